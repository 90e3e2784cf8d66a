"""Running text as blocks of its own byte pairs."""

from __future__ import annotations

import pytest

from reqat.config.errors import ReqatError
from reqat.data.packing import IGNORE
from reqat.data.text import block_rows, blocks, text_tokenizer

TEXT = "\n".join(f"the {i} quick brown foxes jump over the lazy dog, né?" for i in range(50))


def test_a_tokenizer_of_the_text_reads_any_text_back() -> None:
    tokenizer = text_tokenizer(TEXT, 300)
    assert len(tokenizer) == 300 and tokenizer.pad_token_id == 0
    for text in (TEXT, "Ünseen ßtring 漢"):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert len(tokenizer(TEXT)["input_ids"]) < 0.5 * len(TEXT.encode())
    assert text_tokenizer(TEXT, 300).get_vocab() == tokenizer.get_vocab()
    with pytest.raises(ReqatError, match="lower the vocabulary"):
        text_tokenizer("a b", 300)


def test_blocks_follow_each_other_and_a_row_is_one() -> None:
    assert blocks(range(11), 3) == [[0, 1, 2], [3, 4, 5], [6, 7, 8]] and blocks(range(11), 3, 2) == [
        [0, 1, 2],
        [3, 4, 5],
    ]
    for wrong in (4, None):
        with pytest.raises(ReqatError, match="blocks of"):
            blocks(range(11), 3 if wrong else 12, wrong)
    rows = block_rows([[5, 6, 7, 8], [9, 10, 11, 12]], 0)
    batch = rows.batch([0, 1])
    assert batch.input_ids.tolist() == [[5, 6, 7, 8], [9, 10, 11, 12]]
    assert batch.labels.tolist() == [[6, 7, 8, IGNORE], [10, 11, 12, IGNORE]]
