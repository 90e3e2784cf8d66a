"""Kernel backends of packed models: one object for each device, all with the same interface.

:class:`~reqat.inference.native_backend.NativeBackend` (CPU, C++) and
:class:`~reqat.inference.triton_backend.TritonBackend` (CUDA) each keep weights and cache in an order of their own, so a
model is packed for one of them; :func:`reqat.inference.backends.backend_for` chooses by device, once.
Everything else in this package asks the backend it was packed for and knows neither.

A backend promises the numbers of the frozen fake-quantized twin: the codes of inputs and of cached tokens bit for bit,
products and attention up to the order of float32 sums. The exception is a rotation done on the way by sums and
differences instead of a matrix product (Triton's quantizer; native decoding): there a code next to a rounding threshold
may differ too.

The Triton functions also run on CPU tensors in triton's interpreter, which is how they are tested without a GPU.

What is not finite is an error, and to look for it makes the host of a GPU wait. Within :func:`checked_at_end` the
backend notes it on the device, and the host looks once, at the end of the block.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from reqat.formats import Format, QuantizedTensor
from reqat.quant import Quantizer


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


class Table(Protocol):
    """A matrix of the vocabulary [N, K], an output head or embeddings, in a backend's own order."""

    def rows_at(self, ids: Tensor) -> Tensor:
        """Rows ``ids`` [...] as numbers, float32 [..., K]; reads no others."""

    def times(self, x: Tensor, rounded: bool) -> Tensor:
        """``x @ W.T`` for x [M, K], float32 [M, N]; x as it is or ``rounded`` to int8, a row at a time."""

    def tensors(self) -> dict[str, Tensor]:
        """The memory behind it, by name."""


@dataclass(frozen=True)
class Places:
    """Where the next token of each row goes in a cache and how many tokens the row has with it, int64 [B] each.

    On the cache's device and written to in place, so that a step which is recorded once finds them anew each time.
    """

    next_B: Tensor
    lengths_B: Tensor


@dataclass(frozen=True)
class InputQuantSpec:
    """What an input quantizer needs to know besides the numbers. ``format``: None leaves them at 16 or 32 bits."""

    format: Format | None
    block: int
    rotation: int | None
    global_scale: Tensor | None
    name: str


class Backend(Protocol):
    """The functions that a packed model calls."""

    name: str

    @property
    def most_new_tokens(self) -> int | None:
        """New tokens a call up to which :meth:`attend` reads the packed cache; for more it is dequantized. None: any
        number."""

    own_heads: Mapping[torch.dtype, str]
    """By a model's type, the name that :meth:`table` takes for a head that nobody chose anything for; of types that
    are not there the head stays transformers' own."""

    def check_table(self, name: str) -> None:
        """Raise ReqatError unless there are kernels for a head of this name (:data:`reqat.config.vocabulary.HEADS`)."""

    def table(self, weight: Tensor, name: str) -> Table:
        """``weight`` [N, K], float32 or bfloat16, stored as ``name`` says; whole blocks of K."""

    def supports(self, weights: Format, inputs: Format | None, in_features: int) -> bool:
        """Whether linear layers of these formats have a kernel; ``inputs`` None: not quantized."""

    def allocate_weight_buffers(self, shapes: Iterable[tuple[int, int]], fmt: Format) -> list[Tensor | None]:
        """Preallocate contiguous buffers for weights of shapes [N, K]; None: each is allocated when it is packed."""

    def pack_weight(self, weight: QuantizedTensor, buffer: Tensor | None = None) -> Any:
        """A weight [N, K] in the kernel's order."""

    def tensors(self, weight: Any) -> dict[str, Tensor]:
        """The memory behind a packed weight, by name."""

    def tune(self, weights: Sequence[Any], inputs: Format | None) -> None:
        """Measure, where it pays, what is best on this machine for these packed weights; no result changes."""

    def quantize_input(self, x: Tensor, how: InputQuantSpec) -> Any:
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
        start: int | Places,
        *,
        shift_GD: Tensor | None,
        names: tuple[str | None, str | None],
    ) -> None:
        """Quantize ``key - shift`` (in float32) and ``value``, store them from token ``start`` on.

        ``Places``: of backends and formats whose steps :meth:`waits` finds nothing against.
        """

    def attend(
        self,
        query_BHTD: Tensor,
        keys: Any,
        values: Any,
        length: int | Places,
        *,
        scaling: float | None,
        mask: Tensor | None,
        is_causal: bool,
    ) -> Tensor:
        """Attention of a few new tokens over the first ``length`` of the cache, [B, H, T, D]; no gradient."""

    def waits(self, inputs: Format | None, keys: Format | None, values: Format | None) -> str | None:
        """Why the host waits for the device in a step of decoding in these formats; None: it does not."""

    def defer(self) -> None:
        """Note NaN and infinity on the device from here on, in this thread, where that spares the host a wait."""

    def tell(self) -> None:
        """End what :meth:`defer` began; the last of several looks, and raises the ValueError of the first tensor."""


@contextmanager
def checked_at_end(model: Any) -> Iterator[None]:
    """Within this block the kernels of a packed ``model`` note NaN and infinity on the device, and the host looks at
    its end, also where another error ends it, which such numbers may have caused. Of nested blocks the outermost looks.

    Raises the ValueError that the kernel would have raised, naming the tensor. Models that are not packed, and backends
    that look at no cost, raise at once, as everywhere.
    """
    backend: Backend | None = getattr(model, "_reqat_backend", None)
    if backend is None:
        yield
        return
    backend.defer()
    try:
        yield
    finally:
        backend.tell()
