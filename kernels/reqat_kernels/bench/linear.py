"""The matrix product of a linear layer, ``y_MN = x_MK W_NK^T``: GEMV while decoding one sequence, GEMM for a batch.

Every provider gets the same bfloat16 weights and inputs and stores the weights in its own format. Its result is held
against a float64 product of what its weights stand for, within a bound that follows from its arithmetic:

    |y - ref| <= sum_k |W_nk| e_mk  +  c * 2^-24 * K * sum_k |x_mk W_nk|  +  2^-8 |ref|

The first term is what quantizing inputs inside the kernel may do (``e``: half a step of the input's grid; zero where
the reference quantizes the inputs itself); the second is float32 summation in any order, the third one rounding to
bfloat16 (half an ulp is 2^-9; doubled, since some providers round twice). Nothing is fitted.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from reqat.formats import PackedTensor, QuantizedTensor, get_format, quantize, quantize_dequantize
from reqat_kernels.bench.measure import Absent, Case, Kernel, Needs, Work, triton_runs, within
from reqat_kernels.native import instruction_set

SEED = 6
INT8_STEP = 1 / 254  # half a step of an 8-bit grid, as a share of the largest magnitude


def _needs(case: Case) -> Needs:
    """The bfloat16 weights stay beside the ring; a check holds three copies in float64. Half the providers, ours, begin
    each copy's codes and scales at huge pages, which for small weights takes twice their bytes."""
    weights, inputs = case.N * case.K, case.M * (case.N + case.K)
    return Needs(held=2 * weights + 8 * inputs, passing=26 * weights + 64 * inputs, copy=2 * weights, pages=1.6)


LINEAR = Kernel("linear", _needs)


def cases(m: Iterable[int], nk: Iterable[int], *, device: str | None = None, ring_bytes: int = 0) -> list[Case]:
    """A case for each M and each N = K, on ``device`` or on every one that this machine has."""
    rows = list(m)
    asked = [Case("linear", (("M", M), ("N", size), ("K", size)), ring_bytes=ring_bytes) for size in nk for M in rows]
    return [found for case in asked for found in case.on(device)]


def operands(case: Case) -> tuple[Tensor, Tensor]:
    """The case's inputs ``x_MK`` and weights ``w_NK``, bfloat16: normal numbers, weights scaled by 1/sqrt(K)."""
    source = torch.Generator().manual_seed(SEED)
    x = torch.randn(case.M, case.K, generator=source).to(torch.bfloat16)
    w = (torch.randn(case.N, case.K, generator=source) / math.sqrt(case.K)).to(torch.bfloat16)
    return x.to(case.device), w.to(case.device)


def bound(x: Tensor, w: Tensor, reference: Tensor, input_error: Tensor | None = None) -> Tensor:
    """The module's bound [M, N], float64. ``input_error``: ``e_mk``."""
    x, w = x.double().cpu(), w.double().abs().cpu()
    # c = 2: products are rounded too where a kernel does not fuse them.
    out = 2 * x.shape[1] * 2.0**-24 * (x.abs() @ w.T) + 2.0**-8 * reference.abs()
    return out if input_error is None else out + input_error.double().cpu() @ w.T


def check(y: Tensor, x: Tensor, w: Tensor, input_error: Tensor | None = None) -> None:
    """Hold ``y_MN`` against the float64 product. Raises Wrong."""
    reference = x.double().cpu() @ w.double().cpu().T
    within(y.detach().cpu(), reference, bound(x, w, reference, input_error), "the product")


def row_steps(x: Tensor, block: int | None = None) -> Tensor:
    """``e_mk`` of inputs quantized to symmetric int8 by row, or by blocks of a row: half a step, and the float16
    rounding of a block's scale (2^-11 of the value) where blocks store one."""
    x = x.double()
    if block is None:
        # Scale, quotient and product are float32: three roundings, 2^-24 of x each.
        return x.abs().amax(1, keepdim=True).expand_as(x) * INT8_STEP + x.abs() * 2.0**-22
    blocks = x.view(len(x), -1, block)
    steps = blocks.abs().amax(2, keepdim=True).expand_as(blocks) * INT8_STEP
    return (steps + blocks.abs() * 2.0**-11).reshape_as(x) * (1 + 2.0**-10)


def _work(
    case: Case,
    weights: Any,
    bytes_each: int,
    call: Callable[[Any], Tensor],
    verify: Callable[[Tensor], None],
    clone: Callable[[Any], Any],
    string: Callable[[list[Any]], Callable[[], Any]] | None = None,
) -> Work:
    """A ring of copies of ``weights``, and how to call and check. ``string`` makes one call of several copies."""
    ring = [weights, *(clone(weights) for _ in range(case.copies(bytes_each) - 1))]
    moved = bytes_each + 2 * case.M * (case.K + case.N)  # weights once, inputs and outputs as bfloat16
    return Work(
        run=lambda i: call(ring[i]),
        copies=len(ring),
        bytes_moved=moved,
        check=lambda: verify(call(ring[0])),
        ring_bytes=len(ring) * bytes_each,
        chain=None if string is None else lambda indices: string([ring[i] for i in indices]),
    )


@LINEAR.provider("torch", format="BF16", devices=("cpu", "cuda"))
def torch_bf16(case: Case) -> Work:
    """``F.linear`` on bfloat16."""
    x, w = operands(case)
    return _work(case, w, w.nbytes, lambda w: torch.nn.functional.linear(x, w), lambda y: check(y, x, w), torch.clone)


@LINEAR.provider("oneDNN, prepacked", format="BF16")
def onednn_bf16(case: Case) -> Work:
    """oneDNN's inner product with weights in the layout that it asks for, as torch.compile's freezing calls it."""
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        raise Absent("this torch is built without oneDNN.")
    x, w = operands(case)
    try:
        packed = torch.ops.mkldnn._reorder_linear_weight(w)
    except RuntimeError as error:
        raise Absent(f"oneDNN packs no bfloat16 weights on this CPU ({str(error).splitlines()[0]}).") from None

    def call(weight: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")

    def clone(_: Tensor) -> Tensor:
        return torch.ops.mkldnn._reorder_linear_weight(w)

    return _work(case, packed, w.nbytes, call, lambda y: check(y, x, w), clone)


@LINEAR.provider("torch, dynamic", format="INT8")
def torch_int8(case: Case) -> Work:
    """torch.ao's dynamic int8 linear (weights by channel, inputs by tensor), by the best engine this build has.

    Inputs: 8 bits affine over [min, max] of the tensor, reduced range off; so a step is (max - min) / 255, and half of
    one, plus as much again for the zero point's rounding, bounds the error.
    """
    engine = next((e for e in ("x86", "fbgemm", "onednn") if e in torch.backends.quantized.supported_engines), None)
    if engine is None:
        raise Absent("this torch has no int8 engine for this CPU.")
    x, w = operands(case)
    xf, wf = x.float(), w.float()
    scales = (wf.abs().amax(1) / 127).clamp(min=1e-12).double()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.ao's quantized tensors are announced as deprecated
        quantized = torch.quantize_per_channel(wf, scales, torch.zeros(len(wf), dtype=torch.long), 0, torch.qint8)
        before = torch.backends.quantized.engine
        torch.backends.quantized.engine = engine
        try:
            packed = torch.ops.quantized.linear_prepack(quantized, None)
            ring_of = lambda _: torch.ops.quantized.linear_prepack(quantized, None)  # noqa: E731
            step = (float(xf.max().clamp(min=0)) - float(xf.min().clamp(max=0))) / 255
            error = torch.full_like(xf, step)
            return _work(
                case,
                packed,
                case.N * case.K + 4 * case.N,
                lambda w: torch.ops.quantized.linear_dynamic(xf, w),
                lambda y: check(y, x, quantized.dequantize(), error),
                ring_of,
            )
        finally:
            torch.backends.quantized.engine = before


@LINEAR.provider("aten int4pack", format="INT4-g32 W4A16")
def aten_int4(case: Case) -> Work:
    """``_weight_int4pack_mm_for_cpu``: 4-bit integers, a bfloat16 scale and zero for 32 of them, inputs bfloat16."""
    if not hasattr(torch.ops.aten, "_weight_int4pack_mm_for_cpu"):
        raise Absent("this torch lacks aten::_weight_int4pack_mm_for_cpu.")
    group = 32
    if case.K % group or case.N % 16:
        raise Absent("it takes K in multiples of 32 and N in multiples of 16.")
    x, w = operands(case)
    blocks = w.float().view(case.N, -1, group)
    low, high = blocks.amin(2), blocks.amax(2)
    scale = ((high - low) / 15).clamp(min=1e-8).to(torch.bfloat16)
    zero = (low + 8 * scale.float()).to(torch.bfloat16)
    codes = ((blocks - zero.float()[..., None]) / scale.float()[..., None] + 8).round().clamp(0, 15)
    dense = ((codes - 8) * scale.float()[..., None] + zero.float()[..., None]).view(case.N, case.K)
    pairs = torch.stack((scale, zero), -1).transpose(0, 1).contiguous()  # [K / group, N, 2]
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.view(case.N, case.K).to(torch.int32), 1)

    def call(weight: tuple[Tensor, Tensor]) -> Tensor:
        return torch.ops.aten._weight_int4pack_mm_for_cpu(x, weight[0], group, weight[1])

    def clone(weight: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return weight[0].clone(), weight[1].clone()

    # It rounds dequantized weights to bfloat16 before multiplying: 2^-9 of each product.
    error = x.double().abs() * 2.0**-8
    return _work(case, (packed, pairs), packed.nbytes + pairs.nbytes, call, lambda y: check(y, x, dense, error), clone)


# -- ours --------------------------------------------------------------------------------------------------------------


def _gemm() -> Any:
    try:
        from reqat_kernels.native import gemm
    except ImportError:
        raise Absent("reqat_kernels.native has no gemm yet.") from None
    return gemm


def _ours(case: Case, name: str, inputs: str) -> Work:
    """Our kernel on weights of format ``name``. ``inputs``: ``A4`` (quantized like the weights), ``A8``, ``A16``."""
    gemm = _gemm()
    fmt = get_format(name)
    x, w = operands(case)
    q: QuantizedTensor = quantize(w, fmt)
    packed = gemm.pack_weight(q)
    # A token's own global scale, as decoding has it: the product of a row does not depend on its batch.
    grid = get_format(name, global_scale="row" if fmt.has_global_scale else None)
    given: Any = {"A4": grid, "A8": "A8", "A16": None}[inputs]

    def verify(y: Tensor) -> None:
        dense = q.dequantize(torch.float32)
        if inputs == "A4":
            check(y, quantize_dequantize(x.float(), grid), dense)
        else:
            # A16 may round a product of code and scale to bfloat16 on its way: 2^-8 of each.
            error = row_steps(x) if inputs == "A8" else x.double().abs() * 2.0**-8
            check(y, x, dense, error)

    def call(w: Any) -> Tensor:
        return gemm.linear(x, w, inputs=given)

    def string(weights: list[Any]) -> Callable[[], Any]:
        return gemm.Products(x, weights, inputs=given)

    native = instruction_set() != "torch" and case.K % (fmt.block or 1) == 0
    return _work(case, packed, q.nbytes, call, verify, lambda _: gemm.pack_weight(q), string if native else None)


def _triton(case: Case, name: str, kernel: str) -> Work:
    """Our Triton kernel on weights of format ``name``: ``gemv``, ``W4A4`` (inputs are quantized in the call, a global
    scale a row) or ``W4A16``."""
    triton_runs(case.device)
    from reqat_kernels.triton.gemm import linear_w4a4, linear_w4a16
    from reqat_kernels.triton.gemv import MAX_ROWS, gemv_w4a4
    from reqat_kernels.triton.quantize import quantize as quantize_input

    fmt = get_format(name)
    if case.K % (fmt.block or 1):
        raise Absent(f"it takes K in multiples of {fmt.block}.")
    if kernel == "gemv" and case.M > MAX_ROWS:
        raise Absent(f"it takes up to {MAX_ROWS} rows.")
    x, w = operands(case)
    packed = quantize(w, fmt).pack()
    grid = get_format(name, global_scale="row" if fmt.has_global_scale else None)

    def call(weight: PackedTensor) -> Tensor:
        if kernel == "W4A16":
            return linear_w4a16(x, weight)
        # Looking for NaN would make the host wait.
        rounded = quantize_input(x, grid, check=False)
        return gemv_w4a4(rounded, weight) if kernel == "gemv" else linear_w4a4(rounded, weight)

    def verify(y: Tensor) -> None:
        seen = x if kernel == "W4A16" else quantize_dequantize(x.float(), grid)
        check(y, seen, packed.dequantize(torch.float32))

    def clone(weight: PackedTensor) -> PackedTensor:
        return replace(weight, packed=weight.packed.clone(), scales=weight.scales.clone())

    return _work(case, packed, packed.nbytes, call, verify, clone)


def _register_triton() -> None:
    for name in ("NVFP4", "MXFP4"):
        for kernel, label, inputs in (("W4A4", "GEMM", "A4"), ("gemv", "GEMV", "A4"), ("W4A16", "GEMM", "A16")):

            def make(case: Case, name: str = name, kernel: str = kernel) -> Work:
                return _triton(case, name, kernel)

            make.__doc__ = f"Our Triton {label}: {name} weights, {inputs} inputs."
            LINEAR.provider(f"reqat, Triton {label}", format=f"{name} W4{inputs}", devices=("cuda",), ours=True)(make)


_register_triton()


def _register_ours() -> None:
    for name in ("NVFP4", "MXFP4"):
        for inputs in ("A4", "A8", "A16"):

            def make(case: Case, name: str = name, inputs: str = inputs) -> Work:
                return _ours(case, name, inputs)

            make.__doc__ = f"Our native kernel: {name} weights, {inputs} inputs."
            LINEAR.provider("reqat", format=f"{name} W4{inputs}", ours=True)(make)


_register_ours()
