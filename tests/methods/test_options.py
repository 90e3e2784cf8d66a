"""What a model keeps of an earlier method is respected or refused, and options are those of the method."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from reqat.config.errors import ReqatError
from reqat.config.ptq import OPTIONS
from reqat.formats import get_format
from reqat.methods import ptq
from reqat.methods.ptq import flatquant
from reqat.methods.ptq.mr_gptq import mr_gptq
from reqat.methods.transforms import TRANSFORMS
from reqat.models import (
    KVQuantizer,
    carried,
    freeze,
    leave,
    load_model,
    prepare,
    quant_linears,
    save_model,
    share_global_scales,
)
from reqat.models.gradient import set_gradient
from reqat.models.sidecar import Sidecar
from reqat.quant import Precision, clipped

Tiny = Callable[..., PreTrainedModel]
FAST: dict[str, dict[str, Any]] = {
    "flatquant": {"epochs": 2, "batch": 2},
    "mr_gptq": {"grid": 8},
    "awq": {"grid": 2},
}


@pytest.mark.parametrize(
    "precision", ["NVFP4-KV4", "INT4-row-W4A4KV4", "NVFP4-KV4:kv_rotation=16", "NVFP4-KV4:kv_rotation=16,kv_signs=3"]
)
@pytest.mark.parametrize("shifted", [False, True])
def test_keys_are_trained_as_they_are_quantized(precision: str, shifted: bool) -> None:
    """FlatQuant's stand-in for the key/value quantizer computes what the quantizer will, shift and signs included."""
    g = torch.Generator().manual_seed(9)
    wanted = Precision.parse(precision)
    P = torch.linalg.qr(torch.randn(32, 32, generator=g))[0] + 0.1 * torch.randn(32, 32, generator=g)
    key, value = torch.randn(2, 2, 7, 32, generator=g) + 3, torch.randn(2, 2, 7, 32, generator=g)
    query = torch.randn(2, 4, 7, 32, generator=g)
    shift = torch.randn(2, 32, generator=g) + 3 if shifted else None
    p = torch.tensor([2.0, 3.0])
    layer: Any = SimpleNamespace(precision=wanted, keys=P, key_clip=p, value_clip=p, shift=shift)
    cache, kv = flatquant._Cache(layer), KVQuantizer(wanted, 2, 32, "test")
    kv.set_shift(shift)
    kv.basis.set(None, P)
    for quantizer in (kv.key, kv.value):
        quantizer.set_clip(p.sigmoid())
    torch.testing.assert_close(cache.query(query), kv.query(query))
    with torch.no_grad():
        for ours, theirs in zip(cache(key, value), kv(key, value), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_transforms_are_learned_for_the_shift_that_the_model_keeps(tiny: Tiny, ids: Tensor) -> None:
    learned = []
    for size in (0.0, 5.0):
        model = tiny("llama", num_hidden_layers=1)
        leave(model, {"layers.0.kv_shift": torch.full((2, 32), size)})
        flatquant.train(model, Precision.parse("NVFP4-W4A16+NVFP4-KV4"), ids, epochs=1, batch=3, progress=False)
        assert carried(model, "kv_shift") == ["layers.0.kv_shift"]
        prepare(model, "NVFP4-W4A16+NVFP4-KV4")
        kv = model.get_submodule("model.layers.0.self_attn.reqat_kv")
        assert kv.shift is not None and float(kv.shift.max()) == size
        learned.append(kv.basis.right)
    assert not torch.allclose(*learned)


@pytest.mark.parametrize("name", ["awq", "smoothquant", "quarot", "flatquant", "qfit"])
def test_what_was_measured_for_other_weights_is_not_used_for_rewritten_ones(tiny: Tiny, ids: Tensor, name: str) -> None:
    down = "model.layers.0.mlp.down_proj"
    for tensors in ({f"{down}.input_right": 2 * torch.eye(32)}, {f"{down}.weight_clip": torch.full((64, 2), 0.9)}):
        model = tiny("llama")
        leave(model, tensors)
        before = {key: value.clone() for key, value in model.state_dict().items()}
        with pytest.raises(ReqatError, match=next(iter(tensors))):
            TRANSFORMS[name].apply(model, Precision.parse("NVFP4-W4A4KV4"), ids, progress=False)
        assert all(torch.equal(value, model.state_dict()[key]) for key, value in before.items())


def test_a_search_of_scales_does_not_replace_learned_clips(tiny: Tiny, ids: Tensor) -> None:
    model = tiny("llama")
    leave(model, {"model.layers.0.mlp.down_proj.weight_clip": torch.full((64, 2), 0.9)})
    with pytest.raises(ReqatError, match="weight_clip"):
        ptq.quantize("mr_gptq", model, "NVFP4-W4A4", ids, progress=False)


def test_a_search_of_scales_takes_a_model_that_cannot_be_saved_as_it_stands(tiny: Tiny, ids: Tensor) -> None:
    """Shared global scales and learned scales have no place beside a dense weight, but codes do."""
    direct, first, learned = tiny("llama"), tiny("llama"), tiny("llama")
    ptq.quantize("mr_gptq", direct, "NVFP4-W4A4", ids, share_global_scale=True, progress=False, grid=4)
    prepare(first, "NVFP4-W4A4", rotation=16)
    share_global_scales(first)
    prepare(learned, "INT4-row-W4A4")
    set_gradient(learned, "learned", roles=("weights",))
    for model in (first, learned):
        with pytest.raises(ReqatError, match="freeze"):
            Sidecar.collect(model)
        mr_gptq(model, ids, grid=4, progress=False)
        assert len(Sidecar.collect(model).weights) == len(quant_linears(model))
    layers = [f"model.layers.0.self_attn.{n}_proj" for n in "qkv"]
    codes: list[list[Any]] = [[quant_linears(model)[n].quantized for n in layers] for model in (direct, first)]
    assert len({float(q.global_scale) for q in codes[0]}) == 1
    assert all(torch.equal(a.dequantize(), b.dequantize()) for a, b in zip(*codes, strict=True))


def clips_of(model: PreTrainedModel) -> dict[str, list[float] | None]:
    kv: Any = model.get_submodule("model.layers.0.self_attn.reqat_kv")
    linear: Any = model.get_submodule("model.layers.0.mlp.down_proj")
    found = {"keys": kv.key, "values": kv.value, "input": linear.input_quantizer, "weight": linear.weight_quantizer}
    return {role: None if q.clip is None else q.clip.flatten()[:2].tolist() for role, q in found.items()}


def test_clips_stay_whatever_the_global_scale_and_are_not_dropped_unsaid(
    tiny: Tiny, ids: Tensor, tmp_path: Path
) -> None:
    model = tiny("llama")
    places = [
        *("layers.0.keys_clip", "layers.0.values_clip", "model.layers.0.mlp.down_proj.input_clip"),
        "model.layers.0.mlp.down_proj.weight_clip",
    ]
    tensors = {
        n: torch.full((64, 2) if n.endswith("weight_clip") else (2,), 0.5 + 0.125 * i) for i, n in enumerate(places)
    }
    leave(model, tensors)
    expected = dict(zip(("keys", "values", "input", "weight"), ([0.5 + 0.125 * i] * 2 for i in range(4)), strict=True))
    prepare(model, "NVFP4-W4A4KV4")
    assert clips_of(model) == expected
    save_model(model, None, tmp_path / "row")
    for options, kept in (
        ({"global_scale": "static"}, expected),
        ({"global_scale": "dynamic"}, expected),
        ({"rotation": 16}, {**expected, "input": None, "weight": None}),
        ({"kv_rotation": 16}, {**expected, "keys": None}),
        ({"kv_element": "E1M2"}, {**expected, "keys": None, "values": None}),
    ):
        again = load_model(tmp_path / "row")
        report = prepare(again, "NVFP4-W4A4KV4", override=True, **options)
        assert clips_of(again) == kept, options
        lost = sum(value is None for value in kept.values())
        assert bool(report.dropped) == (lost > 0) == ("dropped" in str(report))
        assert not lost or str(lost) in report.dropped[0]
    # What a precision leaves as it is keeps its clips through a checkpoint.
    plain = load_model(tmp_path / "row")
    assert not prepare(plain, "BF16").dropped
    save_model(plain, None, tmp_path / "plain")
    assert carried(load_model(tmp_path / "plain"), "clips") == sorted(places)


def test_shared_global_scales_are_those_of_what_is_quantized(tiny: Tiny) -> None:
    """A clip shrinks the largest magnitude that the global scale reaches to."""
    model = tiny("llama")
    names = [f"model.layers.0.self_attn.{n}_proj" for n in "qkv"]
    leave(model, {f"{n}.weight_clip": torch.full((model.get_submodule(n).out_features, 2), 0.5) for n in names})
    prepare(model, "NVFP4-W4A16")
    layers: list[Any] = [model.get_submodule(n) for n in names]
    largest = max(
        float(clipped(x.weight.detach(), torch.tensor([0.5, 0.5]), get_format("NVFP4")).abs().max()) for x in layers
    )
    freeze(model, share_global_scale=True)
    assert [float(x.quantized.global_scale) for x in layers] == [pytest.approx(448 * 6 / largest, rel=1e-5)] * 3


class Elsewhere(torch.Tensor):
    """Token ids on a device that is not the model's: an embedding cannot read them before they were moved."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.Tensor.to and any(isinstance(a, torch.device | str) for a in (*args[1:], *kwargs.values())):
            return args[0].as_subclass(Tensor).to(*args[1:], **kwargs)
        if func is torch.nn.functional.embedding:
            raise AssertionError("token ids were read on another device than theirs")
        return super().__torch_function__(func, types, args, kwargs)


@pytest.mark.parametrize("method", sorted(ptq.METHODS))
def test_token_ids_go_where_the_model_is(tiny: Tiny, ids: Tensor, method: str) -> None:
    there = ids.as_subclass(Elsewhere)
    with pytest.raises(AssertionError, match="another device"):
        tiny("llama")(there)
    ptq.quantize(
        method,
        tiny("llama", num_hidden_layers=1),
        "NVFP4-W4A4KV4",
        there,
        precision_options={"global_scale": "static"},
        progress=False,
        **FAST.get(method, {}),
    )


def test_options_are_those_of_the_method() -> None:
    """Stated once for configuration; the functions that take them agree."""
    assert set(OPTIONS) == set(ptq.METHODS)
    for name, method in ptq.METHODS.items():
        assert method.settings is OPTIONS[name]
        for option, field in method.settings.model_fields.items():
            takers = [method.solver, *(t.rewrite for t in method.transforms if t.rewrite is not None)]
            found = [s.parameters[option] for t in takers if option in (s := inspect.signature(t)).parameters]
            assert [parameter.default for parameter in found] == [field.default] * len(found) and found, (name, option)


@pytest.mark.parametrize(("method", "option"), [("rtn", "act_order"), ("awq", "act_order"), ("gptq", "alpha")])
def test_an_option_without_effect_is_refused(tiny: Tiny, ids: Tensor, method: str, option: str) -> None:
    model = tiny("llama")
    with pytest.raises(ReqatError, match=rf"option of {method} '{option}'.*{'none' if method == 'rtn' else 'Known'}"):
        ptq.quantize(method, model, "NVFP4-W4A4", ids, progress=False, **{option: 0.5})
    assert not quant_linears(model)


def test_an_option_of_a_method_reaches_it(tiny: Tiny, ids: Tensor) -> None:
    weights = []
    for options in ({}, {"act_order": False}, {"act_order": True, "damp": None}):
        model = tiny("llama")
        _, metrics = ptq.quantize("gptq", model, "NVFP4-W4A4", ids, progress=False, **options)
        assert metrics["act_order"] == options.get("act_order", True)
        weights.append(quant_linears(model)["model.layers.0.mlp.down_proj"].weight)
    assert not torch.equal(weights[0], weights[1]) and torch.equal(weights[0], weights[2])
