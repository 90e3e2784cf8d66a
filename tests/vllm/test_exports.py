"""vLLM's own arithmetic on what was exported, against ours."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from reqat.export import export_model
from reqat.models import calibrate_static, prepare, quant_linears
from tests.vllm.conftest import VLLM, Answer

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not VLLM, reason="REQAT_VLLM names no environment: python tools/vllm_cpu.py create DIR"),
]


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_vllm_computes_the_same(
    tiny: Callable[..., PreTrainedModel], ids: Tensor, tmp_path: Path, family: str, answer: Answer
) -> None:
    # Not modelopt: vLLM computes it in 16-bit types alone, where nothing is told apart at 1e-5.
    model = tiny(family, head_dim=32, hidden_size=128, intermediate_size=128)
    prepare(model, "NVFP4-W4A4", global_scale="static")
    calibrate_static(model, [ids])
    export_model(model, None, tmp_path / "out", "compressed-tensors")
    (found,) = answer(tmp_path / "out", [{"rows": ids.tolist(), "params": {"temperature": 0, "max_tokens": 1}}])
    inside = {id(layer.weight) for layer in quant_linears(model).values()}
    with torch.no_grad():
        for parameter in model.parameters():  # what is not quantized is stored in bfloat16
            if id(parameter) not in inside:
                parameter.copy_(parameter.bfloat16().float())
        logits = model(ids).logits.log_softmax(-1)
    expected = logits[:, :-1].gather(-1, ids[:, 1:, None])[..., 0]
    torch.testing.assert_close(torch.tensor([row["prompt"] for row in found]), expected, rtol=0, atol=1e-5)
