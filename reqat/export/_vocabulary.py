"""A tokenizer as GGUF metadata, for llama.cpp.

llama.cpp splits text before it merges bytes, by a regular expression that a file only names; the name is found by the
tokenizer's own expression. What it cannot express (words as tokens, as in our testbeds' tokenizers; an expression that
it has no name for) is left out, with a note: the model then takes token ids.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import gguf
from transformers import PreTrainedTokenizerBase

_GPT4 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
#: Expression of a tokenizer's splitting step -> llama.cpp's name of it.
SPLITS = {_GPT4 % r"\p{N}{1,3}": "llama-bpe", _GPT4 % r"\p{N}": "qwen2"}


def write_vocabulary(writer: Any, tokenizer: PreTrainedTokenizerBase | None, config: Any) -> list[str]:
    """Add the metadata of ``tokenizer`` to a ``gguf.GGUFWriter``; returns a note where llama.cpp gets no tokenizer."""
    reason = "the model came without one"
    if tokenizer is not None:
        with tempfile.TemporaryDirectory(prefix="reqat-tokenizer-") as temporary:
            folder = Path(temporary)
            tokenizer.save_pretrained(folder)
            config.save_pretrained(folder)  # where ids of special tokens stand
            described = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
            split, reason = _split_name(described)
            if split is not None:
                _write(writer, folder, tokenizer, split, config.vocab_size)
                return []
    writer.add_tokenizer_model(gguf.vocab.NoVocab.tokenizer_model)
    writer.add_vocab_size(config.vocab_size)
    return [
        f"tokenizer: {reason}, so the file has none: llama.cpp takes token ids, which the model's own tokenizer makes"
    ]


def _split_name(described: dict[str, Any]) -> tuple[str | None, str]:
    """llama.cpp's name for how a ``tokenizer.json`` splits text; or None, and why there is none."""
    model = described["model"]
    if model["type"] != "BPE" or model.get("byte_fallback"):
        return None, f"llama.cpp reads byte-level BPE tokenizers here, and this one is {model['type']}" + (
            " with byte fallback (SentencePiece)" if model.get("byte_fallback") else ""
        )
    if (normalizer := described.get("normalizer")) is not None and not _changes_nothing(normalizer):
        return None, f"it normalizes text first ({normalizer.get('type')}), which llama.cpp does not"
    before = described.get("pre_tokenizer") or {}
    steps = before.get("pretokenizers", [before])
    kinds = [step.get("type") for step in steps]
    if any(step.get("type") == "ByteLevel" and step.get("add_prefix_space", True) for step in steps):
        return None, "it puts a space before a text (add_prefix_space), which llama.cpp does not here"
    if kinds == ["ByteLevel"] and steps[0].get("use_regex", True):
        return "gpt-2", ""
    if kinds == ["Digits", "ByteLevel"] and steps[0].get("individual_digits"):
        return "smollm", ""
    expression = steps[0].get("pattern", {}).get("Regex", "") if kinds[:1] == ["Split"] else ""
    if kinds == ["Split", "ByteLevel"] and expression in SPLITS:
        return SPLITS[expression], ""
    return (
        None,
        f"llama.cpp has no name that is known here for how it splits text ({', '.join(map(str, kinds))} {expression})",
    )


def _changes_nothing(normalizer: dict[str, Any]) -> bool:
    """A sequence of no steps, or NFC: of those that llama.cpp has names for, Qwen2's has it, and llama.cpp does without
    (text is nearly always composed)."""
    return normalizer.get("type") == "NFC" or normalizer.get("normalizers") == []


def _write(writer: Any, folder: Path, tokenizer: PreTrainedTokenizerBase, split: str, rows: int) -> None:
    ids = {id: token for token, id in tokenizer.get_vocab().items()}
    added = tokenizer.added_tokens_decoder
    tokens, types = [], []
    for id in range(max(rows, max(ids) + 1)):  # an embedding may have rows that no token uses
        tokens.append(ids.get(id, f"[PAD{id}]"))
        if id not in ids:
            types.append(gguf.TokenType.UNUSED)
        elif id in added:
            types.append(gguf.TokenType.CONTROL if added[id].special else gguf.TokenType.USER_DEFINED)
        else:
            types.append(gguf.TokenType.NORMAL)
    writer.add_tokenizer_model(gguf.vocab.BpeVocab.tokenizer_model)
    writer.add_tokenizer_pre(split)
    writer.add_token_list(tokens[:rows])
    writer.add_token_types(types[:rows])
    gguf.SpecialVocab(folder, load_merges=True, n_vocab=rows).add_to_gguf(writer, quiet=True)
