"""Responses that end at a text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import LogitsProcessorList

from reqat.config.errors import ReqatError
from reqat.config.policy import Decoding
from reqat.data import encode_prompt
from reqat.generation import generate
from reqat.generation.stops import StopTexts
from reqat.models import load_model, load_tokenizer

BASE = Path(__file__).parents[2] / "results" / "base" / "model"


def test_a_row_ends_at_a_text_and_the_others_go_on() -> None:
    model, tokenizer = load_model(BASE), load_tokenizer(BASE)
    prompts = [encode_prompt(tokenizer, prompt) for prompt in ("3 + 4 + 5 =\n", "12 - 7 + 9 - 1 =\n", "8 + 8 =\n")]
    asked: dict[str, Any] = {
        "seeds": [0] * 3, "row_keys": ["a", "b", "c"], "decoding": Decoding.greedy(), "max_new_tokens": 40, "eos_id": 2,
    }  # fmt: skip

    def say(*texts: str) -> list[str]:
        stops = LogitsProcessorList([StopTexts(texts, tokenizer)]) if texts else None
        found = generate(model, tokenizer, prompts, processors=stops, **asked)
        return [tokenizer.decode(list(one.token_ids)) for one in found]

    whole = say()
    stop = whole[1][9:13]  # wherever that cuts tokens
    for text, before in zip(say(stop, "no such text"), whole, strict=True):
        if stop in before:
            assert stop in text and before.startswith(text) and len(text) < before.index(stop) + 12
        else:
            assert text == before
    assert stop in whole[1]


@pytest.mark.parametrize("texts", [[], [""], ["a", ""]])
def test_a_text_that_every_response_holds_is_refused(texts: list[str]) -> None:
    with pytest.raises(ReqatError, match="end a response"):
        StopTexts(texts, load_tokenizer(BASE))
