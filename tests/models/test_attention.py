"""The attention function: transformers' results without quantization, a naive reference with it."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from reqat.formats import quantize
from reqat.models import ATTENTION, KVQuantizer, prepare, softmax_attention
from reqat.models.attention import mark_quantized, reqat_attention
from reqat.quant import Precision, block_hadamard, with_signs


def naive(q, k, v, allowed):  # type: ignore[no-untyped-def]
    """Attention by its formula, head by head; allowed [B, T, S] boolean."""
    out = torch.zeros_like(q)
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            g = h // (q.shape[1] // k.shape[1])
            logits = q[b, h] @ k[b, g].T / math.sqrt(q.shape[-1])
            logits = logits.masked_fill(~allowed[b], -math.inf)
            out[b, h] = torch.softmax(logits, -1).nan_to_num(0.0) @ v[b, g]
    return out


def tensors(T: int = 7, S: int = 7, dtype: torch.dtype = torch.float64):  # type: ignore[no-untyped-def]
    torch.manual_seed(0)
    return torch.randn(2, 6, T, 32, dtype=dtype), *(torch.randn(2, 2, S, 32, dtype=dtype) for _ in range(2))


def test_packed_and_padded_rows_match_the_formula_and_give_no_nan() -> None:
    q, k, v = tensors()
    segments = torch.tensor([[0, 0, 0, 1, 1, 2, 2], [0, 0, 0, 0, 0, 0, 0]])
    allowed = (segments[:, :, None] == segments[:, None]) & torch.ones(7, 7, dtype=torch.bool).tril()
    allowed[1, :, :2] = False  # left padding: the first two rows of sample 1 may attend to nothing
    expected = naive(q, k, v, allowed)
    additive = torch.zeros(2, 1, 7, 7, dtype=torch.float64).masked_fill(~allowed[:, None], -math.inf)
    for mask in (allowed[:, None], additive):
        q.requires_grad_().grad = None
        out = softmax_attention(q, k, v, mask)
        torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-10)
        out.sum().backward()
        assert torch.isfinite(q.grad).all()


def test_causal_without_mask_and_one_new_token() -> None:
    q, k, v = tensors()
    causal = torch.ones(2, 7, 7, dtype=torch.bool).tril()
    expected = naive(q, k, v, causal)
    torch.testing.assert_close(softmax_attention(q, k, v, None), expected, rtol=1e-10, atol=1e-10)
    last = softmax_attention(q[:, :, -1:], k, v, None)
    torch.testing.assert_close(last, expected[:, :, -1:], rtol=1e-10, atol=1e-10)
    seen = torch.ones(2, 1, 1, 7, dtype=torch.bool)
    seen[0, ..., :3] = False
    masked = softmax_attention(q[:, :, -1:], k, v, seen)
    torch.testing.assert_close(masked, naive(q[:, :, -1:], k, v, seen[:, 0]), rtol=1e-10, atol=1e-10)


def test_several_queries_over_a_longer_cache_need_a_mask() -> None:
    q, k, v = tensors(T=3)
    with pytest.raises(ValueError, match="3 queries over 7 keys"):
        softmax_attention(q, k, v, None)


def test_cpu_attention_is_float32_under_autocast_forward_and_backward() -> None:
    q, k, v = (t.bfloat16().requires_grad_() for t in tensors(dtype=torch.float32))
    wide = [t.detach().float().requires_grad_() for t in (q, k, v)]
    with torch.autocast("cpu", torch.bfloat16):
        out = softmax_attention(q, k, v, None)
    expected = softmax_attention(*wide, None)
    assert out.dtype == torch.float32 and torch.equal(out, expected)
    out.sum().backward()
    expected.sum().backward()
    assert torch.equal(q.grad, wide[0].grad.bfloat16())


@pytest.mark.parametrize(("kv_rotation", "kv_signs"), [(None, None), (32, None), (16, 3)])
def test_keys_are_shifted_rotated_and_quantized_values_as_they_are(
    kv_rotation: int | None, kv_signs: int | None
) -> None:
    q, k, v = tensors(dtype=torch.float32)
    precision = Precision.parse("NVFP4-KV4", kv_element="E1M2", kv_rotation=kv_rotation, kv_signs=kv_signs)
    kv = KVQuantizer(precision, 2, 32, "layer")
    kv.set_shift(torch.randn(2, 32))
    module = SimpleNamespace(reqat_kv=kv, is_causal=True)
    out, _ = reqat_attention(module, q, k, v, None)  # type: ignore[arg-type]

    def rotate(x: torch.Tensor) -> torch.Tensor:
        return block_hadamard(with_signs(x, kv_signs), kv_rotation) if kv_rotation else x

    shifted = k - kv.shift[:, None]  # type: ignore[index]
    k_hat = quantize(rotate(shifted), "NVFP4", element="E1M2", global_scale="row").dequantize()
    v_hat = quantize(v, "NVFP4", element="E1M2", global_scale="row").dequantize()
    expected = naive(rotate(q), k_hat, v_hat, torch.ones(2, 7, 7, dtype=torch.bool).tril())
    torch.testing.assert_close(out, expected.transpose(1, 2), rtol=1e-5, atol=1e-5)

    same, _ = reqat_attention(module, q, mark_quantized(k_hat), mark_quantized(v_hat), None)  # type: ignore[arg-type]
    assert torch.equal(out, same)


def test_shift_and_key_rotation_cancel_without_rounding() -> None:
    """softmax ignores a shift common to all keys; the rotation of queries and keys cancels in their product."""
    q, k, v = tensors()
    shifted = k - torch.randn(2, 1, 32, dtype=torch.float64)
    out = softmax_attention(block_hadamard(q, 32), block_hadamard(shifted, 32), v, None)
    torch.testing.assert_close(out, softmax_attention(q, k, v, None), rtol=1e-10, atol=1e-10)


def test_wrong_shifts_are_refused() -> None:
    kv = KVQuantizer(Precision.parse("NVFP4-KV4"), 2, 32, "model.layers.1.self_attn")
    with pytest.raises(ValueError, match=r"model.layers.1.self_attn: shift of shape \(4, 32\)"):
        kv.set_shift(torch.zeros(4, 32))
    with pytest.raises(ValueError, match="NaN"):
        kv.set_shift(torch.full((2, 32), math.nan))


def test_extras_that_it_does_not_compute_are_refused() -> None:
    q, k, v = tensors()
    with pytest.raises(ValueError, match="softcap=30"):
        reqat_attention(nn.Module(), q, k, v, None, softcap=30.0)


def test_bf16_model_equals_transformers_sdpa(tiny, family: str, ids: torch.Tensor) -> None:  # type: ignore[no-untyped-def]
    model = tiny(family)
    model.set_attn_implementation("sdpa")
    padding = torch.ones_like(ids)
    padding[0, :5] = 0
    segments = torch.tensor([0] * 6 + [1] * 8).expand_as(ids)
    packed = (segments[:, :, None] == segments[:, None]) & torch.ones(14, 14, dtype=torch.bool).tril()
    masks = (None, padding, packed[:, None], torch.zeros(3, 1, 14, 14).masked_fill(~packed[:, None], -math.inf))
    expected = [model(ids, attention_mask=mask).logits for mask in masks]
    prepare(model, "BF16")
    assert model.config._attn_implementation == ATTENTION
    for mask, logits in zip(masks, expected, strict=True):
        torch.testing.assert_close(model(ids, attention_mask=mask).logits, logits, rtol=1e-5, atol=1e-5)
    assert (expected[0] - expected[2]).abs().max() > 1e-2  # the packing mask matters


def test_packed_rows_equal_separate_rows(tiny, ids: torch.Tensor) -> None:  # type: ignore[no-untyped-def]
    model = tiny("llama").double()
    prepare(model, "NVFP4-W4A4KV4", global_scale="row")
    row = torch.cat([ids[0, :6], ids[1, :8]])[None]
    segments = torch.tensor([[0] * 6 + [1] * 8])
    mask = (segments[:, :, None] == segments[:, None]) & torch.ones(14, 14, dtype=torch.bool).tril()
    positions = torch.tensor([[*range(6), *range(8)]])
    packed = model(row, attention_mask=mask[:, None], position_ids=positions, use_cache=False).logits[0]
    separate = torch.cat([model(ids[:1, :6]).logits[0], model(ids[1:2, :8]).logits[0]])
    torch.testing.assert_close(packed, separate, rtol=1e-9, atol=1e-9)
