"""GPTQ against textbook optimal-brain-surgeon updates, against rounding to nearest, and inside a model."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
import torch

from reqat.formats import quantize
from reqat.methods.layerwise import WeightProblem, solve_weights
from reqat.methods.ptq import quantize as quantize_model
from reqat.methods.ptq.gptq import gptq, gptq_codes
from reqat.models import load_model, prepare, quant_linears, save_model
from reqat.quant import Precision

FORMATS = ["NVFP4", "NVFP4-4/6", "MXFP4", "AMXFP4", "INT4-g128", "INT4-row"]


def problem(fmt: str, *, N: int = 24, K: int = 128, seed: int = 0, identity: bool = False) -> WeightProblem:
    """A weight with a few large columns, and inputs with strongly correlated features."""
    g = torch.Generator().manual_seed(seed)
    weight = torch.randn(N, K, generator=g) * torch.rand(K, generator=g).mul(3).exp() / 20
    if identity:
        hessian = torch.eye(K, dtype=torch.float64)
    else:
        mix = torch.randn(K // 4, K, generator=g, dtype=torch.float64)
        x = torch.randn(400, K // 4, generator=g, dtype=torch.float64) @ mix
        x += 0.5 * torch.randn(400, K, generator=g, dtype=torch.float64) * torch.rand(K, generator=g).mul(2).exp()
        hessian = x.T @ x / len(x)
    return WeightProblem("test", weight, hessian, quantize(weight, fmt))


def oracle_round(y: torch.Tensor, fmt) -> torch.Tensor:
    """Element values by ml_dtypes and numpy, not by ours."""
    values = y.numpy()
    if fmt.element == "INT4":
        return torch.from_numpy(np.clip(np.rint(values), -7, 7).astype(np.float32))
    if fmt.rounding == "even":
        return torch.from_numpy(values.astype(ml_dtypes.float4_e2m1fn).astype(np.float32))
    magnitudes = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=np.float32)
    index = np.searchsorted((magnitudes[1:] + magnitudes[:-1]) / 2, np.abs(values), side="right")  # half away from zero
    return torch.from_numpy(np.copysign(magnitudes[index], values))


def textbook(p: WeightProblem, *, act_order: bool, damp: float) -> torch.Tensor:
    """Round the columns one by one; after each, update all others by the inverse of H restricted to what is left."""
    fmt, N, K = p.nearest.format, *p.weight.shape
    S = p.nearest.block_scales()
    H = p.hessian + damp * p.hessian.diagonal().mean() * torch.eye(K, dtype=torch.float64)
    W, out = p.weight.double(), torch.empty(N, K)
    left = list(range(K))
    while left:
        column = max(left, key=lambda c: p.hessian[c, c]) if act_order else left[0]
        inverse = torch.linalg.inv(H[left][:, left])
        at = left.index(column)
        w = W[:, column].float()
        s = S[:, column // (fmt.block or K)]
        if fmt.asymmetric:
            s = torch.where(w < 0, s[:, 1], s[:, 0])
        out[:, column] = oracle_round(w / s, fmt) * s
        error = (W[:, column] - out[:, column]) / inverse[at, at]
        W[:, left] -= error[:, None] * inverse[at]
        left.remove(column)
    return out


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("fmt", FORMATS)
def test_matches_textbook_column_by_column(monkeypatch, fmt, act_order):
    monkeypatch.setattr("reqat.methods.ptq.gptq._BATCH", 24)  # several batches, the last one shorter
    p = problem(fmt, N=5, K=128 if fmt == "INT4-g128" else 64)
    ours = gptq_codes(p, act_order=act_order, damp=0.05)
    assert torch.equal(ours.dequantize(), textbook(p, act_order=act_order, damp=0.05))


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("fmt", FORMATS)
def test_error_is_below_rounding_to_nearest_with_the_same_scales(fmt, act_order):
    p = problem(fmt, K=256, seed=1)
    solved = gptq_codes(p, act_order=act_order)
    assert p.error(solved) < 0.7 * p.error(p.nearest)
    assert torch.equal(solved.scales.view(torch.uint8), p.nearest.scales.view(torch.uint8))
    assert solved.global_scale is p.nearest.global_scale and solved.format == p.nearest.format
    assert solved.codes.dtype == torch.uint8 and int(solved.codes.max()) <= 15
    if fmt.startswith("INT4"):
        assert not (solved.codes == 8).any()  # -8 is no code of the symmetric format
    assert torch.equal(solved.pack().unpack().dequantize(), solved.dequantize())


@pytest.mark.parametrize("fmt", FORMATS)
def test_uncorrelated_inputs_give_rounding_to_nearest(fmt):
    p = problem(fmt, K=256, identity=True)
    for act_order in (False, True):
        assert torch.equal(gptq_codes(p, act_order=act_order).codes, p.nearest.codes)


def test_inputs_that_never_move_keep_their_nearest_codes():
    p = problem("NVFP4")
    dead = [0, 17, 127]
    p.hessian[dead], p.hessian[:, dead] = 0, 0
    assert torch.equal(gptq_codes(p).codes[:, dead], p.nearest.codes[:, dead])
    p.hessian.zero_()
    assert torch.equal(gptq_codes(p).codes, p.nearest.codes)


def test_damping_must_be_positive():
    with pytest.raises(ValueError, match="damp.*got 0"):
        gptq_codes(problem("NVFP4"), damp=0)


@pytest.mark.parametrize("precision", ["NVFP4-W4A4KV4", "NVFP4-W4A16", "MXFP4-W4A4:rotation=32", "INT4-row-W4A16"])
def test_every_layer_of_a_model_improves(tiny, ids, precision):
    model = tiny("qwen2")
    prepare(model, precision)
    metrics = gptq(model, ids, progress=False)
    assert [s["layer"] for s in metrics["layers"]] == list(quant_linears(model))
    for solved in metrics["layers"]:
        assert solved["error"] <= solved["error_nearest"], solved
    assert metrics["error"] < 0.8 * metrics["error_nearest"]
    assert all(layer.frozen for layer in quant_linears(model).values())
    assert not any(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("precision", ["NVFP4-W4A4KV4", "MXFP4-W4A4:rotation=32", "NVFP4-W4A16"])
def test_hessians_come_from_quantized_inputs_behind_quantized_layers(tiny, ids, precision):
    """What each solver saw is what each matrix product of the finished model gets as its input."""
    model, seen = tiny("llama"), {}
    prepare(model, precision)

    def solver(p: WeightProblem):
        seen[p.name] = p.hessian
        return gptq_codes(p)

    solve_weights(model, ids, solver, label="test", progress=False)
    inputs = {}
    for name, layer in quant_linears(model).items():
        layer.input_quantizer.register_forward_hook(lambda _m, _a, out, name=name: inputs.setdefault(name, out))
    with torch.no_grad():
        model(ids)
    assert len({h.data_ptr() for h in seen.values()}) == 8  # one for q, k, v; o; gate, up; down; in two layers
    quantized = Precision.parse(precision).inputs is not None
    for name, layer in quant_linears(model).items():
        x = inputs[name if name in inputs else _leader(name)].double().flatten(0, 1)
        torch.testing.assert_close(seen[name], x.T @ x / len(x), rtol=2e-5, atol=1e-7)
        if quantized:  # and it is a tensor of few values
            assert len(x[0, :16].abs().unique()) <= 8
        assert layer.quantized is not None


def _leader(name: str) -> str:
    """The layer of the same input whose hook saw it first."""
    return name.replace("up_proj", "gate_proj").replace("k_proj", "q_proj").replace("v_proj", "q_proj")


def test_solved_codes_survive_the_checkpoint(tiny, ids, tmp_path):
    model = tiny("llama")
    quantize_model("gptq", model, "MXFP4-W4A4:rotation=32", ids, act_order=True, damp=0.02, progress=False)
    save_model(model, None, tmp_path / "m")
    again = load_model(tmp_path / "m")
    prepare(again, "MXFP4-W4A4:rotation=32")
    with torch.no_grad():
        assert torch.equal(model(ids).logits, again(ids).logits)


def test_rtn_is_freezing(tiny, ids):
    model, fake = tiny("llama"), tiny("llama")
    prepare(fake, "NVFP4-W4A4")
    _, metrics = quantize_model("rtn", model, "NVFP4-W4A4", progress=False)
    assert metrics == {"method": "rtn", "layers": 14}
    with torch.no_grad():
        assert torch.equal(model(ids).logits, fake(ids).logits)


def test_static_scales_are_calibrated_on_the_way(tiny, ids):
    model = tiny("llama")
    quantize_model("gptq", model, "NVFP4-W4A4KV4", ids, precision_options={"global_scale": "static"}, progress=False)
    assert all(layer.input_quantizer.global_scale is not None for layer in quant_linears(model).values())


def test_bad_input_is_refused(tiny, ids):
    model = tiny("llama")
    with pytest.raises(ValueError, match="not prepared"):
        gptq(model, ids)
    with pytest.raises(ValueError, match="gptqq.*gptq"):
        quantize_model("gptqq", model, "NVFP4-W4A4", ids)
    with pytest.raises(ValueError, match="dampp.*damp"):
        quantize_model("gptq", model, "NVFP4-W4A4", ids, dampp=1)
    with pytest.raises(ValueError, match="calibration input_ids"):
        quantize_model("gptq", model, "NVFP4-W4A4")
    with pytest.raises(ValueError, match="NVFP4-KV4.*keeps its weights"):
        quantize_model("gptq", model, "NVFP4-KV4", ids)
    model = tiny("llama")
    quantize_model("rtn", model, "NVFP4-W4A4")
    with pytest.raises(ValueError, match="q_proj is frozen"):
        gptq(model, ids)
