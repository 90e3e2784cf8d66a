"""Running text as training data: a byte-pair vocabulary of the text itself, and blocks of one length.

A language model of words is trained on blocks that a text is cut into without overlap, as the Penn Treebank is in the
literature; the first token of a block is given, all others are predicted.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from reqat.config.errors import ReqatError
from reqat.config.files import read_text
from reqat.data.packing import PackedRows, pack
from reqat.data.tokenizer import PAD
from reqat.data.traces import Trace

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


def text_tokenizer(text: str, vocabulary: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of ``vocabulary`` tokens, learned from ``text``; without ``<bos>``.

    Raises ``ReqatError`` where the text gives fewer tokens than that.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[PAD],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    core.train_from_iterator(text.splitlines(), trainer)
    if core.get_vocab_size() != vocabulary:
        raise ReqatError(
            f"the text gives {core.get_vocab_size()} tokens, {vocabulary} are asked for: lower the vocabulary (not "
            "below 257), or take more text"
        )
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token=PAD, clean_up_tokenization_spaces=False)


def running_text(source: str) -> tuple[str, str]:
    """A text and its sha256: of a file, or ``python``, the language reference that comes with Python (``pydoc_data``).

    That is English prose and code of some hundred pages, in every installation, and the same in every one of a version.
    Raises ReqatError for a file that is missing or not UTF-8.
    """
    if source == "python":
        from pydoc_data.topics import topics

        text = "\n\n".join(topics[name] for name in sorted(topics))
    else:
        text = read_text(Path(source), "text", "name another file, or python")
    return text, hashlib.sha256(text.encode()).hexdigest()


def blocks(ids: Sequence[int], length: int, count: int | None = None) -> list[list[int]]:
    """The first ``count`` blocks of ``length`` token ids (None: all that are whole), one after the other.

    Raises ``ReqatError`` for fewer than ``count``, or none at all.
    """
    most = len(ids) // length
    if most < (count or 1):
        raise ReqatError(f"the text has {most} blocks of {length} tokens, {count or 1} are needed: ask for less")
    return [list(ids[i * length : (i + 1) * length]) for i in range(most if count is None else count)]


def block_rows(blocks: Sequence[Sequence[int]], pad_id: int) -> PackedRows:
    """Blocks of one length as rows of the training loop, a block a row."""
    traces = [
        Trace(f"block {i}", f"block {i}", "text", "", "", tuple(block[:1]), tuple(block[1:]), bos=False)
        for i, block in enumerate(blocks)
    ]
    return pack(traces, len(blocks[0]) if blocks else 1, bos_id=None, pad_id=pad_id)
