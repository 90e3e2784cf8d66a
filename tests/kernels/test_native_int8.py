"""The int8 weight of an output head: against float64, between instruction sets, and against its PyTorch path."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import reqat
from reqat_kernels.isas import ISAS
from reqat_kernels.native import dense, gemm, int8, weights
from reqat_kernels.native.library import instruction_sets, library


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def at_every_level(call: Callable[[], Tensor]) -> list[Tensor]:
    """What the kernel gives limited to each instruction set (of those that this CPU has), and PyTorch's path."""
    lib, results = library(), []
    if lib is not None:
        best = lib.reqat_isa()
        for isa in instruction_sets():
            lib.reqat_limit_isa(ISAS.index(isa))
            results.append(call())
        lib.reqat_limit_isa(best)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(int8, "_library", lambda: None)
        patch.setattr(dense, "_library", lambda: None)
        results.append(call())
    return results


@pytest.mark.parametrize("K", [1, 7, 16, 31, 64, 100, 576])
@pytest.mark.parametrize("M", [1, 2, 3, 4, 5, 8, 9, 17])
def test_products_are_those_of_float64(M: int, K: int) -> None:
    q = reqat.quantize(randn(37, K, seed=1), "INT8-row")
    w, x = int8.pack_int8(q), randn(M, K)
    dense_NK = q.dequantize().double()
    size = x.double().abs() @ dense_NK.abs().T
    for y in at_every_level(lambda: int8.linear_int8(x, w)):
        assert y.dtype == torch.float32
        assert ((y - x.double() @ dense_NK.T).abs() <= size * (K + 2) * 2.0**-23).all()


@pytest.mark.parametrize("K", [1, 31, 33, 100, 576])
@pytest.mark.parametrize("M", [1, 3, 4, 6, 17])
def test_rounded_inputs_give_the_same_bits_everywhere(M: int, K: int, same_bits: Callable) -> None:
    q = reqat.quantize(randn(21, K, seed=1), "INT8-row")
    w, x = int8.pack_int8(q), randn(M, K).bfloat16()
    first, *others = at_every_level(lambda: int8.linear_int8(x, w, inputs="A8"))
    for other in others:
        same_bits(first, other)
    row_scale = x.float().abs().amax(-1, keepdim=True) / 127  # float32: a tie of x may fall otherwise in float64
    codes = (x.float() / row_scale).round().double()
    want = (codes @ w.codes.double().T) * row_scale.double() * w.scale.double()
    assert ((first - want).abs() <= 4 * 2.0**-23 * want.abs() + 1e-30).all()


@pytest.mark.parametrize("K", [1, 7, 40, 100])
def test_a_float32_weight_is_multiplied_row_by_row(K: int, same_bits: Callable) -> None:
    x, weight = randn(8, K), randn(21, K, seed=1)
    size = x.double().abs() @ weight.double().abs().T
    for y in at_every_level(lambda: dense.dense_f32(x, weight)):
        assert ((y - x.double() @ weight.double().T).abs() <= size * (K + 2) * 2.0**-23).all()
    if library() is not None:
        same_bits(dense.dense_f32(x, weight), torch.cat([dense.dense_f32(row[None], weight) for row in x]))
    with pytest.raises(ValueError, match="float32"):
        dense.dense_f32(x, weight.bfloat16())


@pytest.mark.parametrize("inputs", [None, "A8"])
def test_a_row_does_not_know_its_batch(inputs: None, same_bits: Callable) -> None:
    w, x = int8.pack_int8(reqat.quantize(randn(40, 100, seed=1), "INT8-row")), randn(8, 100)
    alone = torch.cat([int8.linear_int8(row[None], w, inputs=inputs) for row in x])
    if library() is not None:
        same_bits(int8.linear_int8(x, w, inputs=inputs), alone)


def test_the_largest_sums_fit() -> None:
    K = int8.MOST_COLUMNS
    w = int8.Int8Weight(torch.full((1, K), -128, dtype=torch.int8), torch.ones(1))
    for y in at_every_level(lambda: int8.linear_int8(torch.ones(1, K), w, inputs="A8")):
        assert float(y) == pytest.approx(-128.0 * K, rel=1e-6)


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("factor", [1.0, 1e38, 1e-37])
def test_rows_are_the_dequantized_ones(
    native: bool, factor: float, same_bits: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not native:
        monkeypatch.setattr(weights, "_library", lambda: None)
    ids = torch.tensor([[3, 36], [0, 3]])
    formats = ["INT8-row", "NVFP4", "MXFP4", reqat.get_format("NVFP4", scale_rule="reciprocal"), "NVFP4-4/6"]
    for name in formats:
        q = reqat.quantize(randn(37, 72, seed=1).clamp(-3, 3) * factor, name, pad=True)
        w = int8.pack_int8(q) if name == "INT8-row" else gemm.pack_weight(q)
        same_bits(w.rows_at(ids), q.dequantize()[ids])
        assert w.rows_at(ids[:0]).shape == (0, 2, 72)
        for row in (37, -1):
            with pytest.raises(IndexError, match=str(row)):
                w.rows_at(torch.tensor([2, row]))


def test_arguments_that_do_not_fit_are_refused() -> None:
    w = int8.pack_int8(reqat.quantize(randn(5, 16), "INT8-row"))
    with pytest.raises(ValueError, match="NVFP4"):
        int8.pack_int8(reqat.quantize(randn(5, 16), "NVFP4"))
    with pytest.raises(ValueError, match="15"):
        int8.linear_int8(randn(2, 15), w)
    with pytest.raises(ValueError, match="NaN"):
        int8.linear_int8(torch.full((2, 16), torch.nan), w, inputs="A8")
    with pytest.raises(ValueError, match="A4"):
        int8.linear_int8(randn(2, 16), w, inputs="A4")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="scale"):
        int8.Int8Weight(w.codes, w.scale[:-1])
    with pytest.raises(ValueError, match="int8"):
        torch.ops.reqat.dense_int8(randn(2, 16), w.codes.float(), w.scale)
    with pytest.raises(ValueError, match="row_scale"):
        torch.ops.reqat.dense_int8_a8(torch.zeros(2, 16, dtype=torch.int8), torch.ones(3), w.codes, w.scale)
    with pytest.raises(TypeError, match="NoneType"):
        int8.linear_int8(None, w)  # type: ignore[arg-type]
