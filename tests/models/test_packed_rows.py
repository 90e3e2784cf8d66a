"""Attention of packed rows without a mask of T x T: the formula under the dense mask, with keys and values in four bits
too, in its two forms (a call a trace, and torch's variable-length attention with a stand-in for its kernel)."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from reqat.models import KVQuantizer, softmax_attention
from reqat.models.attention import Segments, dense_mask, reqat_attention, segment_mask, varlen_attention
from reqat.quant import Precision

# Two traces and padding; one trace and much padding; a row of padding; a whole row.
IDS = torch.tensor([[1] * 5 + [2] * 4 + [0] * 2, [1] * 2 + [0] * 9, [0] * 11, [7] * 11])
T = IDS.shape[1]


def allowed() -> Tensor:
    """Who attends to whom, by the definition."""
    found = torch.zeros(len(IDS), T, T, dtype=torch.bool)
    for b, row in enumerate(IDS.tolist()):
        for t in range(T):
            for s in range(t + 1):
                found[b, t, s] = t == s or (row[t] == row[s] and row[t] > 0)
    return found


def tensors(heads: int = 6, groups: int = 2, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    torch.manual_seed(0)
    shapes = [(len(IDS), n, T, 32) for n in (heads, groups, groups)]
    return [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]


def formula(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention [B, T, H, D] by its formula."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    logits = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).masked_fill(~allowed()[:, None], -math.inf)
    return (logits.softmax(-1) @ v).transpose(1, 2)


def gradients(out: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    torch.manual_seed(1)
    return list(torch.autograd.grad((out * torch.randn(out.shape, dtype=out.dtype)).sum(), inputs))


def kernel(
    query: Tensor, key: Tensor, value: Tensor, ends_q: Tensor, ends_k: Tensor, max_q: int, max_k: int, **options: Any
) -> Tensor:
    """``varlen_attn`` by its documentation, for causal attention: [N, heads, D], cut at ``ends``."""
    assert options.pop("window_size") == (-1, 0) and ends_q.dtype == ends_k.dtype == torch.int32
    assert options.pop("enable_gqa") == (query.shape[1] != key.shape[1]) and set(options) == {"scale"}
    lengths = ends_q.diff().tolist()
    assert max_q == max_k == max(lengths) and sum(lengths) == len(query) == len(key)
    parts = []
    for q, k, v in zip(*(x.split(lengths) for x in (query, key, value)), strict=True):
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
        parts.append(softmax_attention(q, k, v, None, scaling=options["scale"])[0].transpose(0, 1))
    return torch.cat(parts)


def test_the_dense_mask_is_the_definition() -> None:
    assert torch.equal(dense_mask(IDS)[:, 0], allowed())


def test_segments_are_runs_of_one_id() -> None:
    segments = Segments.of(segment_mask(IDS))
    assert segments.rows == (((5, True), (4, True), (2, False)), ((2, True), (9, False)), ((11, False),), ((11, True),))
    assert segments.traces == [5, 4, 2, 11] and segments.longest == 11
    assert Segments.of(segment_mask(torch.zeros(1, 3, dtype=torch.int64))).longest == 1
    mask = segment_mask(IDS)
    assert mask.numel() == IDS.numel() and Segments.of(mask) is Segments.of(mask), "read once for all layers"
    changed = segment_mask(IDS.clone())
    assert len(Segments.of(changed).traces) == 4
    changed[3] = 0
    assert len(Segments.of(changed).traces) == 3


@pytest.mark.parametrize("heads", [(6, 2), (3, 3)])
@pytest.mark.parametrize("varlen", [False, True])
def test_values_and_gradients_are_those_of_the_formula(
    heads: tuple[int, int], varlen: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = tensors(*heads)
    if varlen:
        monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", kernel)
        out = varlen_attention(*inputs, Segments.of(segment_mask(IDS))).transpose(1, 2)
    else:
        out, _ = reqat_attention(SimpleNamespace(), *inputs, segment_mask(IDS))  # type: ignore[arg-type]
    expected = formula(*inputs)
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-10)
    for ours, theirs in zip(gradients(out, inputs), gradients(expected, inputs), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("global_scale", ["dynamic", "row"])
def test_keys_and_values_in_four_bits_are_the_same_as_under_the_mask(global_scale: str) -> None:
    """Scales are over whole rows, or all of them, padding included; the shift moves all of a trace's logits alike."""
    inputs = tensors()
    kv = KVQuantizer(Precision.parse("NVFP4-KV4", global_scale=global_scale), 2, 32, "layer")
    kv.set_shift(torch.randn(2, 32))
    module: Any = SimpleNamespace(reqat_kv=kv, is_causal=True)
    out, maps = reqat_attention(module, *inputs, segment_mask(IDS))
    expected, _ = reqat_attention(module, *inputs, dense_mask(IDS))
    assert maps is None and (expected - formula(*inputs)).abs().max() > 1e-2, "four bits are seen"
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-10)
    for ours, theirs in zip(gradients(out, inputs), gradients(expected, inputs), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
    asked = [reqat_attention(module, *inputs, mask, output_attentions=True) for mask in map_masks()]
    assert all(torch.equal(a, b) for a, b in zip(*asked, strict=True))


def map_masks() -> tuple[Tensor, Tensor]:
    return segment_mask(IDS), dense_mask(IDS)


def test_a_sliding_window_bounds_traces_not_rows() -> None:
    inputs = [x[:2] for x in tensors()]
    out, _ = reqat_attention(SimpleNamespace(), *inputs, segment_mask(IDS[:2]), sliding_window=5)  # type: ignore[arg-type]
    torch.testing.assert_close(out, formula(*tensors())[:2], rtol=1e-10, atol=1e-10)
    with pytest.raises(ValueError, match="5 tokens in a layer with a sliding window of 4"):
        reqat_attention(SimpleNamespace(), *inputs, segment_mask(IDS[:2]), sliding_window=4)  # type: ignore[arg-type]


def test_an_integer_mask_of_another_shape_is_refused() -> None:
    with pytest.raises(ValueError, match=r"\(4, 1, 11, 11\).*booleans"):
        reqat_attention(SimpleNamespace(), *tensors(), dense_mask(IDS).long())  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_boolean_mask_gives_torchs_own_bits(dtype: torch.dtype) -> None:
    """What is added is made once for all layers; torch would make it in each of them, of the same numbers."""
    inputs, mask = tensors(dtype=dtype), dense_mask(IDS)
    expected = F.scaled_dot_product_attention(*inputs, mask, enable_gqa=True)
    again = [softmax_attention(*inputs, mask) for _ in range(2)]
    assert all(torch.equal(out, expected) for out in again)
    kept = [out.grad_fn._saved_attn_mask.data_ptr() for out in again]  # type: ignore[union-attr]
    assert kept[0] == kept[1]
    for ours, theirs in zip(gradients(again[1], inputs), gradients(expected, inputs), strict=True):
        assert torch.equal(ours, theirs)
    mask[3] = dense_mask(IDS)[0]  # written to: what was made of it is made anew
    changed = softmax_attention(*inputs, mask)
    assert torch.equal(changed, F.scaled_dot_product_attention(*inputs, mask, enable_gqa=True))
