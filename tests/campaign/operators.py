"""Random calls of the native kernels' operators and wrappers: ``python -m tests.campaign.operators --calls 50000``.

Each call starts from arguments that fit together; most are then broken in one or two places (another length, type,
device or number of axes, a size that is negative, zero or huge, memory taken away, None). A call must either compute
what PyTorch computes from the same arguments, or raise ValueError or TypeError. Anything else is a failure: a crash of
the process, another exception, an answer to arguments that PyTorch refuses, other numbers.

Calls run in processes of their own, whose last words name the call that ended them; the next process goes on behind it.
``--sanitizer address`` builds the native library with the compiler's address sanitizer, which ends the process at the
first byte read or written outside of a tensor.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import random
import subprocess
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from reqat.formats import PackedTensor, QuantizedTensor, get_format, quantize, quantize_dequantize
from reqat_kernels.native import attention, dense, gemm, states, weights
from reqat_kernels.native import quantize as native

ROOT = Path(__file__).resolve().parents[2]
FORMATS = ("NVFP4", "NVFP4-4/6", "MXFP4")
HUGE = (1 << 31, 1 << 40, (1 << 62) + 1)


class Wrong(Exception):
    """A call that neither computed what PyTorch does nor refused its arguments."""


# --- arguments that fit -----------------------------------------------------------------------------------------------


def numbers(r: random.Random, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Normal numbers that depend on ``r`` alone."""
    generator = torch.Generator().manual_seed(r.getrandbits(40))
    return torch.randn(*shape, generator=generator, dtype=torch.float32).to(dtype)


def float_type(r: random.Random) -> torch.dtype:
    """One that kernels take."""
    return r.choice((torch.float32, torch.float32, torch.bfloat16, torch.float16))


def weight(r: random.Random, name: str | None = None) -> QuantizedTensor:
    """A quantized weight [N, K]. K is not 0: any number of rows would fit no bytes, and the product no memory."""
    rows, columns = r.choice((0, 1, 3, 16, 17, 40)), r.choice((1, 16, 31, 48, 96))
    return quantize(numbers(r, rows, columns), name or r.choice(FORMATS), pad=True)


def linear_arguments(r: random.Random) -> dict[str, Any]:
    """Of gemm.linear."""
    w = gemm.pack_weight(weight(r))
    x = numbers(r, *r.choice(((3,), (1,), (0,), (2, 2), ())), w.columns, dtype=float_type(r))
    bias = numbers(r, w.rows, dtype=float_type(r)) if r.random() < 0.5 else None
    inputs = r.choice((None, "A8", get_format("MXFP4" if w.format.block == 32 else "NVFP4")))
    return {"x": x, "w": w, "bias": bias, "inputs": inputs}


def layout(w: gemm.PackedWeight) -> dict[str, Any]:
    """The numbers that a raw operator takes."""
    return dict(zip(("rows", "columns", "element", "scale", "g"), w.layout, strict=True))


def raw_arguments(r: random.Random) -> dict[str, Any]:
    """Of torch.ops.reqat.fp4_linear."""
    a = linear_arguments(r)
    x = a["x"].reshape(-1, a["w"].columns) if a["x"].numel() else numbers(r, 2, a["w"].columns)
    return {"x": x, "weight": a["w"].data, "bias": a["bias"], **layout(a["w"])}


def raw_int_arguments(r: random.Random) -> dict[str, Any]:
    """Of torch.ops.reqat.fp4_linear_int."""
    a = linear_arguments(r)
    q = gemm.quantize_input(
        numbers(r, r.choice((0, 1, 5)), a["w"].columns), a["inputs"] or "A8", block=a["w"].format.block or 1
    )
    parts = {"x": q.x, "start": q.start, "block_scale": q.block_scale, "row_scale": q.row_scale}
    return {**parts, "weight": a["w"].data, "bias": a["bias"], **layout(a["w"])}


def side(r: random.Random, kind: str, shape: tuple[int, int, int, int]) -> tuple[attention.PackedStates, int]:
    """A cache with some tokens in it, and how many."""
    B, G, capacity, D = shape
    name = r.choice(FORMATS if D % 32 == 0 else FORMATS[:2])
    mode = r.choice(("row", "dynamic", "static"))
    fmt = get_format(name) if name == "MXFP4" else get_format(name, global_scale=mode)
    g = torch.tensor(100.0) if fmt.global_scale == "static" else None
    cache = attention.PackedStates.allocate(kind, fmt, B, G, capacity, D, global_scale=g)  # type: ignore[arg-type]
    length = r.randint(0, capacity)
    cache.append(numbers(r, B, G, length, D), 0)
    return cache, length


def cache_shape(r: random.Random) -> tuple[int, int, int, int]:
    """[B, G, capacity, D]."""
    return r.choice((1, 2, 3)), r.choice((1, 2)), r.choice((1, 16, 40)), r.choice((16, 32, 64))


def append_arguments(r: random.Random) -> dict[str, Any]:
    """Of PackedStates.append."""
    cache, _ = side(r, r.choice(("key", "value")), cache_shape(r))
    B, G, room, D = cache.shape
    T = r.choice((0, 1, 1, 3, 7, room))
    shift = numbers(r, G, D) if r.random() < 0.4 else None
    x = numbers(r, B, T, G, D, dtype=float_type(r)).transpose(1, 2)
    return {"cache": cache, "states": x, "start": r.randint(0, room - min(T, room)), "shift": shift}


def raw_append_arguments(r: random.Random) -> dict[str, Any]:
    """Of torch.ops.reqat.kv_append."""
    a = append_arguments(r)
    c = a["cache"]
    parts = {"codes": c.codes, "scales": c.scales, "global_scale": c.global_scale}
    rest = {"start": a["start"], "is_value": c.kind == "value", "format": native.format_key(c.format)}
    return {"states": a["states"], "shift": a["shift"], **parts, **rest}


def attention_arguments(r: random.Random) -> dict[str, Any]:
    """Of kv_attention."""
    shape = cache_shape(r)
    (key, a), (value, b) = (side(r, kind, shape) for kind in ("key", "value"))
    B, G, _, D = key.shape
    T, S = r.choice((1, 1, 3)), min(a, b)
    H = G * r.choice((1, 3))
    mask = None
    if r.random() < 0.4:
        mask = numbers(r, B, 1, 1, S) > -1 if r.random() < 0.5 else numbers(r, B, H, T, S)
    start = torch.tensor([r.randint(0, S) for _ in range(B)]) if r.random() < 0.3 else None
    query = numbers(r, B, T, H, D, dtype=float_type(r)).transpose(1, 2)
    rest = {"mask": mask, "start": start, "is_causal": r.random() < 0.5}
    return {"query": query, "key": key, "value": value, "length": S, "scaling": r.choice((None, 0.2)), **rest}


def raw_attention_arguments(r: random.Random) -> dict[str, Any]:
    """Of torch.ops.reqat.kv_attention."""
    a = attention_arguments(r)
    sides = {
        f"{kind}_{name}": part
        for kind in ("key", "value")
        for name, part in (
            ("codes", a[kind].codes),
            ("scales", a[kind].scales),
            ("global_scale", a[kind].global_scale),
            ("element", a[kind].format.element),
        )
    }
    rest = {name: a[name] for name in ("length", "mask", "start", "is_causal")}
    return {"query": a["query"], **sides, **rest, "scaling": a["scaling"] or 0.25}


def tensor_arguments(r: random.Random) -> dict[str, Any]:
    """Of quantizing along the last axis."""
    name = r.choice((*FORMATS, "AMXFP4", "INT4-g128", "INT4-row"))
    mode = r.choice(("row", "dynamic", "static")) if name.startswith("NVFP4") else None
    fmt = get_format(name, global_scale=mode)
    lead, block = r.choice(((), (1,), (3,), (2, 3), (0,))), fmt.block or r.choice((1, 7))
    x = numbers(r, *lead, block * r.choice((1, 2, 3)), dtype=r.choice((float_type(r), torch.float64)))
    if len(lead) == 2 and r.random() < 0.5:
        x = x.transpose(0, 1)
    g: Any = None
    if mode == "static" or (mode and r.random() < 0.3):
        g = r.choice((torch.tensor(50.0), torch.rand(*x.shape[:-1], 1) + 10))
    return {"x": x, "format": fmt, "global_scale": g}


def raw_tensor_arguments(r: random.Random) -> dict[str, Any]:
    """The same with the format as a string."""
    a = tensor_arguments(r)
    return {**a, "format": native.format_key(a["format"])}


def input_arguments(r: random.Random) -> dict[str, Any]:
    """Of quantize_input."""
    a = linear_arguments(r)
    static = isinstance(a["inputs"], native.Format) and a["inputs"].has_global_scale and r.random() < 0.4
    g = torch.tensor(30.0) if static else None
    return {"x": a["x"], "inputs": a["inputs"] or "A8", "block": a["w"].format.block, "global_scale": g}


def dense_arguments(r: random.Random) -> dict[str, Any]:
    """Of dense_bf16."""
    K = r.choice((0, 1, 7, 64))
    N, M = r.choice((0, 1, 5)), r.choice((0, 1, 4, 12))
    return {"x": numbers(r, M, K, dtype=float_type(r)), "weight": numbers(r, N, K, dtype=torch.bfloat16)}


def parts_arguments(r: random.Random) -> dict[str, Any]:
    """Of a quantized tensor's construction."""
    a = tensor_arguments(r)
    q = quantize(a["x"], a["format"], global_scale=a["global_scale"])
    return {field.name: getattr(q, field.name) for field in dataclasses.fields(q)}


# --- what PyTorch makes of the same arguments -------------------------------------------------------------------------


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
    want = attention._attention_torch(*(raw[name] for name in ("query", *_SIDES, *rest))).double()
    finite = want[torch.isfinite(want)]
    close(got, want, 1e-3 * float(finite.abs().max() if finite.numel() else 0) + 1e-5)


def check_parts(a: dict[str, Any], got: QuantizedTensor) -> None:
    """Construction: what was accepted packs, unpacks and dequantizes."""
    y = got.dequantize(torch.float32)
    if tuple(y.shape) != tuple(got.shape) or not bool(torch.isfinite(y).all()):
        raise Wrong(f"dequantized to {list(y.shape)}, finite: {bool(torch.isfinite(y).all())}")
    same(got.pack().unpack().codes, got.codes)


# --- operators --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Operator:
    """How arguments that fit are made, the call, and what it is held against."""

    arguments: Callable[[random.Random], dict[str, Any]]
    call: Callable[..., Any]
    check: Callable[[dict[str, Any], Any], None]


def _ordered(operator: Any, *names: str) -> Callable[..., Any]:
    return lambda **a: operator(*(a[name] for name in names))


_LAYOUT = ("rows", "columns", "element", "scale", "g")
_SIDES = tuple(f"{kind}_{part}" for kind in ("key", "value") for part in ("codes", "scales", "global_scale", "element"))


def _copied(t: Any) -> Any:
    return t.clone() if isinstance(t, Tensor) else t


def cache_parts(a: dict[str, Any]) -> dict[str, Any]:
    """Codes, scales and global scale of the cache that is appended to."""
    names = ("codes", "scales", "global_scale")
    return {name: getattr(a["cache"], name, None) if "cache" in a else a[name] for name in names}


def _appended(cache: attention.PackedStates, states: Any, start: Any, shift: Any) -> bool:
    cache.append(states, start, shift=shift)
    return True


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


OPERATORS: dict[str, Operator] = {
    "linear": Operator(linear_arguments, gemm.linear, check_linear),
    "fp4_linear": Operator(
        raw_arguments, _ordered(torch.ops.reqat.fp4_linear, "x", "weight", "bias", *_LAYOUT), check_raw
    ),
    "fp4_linear_int": Operator(
        raw_int_arguments,
        _ordered(torch.ops.reqat.fp4_linear_int, "x", "start", "block_scale", "row_scale", "weight", "bias", *_LAYOUT),
        check_raw_int,
    ),
    "pack_weight": Operator(lambda r: {"q": weight(r), "out": None}, gemm.pack_weight, check_packed),
    "quantize_input": Operator(input_arguments, gemm.quantize_input, check_input),
    "dense_bf16": Operator(dense_arguments, dense.dense_bf16, check_dense),
    "dense_bf16 (raw)": Operator(dense_arguments, _ordered(torch.ops.reqat.dense_bf16, "x", "weight"), check_dense),
    "append": Operator(append_arguments, _appended, check_append),
    "kv_append": Operator(
        raw_append_arguments,
        _ordered(
            torch.ops.reqat.kv_append,
            "states",
            "shift",
            "codes",
            "scales",
            "global_scale",
            "start",
            "is_value",
            "format",
        ),
        check_append,
    ),  # fmt: skip
    "kv_attention": Operator(attention_arguments, attention.kv_attention, check_attention),
    "kv_attention (raw)": Operator(
        raw_attention_arguments,
        _ordered(torch.ops.reqat.kv_attention, "query", *_SIDES, "length", "scaling", "mask", "start", "is_causal"),
        check_attention,
    ),
    "quantize": Operator(tensor_arguments, _ordered(native.quantize, "x", "format", "global_scale"), check_quantized),
    "quantize_packed": Operator(
        tensor_arguments, _ordered(native.quantize_packed, "x", "format", "global_scale"), check_quantized
    ),
    "quantize (raw)": Operator(
        raw_tensor_arguments, _ordered(torch.ops.reqat.quantize, "x", "format", "global_scale"), check_quantized
    ),
    "fake_quantize": Operator(
        tensor_arguments, _ordered(native.fake_quantize, "x", "format", "global_scale"), check_fake
    ),
    "fake_quantize (raw)": Operator(
        raw_tensor_arguments, _ordered(torch.ops.reqat.fake_quantize, "x", "format", "global_scale"), check_fake
    ),
    "QuantizedTensor": Operator(parts_arguments, QuantizedTensor, check_parts),
}


# --- breaking arguments -----------------------------------------------------------------------------------------------


def broken_tensor(r: random.Random, t: Tensor) -> Any:
    """``t`` with one thing changed."""
    way = r.randrange(14)
    if way == 0:
        return None
    if way == 1:
        return t.flatten()[: t.numel() - 1] if r.random() < 0.5 else t.flatten()
    if way == 2 and t.ndim:
        axis = r.randrange(t.ndim)
        return t.narrow(axis, 0, max(0, t.shape[axis] - r.choice((1, 1, 8)))) if t.shape[axis] else t[None]
    if way == 3 and t.ndim:
        axis = r.randrange(t.ndim)
        return torch.cat((t.view(torch.uint8), t.view(torch.uint8)), axis).view(t.dtype) if t.element_size() == 1 else (
            torch.cat((t, t), axis))  # fmt: skip
    if way == 4 and t.ndim > 1:
        a, b = r.sample(range(t.ndim), 2)
        return t.transpose(a, b)
    if way == 5:
        kinds = (torch.float64, torch.float32, torch.int32, torch.uint8, torch.int8, torch.bool, torch.complex64)
        return t.to(torch.float32).to(r.choice(kinds)) if t.element_size() == 1 else t.to(r.choice(kinds))
    if way == 6:
        return torch.empty(t.shape, dtype=t.dtype, device="meta")
    if way == 7:
        return torch.empty(0, dtype=t.dtype)
    if way == 8 and t.is_floating_point() and t.element_size() > 1 and t.numel():
        changed = t.clone(memory_format=torch.contiguous_format)
        changed.view(-1)[r.randrange(t.numel())] = r.choice((torch.nan, torch.inf, -torch.inf))
        return changed
    if way == 9 and t.ndim and t.numel():  # every second number of twice the memory
        integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[t.element_size()]
        return t.contiguous().view(integers).repeat_interleave(2, -1).view(t.dtype)[..., ::2]
    if way == 10:
        return t.clone().requires_grad_() if t.is_floating_point() and t.element_size() > 1 else t.clone()
    if way == 11:
        return r.choice((1.0, "x", [1, 2], 3))
    if way == 12:
        return t[None]
    return t.expand(3, *t.shape)


def broken(r: random.Random, value: Any) -> Any:
    """Something else in place of ``value``."""
    if isinstance(value, Tensor):
        return broken_tensor(r, value)
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return r.choice((-1, 0, -16, value + 1, value - 1, value + 16, *HUGE, -HUGE[1], None, 1.5, "3"))
    if isinstance(value, float):
        return r.choice((0.0, -1.0, float("nan"), float("inf"), 1e-40, None, "x"))
    if isinstance(value, native.Format):
        return r.choice((get_format("AMXFP4"), get_format("INT4-g128"), get_format("MXFP4"), None, 3))
    if isinstance(value, str):
        return r.choice(("", "x", "MXFP4", "E8M0", "NVFP4|E2M1|E4M3|divide|even|static|more", None, 7))
    if isinstance(value, torch.Size):
        return r.choice((torch.Size((3, 5)), torch.Size(()), (-1, 16), torch.Size((10**7, 64)), value + (1,), None))
    if isinstance(value, torch.dtype):
        return r.choice((torch.int32, torch.bool, None))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        if r.random() < 0.1 and not isinstance(value, attention.PackedStates):
            return None
        field = r.choice([f.name for f in dataclasses.fields(value)])
        return dataclasses.replace(value, **{field: broken(r, getattr(value, field))})
    return r.choice((None, torch.ones(1), torch.ones(3, 1), 0.0, -1, "x"))


#: Torch's own refusals: an argument of another type than the operator's schema says, which no operator sees, and a
#: result for which there is no memory (a weight of 2^31 rows without columns takes none, its product does).
_TORCHS = (
    "can't allocate memory",
    "There were no tensor arguments",
    "Expected a value of type",
    "is missing value for argument",
    "Unable to cast",
    "Overflow when unpacking",
)


def attempt(seed: int, index: int) -> tuple[str, str]:
    """One call; what came of it (``computed``, ``refused`` or ``failed``), and its description."""
    r = random.Random(f"{seed}/{index}")
    name = r.choice(list(OPERATORS))
    operator = OPERATORS[name]
    a = operator.arguments(r)
    changed = r.sample(list(a), min(len(a), r.choice((0, 1, 1, 1, 2))))
    try:
        for key in changed:
            a[key] = broken(r, a[key])
        if operator.check is check_append:
            a["before"] = {name: _copied(part) for name, part in cache_parts(a).items()}
        got = operator.call(**{key: value for key, value in a.items() if key != "before"})
        results = got if isinstance(got, tuple | list) else (got,)
        if any(isinstance(part, Tensor) and part.device.type == "meta" for part in results):
            if any(isinstance(v, Tensor) and v.device.type == "cpu" and v.numel() > 1 for v in a.values()):
                raise Wrong("a result on the device meta from arguments on the CPU")
            return "computed", f"{name} {changed}"
        operator.check(a, got)
    except (ValueError, TypeError) as error:
        return "refused", f"{name} {changed}: {error}"
    except RuntimeError as error:
        known = any(words in str(error) for words in _TORCHS)
        where = traceback.extract_tb(error.__traceback__)[-1]
        text = f"{name} {changed}: {error!r:.300} ({Path(where.filename).name}:{where.lineno})"
        return "refused" if known else "failed", text
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        return "failed", f"{name} {changed}: {error!r:.300} ({Path(where.filename).name}:{where.lineno})"
    return "computed", f"{name} {changed}"


# --- running ----------------------------------------------------------------------------------------------------------


def work(seed: int, first: int, count: int, log: Path) -> None:
    """Calls ``first`` to ``first + count``; ``log`` gets a line before each and what came of it after."""
    torch.set_num_threads(1)
    with log.open("w", buffering=1) as out:
        for index in range(first, first + count):
            out.write(f"{index} ")
            out.flush()
            outcome, text = attempt(seed, index)
            out.write(outcome + (" " + json.dumps(text) if outcome == "failed" else "") + "\n")


def run(
    calls: int, seed: int, *, sanitizer: str | None = None, isa: str | None = None, say: Callable[[str], None] = print
) -> dict[str, Any]:
    """``calls`` calls; ``tried``, ``counts`` of refused, computed, failed and crashes, and ``failures`` in words."""
    counts: Counter[str] = Counter(dict.fromkeys(("refused", "computed", "failed", "crashes"), 0))
    failures: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        environment = dict(os.environ)
        if sanitizer:
            from tests.kernels.test_sanitizers import checked_environment

            environment = checked_environment(Path(folder))
            # A result that is too large for memory is an error of torch's then, and not the end of the process.
            environment["ASAN_OPTIONS"] += ":allocator_may_return_null=1"
        environment |= {"OMP_NUM_THREADS": "1"} | ({"REQAT_ISA": isa} if isa else {})
        log, first = Path(folder) / "log", 0
        while first < calls:
            count = min(5000, calls - first)
            command = [sys.executable, "-m", "tests.campaign.operators", "--work", str(log), "--first", str(first)]
            command += ["--calls", str(count), "--seed", str(seed)]
            log.unlink(missing_ok=True)
            done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
            lines = log.read_text().splitlines() if log.exists() else []
            for line in lines:
                index, _, rest = line.partition(" ")
                outcome, _, text = rest.partition(" ")
                counts[outcome or "crashes"] += 1
                if outcome == "failed":
                    failures.append(f"call {index}: {json.loads(text)}")
            if done.returncode:
                last = lines[-1].split(" ")[0] if lines else "none"
                words = [row for row in done.stderr.splitlines() if "ERROR" in row or "rror:" in row][:2]
                failures.append(f"call {last}: the process ended with {done.returncode}: {' '.join(words)[:300]}")
                if not lines:
                    counts["crashes"] += 1
                    break
            first += len(lines)
            say(f"{first} calls: {dict(counts)}")
            sys.stdout.flush()
    return {"tried": first, "counts": dict(counts), "failures": failures}


def main() -> int:
    """The command line; 1 if a call failed."""
    parser = argparse.ArgumentParser(prog="python -m tests.campaign.operators", description=__doc__.split("\n")[0])
    parser.add_argument("--calls", type=int, default=50_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--sanitizer", choices=["address"], help="build the native library with it")
    parser.add_argument("--isa", choices=["portable", "avx2", "avx512", "torch"], help="use this instruction set")
    parser.add_argument("--first", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.work:
        work(given.seed, given.first, given.calls, given.work)
        return 0
    found = run(given.calls, given.seed, sanitizer=given.sanitizer, isa=given.isa)
    for failure in found["failures"][:40]:
        print(failure)
    counts = found["counts"]
    print(
        f"{found['tried']} calls: "
        + ", ".join(f"{counts[k]} {k}" for k in ("refused", "computed", "failed", "crashes"))
    )
    return 1 if found["failures"] else 0


if __name__ == "__main__":
    sys.exit(main())
