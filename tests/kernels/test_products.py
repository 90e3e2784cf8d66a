"""Products of narrow floats on CPUs that lack instructions for them: rounded once, whatever the tiles."""

from __future__ import annotations

import pytest
import torch

from reqat_kernels import products
from reqat_kernels.products import mm


@pytest.fixture(params=["own", "through float32"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "through float32":
        monkeypatch.setattr(products, "cpu_multiplies", lambda dtype: dtype == torch.float32)
    return request.param


@pytest.mark.parametrize("tile_bytes", [64, 1000, 2**25])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("shape", [(5, 7, 3), (1, 64, 33), (130, 16, 1), (0, 4, 3), (3, 0, 2)])
def test_the_product_is_rounded_once(
    path: str, dtype: torch.dtype, shape: tuple[int, int, int], tile_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(products, "_TILE_BYTES", tile_bytes)
    M, K, N = shape
    g = torch.Generator().manual_seed(1)
    a, b = torch.randn(K, M, generator=g).t().to(dtype), torch.randn(K, N, generator=g).to(dtype)
    exact = a.double() @ b.double()
    # Half an ulp of the result, and the float32 sum's own error: K u |a||b|.
    bound = torch.finfo(dtype).eps / 2 * exact.abs() + (K + 1) * 2.0**-24 * (a.double().abs() @ b.double().abs())
    out = torch.full((N, M), float("nan"), dtype=dtype).t()  # strided, as a block of columns is
    for result in (mm(a, b), mm(a, b, out)):
        assert result.dtype == dtype
        assert ((result.double() - exact).abs() <= bound * (1 + 1e-6)).all()
    assert not out.isnan().any()


def test_operands_of_two_dtypes_are_refused(path: str) -> None:
    with pytest.raises(RuntimeError):
        mm(torch.ones(2, 2, dtype=torch.bfloat16), torch.ones(2, 2))
