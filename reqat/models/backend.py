"""Which kernels a packed model computes with: one object a device, the same few functions on each.

:class:`NativeBackend` (CPU, C++) and :class:`~reqat.models.triton_backend.TritonBackend` (CUDA) each keep weights and
cache in an order of their own, so a model is packed for one of them; :func:`backend_for` chooses by device, once.
Everything else in this package asks the backend it was packed for and knows neither.

A backend promises the numbers of the frozen fake-quantized twin: the codes of inputs and of cached tokens bit for bit,
products and attention up to the order of float32 sums. The exception is a rotation done on the way by sums and
differences instead of a matrix product (Triton's quantizer; native decoding): there a code next to a rounding threshold
may differ too.

The Triton functions also run on CPU tensors in triton's interpreter, which is how they are tested without a GPU.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from reqat.config.errors import ReqatError
from reqat.formats import Format, QuantizedTensor
from reqat.quant import Quantizer, block_hadamard
from reqat_kernels.native import attention as native_attention
from reqat_kernels.native import gemm as native_gemm

Choice = Literal["auto", "native", "triton"]
CHOICES: tuple[Choice, ...] = ("auto", "native", "triton")


class States(Protocol):
    """Packed keys or values of one layer [B, G, capacity, D], in a backend's own order."""

    @property
    def codes(self) -> Tensor:
        """uint8, two codes a byte."""

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(B, G, tokens that fit, D)."""

    @property
    def nbytes(self) -> int:
        """Bytes allocated."""

    def dequantize(self, length: int, dtype: torch.dtype = ...) -> Tensor:
        """The first ``length`` tokens as numbers, [B, G, length, D]."""

    def resized(self, capacity: int, length: int) -> Any:
        """A copy with another capacity that holds the first ``length`` tokens."""

    def select_rows(self, rows: Tensor, length: int) -> Any:
        """A copy with these batch rows."""


@dataclass(frozen=True)
class TokenInput:
    """What an input quantizer needs to know besides the numbers. ``format``: None leaves them at 16 or 32 bits."""

    format: Format | None
    block: int
    rotation: int | None
    global_scale: Tensor | None
    name: str


class Backend(Protocol):
    """The functions that a packed model calls."""

    name: str
    few_tokens: int
    """New tokens a call up to which :meth:`attend` reads the packed cache; beyond, dequantizing it once is faster."""

    def fits(self, weights: Format, inputs: Format | None, in_features: int) -> bool:
        """Whether linear layers of these formats have a kernel; ``inputs`` None: not quantized."""

    def rooms(self, shapes: Iterable[tuple[int, int]], fmt: Format) -> list[Tensor | None]:
        """Memory for weights of these shapes [N, K], side by side; None: each is allocated as it is packed."""

    def pack_weight(self, weight: QuantizedTensor, room: Tensor | None = None) -> Any:
        """A weight [N, K] in the kernel's order."""

    def tensors(self, weight: Any) -> dict[str, Tensor]:
        """The memory behind a packed weight, by name."""

    def quantize_input(self, x: Tensor, how: TokenInput) -> Any:
        """``x`` [..., K] rotated and rounded, as :meth:`linear` takes it. Raises ValueError for NaN or infinity."""

    def linear(self, x: Any, weight: Any, bias: Tensor | None) -> Tensor:
        """``x @ weight.T + bias`` [..., N] in the type of the input that was quantized."""

    def allocate(self, kind: Literal["key", "value"], quantizer: Quantizer, states: Tensor, capacity: int) -> States:
        """Room for ``capacity`` tokens like ``states`` [B, G, T, D]."""

    def append(
        self,
        keys: Any,
        values: Any,
        key_BGTD: Tensor,
        value_BGTD: Tensor,
        start: int,
        *,
        shift_GD: Tensor | None,
        names: tuple[str | None, str | None],
    ) -> None:
        """Quantize ``key - shift`` (in float32) and ``value``, store them from token ``start`` on."""

    def attend(
        self,
        query_BHTD: Tensor,
        keys: Any,
        values: Any,
        length: int,
        *,
        scaling: float | None,
        mask: Tensor | None,
        is_causal: bool,
    ) -> Tensor:
        """Attention of a few new tokens over the first ``length`` of the cache, [B, H, T, D]; no gradient."""


class NativeBackend:
    """C++ kernels on CPU tensors, or their PyTorch path where there is no library."""

    name = "native"
    few_tokens = 8

    def fits(self, weights: Format, inputs: Format | None, in_features: int) -> bool:
        """FP4 weights; inputs at 16 bits, or FP4 in blocks of the same size. Ragged ends are padded."""
        return native_gemm.supports(weights) and (
            inputs is None or (native_gemm.supports(inputs) and inputs.block == weights.block)
        )

    def rooms(self, shapes: Iterable[tuple[int, int]], fmt: Format) -> list[Tensor | None]:
        """Pieces of one allocation in huge pages."""
        sizes = [native_gemm.packed_bytes(rows, columns, fmt) for rows, columns in shapes]
        return [*native_gemm.allocate(sum(sizes)).split(sizes)]

    def pack_weight(self, weight: QuantizedTensor, room: Tensor | None = None) -> native_gemm.PackedWeight:
        """16 rows side by side."""
        return native_gemm.pack_weight(weight, room)

    def tensors(self, weight: native_gemm.PackedWeight) -> dict[str, Tensor]:
        """Codes and scales are one piece."""
        return {"data": weight.data}

    def quantize_input(self, x: Tensor, how: TokenInput) -> Tensor | native_gemm.QuantizedInput:
        """Integers."""
        if how.rotation is not None:
            x = block_hadamard(x, how.rotation)
        if how.format is None:
            return x
        return native_gemm.quantize_input(x, how.format, block=how.block, global_scale=how.global_scale, name=how.name)

    def linear(
        self, x: Tensor | native_gemm.QuantizedInput, weight: native_gemm.PackedWeight, bias: Tensor | None
    ) -> Tensor:
        """Exact within a block, float32 across blocks."""
        return native_gemm.linear(x, weight, bias)

    def allocate(
        self, kind: Literal["key", "value"], quantizer: Quantizer, states: Tensor, capacity: int
    ) -> native_attention.PackedStates:
        """Tiles of 16 tokens."""
        batch, heads, _, head_dim = states.shape
        assert quantizer.format is not None
        return native_attention.PackedStates.allocate(
            kind,
            quantizer.format,
            batch,
            heads,
            capacity,
            head_dim,
            global_scale=quantizer.global_scale,
            device=states.device,
        )

    def append(
        self,
        keys: native_attention.PackedStates,
        values: native_attention.PackedStates,
        key_BGTD: Tensor,
        value_BGTD: Tensor,
        start: int,
        *,
        shift_GD: Tensor | None,
        names: tuple[str | None, str | None],
    ) -> None:
        """Keys, then values."""
        keys.append(key_BGTD, start, shift=shift_GD, name=names[0])
        values.append(value_BGTD, start, name=names[1])

    def attend(
        self,
        query_BHTD: Tensor,
        keys: native_attention.PackedStates,
        values: native_attention.PackedStates,
        length: int,
        *,
        scaling: float | None,
        mask: Tensor | None,
        is_causal: bool,
    ) -> Tensor:
        """In float32."""
        return native_attention.kv_attention(
            query_BHTD, keys, values, length, scaling=scaling, mask=mask, is_causal=is_causal
        )


_NATIVE: Backend = NativeBackend()
_BY_DEVICE = {"cpu": "native", "cuda": "triton"}


def backend_for(device: torch.device, choice: str = "auto") -> Backend:
    """The backend for tensors on ``device``; ``choice``: ``native``, ``triton``, or by device (``auto``).

    Raises ReqatError, naming the remedy, for a device without kernels, a choice that cannot run there, or triton
    missing.
    """
    if choice not in CHOICES:
        raise ReqatError(f"backend {choice!r}: choose one of {', '.join(CHOICES)}")
    name = _BY_DEVICE.get(device.type, "none") if choice == "auto" else choice
    if name == "none" or (name == "native" and device.type != "cpu"):
        raise ReqatError(
            f"there are no {'' if name == 'none' else 'native '}kernels for tensors on {device}: move the model with "
            "model.to('cpu'), or model.to('cuda') for the Triton kernels"
        )
    if name == "native":
        return _NATIVE
    from reqat_kernels.triton import runtime  # imports triton, which a CPU has no use for

    if not runtime.AVAILABLE:
        raise ReqatError(
            "packed models on a GPU need the package triton: pip install 'reqat[kernels]', or model.to('cpu')"
        )
    if device.type != "cuda" and not runtime.INTERPRETED:
        raise ReqatError(
            f"Triton kernels need a CUDA device, and this model is on {device}: model.to('cuda'), or leave the "
            "backend out"
        )
    return _triton()


@cache
def _triton() -> Backend:
    from reqat.models.triton_backend import TritonBackend

    return TritonBackend()
