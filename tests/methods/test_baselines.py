"""QuaRot, FlatQuant, MR-GPTQ, GPTAQ and AWQ's clipping against plain loops, and through a checkpoint."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from reqat.config.errors import ReqatError
from reqat.formats import get_format, quantize, quantize_dequantize
from reqat.inference import PackedCache, pack
from reqat.methods import ptq
from reqat.methods.layerwise import WeightProblem, solve_weights
from reqat.methods.ptq import awq, flatquant
from reqat.methods.ptq._grid import searched
from reqat.methods.ptq.gptq import gptq_codes
from reqat.methods.transforms import TRANSFORMS
from reqat.models import freeze, load_model, prepare, quant_linears, save_model
from reqat.quant import Precision, clipped

Tiny = Callable[..., PreTrainedModel]
INT4 = "INT4-row-W4+AINT4-row-A4KV4"
FAST: dict[str, dict[str, Any]] = {"flatquant": {"epochs": 2, "batch": 2}, "mr_gptq": {"grid": 8}}


def inputs(tokens: int = 300, K: int = 64, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Correlated inputs [K, tokens] of the quantized path, and of the full-precision path."""
    g = torch.Generator().manual_seed(seed)
    mix = torch.randn(K, K // 4, generator=g, dtype=torch.float64)
    full = mix @ torch.randn(K // 4, tokens, generator=g, dtype=torch.float64)
    full += 0.3 * torch.randn(K, tokens, generator=g, dtype=torch.float64)
    # Quantized layers before shrink it and blend neighbours: an error that the weight can make up for.
    return 0.9 * full + 0.1 * full.roll(1, 0) + 0.05 * torch.randn(K, tokens, generator=g, dtype=torch.float64), full


def problem(fmt: str, *, N: int = 6, K: int = 64) -> tuple[WeightProblem, Tensor, Tensor]:
    x, full = inputs(K=K)
    weight = torch.randn(N, K, generator=torch.Generator().manual_seed(1))
    n = x.shape[1]
    drift = (full - x) @ x.T / n
    return WeightProblem("test", weight, x @ x.T / n, quantize(weight, fmt), drift, n), x, full


def naive_gptaq(p: WeightProblem, alpha: float, damp: float) -> Tensor:
    """The formula of GPTAQ, all columns updated after each, with the inverse and its factor taken by the library."""
    K = p.weight.shape[1]
    H = p.hessian + damp * p.hessian.diagonal().mean() * torch.eye(K, dtype=torch.float64)
    U = torch.linalg.cholesky(torch.linalg.inv(H), upper=True)
    assert p.drift is not None
    P = alpha * torch.triu(p.drift @ U.T, 1) @ U
    W, out = p.weight.double().clone(), torch.empty_like(p.weight)
    for i in range(K):
        w = W[:, i].clone()
        s = p.nearest.block_scales()[:, i // (p.nearest.format.block or K)]
        out[:, i] = torch.round(w.float() / s).clamp(-7, 7) * s
        error = (w - out[:, i]) / U[i, i]
        for j in range(i, K):
            W[:, j] -= error * U[i, j] - w * P[i, j]
    return out


@pytest.mark.parametrize("fmt", ["INT4-row", "INT4-g32"])
def test_gptaq_is_its_formula_column_by_column(monkeypatch: pytest.MonkeyPatch, fmt: str) -> None:
    monkeypatch.setattr("reqat.methods.ptq.gptq._BATCH", 24)
    p, _, _ = problem(fmt)
    ours = gptq_codes(p, act_order=False, damp=0.05, drift=0.25)
    assert torch.equal(ours.dequantize(), naive_gptaq(p, 0.25, 0.05))


@pytest.mark.parametrize("act_order", [False, True])
def test_gptaq_comes_nearer_to_the_full_precision_output(act_order: bool) -> None:
    p, x, full = problem("NVFP4", N=24)
    target = p.weight.double() @ full
    errors = [
        float((gptq_codes(p, act_order=act_order, drift=alpha).dequantize().double() @ x - target).square().sum())
        for alpha in (0.0, 0.25, 1.0)
    ]
    assert errors[2] < errors[1] < errors[0]


def test_gptaq_with_equal_inputs_is_gptq(tiny: Tiny, ids: Tensor) -> None:
    """The first layer's q, k and v read what the full-precision model reads, where inputs are not quantized."""
    models = {method: tiny("llama") for method in ("gptq", "gptaq")}
    for method, model in models.items():
        ptq.quantize(method, model, "NVFP4-W4A16", ids, progress=False)
    layers = {method: quant_linears(model) for method, model in models.items()}
    same = {name: torch.equal(layer.weight, layers["gptaq"][name].weight) for name, layer in layers["gptq"].items()}
    assert all(same[f"model.layers.0.self_attn.{name}_proj"] for name in "qkv")
    assert not same["model.layers.1.mlp.down_proj"]


def test_drift_is_that_of_two_models(tiny: Tiny, ids: Tensor) -> None:
    """Between the inputs of one layer in the full-precision model and in the one whose layers before are quantized."""
    model, plain = tiny("qwen2"), tiny("qwen2")
    seen: dict[str, Tensor] = {}
    for m, key in ((plain, "full"), (model, "quantized")):
        if m is model:
            prepare(model, "NVFP4-W4A16")
        down: Any = m.get_submodule("model.layers.1.mlp.down_proj")
        down.register_forward_pre_hook(lambda _m, args, key=key: seen.__setitem__(key, args[0].flatten(0, 1).double()))
    drifts: dict[str, Tensor | None] = {}

    def solver(p: WeightProblem) -> Any:
        drifts[p.name] = p.drift
        return p.nearest

    solve_weights(model, ids, solver, label="test", drift=True, progress=False)
    with torch.no_grad():
        plain(ids), model(ids)
    expected = (seen["full"] - seen["quantized"]).T @ seen["quantized"] / len(seen["full"])
    found = drifts["model.layers.1.mlp.down_proj"]
    assert found is not None
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))


@pytest.mark.parametrize("fmt", ["NVFP4", "NVFP4-4/6", "INT4-row", "INT4-g32", "AINT4-g32", "MXFP4", "MXFP4-4/3"])
@pytest.mark.parametrize("norm", [2.0, 2.4])
def test_searched_scales_are_never_worse_than_those_of_the_largest_magnitude(fmt: str, norm: float) -> None:
    weight = torch.randn(9, 128, generator=torch.Generator().manual_seed(3)) ** 3
    q = searched(weight, get_format(fmt), [1 - 0.8 * i / 20 for i in range(20)], norm=norm)
    block = q.format.block or 128

    def error(rounded: Tensor) -> Tensor:
        return (rounded - weight).abs().pow(norm).unflatten(-1, (-1, block)).sum(-1)

    ours, nearest = error(q.dequantize()), error(quantize_dequantize(weight, fmt))
    assert (ours <= nearest * (1 + 1e-6)).all()
    assert bool((ours < nearest).any()) == (q.format.scale != "E8M0")


def test_searched_scales_are_the_best_of_the_shares_of_each_row() -> None:
    weight = torch.randn(5, 48, generator=torch.Generator().manual_seed(4)) ** 3
    shares = [1 - i / 20 for i in range(16)]
    q = searched(weight, get_format("INT4-row"), shares, norm=2.0)
    for row, s in zip(weight, q.block_scales(), strict=True):
        scales = [row.abs().max() * share / 7 for share in shares]
        errors = [(torch.round(row / t).clamp(-7, 7) * t - row).square().sum() for t in scales]
        assert float(s) == pytest.approx(float(scales[int(torch.stack(errors).argmin())]), rel=1e-6)


@pytest.mark.parametrize("fmt", ["INT4-row", "AINT4-row", "INT4-g32", "NVFP4"])
def test_clipping_is_a_loop_over_blocks(fmt: str) -> None:
    x = torch.randn(4, 64, generator=torch.Generator().manual_seed(5)) + 0.3
    clip = torch.rand(4, 2, generator=torch.Generator().manual_seed(6)) * 0.9 + 0.1
    out, block = clipped(x, clip, get_format(fmt)), get_format(fmt).block or 64
    for row in range(4):
        for start in range(0, 64, block):
            part = x[row, start : start + block]
            low, high = clip[row, 0] * min(part.min(), 0.0), clip[row, 1] * max(part.max(), 0.0)
            if not fmt.startswith("AINT4"):
                low, high = min(low, -high), max(high, -low)
            assert torch.equal(out[row, start : start + block], part.clamp(low, high))


@pytest.mark.parametrize("fmt", ["INT4-g32", "AINT4-g32"])
def test_awqs_clip_is_the_best_of_ten_bounds_of_each_block(fmt: str) -> None:
    p, x, _ = problem(fmt, N=4)
    ours = awq._clipped(p).dequantize()
    for row in range(4):
        for start in range(0, 64, 32):
            w, part = p.weight[row, start : start + 32], x[start : start + 32]
            candidates = [w.clamp(-m, m) for m in (w.abs().max() * (1 - i / 20) for i in range(10))]
            rounded = [quantize_dequantize(c[None], fmt)[0] for c in candidates]
            errors = [float((((r - w).double() @ part) ** 2).sum()) for r in rounded]
            error = float((((ours[row, start : start + 32] - w).double() @ part) ** 2).sum())
            assert error == pytest.approx(min(errors), rel=1e-6)
    kept = WeightProblem("model.layers.0.self_attn.q_proj", p.weight, p.hessian, p.nearest)
    assert awq._clipped(kept) is p.nearest


@pytest.mark.parametrize("precision", ["AINT4-g32-W4A16", "INT4-g32-W4A16"])
def test_awq_clips_integers_and_lowers_their_error(tiny: Tiny, ids: Tensor, precision: str) -> None:
    _, metrics = ptq.quantize("awq", tiny("llama"), precision, ids, grid=2, progress=False)
    assert metrics["method"] == "awq" and metrics["clip"] and metrics["error"] < metrics["error_nearest"]
    _, metrics = ptq.quantize("awq", tiny("llama"), "MXFP4-W4A16", ids, grid=2, progress=False)
    assert metrics["clip"] is False and metrics["layers"] == 14
    for other, clip in ((precision, False), ("NVFP4-W4A16", True)):
        _, metrics = ptq.quantize("awq", tiny("llama"), other, ids, grid=2, clip=clip, progress=False)
        assert metrics["clip"] is clip


@pytest.mark.parametrize("method", ["quarot", "flatquant", "mr_gptq", "gptaq"])
@pytest.mark.parametrize("precision", [INT4, "NVFP4-W4A4KV4"])
def test_what_is_online_survives_the_checkpoint(
    tiny: Tiny, ids: Tensor, tmp_path: Path, method: str, precision: str
) -> None:
    model = tiny("qwen3", num_key_value_heads=2)
    plain = model(ids).logits.detach()
    report, _ = ptq.quantize(method, model, precision, ids, progress=False, **FAST.get(method, {}))
    expected = model(ids).logits
    assert not torch.allclose(expected, plain, rtol=1e-2)
    save_model(model, None, tmp_path / "m")
    again = load_model(tmp_path / "m")
    prepare(again, str(report.precision))
    assert torch.equal(again(ids).logits, expected)
    save_model(again, None, tmp_path / "twice")
    assert (tmp_path / "twice" / "reqat.safetensors").read_bytes() == (
        tmp_path / "m" / "reqat.safetensors"
    ).read_bytes()
    fresh = tiny("qwen3", num_key_value_heads=2, tie_word_embeddings=False)
    prepare(fresh, report.precision)
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh(ids).logits, expected)
    # Without reqat it is a model of the same function, but for what the rounding of weights has changed.
    with torch.no_grad():
        other = AutoModelForCausalLM.from_pretrained(tmp_path / "m")(ids).logits
    assert float((other - plain).norm() / plain.norm()) < 0.7


@pytest.mark.parametrize("method", ["quarot", "flatquant"])
def test_packing_refuses_what_no_kernel_computes(tiny: Tiny, ids: Tensor, method: str) -> None:
    model = tiny("llama")
    ptq.quantize(method, model, "NVFP4-W4A4KV4", ids, progress=False, **FAST.get(method, {}))
    with pytest.raises(ReqatError, match="proj.*packed models do not compute"):
        pack(model)
    with pytest.raises(ReqatError, match="cannot be packed.*basis"):
        PackedCache(model)
    assert torch.isfinite(model(ids).logits).all()


def test_a_model_in_a_basis_trains(tiny: Tiny, ids: Tensor) -> None:
    """Gradients reach the plain weight through its basis; frozen, the model computes what it did before."""
    model = tiny("llama")
    TRANSFORMS["quarot"].apply(model, Precision.parse("NVFP4-W4A4"), ids, progress=False)
    prepare(model, "NVFP4-W4A4")
    loss = model(ids, labels=ids).loss
    loss.backward()
    down: Any = model.get_submodule("model.layers.0.mlp.down_proj")
    assert down.weight.grad is not None and float(down.weight.grad.abs().sum()) > 0
    before = model(ids).logits.detach()
    freeze(model)
    assert torch.equal(model(ids).logits, before)


def test_sizes_of_kronecker_products() -> None:
    assert [flatquant.kronecker_sizes(n) for n in (128, 384, 64, 96, 4096, 7)] == [
        (8, 16), (16, 24), (8, 8), (8, 12), (64, 64), (1, 7),
    ]  # fmt: skip


def test_training_transforms_lowers_the_error(tiny: Tiny, ids: Tensor) -> None:
    """Below that of random orthogonal bases, with which it begins, and end to end below rounding to nearest."""
    models = {name: tiny("llama", num_hidden_layers=1) for name in ("plain", "rtn", "flatquant")}
    ptq.quantize("rtn", models["rtn"], INT4, progress=False)
    _, metrics = ptq.quantize("flatquant", models["flatquant"], INT4, ids, epochs=20, batch=2, progress=False)
    assert metrics["layer_error_last"] < 0.9 * metrics["layer_error_first"]
    with torch.no_grad():
        logits = {name: model(ids).logits for name, model in models.items()}
    errors = {name: float((y - logits["plain"]).norm()) for name, y in logits.items()}
    assert errors["flatquant"] < errors["rtn"]


def test_the_learned_rounding_is_that_of_the_quantizer() -> None:
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(8), requires_grad=True)
    for fmt in ("NVFP4", "INT4-row", "AINT4-row", "MXFP4"):
        clip = torch.tensor([0.9, 0.8], requires_grad=True)
        out = flatquant.soft_quantize(x, get_format(fmt), clip)
        expected = quantize_dequantize(clipped(x.detach(), clip.detach(), get_format(fmt)), fmt)
        torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-6)
        out.square().sum().backward()
        assert clip.grad is not None and float(clip.grad.abs().sum()) > 0


def test_what_a_user_can_mend_is_said(tiny: Tiny, ids: Tensor) -> None:
    for method, precision, options, says in (
        ("flatquant", "NVFP4-KV4", {}, "NVFP4-KV4"),
        ("flatquant", INT4, {"batch": 7}, "7 sequences, and 6"),
        ("flatquant", INT4, {"epochs": 0}, "flatquant: epochs.*0"),
        ("gptaq", "NVFP4-W4A4", {"alpha": 1.5}, "1.5"),
        ("mr_gptq", "NVFP4-W4A4", {"grid": 0}, "mr_gptq: grid.*0"),
        ("quarot", INT4, {"input_clip": 1.5}, "quarot: input_clip.*1.5"),
        ("quarot", "NVFP4-W4A4", {"clips": 1}, "clips"),
    ):
        with pytest.raises(ReqatError, match=says):
            ptq.quantize(method, tiny("llama"), precision, ids, progress=False, **options)
    model = tiny("llama", intermediate_size=92)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ReqatError, match="92"):
        ptq.quantize("quarot", model, INT4, ids, progress=False)
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in before.items())


def test_fewer_tokens_than_inputs_are_a_warning(tiny: Tiny, ids: Tensor) -> None:
    for rows, warned in ((2, True), (6, False)):  # 48 and 144 tokens for layers of up to 128 inputs
        _, metrics = ptq.quantize("gptq", tiny("llama"), "NVFP4-W4A16", ids[:rows], progress=False)
        assert ("warning" in metrics) == warned
    assert all("tokens" not in layer for layer in metrics["layers"])


@pytest.mark.parametrize("damage", ["singular", "clip", "size"])
def test_a_damaged_basis_or_clip_is_refused(tiny: Tiny, ids: Tensor, tmp_path: Path, damage: str) -> None:
    from safetensors.torch import load_file, save_file

    model = tiny("llama")
    ptq.quantize("quarot", model, INT4, ids, progress=False)
    save_model(model, None, tmp_path / "m")
    file, about = tmp_path / "m" / "reqat.safetensors", tmp_path / "m" / "reqat.json"
    tensors = load_file(file)
    down = "model.layers.0.mlp.down_proj"
    if damage == "singular":
        tensors[f"{down}.input_left"].zero_()
    elif damage == "size":
        tensors[f"{down}.input_left"] = torch.eye(7)
    else:
        tensors[f"{down}.input_clip"].fill_(2.0)
    save_file(tensors, file, metadata={"format": "pt"})
    said = json.loads(about.read_text())
    for key in ("digest", "tensors_sha256"):  # of an earlier version, which had none
        said.pop(key)
    about.write_text(json.dumps(said))
    with pytest.raises(ReqatError, match=down):
        load_model(tmp_path / "m")
