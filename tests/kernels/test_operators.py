"""Operators trust nothing: random calls, the faults that were seen, and torch's default dtype and device."""

from __future__ import annotations

import ast
import dataclasses
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import reqat
import reqat.formats
from reqat_kernels.native import attention, dense, gemm, int8, table
from reqat_kernels.native.quantize import fake_quantize, format_key, quantize, quantize_packed
from reqat_kernels.native.weights import weight_of

ROOT = Path(__file__).resolve().parents[2]
NVFP4 = reqat.get_format("NVFP4")


def packed(rows: int = 24, columns: int = 64, fmt: str = "NVFP4") -> gemm.PackedWeight:
    generator = torch.Generator().manual_seed(0)
    return gemm.pack_weight(reqat.quantize(torch.randn(rows, columns, generator=generator), fmt, pad=True))


def campaign(*arguments: str) -> str:
    command = [sys.executable, "-m", "tests.campaign.operators", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    return done.stdout.splitlines()[-1]


def test_random_calls_compute_what_pytorch_does_or_are_refused() -> None:
    last = campaign("--calls", "400", "--seed", "7")
    assert last.startswith("400 calls") and "0 failed" in last and "0 crashes" in last
    assert ", 0 computed" not in last and " 0 refused" not in last


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.skipif(sys.platform != "linux", reason="needs g++ on Linux")
def test_random_calls_touch_no_foreign_memory() -> None:
    last = campaign("--calls", "1000", "--seed", "8", "--sanitizer", "address")
    assert "0 failed" in last and "0 crashes" in last


BROKEN: dict[str, Callable[[], Any]] = {
    "bias of another length": lambda: gemm.linear(torch.ones(2, 64), packed(), torch.ones(1)),
    "bias of integers": lambda: gemm.linear(torch.ones(2, 64), packed(), torch.ones(24).int()),
    "bias on another device": lambda: gemm.linear(torch.ones(2, 64), packed(), torch.ones(24, device="meta")),
    "x on another device": lambda: gemm.linear(torch.ones(2, 64, device="meta"), packed()),
    "x of integers": lambda: gemm.linear(torch.ones(2, 64).int(), packed()),
    "a global scale for inputs that have none": lambda: gemm.linear(
        torch.ones(2, 64), packed(), inputs="A8", global_scale=torch.tensor(2.0)
    ),
    "a negative block": lambda: gemm.quantize_input(torch.ones(2, 64), "A8", block=-16),
    "a block of none": lambda: gemm.quantize_input(torch.ones(2, 64), "A8", block=0),
    "a static scale of zero": lambda: gemm.quantize_input(
        torch.ones(2, 64), NVFP4, block=16, global_scale=torch.tensor(0.0)
    ),
    "more rows than bytes": lambda: dataclasses.replace(packed(), rows=10**7),
    "negative rows": lambda: dataclasses.replace(packed(), rows=-16),
    "weight with global scale 0": lambda: dataclasses.replace(packed(), global_scale=0.0),
    "weight with a NaN": lambda: dataclasses.replace(packed(), global_scale=float("nan")),
    "weight with bytes cut off": lambda: dataclasses.replace(packed(), data=packed().data[:-1]),
    "rounded input without starts": lambda: gemm.linear(
        dataclasses.replace(gemm.quantize_input(torch.ones(2, 64), "A8", block=16), start=torch.empty(0)), packed()
    ),
    "rounded input of another shape": lambda: gemm.linear(
        dataclasses.replace(gemm.quantize_input(torch.ones(2, 64), "A8", block=16), shape=torch.Size((3, 64))),
        packed(),
    ),
    "short weight, raw": lambda: torch.ops.reqat.fp4_linear(
        torch.ones(2, 64), packed().data[:64], None, *packed().layout
    ),
    "dense weight of float32, raw": lambda: torch.ops.reqat.dense_bf16(torch.ones(2, 64), torch.ones(3, 64)),
    "dense of other columns, raw": lambda: torch.ops.reqat.dense_bf16(torch.ones(2, 63), torch.ones(3, 64).bfloat16()),
    "a token beyond the cache, raw": lambda: append(cache("key"), torch.ones(1, 2, 1, 32), start=16),
    "a token before the cache, raw": lambda: append(cache("key"), torch.ones(1, 2, 1, 32), start=-1),
    "tokens of other heads, raw": lambda: append(cache("key"), torch.ones(1, 3, 1, 32)),
    "scales cut off, raw": lambda: append(
        cache("key"), torch.ones(1, 2, 1, 32), scales=torch.zeros(1, 2, 1, 1, 16, dtype=torch.uint8)
    ),
    "a row that is not there": lambda: cache("key").select_rows(torch.tensor([1]), 4),
    "a length beyond the cache": lambda: cache("key").dequantize(17),
    "a cache with a static scale of zero": lambda: attention.PackedStates.allocate(
        "key", NVFP4, 1, 1, 16, 32, global_scale=torch.tensor(0.0)
    ),
    "keys for values": lambda: attention.kv_attention(torch.ones(1, 2, 1, 32), cache("value"), cache("value"), 4),
}


def cache(kind: Any) -> attention.PackedStates:
    states = attention.PackedStates.allocate(kind, NVFP4.replace(global_scale="row"), 1, 2, 16, 32)
    states.append(torch.randn(1, 2, 4, 32, generator=torch.Generator().manual_seed(1)), 0)
    return states


def append(states: attention.PackedStates, x: Tensor, start: int = 4, scales: Tensor | None = None) -> bool:
    parts = (states.codes, states.scales if scales is None else scales, states.global_scale)
    return torch.ops.reqat.kv_append(x, None, *parts, start, states.kind == "value", format_key(states.format))


@pytest.mark.parametrize("what", BROKEN)
def test_arguments_that_do_not_fit_are_refused(what: str) -> None:
    with pytest.raises((ValueError, TypeError)):
        BROKEN[what]()


@pytest.mark.parametrize("call", [gemm.linear, gemm.pack_weight, dense.dense_bf16, attention.kv_attention])
def test_what_is_no_tensor_is_a_type_error(call: Callable[..., Any]) -> None:
    arguments = {gemm.linear: 2, gemm.pack_weight: 1, dense.dense_bf16: 2, attention.kv_attention: 4}
    with pytest.raises(TypeError, match="NoneType"):
        call(*[None] * arguments[call])


def test_empty_sizes_work_where_they_mean_something() -> None:
    none = gemm.pack_weight(reqat.quantize(torch.zeros(0, 64), "NVFP4"))
    assert gemm.linear(torch.ones(3, 64), none).shape == (3, 0) and none.dequantize().shape == (0, 64)
    for inputs in (None, "A8", NVFP4):
        assert gemm.linear(torch.ones(0, 64), packed(), inputs=inputs).shape == (0, 24)
        assert gemm.linear(torch.ones(3, 64), none, inputs=inputs).shape == (3, 0)
    narrow = gemm.pack_weight(reqat.quantize(torch.zeros(5, 0), "NVFP4"))
    assert torch.equal(gemm.linear(torch.ones(2, 0), narrow, torch.arange(5.0)), torch.arange(5.0).expand(2, 5))
    for rows in (torch.tensor([]), torch.tensor([], dtype=torch.long)):
        assert cache("key").select_rows(rows, 4).dequantize(4).shape == (0, 2, 4, 32)
    assert reqat.quantize_dequantize(torch.ones(0, 32), "NVFP4", global_scale="row").shape == (0, 32)


def test_a_structure_for_c_is_checked_once_and_kept() -> None:
    w = packed()
    assert weight_of(w) is weight_of(w)


# --- torch's defaults -------------------------------------------------------------------------------------------------


def everything() -> Iterator[Tensor]:
    """Results of all kernels and of the formats, from inputs that name their types."""
    generator = torch.Generator().manual_seed(3)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float32, device="cpu")

    x, w = randn(3, 64), randn(32, 64)
    for name in ("NVFP4", "NVFP4-4/6", "MXFP4", "AMXFP4", "INT4-row"):
        fmt = reqat.get_format(name)
        q = reqat.quantize(w, fmt)
        yield from (q.codes, q.scales.float(), q.dequantize(), reqat.quantize_dequantize(w, fmt))
        yield from (fake_quantize(w, fmt), quantize(w, fmt).codes, quantize_packed(w, fmt).packed)
        if fmt.has_global_scale:
            yield fake_quantize(w, fmt, 50.1)
            yield reqat.formats.global_scale_for(w, fmt)
        if not gemm.supports(fmt):
            continue
        p = gemm.pack_weight(q)
        yield from (p.data, p.dequantize())
        ways = (None, "A8", reqat.get_format("MXFP4" if fmt.block == 32 else "NVFP4"))
        for inputs in ways:
            yield gemm.linear(x, p, torch.ones(32, dtype=torch.float32, device="cpu"), inputs=inputs)
            if gemm._library() is not None:
                yield from gemm.Products(x, [p], inputs=inputs)()
        mode = "row" if fmt.has_global_scale else None
        key, value = (
            attention.PackedStates.allocate(kind, reqat.get_format(name, global_scale=mode), 1, 2, 20, 32)
            for kind in ("key", "value")
        )
        for states in (key, value):
            states.append(randn(1, 2, 18, 32), 0)
            yield from (states.codes, states.dequantize(18))
        yield attention.kv_attention(randn(1, 4, 1, 32), key, value, 18)
    yield dense.dense_bf16(x, w.bfloat16())
    yield dense.dense_f32(x, w)
    eight = int8.pack_int8(reqat.quantize(w, "INT8-row"))
    yield from (int8.linear_int8(x, eight, inputs=kind) for kind in (None, "A8"))
    yield eight.rows_at(torch.tensor([1], device="cpu"))
    yield table.piecewise_linear(x, w[0, :15].sort()[0], w[1, :16], w[2, :16])
    static = reqat.quantize(w, "NVFP4", global_scale=30.3)
    yield from reqat.formats.to_layout(static, "modelopt", input_global_scale=3.3).values()


@pytest.fixture
def defaults() -> Iterator[None]:
    yield
    torch.set_default_dtype(torch.float32)
    torch.set_default_device(None)


DEFAULTS = [torch.float64, torch.bfloat16, torch.float16, "meta"]


@pytest.mark.parametrize("default", DEFAULTS, ids=str)
def test_no_default_of_torch_changes_a_bit(default: torch.dtype | str, defaults: None, same_bits: Callable) -> None:
    want = list(everything())
    (torch.set_default_device if isinstance(default, str) else torch.set_default_dtype)(default)
    got = list(everything())
    torch.set_default_device(None)
    assert len(got) == len(want) > 60
    for a, b in zip(got, want, strict=True):
        if a.element_size() == 1:
            a, b = a.view(torch.uint8), b.view(torch.uint8)
        same_bits(a, b)


@pytest.mark.parametrize("default", DEFAULTS[:3], ids=str)
def test_a_packed_model_takes_no_default_dtype(default: torch.dtype, defaults: None) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 61, "head_dim": 32}
    model = LlamaForCausalLM(LlamaConfig(num_attention_heads=4, num_key_value_heads=2, **shape)).eval()
    reqat.prepare(model, "NVFP4-W4A4KV4", global_scale="row")
    reqat.pack(model)
    ids = torch.arange(3, 17)[None]

    def answers() -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            return model(ids).logits, model.generate(ids, max_new_tokens=5, do_sample=False, pad_token_id=0)

    want = answers()
    torch.set_default_dtype(default)
    for a, b in zip(answers(), want, strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b)


#: Functions of torch whose result has torch's default dtype or device unless they are named.
CREATORS = {
    "arange", "as_tensor", "asarray", "empty", "empty_strided", "eye", "full", "linspace", "logspace", "ones", "rand",
    "randint", "randn", "randperm", "scalar_tensor", "tensor", "tril_indices", "triu_indices", "zeros",
}  # fmt: skip
KERNELS = ("kernels/reqat_kernels/*.py", "kernels/reqat_kernels/native/*.py", "kernels/reqat_kernels/triton/*.py")
SOURCES = (*KERNELS, "reqat/formats/*.py", "reqat/quant/*.py", "reqat/inference/*.py")


def test_every_tensor_that_is_created_names_dtype_and_device() -> None:
    """Memory that C fills must be of the type that C writes, whatever torch's defaults are."""
    unnamed, seen = [], 0
    for file in sorted(path for pattern in SOURCES for path in ROOT.glob(pattern)):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in CREATORS:
                if not (isinstance(node.func.value, ast.Name) and node.func.value.id == "torch"):
                    continue
                seen += 1
                missing = {"dtype", "device"} - {keyword.arg for keyword in node.keywords}
                if missing:
                    unnamed.append(f"{file.relative_to(ROOT)}:{node.lineno}: torch.{node.func.attr} without {missing}")
    assert seen > 50 and not unnamed, "\n".join(unnamed)
