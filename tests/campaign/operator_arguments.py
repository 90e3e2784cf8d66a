"""Arguments of the native operators: some that fit together, and others in their place."""

from __future__ import annotations

import dataclasses
import random
from typing import Any

import torch
from torch import Tensor

from reqat.formats import QuantizedTensor, get_format, quantize
from reqat_kernels.native import attention, gemm
from reqat_kernels.native import quantize as native

FORMATS = ("NVFP4", "NVFP4-4/6", "MXFP4")
HUGE = (1 << 31, 1 << 40, (1 << 62) + 1)


# --- that fit ---------------------------------------------------------------------------------------------------------


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
    T, S = r.choice((1, 1, 3, 9, 21)), min(a, b)  # more than eight: as of a prompt
    H = G * r.choice((1, 3))
    mask = None
    if r.random() < 0.4:
        shape = r.choice(((B, 1, 1, S), (B, 1, T, S), (B, H, T, S)))
        mask = numbers(r, *shape) > -1 if r.random() < 0.5 else numbers(r, *shape)
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


def dense_f32_arguments(r: random.Random) -> dict[str, Any]:
    """Of dense_f32."""
    a = dense_arguments(r)
    return {"x": a["x"], "weight": a["weight"].float()}


def int8_arguments(r: random.Random) -> dict[str, Any]:
    """Of dense_int8."""
    N, M, K = r.choice((0, 1, 5)), r.choice((0, 1, 4, 12)), r.choice((0, 1, 7, 64))
    weight = (numbers(r, N, K) * 40).clamp(-128, 127).to(torch.int8)
    return {"x": numbers(r, M, K, dtype=float_type(r)), "weight": weight, "scale": numbers(r, N)}


def int8_a8_arguments(r: random.Random) -> dict[str, Any]:
    """Of dense_int8_a8."""
    a = int8_arguments(r)
    x = (a["x"].float() * 40).clamp(-128, 127).to(torch.int8)
    return {"x": x, "row_scale": numbers(r, len(x)), "weight": a["weight"], "scale": a["scale"]}


def table_arguments(r: random.Random) -> dict[str, Any]:
    """Of piecewise_linear."""
    E = r.choice((1, 2, 15, 16, 17, 40, 256))
    parts = {"slopes": numbers(r, E), "intercepts": numbers(r, E)}
    x = numbers(r, r.choice((0, 1, 33)), r.choice((1, 16, 70)), dtype=float_type(r))
    return {"x": x, "breakpoints": numbers(r, E - 1).sort()[0], **parts}


def parts_arguments(r: random.Random) -> dict[str, Any]:
    """Of a quantized tensor's construction."""
    a = tensor_arguments(r)
    q = quantize(a["x"], a["format"], global_scale=a["global_scale"])
    return {field.name: getattr(q, field.name) for field in dataclasses.fields(q)}


# --- broken -----------------------------------------------------------------------------------------------------------


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
