"""Tokenization with every fault of text, chat template or tokenizer reported as one `ReqatError`."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from reqat.config.errors import ReqatError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Encode = Callable[["PreTrainedTokenizerBase", str], list[int]]


def explained(encode: Encode) -> Encode:
    """``encode(tokenizer, text)`` that raises `ReqatError` for text that no tokenizer reads (half a character), for a
    chat template that is damaged, stopped by its sandbox or refuses the text, and for a tokenizer that fails."""

    @functools.wraps(encode)
    def explaining(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
        check_text(text)
        try:
            return encode(tokenizer, text)
        except ReqatError:
            raise
        except Exception as error:  # of jinja2, of whatever the template computes, of tokenizers (which has bare ones)
            template: Any = getattr(tokenizer, "chat_template", None)
            where = "chat template" if template else "tokenizer"
            name = getattr(tokenizer, "name_or_path", "") or "of the model"
            said = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            raise ReqatError(
                f"the {where} {name} cannot encode {text[:40]!r} ({said}); correct or replace it."
            ) from error

    return explaining


def check_text(text: str) -> None:
    """Raise `ReqatError` if ``text`` is no text, or holds half a character (a lone surrogate)."""
    if not isinstance(text, str):
        raise ReqatError(f"a text is needed to encode, not {type(text).__name__} ({str(text)[:40]}).")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ReqatError(
            f"the text {text[:40]!r} has half a character ({text[error.start]!r} at {error.start}, a lone surrogate), "
            "which no tokenizer can read; write the whole character."
        ) from None
