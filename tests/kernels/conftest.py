"""What the kernel tests share: where Triton kernels run, comparison of bits, hard inputs.

With a CUDA device the Triton tests run on it. Without one, tests/conftest.py has chosen triton's interpreter before
anything could import triton, and they run on CPU tensors: same kernels, operation by operation, so tests use few tiles.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from reqat_kernels.isas import ISAS
from reqat_kernels.native.library import library

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where Triton kernels run in this process."""
    runtime = pytest.importorskip("reqat_kernels.triton.runtime")
    if not runtime.AVAILABLE:
        pytest.skip("triton is not installed")
    if torch.cuda.is_available():
        return torch.device("cuda")
    if not runtime.INTERPRETED:
        pytest.skip("triton was imported before TRITON_INTERPRET=1 was set, and there is no CUDA device")
    return torch.device("cpu")


@pytest.fixture(scope="session")
def interpreted(device: torch.device) -> None:
    """For tests of the interpreter itself."""
    if device.type != "cpu":
        pytest.skip("kernels run on a GPU here")


@pytest.fixture(autouse=True)
def _limit_comes_back() -> Iterator[None]:
    """A test that left a lesser instruction set behind would have later ones skipped, or prove less."""
    lib = library()
    best = None if lib is None else lib.reqat_isa()
    yield
    if lib is not None:
        assert lib.reqat_isa() == best, "the test did not lift its limit of the instruction set"


@pytest.fixture
def limit_isa() -> Iterator[Callable[[str], None]]:
    """Let native kernels use this instruction set and none better; the test is skipped where it cannot be used. What
    was the limit before comes back afterwards."""
    lib = library()
    if lib is None:
        pytest.skip("no native library")
    best = lib.reqat_isa()

    def limit(isa: str) -> None:
        at = ISAS.index(isa)
        if at > best or lib.reqat_lack(at):
            pytest.skip(f"this CPU, or REQAT_ISA, has no {isa}")
        lib.reqat_limit_isa(at)
        assert lib.reqat_isa() == at

    yield limit
    lib.reqat_limit_isa(best)


@pytest.fixture(scope="session")
def same_bits() -> Callable[[Tensor, Tensor], None]:
    """Assert that two tensors hold the same bits, signs of zeros included; the message names the first difference."""

    def check(a: Tensor, b: Tensor) -> None:
        a, b = a.cpu(), b.cpu()
        assert a.dtype == b.dtype and a.shape == b.shape, (
            f"{a.dtype} {tuple(a.shape)} against {b.dtype} {tuple(b.shape)}"
        )
        ints = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
        different = a.contiguous().view(ints) != b.contiguous().view(ints)
        if bool(different.any()):
            where = tuple(different.nonzero()[0].tolist())
            raise AssertionError(
                f"{int(different.sum())} of {a.numel()} differ, first at {where}: {a[where]} {b[where]}"
            )

    return check


@pytest.fixture(scope="session")
def hard_rows() -> Tensor:
    """Rows [*, 256] in float32 that go wrong easily: zeros of both signs, ties, subnormals, the largest numbers."""
    generator = torch.Generator().manual_seed(7)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    one = torch.zeros(4, 256)
    one[0, 3], one[1, 0], one[2, -1], one[3, 17] = 1.0, -3e-5, 7e30, -1e-38
    ties = torch.tensor([6, 5, 3.5, 2.5, 1.75, 1.25, 0.75, 0.25, -5, -3.5, -2.5, -1.75, -1.25, -0.75, -0.25, -0.0])
    return torch.cat(
        [
            torch.zeros(2, 256),
            torch.full((1, 256), -0.0),
            one,
            torch.where(torch.arange(256) % 64 < 32, 0.0, randn(2, 256)),
            torch.stack([ties.repeat(16) * 2.0**k for k in (-40, -9, -1, 0, 1, 7, 40)]),
            torch.stack([((torch.arange(256) % 15 - 7) * 0.5 + 0.25) * 2.0**k for k in (-9, 0, 5)]),
            randn(2, 256) * 1e-39,
            torch.full((1, 256), 1e-45),
            randn(2, 256) * 1e-37,
            (randn(2, 256) * 1e38).clamp(-3.4028234e38, 3.4028234e38),
            torch.full((1, 256), torch.finfo(torch.float32).max),
            2.0 ** torch.linspace(-126, 127, 256).floor()[None],
            randn(6, 256) * torch.exp(8 * randn(6, 256)),
            randn(8, 256) * torch.exp(6 * randn(8, 1)),
            randn(8, 256),
            torch.full((1, 256), 0.1),
        ]
    )
