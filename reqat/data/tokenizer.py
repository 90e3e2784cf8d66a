"""A small word-level tokenizer in the standard format, one token a digit.

A token carries its leading space (`` 4`` opens a number, ``4`` continues one), so text survives encoding and decoding
unchanged and no token is spent on a space. The vocabulary is the closed set of pieces in a sample of traces, plus
every digit and letter in both forms. Published models keep their own tokenizer; how a prompt becomes tokens under
either is said once, in :func:`prompt_ids`.
"""

from __future__ import annotations

import re
import string
from collections.abc import Iterable
from typing import TYPE_CHECKING

from reqat.config.errors import ReqatError
from reqat.data.encoding import explained

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

PAD, BOS, EOS, UNK = "<pad>", "<bos>", "<eos>", "<unk>"
_PIECE = r" ?[A-Za-z]+| ?[0-9]| ?[^\sA-Za-z0-9]|\n"


def pieces(text: str) -> list[str]:
    """The tokens of ``text`` before any vocabulary."""
    return re.findall(_PIECE, text)


def build_tokenizer(corpus: Iterable[str]) -> PreTrainedTokenizerFast:
    """A transformers tokenizer over the pieces of ``corpus``.

    Raises ``ReqatError`` for an empty corpus. Encoding adds no special tokens: callers place ``<bos>`` and ``<eos>``
    themselves.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    found = {piece for text in corpus for piece in pieces(text)}
    if not found:
        raise ReqatError("the tokenizer's corpus is empty; give it at least one text")
    for char in string.digits + string.ascii_lowercase:
        found |= {char, f" {char}"}
    vocab = {token: i for i, token in enumerate([PAD, BOS, EOS, UNK, *sorted(found)])}
    core = Tokenizer(models.WordLevel(vocab, unk_token=UNK))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(_PIECE), behavior="isolated")
    core.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        unk_token=UNK,
        clean_up_tokenization_spaces=False,
    )


@explained
def prompt_ids(tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[int]:
    """Token ids of a prompt without ``<bos>``, for training and for generation alike.

    A tokenizer with a chat template (a published instruction model's) puts the prompt as a user's message and opens
    the answer; any other takes the text as it is.
    """
    if not tokenizer.chat_template:
        return list(tokenizer(prompt, add_special_tokens=False)["input_ids"])
    message = [{"role": "user", "content": prompt.strip()}]
    ids = list(tokenizer.apply_chat_template(message, add_generation_prompt=True, return_dict=False))
    return ids[1:] if ids[:1] == [tokenizer.bos_token_id] else ids
