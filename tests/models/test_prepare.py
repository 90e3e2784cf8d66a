"""prepare and freeze: what is swapped, what is computed, what is refused."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel

import reqat.quant.fake
from reqat.config.errors import ReqatError
from reqat.formats import get_format, global_scale_for, quantize
from reqat.models import (
    calibrate_static,
    freeze,
    kv_quantizers,
    prepare,
    quant_linears,
    share_global_scales,
    sharing_global_scales,
)
from reqat.models.pretrained import plain_state
from reqat.quant import Precision, Quantizer, block_hadamard

Tiny = Callable[..., PreTrainedModel]
PRECISIONS = (
    "NVFP4-W4A4KV4",
    "NVFP4-W4A4KV4:kv_element=E1M2",
    "MXFP4-W4A4:rotation=32",
    "MXFP4-W4A16:rotation=32",
    "NVFP4-4/6-W4A4",
    "AMXFP4-W4A4KV4",
    "INT4-row-W4A4KV4",
    "TERNARY-tensor-W2+INT8-tensor-A8+INT8-row-KV8",
)


def naive_logits(model: PreTrainedModel, ids: Tensor, precision: Precision) -> Tensor:
    """A decoder written out, quantizing by codes: no autograd, no sharing, no module of ours."""
    state, config = model.state_dict(), model.config
    D, G = config.head_dim, config.num_key_value_heads

    def q(x: Tensor, fmt: Any) -> Tensor:
        return x if fmt is None else quantize(x, fmt).dequantize()

    def rotated(x: Tensor) -> Tensor:
        return x if precision.rotation is None else block_hadamard(x, precision.rotation)

    def linear(x: Tensor, name: str) -> Tensor:
        w = q(rotated(state[f"{name}.weight"]), precision.weights)
        return F.linear(q(rotated(x), precision.inputs), w, state.get(f"{name}.bias"))

    def norm(x: Tensor, name: str) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + config.rms_norm_eps) * state[f"{name}.weight"]

    T = ids.shape[1]
    angle = torch.arange(T)[:, None] * config.rope_parameters["rope_theta"] ** (-torch.arange(0, D, 2) / D)
    cos, sin = torch.cat([angle, angle], -1).cos(), torch.cat([angle, angle], -1).sin()

    def rope(x: Tensor) -> Tensor:
        return x * cos + torch.cat([-x[..., D // 2 :], x[..., : D // 2]], -1) * sin

    def heads(x: Tensor) -> Tensor:
        return x.view(*x.shape[:2], -1, D)

    x = state["model.embed_tokens.weight"][ids]
    for i in range(config.num_hidden_layers):
        at = f"model.layers.{i}"
        h = norm(x, f"{at}.input_layernorm")
        query, key = (heads(linear(h, f"{at}.self_attn.{n}_proj")) for n in "qk")
        if config.model_type == "qwen3":
            query, key = norm(query, f"{at}.self_attn.q_norm"), norm(key, f"{at}.self_attn.k_norm")
        value = heads(linear(h, f"{at}.self_attn.v_proj")).transpose(1, 2)
        query, key = rope(query.transpose(1, 2)), rope(key.transpose(1, 2))
        key, value = q(key, precision.keys), q(value, precision.values)
        repeat = query.shape[1] // G
        logits = query @ key.repeat_interleave(repeat, 1).transpose(2, 3) / math.sqrt(D)
        logits = logits.masked_fill(~torch.ones(T, T, dtype=torch.bool).tril(), -math.inf)
        mixed = torch.softmax(logits, -1) @ value.repeat_interleave(repeat, 1)
        x = x + linear(mixed.transpose(1, 2).flatten(2), f"{at}.self_attn.o_proj")
        h = norm(x, f"{at}.post_attention_layernorm")
        gated = F.silu(linear(h, f"{at}.mlp.gate_proj")) * linear(h, f"{at}.mlp.up_proj")
        x = x + linear(gated, f"{at}.mlp.down_proj")
    return F.linear(norm(x, "model.norm"), state["lm_head.weight"])


@pytest.mark.parametrize(
    "name", ["BF16", "NVFP4-W4A4KV4", "NVFP4-W4A4KV4:kv_element=E1M2", "MXFP4-W4A4:rotation=32", "AMXFP4-W4A4KV4"]
)
def test_forward_equals_a_naive_decoder(tiny: Tiny, family: str, name: str) -> None:
    # float64, so that differences in summation order do not flip a rounding. Norms of transformers and quantizers work
    # in float32, so values within 1e-7 of a threshold still may: these tokens have none.
    ids = torch.randint(0, 61, (3, 14), generator=torch.Generator().manual_seed(3))
    model = tiny(family).double()
    expected = naive_logits(copy.deepcopy(model), ids, Precision.parse(name))
    prepare(model, name)
    actual = model(ids, use_cache=False).logits
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)  # float32 angles of transformers' RoPE


@pytest.mark.parametrize("name", PRECISIONS)
def test_frozen_model_equals_qat_forward_bit_for_bit(tiny: Tiny, family: str, ids: Tensor, name: str) -> None:
    model = tiny(family).train()
    prepare(model, name)
    qat = model(ids, use_cache=False).logits
    assert qat.requires_grad
    frozen = freeze(model)
    assert frozen is model and not model.training
    assert not any(p.requires_grad for p in model.parameters())
    assert torch.equal(model(ids).logits, qat)
    before = {name: layer.quantized for name, layer in quant_linears(model).items()}
    freeze(model)
    assert all(layer.quantized is before[name] for name, layer in quant_linears(model).items())


@pytest.mark.parametrize("name", ["NVFP4-W4A4", "MXFP4-W4A4:rotation=32", "MXFP4-W4A16:rotation=32", "NVFP4-W16A4"])
def test_gradients_are_those_of_the_dense_layer_at_quantized_operands(tiny: Tiny, name: str) -> None:
    model = tiny("qwen2")
    prepare(model, name)
    layer = quant_linears(model)["model.layers.0.self_attn.q_proj"]
    torch.manual_seed(0)
    x, upstream = torch.randn(5, 64, requires_grad=True), torch.randn(5, 128)
    (layer(x) * upstream).sum().backward()

    p = Precision.parse(name)
    rotated = [t.detach() if p.rotation is None else block_hadamard(t.detach(), p.rotation) for t in (x, layer.weight)]
    x_hat, w_hat = (
        t if fmt is None else quantize(t, fmt).dequantize()
        for t, fmt in zip(rotated, (p.inputs, p.weights), strict=True)
    )
    dx, dw = upstream @ w_hat, upstream.T @ x_hat
    if p.rotation is not None:
        dx, dw = block_hadamard(dx, p.rotation), block_hadamard(dw, p.rotation)
    torch.testing.assert_close(x.grad, dx, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(layer.weight.grad, dw, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(layer.bias.grad, upstream.sum(0), rtol=1e-5, atol=1e-5)


def test_state_dict_and_parameters_are_those_of_the_plain_model(tiny: Tiny, family: str) -> None:
    model = tiny(family)
    plain = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    parameters = dict(model.named_parameters())
    prepare(model, "NVFP4-W4A4KV4", global_scale="row")
    assert list(model.state_dict()) == list(plain)
    assert all(model.get_parameter(name) is parameter for name, parameter in parameters.items())
    model.load_state_dict(plain, strict=True)


def test_each_distinct_tensor_is_quantized_once_a_forward(
    tiny: Tiny, ids: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny("llama").train()
    prepare(model, "NVFP4-W4A4KV4")
    seen: list[str] = []
    original = reqat.quant.fake._quantized

    def counted(x: Tensor, fmt: Any, global_scale: Any, rotation: Any, name: str) -> Tensor:
        seen.append(name)
        return original(x, fmt, global_scale, rotation, name)

    monkeypatch.setattr(reqat.quant.fake, "_quantized", counted)
    for _ in range(2):
        seen.clear()
        model(ids, use_cache=False).logits.sum().backward()
        assert len(seen) == len(set(seen)) == 2 * (7 + 4 + 2)  # weights; inputs of qkv, o, gate/up, down; K and V
    seen.clear()
    model.activation_checkpointing_enable()
    model(ids, use_cache=False).logits.sum().backward()
    assert len(seen) == 2 * 2 * 13  # everything twice: forward and recomputation
    memos = [layer.input_quantizer._memo.held for layer in quant_linears(model).values()]
    assert memos == [None] * len(memos)


def test_a_shared_input_quantizer_never_serves_a_stale_tensor(tiny: Tiny) -> None:
    model = tiny("llama")
    prepare(model, "NVFP4-W4A4")
    layers = quant_linears(model)
    q, k = layers["model.layers.0.self_attn.q_proj"], layers["model.layers.0.self_attn.k_proj"]
    assert q.input_quantizer is k.input_quantizer
    x, y = torch.randn(4, 64), torch.randn(4, 64)
    with torch.no_grad():
        expected = copy.deepcopy(k)(y)
        q(x)
        assert torch.equal(k(y), expected)  # another tensor
        q(x)
        x.copy_(y)
        assert torch.equal(k(x), expected)  # the same tensor, written to in between
    with torch.inference_mode():
        x, y = torch.randn(4, 64), torch.randn(4, 64)  # tensors without a version
        expected = copy.deepcopy(k)(y)
        k(x)
        x.copy_(y)
        assert torch.equal(k(x), expected)  # a layer that asks again is not served what it was served before
    copy.deepcopy(model)  # no activation left that could not be copied


def test_autocast_training_step_reaches_every_weight(tiny: Tiny, family: str, ids: Tensor) -> None:
    model = tiny(family).train()
    prepare(model, "NVFP4-W4A4KV4")
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(ids, labels=ids, use_cache=False).loss
    loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


def test_report_says_what_and_why(tiny: Tiny) -> None:
    model = tiny("llama")
    report = prepare(model, "MXFP4-W4A4+NVFP4-KV4:rotation=32", skip=["model.layers.1.mlp.*"])
    names = [entry.name for entry in report.quantized]
    assert len(names) == 11 and names == list(quant_linears(model))
    text = str(report)
    assert text.startswith("MXFP4-W4A4+NVFP4-KV4:rotation=32 on LlamaForCausalLM: 11 of 16 weight matrices quantized")
    for piece in (
        "inputs    MXFP4: E2M1 in blocks of 32, E8M0 scales, rotated in Hadamard blocks of 32",
        "keys      NVFP4: E2M1 in blocks of 16, E4M3 scales, global scale row, 2 layers",
        "lm_head",
        "the output head is never quantized",
        "embeddings are never quantized",
        "skipped on request",
    ):
        assert piece in text
    assert any(line.split()[:2] == ["quantized", "model.layers.*.self_attn.q_proj"] for line in text.splitlines())
    assert str(report.precision) in repr(model) or "QuantLinear" in repr(model)


def test_tied_embeddings_stay_tied_and_unquantized(tiny: Tiny) -> None:
    model = tiny("llama", tie_word_embeddings=True)
    report = prepare(model, "NVFP4-W4A4")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert type(model.lm_head) is nn.Linear
    reasons = {entry.name: entry.reason for entry in report.skipped}
    assert reasons == {
        "model.embed_tokens": "embeddings are never quantized",
        "lm_head": "the output head is never quantized",
    }


def test_preparing_twice(tiny: Tiny) -> None:
    model = tiny("llama")
    prepare(model, "BF16")
    report = prepare(model, "NVFP4-W4A4")  # nothing was quantized yet
    assert prepare(model, "NVFP4-W4A4") is report
    with pytest.raises(ValueError, match="NVFP4-W4A4 already.*MXFP4-W4A4"):
        prepare(model, "MXFP4-W4A4")
    with pytest.raises(ValueError, match="other options"):
        prepare(model, "NVFP4-W4A4", global_scale="dynamic")
    with pytest.raises(ValueError, match="cannot be prepared for BF16"):
        prepare(model, "BF16")


def refused(model: nn.Module, precision: str, match: str) -> None:
    """prepare raises, and leaves the model as it was."""
    with pytest.raises(ValueError, match=match):
        prepare(model, precision)  # type: ignore[arg-type]
    assert not quant_linears(model) and not any(isinstance(m, Quantizer) for m in model.modules())


def test_bad_models_and_precisions_are_refused(tiny: Tiny) -> None:
    refused(tiny("llama"), "NVFP4-W4A4KV44", "'NVFP4-W4A4KV44'.*mean 'NVFP4-W4A4KV4'")
    gpt2 = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=32, n_head=2, vocab_size=11))
    refused(gpt2, "NVFP4-W4A4", "'gpt2'.*not supported")
    chunked = tiny("llama")
    chunked.config.layer_types = ["full_attention", "chunked_attention"]
    refused(chunked, "NVFP4-W4A4", "'llama'.*chunked_attention")
    refused(nn.Linear(2, 2), "NVFP4-W4A4", "Linear.*PreTrainedModel")
    refused(tiny("llama", head_dim=24), "NVFP4-KV4", "head_dim 24 .*block 16")
    refused(tiny("llama", head_dim=16), "AMXFP4-W4A4KV4", "head_dim 16 .*block 32")
    odd = tiny("llama", intermediate_size=72)
    refused(odd, "NVFP4-W4A4", "layers.0.mlp.down_proj: in_features 72 .*block 16")
    refused(tiny("llama", intermediate_size=80), "MXFP4-W4A16", "in_features 80 .*block 32")
    with pytest.raises(ReqatError, match=r"skip: unknown layer '\*.down_prj'.*such as 'model.layers.\d.mlp.down_proj'"):
        prepare(odd, "NVFP4-W4A4", skip=["*.down_proj", "*.down_prj"])
    assert len(prepare(odd, "NVFP4-W4A4", skip=["*.down_proj"]).quantized) == 12


def test_a_second_prepare_skips_what_it_is_asked_to_or_is_refused(tiny: Tiny) -> None:
    model = tiny("llama")
    first = prepare(model, "MXFP4-W4A4:skip=*.down_proj")
    for same in ({"precision": "MXFP4-W4A4"}, {"precision": "MXFP4-W4A4", "skip": ["*.down_proj"]}):
        assert prepare(model, **same) is first  # type: ignore[arg-type]
    assert prepare(model, "MXFP4-W4A4:skip=*.down_proj") is first
    whole = tiny("llama")
    prepare(whole, "MXFP4-W4A4")
    for prepared, skip in ((whole, "*.down_proj"), (model, "*.up_proj")):
        for given in ({"precision": f"MXFP4-W4A4:skip={skip}"}, {"precision": "MXFP4-W4A4", "skip": [skip]}):
            with pytest.raises(ReqatError, match="load it again"):
                prepare(prepared, **given)  # type: ignore[arg-type]


def test_nan_weights_are_named(tiny: Tiny) -> None:
    model = tiny("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 5] = math.nan
    refused(model, "NVFP4-W4A4", "layers.1.mlp.up_proj.weight .*NaN")


def test_freeze_needs_a_prepared_model(tiny: Tiny) -> None:
    with pytest.raises(ValueError, match="freeze needs a prepared model"):
        freeze(tiny("llama"))


def test_global_scales_shared_as_engines_want(tiny: Tiny) -> None:
    model = tiny("llama")
    prepare(model, "NVFP4-W4A16")
    layers = quant_linears(model)
    fmt = get_format("NVFP4")
    expected = {n: global_scale_for(layer.weight.detach(), fmt) for n, layer in layers.items()}
    freeze(model, share_global_scale=True)
    for i in range(2):
        for group in (["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"], ["mlp.gate_proj", "mlp.up_proj"]):
            names = [f"model.layers.{i}.{n}" for n in group]
            smallest = min(float(expected[n]) for n in names)
            assert {float(layers[n].quantized.global_scale) for n in names} == {smallest}  # type: ignore[union-attr]
        alone = f"model.layers.{i}.mlp.down_proj"
        assert float(layers[alone].quantized.global_scale) == float(expected[alone])  # type: ignore[union-attr]


def test_training_computes_with_the_shared_scales_that_freezing_gives(tiny: Tiny, ids: Tensor) -> None:
    model, apart = tiny("llama"), tiny("llama")
    for each in (model, apart):
        prepare(each, "NVFP4-W4A4")
    with torch.no_grad(), sharing_global_scales(model):
        first = model(ids).logits
        for each in (model, apart):  # as an optimizer does: another matrix is the largest now
            each.model.layers[0].self_attn.v_proj.weight.mul_(1.37)
        second, own = model(ids).logits, apart(ids).logits
    assert all(layer.weight_quantizer.global_scale is None for layer in quant_linears(model).values())
    with torch.no_grad():
        assert torch.equal(model(ids).logits, own)  # after the block: scales of their own
        frozen = freeze(model, share_global_scale=True)(ids).logits
    assert torch.equal(second, frozen) and not torch.equal(second, first) and not torch.equal(second, own)


def test_codes_with_scales_of_their_own_cannot_share_one(tiny: Tiny) -> None:
    model = tiny("llama")
    prepare(model, "NVFP4-W4A4")
    freeze(model)
    with pytest.raises(ReqatError, match="k_proj.*dense model"):
        share_global_scales(model)


def test_solvers_set_codes(tiny: Tiny, ids: Tensor) -> None:
    """A weight solver (GPTQ) hands over codes of the rotated weight; the layer multiplies with exactly those."""
    model = tiny("llama")
    prepare(model, "MXFP4-W4A4:rotation=32")
    layer = quant_linears(model)["model.layers.0.mlp.gate_proj"]
    other = quantize(layer.rotated_weight() * 0.9, layer.weight_quantizer.format)
    layer.set_quantized(other)
    freeze(model)
    assert layer.quantized is other
    x = torch.randn(3, 64)
    expected = F.linear(quantize(block_hadamard(x, 32), "MXFP4").dequantize(), other.dequantize())
    assert torch.equal(layer(x), expected)
    torch.testing.assert_close(layer.plain_weight(), block_hadamard(other.dequantize(), 32))
    with pytest.raises(ValueError, match="gate_proj: codes of shape"):
        layer.set_quantized(quantize(torch.zeros(2, 32), "MXFP4"))
    with pytest.raises(ValueError, match="gate_proj: codes are in"):
        layer.set_quantized(quantize(layer.rotated_weight(), "NVFP4"))


def test_static_calibration_covers_the_batches(tiny: Tiny, family: str, ids: Tensor) -> None:
    model = tiny(family)
    prepare(model, "NVFP4-W4A4KV4", global_scale="static")
    with pytest.raises(ValueError, match="q_proj input.*static.*not calibrated"):
        model(ids)
    assert calibrate_static(model, [ids[:2], {"input_ids": ids[2:]}]) == 2 * (4 + 2)
    scales = [kv.key.global_scale for kv in kv_quantizers(model)]
    assert all(scale is not None and scale.ndim == 0 for scale in scales)
    assert torch.isfinite(model(ids).logits).all()
    assert list(plain_state(model)) == list(tiny(family).state_dict())
    extra = model.state_dict().keys() - plain_state(model).keys()
    assert len(extra) == 2 * (7 + 2) and all(name.endswith(".global_scale") for name in extra)
    assert calibrate_static(tiny("llama"), [ids]) == 0
    with pytest.raises(ValueError, match="nothing was observed"):
        calibrate_static(model, [])
