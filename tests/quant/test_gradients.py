"""Gradient rules: the default bit for bit as it was, the others against finite differences and explicit formulas."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from reqat.config.errors import ReqatError
from reqat.formats import get_format, quantize
from reqat.models import freeze, has_learned_scales, load_model, prepare, quant_linears, save_model, set_gradient
from reqat.models.pretrained import plain_state
from reqat.quant import RULES, Quantizer, block_hadamard, fake_quantize

FORMATS = ["NVFP4", "MXFP4", "AMXFP4", "INT3-row", "INT8-tensor", "TERNARY-row"]


def ruled(fmt: str, rule: str, *, rotation: int | None = None, rows: int | None = None, **settings: Any) -> Quantizer:
    quantizer = Quantizer(get_format(fmt), rotation=rotation, name="q")
    quantizer.gradient = RULES[rule](**settings)
    quantizer.gradient.prepare(quantizer.format, "weights", rows, "q")
    return quantizer


def gradient(quantizer: Quantizer, x: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
    x = x.clone().requires_grad_()
    y = quantizer(x)
    y.backward(dy)
    return y.detach(), x.grad


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("rotation", [None, 32])
def test_straight_through_is_the_default_and_bitwise_what_fake_quantize_does(fmt: str, rotation: int | None) -> None:
    torch.manual_seed(0)
    x, dy = torch.randn(6, 64), torch.randn(6, 64)
    y, dx = gradient(Quantizer(get_format(fmt), rotation=rotation), x, dy)
    leaf = x.clone().requires_grad_()
    fake_quantize(leaf, fmt, rotation=rotation).backward(dy)
    assert torch.equal(dx, leaf.grad) and torch.equal(y, fake_quantize(x, fmt, rotation=rotation))
    assert torch.equal(dx, dy if rotation is None else block_hadamard(dy, rotation))


@pytest.mark.parametrize("fmt", [*FORMATS, "MXFP4 floor"])
@pytest.mark.parametrize("rotation", [None, 32])
@pytest.mark.parametrize("limit", [None, 0.8])
def test_clipped_gives_no_gradient_outside_the_range(fmt: str, rotation: int | None, limit: float | None) -> None:
    torch.manual_seed(0)
    x, dy = torch.randn(6, 64), torch.randn(6, 64)
    quantizer = ruled(fmt.split()[0], "clipped", rotation=rotation, limit=limit)
    if fmt.endswith("floor"):
        quantizer.format = quantizer.format.replace(scale_rule="floor")
    y, dx = gradient(quantizer, x, dy)
    assert torch.equal(y, fake_quantize(x, quantizer.format, rotation=rotation))
    rotated = x if rotation is None else block_hadamard(x, rotation)
    if limit is None:
        q = quantize(rotated, quantizer.format)
        largest = q.dequantize().abs().new_tensor(q.format.element_type.emax)
        S = q.block_scales()
        if q.format.asymmetric:
            block = S.repeat_interleave(32, 1)
            S = torch.where(rotated < 0, block[..., 1], block[..., 0])
        else:
            S = S.repeat_interleave(64 // S.shape[1], 1)
        inside = rotated.double().abs() <= largest.double() * S.double() * (1 + 1e-6)  # beyond rounding of S itself
    else:
        inside = rotated.abs() <= limit
    expected = torch.where(inside, dy, 0.0)
    assert torch.equal(dx, expected if rotation is None else block_hadamard(expected, rotation))
    if fmt in ("MXFP4 floor", "TERNARY-row") or limit:
        assert not inside.all()
    if fmt == "MXFP4" and limit is None:
        assert inside.all()  # rceil cuts nothing off


@pytest.mark.parametrize("limit", [None, 0.8])
@pytest.mark.parametrize("fmt", ["SAWB2-tensor", "INT8-tensor"])  # rounded by reqat.formats on every device
def test_clipped_rounds_once(fmt: str, limit: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    quantizer = ruled(fmt, "clipped", limit=limit)
    element, calls = type(quantizer.format.element_type), []
    round_ = element.round_
    monkeypatch.setattr(element, "round_", lambda *args, **more: calls.append(1) or round_(*args, **more))
    gradient(quantizer, torch.randn(6, 64), torch.randn(6, 64))
    assert len(calls) == 1


def test_learned_scale_has_the_gradient_of_its_formula_in_float64() -> None:
    """With v held where rounding put it inside the range: w^ = s (v - u) + w there, and Q s outside."""
    torch.manual_seed(0)
    w, dy = torch.randn(5, 64), torch.randn(5, 64)
    for fmt, most in (("INT3-row", 3), ("TERNARY-row", 1), ("INT4-tensor", 7)):
        quantizer = ruled(fmt, "learned", rows=5)
        rule: Any = quantizer.gradient
        with torch.no_grad():
            rule.gamma.mul_(torch.linspace(0.5, 1.2, rule.gamma.numel()).view_as(rule.gamma))
        y, dw = gradient(quantizer, w, dy)
        S = quantize(w, fmt).block_scales().double().expand(5, 1)
        gamma, u = rule.gamma.detach().double(), w.double() / (rule.gamma.detach().double() * S)
        v, inside = u.round().clamp(-most, most), u.abs() <= most
        torch.testing.assert_close(y.double(), v * gamma * S, rtol=1e-6, atol=1e-7)
        assert torch.equal(dw, torch.where(inside, dy, 0.0))

        def loss(gamma: Tensor, held=(S, v, u, inside)) -> Tensor:
            S, v, u, inside = held
            straight = (v - u) * S * gamma + w.double()  # rounding's offset in codes is held, as the estimator does
            return (torch.where(inside, straight, v * S * gamma) * dy.double()).sum(-1, keepdim=True)

        step = 1e-6  # central differences are exact up to rounding: the function is linear in gamma
        difference = (loss(gamma + step) - loss(gamma - step)) / (2 * step)
        difference = difference.sum() if gamma.ndim == 0 else difference
        torch.testing.assert_close(rule.gamma.grad.double(), difference, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("fmt", ["TERNARY-row", "TERNARY-tensor"])
def test_a_learned_factor_of_the_mean_is_tslds_option(fmt: str) -> None:
    """Clip at a = gamma mean|w|, round w / a straight through, times a: by autograd in float64."""
    torch.manual_seed(0)
    w, dy = torch.randn(5, 64), torch.randn(5, 64)
    quantizer = ruled(fmt, "learned", rows=5, base="mean")
    rule: Any = quantizer.gradient
    with torch.no_grad():
        rule.gamma.mul_(torch.linspace(0.7, 1.3, rule.gamma.numel()).view_as(rule.gamma))
    y, dw = gradient(quantizer, w, dy)
    x, gamma = w.double().requires_grad_(), rule.gamma.detach().double().requires_grad_()
    a = gamma * (x.abs().mean(1, keepdim=True) if fmt == "TERNARY-row" else x.abs().mean())
    u = torch.where(x > a, a, torch.where(x < -a, -a, x)) / a
    out = (u + (u.round() - u).detach()) * a
    (out * dy.double()).sum().backward()
    torch.testing.assert_close(y.double(), out.detach(), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(dw.double(), x.grad, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(rule.gamma.grad.double(), gamma.grad, rtol=1e-4, atol=1e-5)
    assert torch.equal(quantizer.codes(w).dequantize(), y)
    with pytest.raises(ReqatError, match="base 'mean'.*TERNARY-row"):
        ruled("INT4-g128", "learned", rows=5, base="mean")


def test_a_learned_scale_starts_as_the_formats_and_its_codes_are_what_training_saw() -> None:
    torch.manual_seed(0)
    w = torch.randn(5, 64)
    quantizer = ruled("INT4-row", "learned", rows=5, rotation=32)
    torch.testing.assert_close(quantizer(w), fake_quantize(w, "INT4-row", rotation=32), rtol=0, atol=0)
    with torch.no_grad():
        quantizer.gradient.gamma.uniform_(0.4, 1.1)
    assert torch.equal(quantizer(w), quantizer.codes(block_hadamard(w, 32)).dequantize())


@pytest.mark.parametrize("rule", ["clipped", "learned"])
@pytest.mark.parametrize("fmt", ["INT8-row", "FP8-row", "INT4-row", "INT4-g128"])
def test_the_largest_of_a_block_is_not_cut_off_by_the_rounding_of_its_scale(fmt: str, rule: str) -> None:
    """S = fl(amax / Q) makes amax / S up to 2 ulp more than Q in some blocks."""
    torch.manual_seed(0)
    w, dy = torch.randn(256, 256), torch.randn(256, 256)
    quantizer = ruled(fmt, rule, rows=256)
    S = quantize(w, fmt).element_scales()
    assert (w.abs() / S > quantizer.format.element_type.emax).any()
    y, dw = gradient(quantizer, w, dy)
    assert torch.equal(y, fake_quantize(w, fmt)) and torch.equal(dw, dy)
    if rule == "learned":
        offset = y.double() - w.double()  # (v - u) S, for every weight
        expected = (offset * dy.double()).sum(-1, keepdim=True)
        torch.testing.assert_close(quantizer.gradient.gamma.grad.double(), expected, rtol=1e-3, atol=1e-4)


def test_what_rounds_to_zero_is_within_the_scale_of_its_own_sign() -> None:
    """AMXFP4 has one a sign: -0.2 is far beyond the positives' range here, and far within the negatives'."""
    x, dy = torch.full((1, 32), 6 * 2.0**-10), torch.ones(1, 32)
    x[0, :2] = torch.tensor([-6.0, -0.2])
    y, dx = gradient(ruled("AMXFP4", "clipped"), x, dy)
    assert y[0, 1] == 0 and torch.equal(dx, dy)
    y, dx = gradient(ruled("AMXFP4", "clipped"), -x, dy)
    assert y[0, 1] == 0 and torch.equal(dx, dy)


def test_pact_is_its_formula_and_its_gradients_are_those_of_clipping() -> None:
    """Against numpy for the values, and autograd of clip(x, 0, a) for both gradients: rounding counts as identity."""
    torch.manual_seed(0)
    x, dy = torch.randn(3, 4, 7), torch.randn(3, 4, 7)
    for bits, start in ((2, 0.9), (3, 1.4), (4, 0.31)):
        quantizer = Quantizer(get_format(f"AINT{bits}-tensor"), name="q")
        quantizer.gradient = RULES["pact"](start=start)
        quantizer.gradient.prepare(quantizer.format, "inputs", None, "q")
        y, dx = gradient(quantizer, x, dy)
        steps = 2**bits - 1
        expected = np.rint(np.clip(x.double().numpy(), 0, start) * steps / start) * start / steps
        np.testing.assert_allclose(y.numpy(), expected, rtol=1e-6, atol=1e-7)
        assert len(y.unique()) <= steps + 1
        leaf, a = x.double().requires_grad_(), torch.tensor(start, dtype=torch.float64, requires_grad=True)
        torch.minimum(leaf.clamp(min=0), a).backward(dy.double())
        assert torch.equal(dx, leaf.grad.float())
        torch.testing.assert_close(quantizer.gradient.level.grad.double(), a.grad, rtol=1e-5, atol=1e-6)
        assert torch.equal(quantizer.codes(x).dequantize(), y)


def test_sawb_passes_no_gradient_beyond_its_range() -> None:
    torch.manual_seed(0)
    w, dy = torch.randn(6, 64) * 0.02, torch.randn(6, 64)
    a = 3.12 * w.double().square().mean().sqrt() - 2.064 * w.double().abs().mean()
    y, dw = gradient(ruled("SAWB2-tensor", "clipped"), w, dy)
    torch.testing.assert_close(y.double().unique(), a * torch.tensor([-1, -1 / 3, 1 / 3, 1], dtype=torch.float64))
    assert torch.equal(dw, torch.where(w.abs() <= a, dy, 0.0)) and (dw == 0).any()


def tiny() -> LlamaForCausalLM:
    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=41, **shape))


def test_a_model_takes_a_rule_by_role_and_keeps_what_was_learned(tmp_path: Path) -> None:
    model, ids = tiny(), torch.arange(12)[None]
    prepare(model, "TERNARY-row-W2+INT8-tensor-A8")
    assert set_gradient(model, "clipped", roles=("inputs",), limit=2.5) == 4  # shared by q, k, v and gate, up
    assert set_gradient(model, "learned", roles=("weights",)) == 7
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(ids, labels=ids).loss.backward()
    optimizer.step()
    factors = {n: p for n, p in model.named_parameters() if n.endswith("gamma")}
    assert len(factors) == 7 and all((p.grad != 0).any() and (p != 1).any() for p in factors.values())
    expected = model(ids).logits
    with pytest.raises(ReqatError, match="freeze"):
        save_model(model, None, tmp_path / "m")
    assert torch.equal(freeze(model)(ids).logits, expected) and not has_learned_scales(model)
    save_model(model, None, tmp_path / "m")
    again = load_model(tmp_path / "m")
    assert prepare(again, "TERNARY-row-W2+INT8-tensor-A8").restored == ["7 quantized weights"]
    torch.testing.assert_close(again(ids).logits, expected, rtol=0, atol=0)
    with pytest.raises(ReqatError, match="frozen"):
        set_gradient(again, "clipped")


def test_a_rules_parameters_are_no_part_of_an_ordinary_checkpoint_and_are_not_dropped_unseen() -> None:
    model = tiny()
    names = list(model.state_dict())
    prepare(model, "INT8-row-W8")
    set_gradient(model, "learned", roles=("weights",))
    state = model.state_dict()
    assert len(state) == len(names) + 7 and list(plain_state(model)) == names
    model.load_state_dict(state)
    other = tiny()
    prepare(other, "INT8-row-W8")
    for rule in (None, "clipped"):
        if rule:
            set_gradient(other, rule, roles=("weights",))
        with pytest.raises(ReqatError, match="gradient.gamma.*set_gradient"):
            other.load_state_dict(state, strict=False)


def test_what_a_rule_does_not_do_is_said_before_anything_changes() -> None:
    model = tiny()
    prepare(model, "NVFP4-W4A4")
    for rule, options, says in (
        ("clip", {}, "clip.*clipped"),
        ("clipped", {"roles": ("weight",)}, "weight.*weights"),
        ("clipped", {"limit": -1.0}, "-1.0"),
        ("clipped", {"limits": 1.0}, "limits"),
        ("clipped", {"roles": ("keys",)}, "keys"),
        ("learned", {"roles": ("weights",)}, "NVFP4.*INT"),
        ("learned", {"roles": ("inputs",)}, "inputs"),
        ("pact", {"roles": ("weights",)}, "weights"),
        ("pact", {"roles": ("inputs",)}, "AINT2-tensor, not NVFP4"),
        ("pact", {"roles": ("inputs",), "start": 0.0}, "0.0"),
    ):
        with pytest.raises(ReqatError, match=says):
            set_gradient(model, rule, **options)
    assert all(linear.weight_quantizer.gradient.straight for linear in quant_linears(model).values())
