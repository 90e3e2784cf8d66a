"""Chat templates and texts that cannot be encoded end in one error of ours."""

from __future__ import annotations

import pytest

from reqat.config.errors import ReqatError
from reqat.data.encoding import check_text, explained
from reqat.data.tokenizer import build_tokenizer


@explained
def encode(tokenizer, text: str) -> list[int]:
    message = [{"role": "user", "content": text}]
    return list(tokenizer.apply_chat_template(message, return_dict=False))


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}{{ m",
        "{{ messages | nosuch }}",
        "{{ messages.__class__.__mro__[1].__subclasses__() }}",
        "{{ raise_exception('no system prompt') }}",
        "{{ messages + 5 }}",
        "{{ 1 // 0 }}",
        "{% for i in range(10**9) %}{% endfor %}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    ],
)
def test_a_template_that_cannot_be_used_is_named(template: str):
    tokenizer = build_tokenizer(["So 2"])
    tokenizer.chat_template = template
    with pytest.raises(ReqatError, match="chat template") as error:
        encode(tokenizer, "So 2")
    assert "\n" not in str(error.value)


def test_a_good_template_encodes():
    tokenizer = build_tokenizer(["So 2"])
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    assert encode(tokenizer, "So 2") == tokenizer("So 2", add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("text", ["\ud800", "So \udfff 2", 5, None])
def test_what_is_no_text_is_refused(text):
    with pytest.raises(ReqatError):
        check_text(text)
