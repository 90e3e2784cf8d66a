"""Agreement of a packed model with its twin: counted as it should be, and close to the control on a trained model."""

from __future__ import annotations

from pathlib import Path

import pytest

from reqat.config.errors import ReqatError
from reqat.data import encode_prompt
from reqat.evaluation.agreement import Agreement, _common, agreement
from reqat.models import load_tokenizer
from reqat.tasks import problems

BASE = Path(__file__).resolve().parents[2] / "results" / "base" / "model"


def test_common_beginnings() -> None:
    assert _common([1, 2, 3], [1, 2, 4]) == 2
    assert _common([1, 2], [1, 2, 4]) == 2
    assert _common([], [1]) == 0


def test_the_pinned_base_packed_parts_from_its_twin_as_seldom_as_float64_does() -> None:
    tokenizer = load_tokenizer(BASE)
    prompts = [encode_prompt(tokenizer, problem.prompt) for problem in problems(["chain_sum"], "test", 24, seed=0)]
    found = agreement(str(BASE), tokenizer, prompts, "NVFP4-W4A4KV4", max_new_tokens=60, global_scale="row")
    assert isinstance(found, Agreement) and found.prompts == 24 and found.tokens > 24 * 20
    # Packed and twin both err against float64, so they may part twice as often as twin and control, and by chance more.
    assert found.same >= 24 - 2 * (24 - found.control_same) - 3
    assert found.metrics()["agreement_same"] == found.same


def test_no_prompts() -> None:
    with pytest.raises(ReqatError, match="at least one prompt"):
        agreement(str(BASE), None, [], "NVFP4-W4A4KV4", max_new_tokens=4)
