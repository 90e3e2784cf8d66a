"""Products with packed weights, against float64 products of what reqat.formats says the codes stand for."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

import reqat
from reqat_kernels.isas import ISAS
from reqat_kernels.native import gemm
from reqat_kernels.native.library import NO_MEMORY, instruction_set, instruction_sets, library
from reqat_kernels.native.quantize import spec_of

FORMATS = ["NVFP4", "MXFP4", "NVFP4-4/6"]
# rows of x, N, K: one row and many, tiles and blocks that do not come out even, more rows than go together
SHAPES = [
    *[(1, 16, 32), (1, 1, 16), (2, 16, 48), (3, 33, 96), (7, 50, 160), (8, 20, 112), (9, 20, 112)],
    *[(16, 48, 64), (17, 16, 80), (31, 20, 192), (64, 16, 32), (70, 17, 32), (70, 33, 144)],
]
WORST = 2.0**-24


@pytest.fixture
def each_isa(limit_isa: Callable[[str], None]) -> Callable[[], Iterator[str]]:
    """Goes through the instruction sets that this process may use, from the least on; kernels use the current one."""
    allowed = ISAS[: ISAS.index(instruction_set()) + 1]

    def each() -> Iterator[str]:
        for isa in instruction_sets():
            if isa in allowed:
                limit_isa(isa)
                yield isa

    return each


def weight(N: int, K: int, fmt: str, seed: int = 0, **options: str) -> reqat.QuantizedTensor:
    generator = torch.Generator().manual_seed(seed)
    w_NK = torch.randn(N, K, generator=generator) * torch.logspace(-3, 1, N)[:, None]
    return reqat.quantize(w_NK, fmt, pad=True, **options)


def inputs(M: int, K: int, seed: int = 1) -> Tensor:
    x_MK = torch.randn(M, K, generator=torch.Generator().manual_seed(seed)) * 3
    x_MK[:, 0] *= 20
    return x_MK


def check(y: Tensor, x: Tensor, w: reqat.QuantizedTensor, bias: Tensor | None, terms: int) -> None:
    """y is within ``terms`` roundings of the exact product; ``terms``: those on one product's longest path."""
    W = w.dequantize(torch.float64)
    exact = x.double() @ W.T
    magnitude = x.double().abs() @ W.abs().T
    if bias is not None:
        exact, magnitude = exact + bias.double(), magnitude + bias.double().abs()
    excess = (y.double() - exact).abs() - terms * WORST * magnitude
    assert (excess <= 0).all(), f"beyond the bound by {float(excess.max())}"


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize(("N", "K"), [(16, 32), (1, 16), (33, 96), (50, 40), (48, 576)])
def test_packing_loses_nothing(fmt: str, N: int, K: int) -> None:
    q = weight(N, K, fmt)
    packed = gemm.pack_weight(q)
    back = packed.unpack()
    assert torch.equal(back.codes, q.codes)
    assert torch.equal(back.scales.view(torch.uint8), q.scales.view(torch.uint8))
    assert torch.equal(packed.dequantize(), q.dequantize())


@pytest.mark.parametrize("fmt", FORMATS)
def test_a_packed_weight_is_the_same_for_all_instruction_sets(fmt: str, each_isa: Callable[[], Iterator[str]]) -> None:
    packed = [gemm.pack_weight(weight(33, 96, fmt)) for _ in each_isa()]
    assert all(torch.equal(one.data, packed[0].data) and one.layout == packed[0].layout for one in packed)


def test_a_packed_weight_takes_four_and_a_half_bits() -> None:
    packed = gemm.pack_weight(weight(4096, 1024, "NVFP4"))
    assert packed.nbytes * 8 == 4.5 * 4096 * 1024
    assert packed.data.data_ptr() % (1 << 21) == 0  # whole huge pages
    room = gemm.allocate(gemm.packed_bytes(33, 40, reqat.get_format("NVFP4")))
    small = gemm.pack_weight(weight(33, 40, "NVFP4"), room)
    assert small.data.data_ptr() == room.data_ptr() and room.data_ptr() % 64 == 0
    with pytest.raises(ValueError, match="contiguous bytes"):
        gemm.pack_weight(weight(33, 64, "NVFP4"), room)


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize(("M", "N", "K"), SHAPES)
def test_w4a16(fmt: str, M: int, N: int, K: int) -> None:
    q, x, bias = weight(N, K, fmt), inputs(M, K), torch.linspace(-2, 2, N)
    y = gemm.linear(x, gemm.pack_weight(q), bias)
    assert y.shape == (M, N) and y.dtype == torch.float32
    check(y, x, q, bias, terms=K + 5)  # an addition a column, scale, sum over blocks, alpha, bias


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("element", ["E2M1", "E1M2"])
@pytest.mark.parametrize(("M", "N", "K"), SHAPES)
def test_w4a4(fmt: str, element: str, M: int, N: int, K: int) -> None:
    family = fmt.removesuffix("-4/6")
    if fmt == "MXFP4" and K % 32:
        pytest.skip("MXFP4's block")
    q = weight(N, K, fmt, **({"element": element} if fmt == family else {}))
    x = inputs(M, K)
    input_format = reqat.get_format(family, element=element)
    y = gemm.linear(x, gemm.pack_weight(q), inputs=input_format)
    blocks = K // (input_format.block or 1)
    # Products within a block are exact. The reference's own scales are rounded (s / g), as are scale times scale, each
    # block's addition, 1 / g and the last product.
    check(y, reqat.quantize_dequantize(x, input_format), q, None, terms=blocks + 6)


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize(("M", "N", "K"), SHAPES)
def test_w4a8(fmt: str, M: int, N: int, K: int) -> None:
    q, x = weight(N, K, fmt), inputs(M, K)
    packed = gemm.pack_weight(q)
    rounded = gemm.quantize_input(x, "A8", block=packed.format.block or 1)
    assert rounded.row_scale is not None
    scale = x.abs().amax(-1) / 127
    assert torch.equal(rounded.row_scale, scale)
    assert torch.equal(rounded.x[:, :K].float(), (x / scale[:, None]).round())
    bias = torch.linspace(-2, 2, N)
    y = gemm.linear(x, packed, bias, inputs="A8")
    blocks = -(-K // (packed.format.block or 1))
    check(y, rounded.x[:, :K].double() * scale.double()[:, None], q, bias, terms=blocks + 6)


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("signs", [(1, 1), (1, -1), (-1, 1), (-1, -1)])
def test_the_largest_products_do_not_overflow(
    fmt: str, signs: tuple[int, int], each_isa: Callable[[], Iterator[str]]
) -> None:
    """Every weight the largest of its element, every input 127: some instruction sets add products in 16 bits."""
    w, x = signs[0] * torch.ones(16, 96), signs[1] * torch.ones(9, 96)
    q = reqat.quantize(w, fmt)
    exact = x.double() @ q.dequantize().double().T
    for isa in each_isa():
        y = gemm.linear(x, gemm.pack_weight(q), inputs="A8")
        assert torch.allclose(y.double(), exact, rtol=1e-6, atol=0), isa


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("kind", [None, "A8", "A4"])
def test_every_instruction_set_gives_the_same_bits(
    fmt: str, kind: str | None, each_isa: Callable[[], Iterator[str]]
) -> None:
    rounding = reqat.get_format(fmt.removesuffix("-4/6")) if kind == "A4" else kind
    for M, N, K in SHAPES:
        if K % 32 and fmt == "MXFP4" and kind == "A4":
            continue
        packed, x, bias = gemm.pack_weight(weight(N, K, fmt)), inputs(M, K), torch.linspace(-2, 2, N)
        results = {}
        for isa in each_isa():
            results[isa] = gemm.linear(x, packed, bias, inputs=rounding)
        assert all(torch.equal(y, results["portable"]) for y in results.values()), (M, N, K)


@pytest.mark.parametrize("kind", [None, "A8", "A4"])
def test_a_row_does_not_depend_on_its_batch_or_on_threads(kind: str | None) -> None:
    rounding = reqat.get_format("NVFP4", global_scale="row") if kind == "A4" else kind
    packed, x = gemm.pack_weight(weight(512, 256, "NVFP4")), inputs(37, 256)
    together = gemm.linear(x, packed, inputs=rounding)
    alone = torch.cat([gemm.linear(row[None], packed, inputs=rounding) for row in x])
    assert torch.equal(together, alone)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert torch.equal(together, gemm.linear(x, packed, inputs=rounding))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("element", ["E2M1", "E1M2"])
@pytest.mark.parametrize(
    ("fmt", "options"),
    [
        ("NVFP4", {}),
        ("NVFP4", {"global_scale": "row"}),
        ("NVFP4", {"global_scale": "static"}),
        ("NVFP4", {"scale_rule": "reciprocal"}),
        ("MXFP4", {"scale_rule": "floor"}),
    ],
)
def test_inputs_are_rounded_as_the_formats_say(fmt: str, options: dict[str, str], element: str) -> None:
    format_ = reqat.get_format(fmt, element=element, **options)
    g = torch.tensor(11.5) if options.get("global_scale") == "static" else None
    x = inputs(5, 96)
    q = reqat.quantize(x, format_, global_scale=g)
    rounded = gemm.quantize_input(x, format_, block=format_.block or 1, global_scale=g)
    values = format_.element_type.decode(q.codes) * 2
    assert torch.equal(rounded.x.float(), values)
    assert rounded.block_scale is not None and torch.equal(rounded.block_scale, q.block_scales() / 2)
    assert torch.equal(rounded.start, (values.view(5, -1, format_.block or 1).sum(-1) * -16).int())


@pytest.mark.parametrize("block", [1, 8, 16, 32, 64, 128])
def test_int8_inputs_start_from_the_sums_of_any_block(block: int, each_isa: Callable[[], Iterator[str]]) -> None:
    x = inputs(3, 250)
    for _ in each_isa():
        rounded = gemm.quantize_input(x, "A8", block=block)
        values = rounded.x.int()
        assert values.shape[1] == -(-250 // block) * block and not values[:, 250:].any()
        assert torch.equal(rounded.start, values.view(3, -1, block).sum(-1, dtype=torch.int32) * -16)


def test_extreme_scales() -> None:
    w_NK = torch.randn(16, 64, generator=torch.Generator().manual_seed(0))
    w_NK[:, :16] = 0.0
    w_NK[:, 16:32] *= 2.0**-40  # below E4M3's range: scale 0.125, codes 0
    w_NK[:, 32:48] *= 2.0**-14  # a subnormal scale
    for fmt, tiny in (("NVFP4", 1.0), ("MXFP4", 2.0**-120)):
        q = reqat.quantize(w_NK * tiny, fmt)
        x = inputs(2, 64) * 0.01
        y = gemm.linear(x, gemm.pack_weight(q))
        check(y, x, q, None, terms=64 + 5)


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize(("M", "N", "K"), SHAPES)
def test_w4a16_of_bfloat16(fmt: str, M: int, N: int, K: int, each_isa: Callable[[], Iterator[str]]) -> None:
    q, x = weight(N, K, fmt), inputs(M, K).bfloat16()
    packed = gemm.pack_weight(q)
    for _ in each_isa():
        y = gemm.linear(x, packed)
        assert y.dtype == torch.bfloat16
        exact = torch.ops.reqat.fp4_linear(x, packed.data, None, *packed.layout)
        check(exact, x, q, None, terms=2 * K + 5)  # the instruction may round each of a pair's two products
        assert torch.equal(y, exact.bfloat16())
        rows = [torch.ops.reqat.fp4_linear(row[None], packed.data, None, *packed.layout) for row in x]
        assert torch.equal(torch.cat(rows), exact)


def test_leading_axes_strides_and_empty() -> None:
    q = weight(24, 64, "NVFP4")
    packed, x = gemm.pack_weight(q), inputs(6, 64)
    flat = gemm.linear(x, packed)
    assert torch.equal(gemm.linear(x.view(2, 3, 64), packed), flat.view(2, 3, 24))
    assert torch.equal(gemm.linear(x.t().contiguous().t(), packed), flat)
    assert torch.equal(gemm.linear(torch.cat([x, x], 1)[:, 64:], packed), flat)
    for kind in (None, "A8", reqat.get_format("NVFP4")):
        assert gemm.linear(torch.empty(0, 64), packed, inputs=kind).shape == (0, 24)


def test_one_rounding_serves_several_layers() -> None:
    first, second = (gemm.pack_weight(weight(N, 64, "NVFP4", seed=N)) for N in (16, 32))
    x, fmt = inputs(5, 64), reqat.get_format("NVFP4")
    shared = gemm.quantize_input(x, fmt, block=16)
    for packed in (first, second):
        assert torch.equal(gemm.linear(shared, packed), gemm.linear(x, packed, inputs=fmt))


@pytest.mark.skipif(instruction_set() == "torch", reason="no native library")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", [None, "A8", "A4"])
@pytest.mark.parametrize("fmt", FORMATS)
def test_products_in_one_call_are_those_of_linear(fmt: str, kind: str | None, dtype: torch.dtype) -> None:
    rounding = reqat.get_format(fmt.removesuffix("-4/6")) if kind == "A4" else kind
    weights = [gemm.pack_weight(weight(N, 96, fmt, seed=N)) for N in (16, 33)]
    x = inputs(5, 96).to(dtype)
    products = gemm.Products(x, weights, inputs=rounding)
    for _ in range(2):
        for y, w in zip(products(), weights, strict=True):
            assert torch.equal(y.to(dtype), gemm.linear(x, w, inputs=rounding))
        x.mul_(-0.5)  # the next call reads x as it is then
    if kind is not None:
        x[3, 7] = float("nan")
        with pytest.raises(ValueError, match="NaN or infinity"):
            products()
    with pytest.raises(ValueError, match=r"\[M, 96\] in blocks"):
        gemm.Products(inputs(2, 64), weights)


def test_operators_are_well_formed() -> None:
    packed, x = gemm.pack_weight(weight(24, 64, "NVFP4")), inputs(3, 64)
    q = gemm.quantize_input(x, reqat.get_format("NVFP4"), block=16)
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.reqat.fp4_linear.default, (x, packed.data, None, *packed.layout), test_utils=tests)
    arguments = (q.x, q.start, q.block_scale, None, packed.data, torch.zeros(24), *packed.layout)
    torch.library.opcheck(torch.ops.reqat.fp4_linear_int.default, arguments, test_utils=tests)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("kind", ["A8", "NVFP4"])
def test_what_is_not_finite_is_named(bad: float, kind: str) -> None:
    x = inputs(2, 32)
    x[1, 31] = bad
    fmt = kind if kind == "A8" else reqat.get_format(kind)
    with pytest.raises(ValueError, match="gate's input .*holds"):
        gemm.quantize_input(x, fmt, block=16, name="the gate's input")


def test_errors_say_what_to_do() -> None:
    packed = gemm.pack_weight(weight(16, 64, "NVFP4"))
    with pytest.raises(ValueError, match=r"\(2, 63\).*\[16, 64\]"):
        gemm.linear(torch.zeros(2, 63), packed)
    with pytest.raises(ValueError, match="block 32.*blocks of 16"):
        gemm.linear(torch.zeros(2, 64), packed, inputs=reqat.get_format("MXFP4"))
    with pytest.raises(ValueError, match="blocks of 32.*NVFP4.*16"):
        gemm.linear(gemm.quantize_input(torch.ones(2, 64), "A8", block=32), packed)
    with pytest.raises(ValueError, match="INT4-g128 have no kernel"):
        gemm.pack_weight(reqat.quantize(torch.randn(16, 128), "INT4-g128"))
    with pytest.raises(ValueError, match="quantized along K"):
        gemm.pack_weight(reqat.quantize(torch.randn(16, 32), "NVFP4", axis=0))
    with pytest.raises(ValueError, match="one global scale"):
        gemm.pack_weight(reqat.quantize(torch.randn(16, 32), "NVFP4", global_scale="row"))


def test_without_the_library_pytorch_computes_the_same() -> None:
    """The PyTorch path, in a process where native code is switched off: same bits in, same numbers up to summation."""
    script = """
import torch, reqat
from reqat_kernels.native import gemm, status
generator = torch.Generator().manual_seed(0)
x, w = torch.randn(5, 80, generator=generator), torch.randn(20, 80, generator=generator)
for fmt, kinds in (("NVFP4", (None, "A8", reqat.get_format("NVFP4"))), ("MXFP4", (None, "A8"))):
    packed = gemm.pack_weight(reqat.quantize(w, fmt, pad=True))
    for kind in kinds:
        print(*(float(v).hex() for v in gemm.linear(x, packed, inputs=kind).flatten()))
"""

    def run(isa: str) -> Tensor:
        environment = {**os.environ, "REQAT_ISA": isa}
        done = subprocess.run(
            [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True
        )
        return torch.tensor([float.fromhex(word) for word in done.stdout.split()], dtype=torch.float64)

    slow, fast = run("torch"), run("")
    assert slow.numel() == 500
    # 80 terms of magnitude up to about 9 a product, summed in another order
    assert (slow - fast).abs().max() <= 80 * WORST * 100


def test_an_unknown_instruction_set_is_refused() -> None:
    environment = {**os.environ, "REQAT_ISA": "sse9"}
    script = "from reqat_kernels.native import status; status()"
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert done.returncode != 0 and "REQAT_ISA='sse9'" in done.stderr


@pytest.mark.skipif(library() is None, reason="no native library")
@pytest.mark.parametrize("call", ["reqat_gemm_bf16", "reqat_gemm_float", "reqat_gemm_int", "reqat_products"])
def test_a_call_without_memory_says_so(call: str) -> None:
    """Fewer bytes than this there are nowhere; no exception may cross into Python, where it would end the process."""
    lib, rows = library(), 1 << 44
    assert lib is not None
    packed = gemm.pack_weight(weight(16, 32, "MXFP4"))
    w = gemm.weight_struct(packed.data.data_ptr(), *packed.layout[:4], 1.0)
    if call in ("reqat_gemm_float", "reqat_gemm_int") and instruction_set() == "portable":
        pytest.skip("takes rows as they are, one at a time, and no memory")
    if call == "reqat_gemm_int":
        status = lib.reqat_gemm_int(w, packed.data.data_ptr(), None, None, None, None, None, rows, 16, 1)
    elif call != "reqat_products":
        status = getattr(lib, call)(w, packed.data.data_ptr(), None, None, rows, 16, 1)
    else:
        spec = ctypes.pointer(spec_of(reqat.get_format("MXFP4")))
        product = gemm.Product(ctypes.pointer(w), None, None, spec, rows, 0, 0, 0.0)
        status = lib.reqat_products(product, 1, 1)
    assert status == NO_MEMORY
