"""What PyTorch makes of the arguments of a native operator, held against what the operator gave."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from reqat.formats import PackedTensor, QuantizedTensor, quantize, quantize_dequantize
from reqat_kernels.native import attention, dense, gemm, states, weights
from reqat_kernels.native import quantize as native

SIDES = tuple(f"{kind}_{part}" for kind in ("key", "value") for part in ("codes", "scales", "global_scale", "element"))


class Wrong(Exception):
    """A call that neither computed what PyTorch does nor refused its arguments."""


def close(got: Tensor, want: Tensor, bound: Tensor | float) -> None:
    """Refuse numbers further apart than ``bound``, or not finite in other places."""
    if got.shape != want.shape:
        raise Wrong(f"shape {list(got.shape)}, not {list(want.shape)}")
    got, finite = got.double(), torch.isfinite(want)
    if not torch.equal(torch.isfinite(got), finite):
        raise Wrong("finite in other places than PyTorch's")
    if bool(((got - want).abs() > bound)[finite].any()):
        raise Wrong(f"off by {float((got - want).abs()[finite].max()):.3g}")


def product(x: Tensor, w: Tensor, bias: Tensor | None, got: Tensor) -> None:
    """Hold ``got`` against ``x @ w.T + bias`` in float64."""
    x, w = x.double(), w.double()
    want = x @ w.T if bias is None else x @ w.T + bias.double()
    size = x.abs().nan_to_num(0, 0, 0) @ w.abs().T + (0 if bias is None else bias.double().abs())
    terms = (x.shape[-1] + 8) * 2.0**-23 + {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}.get(got.dtype, 0.0)
    smallest = 2.0**-24 if got.dtype == torch.float16 else 1e-30  # a step of its subnormal numbers
    close(got, want, size * terms + smallest)


def raw_weight(a: dict[str, Any]) -> Tensor:
    """The dense weight behind a raw operator's arguments."""
    parts = (a["rows"], a["x"].shape[1], a["element"], a["scale"])
    return weights.dense(a["weight"], *parts).double() * (0.5 / a["g"])


def check_linear(a: dict[str, Any], got: Tensor) -> None:
    """gemm.linear."""
    x, w = a["x"], a["w"]
    if a["inputs"] == "A8":
        s = x.float().abs().amax(-1, keepdim=True) / 127 if x.numel() else x.float().sum(-1, keepdim=True)
        x = ((x.float() / torch.where(s == 0, 1.0, s)).round() * torch.where(s == 0, 1.0, s)).to(torch.float32)
    elif a["inputs"] is not None:
        x = quantize(x.float(), a["inputs"], pad=True).dequantize()
    lead = x.shape[:-1]
    product(x.reshape(-1, w.columns) if x.numel() else x.reshape(lead.numel(), w.columns), w.dequantize(), a["bias"],
            got.reshape(lead.numel(), w.rows))  # fmt: skip


def check_raw(a: dict[str, Any], got: Tensor) -> None:
    """fp4_linear."""
    product(a["x"], raw_weight(a), a["bias"], got)


def check_raw_int(a: dict[str, Any], got: Tensor) -> None:
    """fp4_linear_int."""
    x = a["x"].double()
    if a["block_scale"] is not None:
        x = x * a["block_scale"].double().repeat_interleave(32 if a["scale"] else 16, -1)
    if a["row_scale"] is not None:
        x = x * a["row_scale"].double()[:, None]
    product(x, raw_weight(a), a["bias"], got)


def check_dense(a: dict[str, Any], got: Tensor) -> None:
    """dense_bf16; many rows are multiplied in bfloat16."""
    x = a["x"].bfloat16() if len(a["x"]) > dense.MOST_ROWS else a["x"].float()
    want = x.double() @ a["weight"].double().T
    many = 2.0**-7 if len(a["x"]) > dense.MOST_ROWS else 0
    size = x.double().abs().nan_to_num(0, 0, 0) @ a["weight"].double().abs().T
    close(got, want, size * ((x.shape[-1] + 8) * 2.0**-23 + many) + 1e-30)


def check_dense_f32(a: dict[str, Any], got: Tensor) -> None:
    """dense_f32."""
    product(a["x"].float(), a["weight"], None, got)


def check_int8(a: dict[str, Any], got: Tensor) -> None:
    """dense_int8 and dense_int8_a8: the sum of products, then its scales (0 times infinity where K is 0)."""
    x, w, scale = a["x"].double(), a["weight"].double(), a["scale"]
    if not a["x"].is_floating_point():  # the product of both scales is one of float32
        scale = scale * a["row_scale"][:, None]
    size = (x.abs().nan_to_num(0, 0, 0) @ w.abs().T) * scale.double().abs().nan_to_num(0, 0, 0)
    close(got, (x @ w.T) * scale.double(), size * (x.shape[-1] + 8) * 2.0**-23 + 1e-30)


def check_table(a: dict[str, Any], got: Tensor) -> None:
    """piecewise_linear, where breakpoints are in order; without order any entry may be taken."""
    x, d = a["x"].detach().float(), a["breakpoints"].detach()
    if bool(d.isnan().any()) or not torch.equal(d, d.sort()[0]):
        return
    at = (d <= x[..., None]).sum(-1)
    want = a["slopes"].detach()[at] * x + a["intercepts"].detach()[at]
    same(got.nan_to_num(7.0), want.to(a["x"].dtype).nan_to_num(7.0))


def same(got: Any, want: Any) -> None:
    """Refuse other bits."""
    if (got is None) != (want is None):
        raise Wrong("a part is missing")
    if got is None:
        return
    got, want = got.detach(), want.detach()
    if got.shape != want.shape or got.dtype != want.dtype:
        raise Wrong(f"{got.dtype} {list(got.shape)}, not {want.dtype} {list(want.shape)}")
    integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[got.element_size()]
    if not torch.equal(got.contiguous().view(integer), want.contiguous().view(integer)):
        raise Wrong("other bits than PyTorch's")


def parts_of(q: Any) -> tuple[Any, ...]:
    """Codes, scales and global scale."""
    return (q.packed if isinstance(q, PackedTensor) else q.codes, q.scales, q.global_scale)


def check_quantized(a: dict[str, Any], got: Any) -> None:
    """quantize, quantize_packed and the raw operator."""
    fmt = native.format_from_key(a["format"]) if isinstance(a["format"], str) else a["format"]
    want = quantize(a["x"], fmt, global_scale=a["global_scale"])
    expected = parts_of(want if isinstance(got, QuantizedTensor) else want.pack())
    for part, other in zip(got if isinstance(got, tuple) else parts_of(got), expected, strict=True):
        same(part if other is not None or not isinstance(got, tuple) else None, other)


def check_fake(a: dict[str, Any], got: Tensor) -> None:
    """fake_quantize."""
    fmt = native.format_from_key(a["format"]) if isinstance(a["format"], str) else a["format"]
    same(got, quantize_dequantize(a["x"], fmt, global_scale=a["global_scale"]))


def check_input(a: dict[str, Any], got: gemm.QuantizedInput) -> None:
    """quantize_input."""
    x = a["x"].float()
    if a["inputs"] == "A8":
        values = got.x[:, : x.shape[-1]].double() * got.row_scale.double()[:, None]  # type: ignore[union-attr]
        step = got.row_scale.double()[:, None] * 0.51  # type: ignore[union-attr]
        close(values, x.reshape(values.shape).double(), step)
        return
    q = quantize(x.reshape(-1, x.shape[-1]) if x.numel() else x.reshape(got.x.shape[0], x.shape[-1]), a["inputs"],
                 pad=True, global_scale=a["global_scale"])  # fmt: skip
    same(got.x, (q.format.element_type.decode(q.codes) * 2).to(torch.int8))


def check_packed(a: dict[str, Any], got: gemm.PackedWeight) -> None:
    """pack_weight: unpacking gives back what was packed."""
    q = got.unpack()
    for part, other in zip(parts_of(q), parts_of(a["q"]), strict=True):
        same(part if part is None else part.reshape(other.shape), other)


def check_attention(a: dict[str, Any], got: Tensor) -> None:
    """kv_attention."""
    raw = dict(a)
    if "key" in a:
        for kind in ("key", "value"):
            part = raw.pop(kind)
            raw |= {f"{kind}_codes": part.codes, f"{kind}_scales": part.scales}
            raw |= {f"{kind}_global_scale": part.global_scale, f"{kind}_element": part.format.element}
        raw["scaling"] = a["query"].shape[-1] ** -0.5 if a["scaling"] is None else a["scaling"]
        raw["is_causal"] = a["is_causal"] and a["mask"] is None
    scales = [raw[f"{kind}_global_scale"] for kind in ("key", "value")]
    if not all(g is None or bool(torch.isfinite(g).all()) for g in scales):
        # Of tokens that nobody sees, whose weight is 0, PyTorch makes NaN of NaN; the kernel may not read them.
        if got.shape != a["query"].shape:
            raise Wrong(f"shape {list(got.shape)}")
        return
    rest = ("length", "scaling", "mask", "start", "is_causal")
    want = attention._attention_torch(*(raw[name] for name in ("query", *SIDES, *rest))).double()
    finite = want[torch.isfinite(want)]
    close(got, want, 1e-3 * float(finite.abs().max() if finite.numel() else 0) + 1e-5)


def check_parts(a: dict[str, Any], got: QuantizedTensor) -> None:
    """Construction: what was accepted packs, unpacks and dequantizes."""
    y = got.dequantize(torch.float32)
    if tuple(y.shape) != tuple(got.shape) or not bool(torch.isfinite(y).all()):
        raise Wrong(f"dequantized to {list(y.shape)}, finite: {bool(torch.isfinite(y).all())}")
    same(got.pack().unpack().codes, got.codes)


def cache_parts(a: dict[str, Any]) -> dict[str, Any]:
    """Codes, scales and global scale of the cache that is appended to."""
    names = ("codes", "scales", "global_scale")
    return {name: getattr(a["cache"], name, None) if "cache" in a else a[name] for name in names}


def check_append(a: dict[str, Any], got: bool) -> None:
    """kv_append and PackedStates.append: the bytes of the PyTorch path."""
    if "cache" in a:
        rest = (a["start"], a["cache"].kind == "value", native.format_key(a["cache"].format))
    else:
        rest = (a["start"], a["is_value"], a["format"])
    raw, old = cache_parts(a), a["before"]
    x = a["states"].float() if a["states"].dtype == torch.float64 else a["states"]
    want = states._append_torch(x, a["shift"], old["codes"], old["scales"], old["global_scale"], *rest)
    if bool(got) != bool(want):
        raise Wrong(f"finite: {got}, not {want}")
    if want:
        for name, part in raw.items():
            same(part, old[name])
