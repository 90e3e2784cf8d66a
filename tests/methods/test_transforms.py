"""Transforms: the unquantized model computes the same before and after, and what they are for gets better."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import Gemma2Config, Gemma2ForCausalLM, PreTrainedModel

from reqat.config.errors import ReqatError
from reqat.methods import ptq
from reqat.methods.layerwise import walk
from reqat.methods.ptq import Method, awq, smoothquant
from reqat.methods.ptq.rtn import rtn
from reqat.methods.scaling import FoldableGroup, groups_of
from reqat.methods.transforms import TRANSFORMS, Transform
from reqat.models import KVQuantizer, prepare, quant_linears
from reqat.models.linear import InputQuantizer
from reqat.quant import Precision, Quantizer, block_hadamard, without_rounding

Tiny = Callable[..., PreTrainedModel]
W4A4 = Precision.parse("NVFP4-W4A4")


def with_outliers(model: PreTrainedModel) -> PreTrainedModel:
    """Some channels of every norm's output and of v and up are large, as in trained models."""
    for name, module in model.named_modules():
        if name.endswith("layernorm") and hasattr(module, "weight"):
            module.weight.data[::7] *= 12.0
        if name.endswith(("v_proj", "up_proj")):
            module.weight.data[::5] *= 8.0
    return model


#: Options of transforms that would search long without.
OPTIONS = {"qfit": {"grid": 4}, "awq": {"grid": 4}, "flatquant": {"epochs": 1, "batch": 2}}


def assert_equivalent(
    transform: Transform, model: PreTrainedModel, ids: Tensor, precision: str, **options: Any
) -> None:
    """A float64 ``model`` gives the same logits before ``transform`` and after: as it is rewritten, and prepared for
    the precision with all that is then computed online, but not rounded."""
    expected, asked = model(ids).logits, Precision.parse(precision)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    prepared, metrics = transform.apply(model, asked, ids, progress=False, **options)
    torch.testing.assert_close(model(ids).logits, expected, rtol=1e-9, atol=1e-9)
    rewritten = any(not torch.equal(value, before[key]) for key, value in model.state_dict().items() if key in before)
    assert (rewritten or prepared != asked) and isinstance(metrics, dict), "it must have done something"
    left = getattr(model, "_reqat_sidecar", None)  # for prepare: bases and clips
    online = prepared != asked or left is not None or any(k.shift is not None for k in kv_of(model))
    assert bool(transform.online) == online
    prepare(model, prepared)
    assert not torch.allclose(model(ids).logits, expected, rtol=1e-3)  # it is quantized
    with without_rounding(m for m in model.modules() if isinstance(m, Quantizer)):
        torch.testing.assert_close(model(ids).logits, expected, rtol=1e-9, atol=1e-9)


def kv_of(model: PreTrainedModel) -> list[KVQuantizer]:
    return [module for module in model.modules() if isinstance(module, KVQuantizer)]


def test_every_transform_is_tried() -> None:
    assert {"hadamard", "kv_hadamard", "qfit", "awq", "smoothquant", "quarot", "mr_gptq", "flatquant"} <= set(
        TRANSFORMS
    )
    assert all(t in TRANSFORMS.values() for method in ptq.METHODS.values() for t in method.transforms)


@pytest.mark.parametrize("name", sorted(TRANSFORMS))
@pytest.mark.parametrize("kv_heads", [2, 4])
def test_the_unquantized_model_computes_the_same(
    tiny: Tiny, float64_norms: Any, family: str, ids: Tensor, name: str, kv_heads: int
) -> None:
    model = float64_norms(with_outliers(tiny(family, num_key_value_heads=kv_heads)).double())
    assert_equivalent(TRANSFORMS[name], model, ids, "NVFP4-W4A4KV4", **OPTIONS.get(name, {}))


def _columns_alone(model: PreTrainedModel, *_: Any, **__: Any) -> dict[str, Any]:
    model.get_decoder().layers[0].mlp.up_proj.weight.data[:, 3] *= 1 + 1e-6  # type: ignore[attr-defined]
    return {}


WRONG: dict[str, tuple[str, Callable[[pytest.MonkeyPatch], None]]] = {
    "queries are not rotated": (
        "kv_hadamard",
        lambda patch: patch.setattr(KVQuantizer, "query", lambda self, query: query),
    ),
    "inputs are rotated in blocks of another size": (
        "hadamard",
        lambda patch: patch.setattr(InputQuantizer, "compute", lambda self, x: block_hadamard(x, 16)),
    ),
    "a scale that RoPE does not pass through": (
        "qfit",
        lambda patch: patch.setattr("reqat.methods.qfit.search.pair_scale", lambda key, **_: key.abs().amax((0, 2))),
    ),
    "a shift of each token": (
        "qfit",
        lambda patch: patch.setattr(
            KVQuantizer,
            "forward",
            lambda self, key, value: (key - self.shift[:, None] * torch.arange(key.shape[2])[:, None], value),
        ),
    ),
    "scales that are folded on one side": (
        "smoothquant",
        lambda patch: patch.setattr(FoldableGroup, "fold", _half_folded),
    ),
}


def _half_folded(self: FoldableGroup, s_K: Tensor) -> None:
    for linear in self.linears:
        linear.weight.data.mul_(s_K)


@pytest.mark.parametrize("what", sorted(WRONG))
def test_the_test_fails_for_a_wrong_transform(
    tiny: Tiny, float64_norms: Any, ids: Tensor, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, mutate = WRONG[what]
    mutate(monkeypatch)
    model = float64_norms(with_outliers(tiny("llama")).double())
    with pytest.raises((AssertionError, ReqatError), match="not close|does not compute the same"):
        assert_equivalent(TRANSFORMS[name], model, ids, "NVFP4-W4A4KV4", **OPTIONS.get(name, {}))


def test_the_test_fails_for_a_rewrite_of_one_part_in_a_million(tiny: Tiny, float64_norms: Any, ids: Tensor) -> None:
    model = float64_norms(tiny("llama").double())
    with pytest.raises(AssertionError, match="not close"):
        assert_equivalent(Transform(_columns_alone), model, ids, "NVFP4-W4A4KV4")


def test_a_method_is_prepared_for_what_its_transforms_compute_online(tiny: Tiny, ids: Tensor) -> None:
    method = Method(rtn, transforms=(TRANSFORMS["hadamard"],))
    assert not method.needs_calibration
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(ptq.METHODS, "rotated", method)
        report, _ = ptq.quantize("rotated", tiny("llama"), "MXFP4-W4A4", progress=False)
        assert str(report.precision) == "MXFP4-W4A4:rotation=32"
        with pytest.raises(ReqatError, match="48.*32|32.*48"):
            ptq.quantize("rotated", tiny("llama", intermediate_size=48), "NVFP4-W4A4", progress=False)


def test_what_makes_an_input_is_found(tiny: Tiny, ids: Tensor) -> None:
    for kv_heads, foldable in (
        (2, {"q_proj", "gate_proj", "down_proj"}),
        (4, {"q_proj", "o_proj", "gate_proj", "down_proj"}),
    ):
        model = tiny("llama", num_key_value_heads=kv_heads)
        for step in walk(model, ids):
            groups = groups_of(step)
            assert {g.name.rpartition(".")[2] for g in groups if g.divide is not None} == foldable


def test_a_norm_that_adds_one_to_its_weight_is_folded(ids: Tensor) -> None:
    config = Gemma2Config(
        vocab_size=61, hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, attn_logit_softcapping=None, final_logit_softcapping=None,
        sliding_window=64, query_pre_attn_scalar=16,
    )  # fmt: skip
    torch.manual_seed(0)
    model = Gemma2ForCausalLM(config).eval()
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.05)
    expected = model(ids).logits
    done = smoothquant.smooth(model, W4A4, ids, progress=False)
    assert done["smoothed"] == 2
    torch.testing.assert_close(model(ids).logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["awq", "smoothquant"])
def test_an_input_that_something_else_reads_is_not_scaled(tiny: Tiny, ids: Tensor, name: str) -> None:
    """A router that reads what the experts read is seen; a use outside any module is caught by what the layer gives."""
    model = with_outliers(tiny("llama"))
    for layer in model.get_decoder().layers:  # type: ignore[attr-defined]
        mlp = layer.mlp
        mlp.router, plain = nn.Linear(64, 1, bias=False), mlp.forward
        mlp.forward = lambda x, mlp=mlp, plain=plain: plain(x) * mlp.router(x).sigmoid()
    expected = model(ids).logits
    TRANSFORMS[name].apply(model, W4A4, ids, progress=False)
    torch.testing.assert_close(model(ids).logits, expected, rtol=1e-3, atol=1e-3)

    model = with_outliers(tiny("llama"))
    mlp = model.get_decoder().layers[0].mlp  # type: ignore[attr-defined]
    plain = mlp.forward
    mlp.forward = lambda x: plain(x) + x
    with pytest.raises(ReqatError, match="layers.0.*not supported"):
        TRANSFORMS[name].apply(model, W4A4, ids, progress=False)


def test_smoothquant_is_its_formula(tiny: Tiny, ids: Tensor) -> None:
    model = with_outliers(tiny("llama"))
    plain = copy.deepcopy(model)
    layer: Any = plain.get_decoder().layers[0]
    seen: list[Tensor] = []
    handle = layer.self_attn.q_proj.register_forward_pre_hook(lambda _m, args: seen.append(args[0].detach()))
    plain(ids)
    handle.remove()
    names = ("q_proj", "k_proj", "v_proj")
    largest_w = torch.stack([getattr(layer.self_attn, n).weight.abs().amax(0) for n in names]).amax(0)
    s = seen[0].abs().flatten(0, 1).amax(0) ** 0.7 / largest_w**0.3
    smoothquant.smooth(model, W4A4, ids, alpha=0.7, progress=False)
    smoothed: Any = model.get_decoder().layers[0]
    for n in names:
        before, after = getattr(layer.self_attn, n).weight, getattr(smoothed.self_attn, n).weight
        torch.testing.assert_close(after, before * s, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(smoothed.input_layernorm.weight, layer.input_layernorm.weight / s, rtol=1e-5, atol=1e-7)
    assert torch.equal(smoothed.self_attn.o_proj.weight, layer.self_attn.o_proj.weight)


@pytest.mark.parametrize(
    "precision", ["NVFP4-W4A16", "MXFP4-W4A4", "MXFP4-W4A4:rotation=32", "NVFP4-W4A4:global_scale=static"]
)
def test_awq_never_loses_to_rounding_on_its_own_error(tiny: Tiny, ids: Tensor, precision: str) -> None:
    found = awq.scale(with_outliers(tiny("qwen2")), Precision.parse(precision), ids, grid=6, progress=False)
    assert len(found["groups"]) == 2 * 3
    for group in found["groups"]:
        assert group["error"] <= group["error_nearest"]
        assert (group["r"] == 0) == (group["error"] == group["error_nearest"])
    assert found["group_error"] < found["group_error_nearest"]


def test_awqs_error_is_that_of_the_layer_as_it_will_be_quantized(tiny: Tiny, ids: Tensor) -> None:
    """The error of the first group at r = 0 is that of the attention of a model that is prepared and frozen."""
    model = with_outliers(tiny("llama"))
    prepared = copy.deepcopy(model)
    prepare(prepared, "NVFP4-W4A4", skip=["*.o_proj", "*.mlp.*"])
    outputs: list[list[Tensor]] = [[], []]
    for which, m in enumerate((model, prepared)):
        attention: Any = m.get_decoder().layers[0].self_attn
        handle = attention.register_forward_hook(lambda _m, _a, out, w=which: outputs[w].append(out[0].detach()))
        m(ids)
        handle.remove()
    y, z = outputs[0][0].double(), outputs[1][0].double()
    expected = float((y - z).square().sum() / y.square().sum())
    found = awq.scale(model, Precision.parse("NVFP4-W4A4"), ids, grid=2, progress=False)
    assert found["groups"][0]["error_nearest"] == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("method", sorted(ptq.METHODS))
def test_every_method_leaves_a_frozen_model_of_its_precision(tiny: Tiny, ids: Tensor, method: str) -> None:
    model = with_outliers(tiny("qwen3"))
    wanted = Precision.parse("NVFP4-W4A4KV4:global_scale=static")
    report, metrics = ptq.quantize(method, model, wanted, ids, progress=False)
    for transform in ptq.METHODS[method].transforms:
        wanted = transform.prepared_for(wanted)
    assert metrics["method"] == method and report.precision == wanted
    assert all(linear.frozen for linear in quant_linears(model).values())
    assert torch.isfinite(model(ids).logits).all()


def test_what_a_user_can_mend_is_said_before_the_model_is_changed(tiny: Tiny, ids: Tensor) -> None:
    model = tiny("llama")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    for method, precision, options, says in (
        ("awk", "NVFP4-W4A4", {}, "awk.*awq"),
        ("awq", "NVFP4-KV4", {}, "NVFP4-KV4"),
        ("smoothquant", "NVFP4-W4A4", {"alpha": 1.5}, "1.5"),
        ("smoothquant", "NVFP4-W4A4", {"beta": 1.5}, "beta"),
    ):
        with pytest.raises(ReqatError, match=says):
            ptq.quantize(method, model, precision, ids, progress=False, **options)
    with pytest.raises(ReqatError, match="calibration"):
        ptq.quantize("awq", model, "NVFP4-W4A4", progress=False)
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in before.items())
    odd = tiny("llama", intermediate_size=80)
    first = odd.get_decoder().layers[0].input_layernorm.weight.clone()  # type: ignore[attr-defined]
    with pytest.raises(ReqatError, match="in_features 80.*block 32"):
        ptq.quantize("smoothquant", odd, "MXFP4-W4A4", ids, progress=False)
    assert torch.equal(first, odd.get_decoder().layers[0].input_layernorm.weight)  # type: ignore[attr-defined]
    prepare(model, "NVFP4-W4A4")
    with pytest.raises(ReqatError, match="full-precision"):
        ptq.quantize("awq", model, "NVFP4-W4A4", ids, progress=False)
    assert isinstance(model, nn.Module)
