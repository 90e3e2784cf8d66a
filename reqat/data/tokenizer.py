"""A small word-level tokenizer in the standard format, one token a digit.

A token carries its leading space (`` 4`` opens a number, ``4`` continues one), so text survives encoding and decoding
unchanged and no token is spent on a space. The vocabulary is the closed set of pieces in a sample of traces, plus
every digit and letter in both forms. Published models keep their own tokenizer; what a model reads of a prompt under
either is said once, in :func:`encode_prompt`.
"""

from __future__ import annotations

import json
import re
import string
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

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

    Encoding puts ``<bos>`` first, as every model of ours was trained, unless ``add_special_tokens=False``; callers
    place ``<eos>``. Raises ``ReqatError`` for an empty corpus.
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
    core.post_processor = _bos_first(vocab[BOS])
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        unk_token=UNK,
        clean_up_tokenization_spaces=False,
    )


def _bos_first(bos_id: int) -> Any:
    from tokenizers.processors import TemplateProcessing

    return TemplateProcessing(single=f"{BOS}:0 $A:0", pair=f"{BOS}:0 $A:0 $B:1", special_tokens=[(BOS, bos_id)])


def is_built(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether :func:`build_tokenizer` made the tokenizer, of this version or one whose encoding added no ``<bos>``."""
    core: Any = getattr(tokenizer, "backend_tokenizer", None)
    if type(getattr(core, "model", None)).__name__ != "WordLevel" or tokenizer.chat_template:
        return False
    if [core.token_to_id(token) for token in (PAD, BOS, EOS, UNK)] != [0, 1, 2, 3] or core.pre_tokenizer is None:
        return False
    return bool(json.loads(core.pre_tokenizer.__getstate__()).get("pattern") == {"Regex": _PIECE})


def with_bos(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """The tokenizer itself; one of ours that was saved before encoding put ``<bos>`` first does so from now on.

    To be called before it is saved beside a model: other programs feed what ``tokenizer(text)`` gives.
    """
    if is_built(tokenizer):
        core: Any = tokenizer
        core.backend_tokenizer.post_processor = _bos_first(int(core.bos_token_id))
    return tokenizer


@explained
def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[int]:
    """Token ids of a prompt as a model reads them, whole, for training and for generation alike.

    A tokenizer with a chat template (a published instruction model's) puts the prompt as a user's message and opens
    the answer: the ids are those of ``apply_chat_template``, and begin with ``<bos>`` only if the template writes one.
    Without a template they are those of ``tokenizer(prompt)``, whose post-processor decides on ``<bos>``; a tokenizer
    of ours always puts it first.
    """
    if tokenizer.chat_template:
        return _templated(tokenizer, [{"role": "user", "content": prompt.strip()}])
    if is_built(tokenizer):
        return [int(tokenizer.bos_token_id), *tokenizer(prompt, add_special_tokens=False)["input_ids"]]  # type: ignore[arg-type]
    return list(tokenizer(prompt)["input_ids"])


def encode_messages(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Mapping[str, str]]) -> list[int]:
    """Token ids of a conversation up to the answer that is to come, by the tokenizer's chat template.

    Raises `ReqatError` for a tokenizer without one, and for what the template refuses.
    """
    if not tokenizer.chat_template:
        raise ReqatError(
            "the tokenizer has no chat template, so it reads no messages; take the instruction-tuned model's "
            "tokenizer, or give prompt and response"
        )
    by_text: Any = explained(lambda tokenizer, text: _templated(tokenizer, messages))
    return list(by_text(tokenizer, "\n".join(message["content"] for message in messages)))


def _templated(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Mapping[str, str]]) -> list[int]:
    given = [dict(message) for message in messages]
    return list(tokenizer.apply_chat_template(given, add_generation_prompt=True, return_dict=False))


def without_bos(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> tuple[bool, list[int]]:
    """Whether ``ids`` begin with ``<bos>``, and the ids after it: how a trace store holds a prompt."""
    has_bos = bool(ids) and ids[0] == tokenizer.bos_token_id
    return has_bos, ids[1:] if has_bos else ids


def unknown_id(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The id that stands for text without a token, and for nothing else; None where there is none.

    Many published tokenizers give it to the token that ends, pads or opens a sequence, which is a known one.
    """
    unknown = tokenizer.unk_token_id
    named = [getattr(tokenizer, f"{role}_token_id", None) for role in ("bos", "eos", "pad", "sep", "cls", "mask")]
    more = getattr(tokenizer, "extra_special_tokens", None) or ()
    known = unknown is None or unknown in named or str(tokenizer.unk_token) in map(str, more)
    return None if known else int(unknown)  # type: ignore[arg-type]
