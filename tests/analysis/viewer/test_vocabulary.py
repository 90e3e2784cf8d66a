"""Texts of tokens, from the trace folder or its tokenizer."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from analysis.viewer import build_page
from analysis.viewer.folder import open_folder
from analysis.viewer.vocabulary import Vocabulary
from reqat.config.errors import ReqatError
from tests.analysis.viewer.read_pages import (
    index_of,
    pieces_of,
    rewrite,
    set_token,
)


def test_byte_level_and_sentencepiece_spellings_are_turned_back() -> None:
    byte_level = Vocabulary(dict(enumerate(["Ġthe", "Ċ", "Ã©", "âĤ", "<|end|>", "Ġ"])), "vocabulary", padded=False)
    assert [byte_level.text(id) for id in range(6)] == [" the", "\n", "é", "\\xe2\\x82", "<|end|>", " "]
    pieces = Vocabulary(dict(enumerate(["▁the", "<0x0A>", "a", "<0xE2>"])), "vocabulary", padded=False)
    assert [pieces.text(id) for id in range(4)] == [" the", "\n", "a", "\\xe2"]
    plain = Vocabulary(dict(enumerate([" the", "\n", "<0x0A>"])), "vocabulary", padded=False)
    assert [plain.text(id) for id in range(3)] == [" the", "\n", "<0x0A>"]


def test_a_tokenizers_folder_names_the_tokens(pairs: Path) -> None:
    meta = json.loads((pairs / "meta.json").read_text())
    words = meta.pop("vocabulary")
    (pairs / "tok").mkdir()
    vocabulary = {word: id for id, word in enumerate(words) if id}
    described = {"model": {"vocab": vocabulary}, "added_tokens": [{"id": 0, "content": words[0]}]}
    (pairs / "tok" / "tokenizer.json").write_text(json.dumps(described))
    (pairs / "meta.json").write_text(json.dumps(meta | {"tokenizer": "tok"}))
    assert open_folder(pairs).vocabulary.text(0) == "<eos>"
    # A model has more logits than its tokenizer has tokens: such an id may be probable, but nobody can have said it.
    rewrite(pairs, "tokens.parquet", lambda rows: set_token(rows, "top_BF16", [31, 1, 2, 3, 4]))
    index = index_of(build_page(pairs).text)
    assert pieces_of(index)[31] == "<31>"
    rewrite(pairs, "tokens.parquet", lambda rows: set_token(rows, "token", 31))
    with pytest.raises(ReqatError, match="token id 31 is not in the tokenizer tok of 30 tokens"):
        build_page(pairs)
