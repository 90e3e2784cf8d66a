"""The native kernels (C++, CPU) as a packed model calls them; see :mod:`reqat.inference.backend`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from reqat.config import machine
from reqat.config.vocabulary import stored_as
from reqat.formats import Format, QuantizedTensor
from reqat.inference.backend import InputQuantSpec, Places, Table
from reqat.inference.native_tables import Bf16Table, Float32Table, Fp4Table, Int8Table
from reqat.quant import Quantizer, block_hadamard
from reqat_kernels.native import attention as native_attention
from reqat_kernels.native import gemm as native_gemm
from reqat_kernels.native import library, prefetch


class NativeBackend:
    """C++ kernels on CPU tensors, or their PyTorch path where there is no library."""

    name = "native"
    own_heads: Mapping[torch.dtype, str] = {torch.bfloat16: "BF16", torch.float32: "FP32"}

    @property
    def most_new_tokens(self) -> int | None:
        """Any number, whole prompts. Without the library the scores of a prompt would all be in memory at once, and in
        portable C++ a prompt takes several times as long as PyTorch on what is dequantized: 8 there."""
        return 8 if library.instruction_set() in ("torch", "portable") else None

    def check_table(self, name: str) -> None:
        """Every choice has a kernel."""

    def table(self, weight: Tensor, name: str) -> Table:
        """Dense, int8 or packed FP4; an input rounded or not changes nothing of it."""
        stored = stored_as(name)
        if stored == "FP32":
            return Float32Table(weight.detach())
        if stored == "BF16":
            return Bf16Table(weight.detach())
        return Int8Table(weight.detach()) if stored == "INT8" else Fp4Table(weight.detach(), stored)

    def supports(self, weights: Format, inputs: Format | None, in_features: int) -> bool:
        """FP4 weights; inputs at 16 bits, or FP4 in blocks of the same size. Ragged ends are padded."""
        return native_gemm.supports(weights) and (
            inputs is None or (native_gemm.supports(inputs) and inputs.block == weights.block)
        )

    def allocate_weight_buffers(self, shapes: Iterable[tuple[int, int]], fmt: Format) -> list[Tensor | None]:
        """Pieces of one allocation in huge pages."""
        sizes = [native_gemm.packed_bytes(rows, columns, fmt) for rows, columns in shapes]
        return [*native_gemm.allocate(sum(sizes)).split(sizes)]

    def pack_weight(self, weight: QuantizedTensor, buffer: Tensor | None = None) -> native_gemm.PackedWeight:
        """16 rows side by side."""
        return native_gemm.pack_weight(weight, buffer)

    def tensors(self, weight: native_gemm.PackedWeight) -> dict[str, Tensor]:
        """Codes and scales are one piece."""
        return {"data": weight.data}

    def tune(self, weights: Sequence[native_gemm.PackedWeight], inputs: Format | None) -> None:
        """How many threads, where a quota gives this process fewer cores than it sees; how far ahead products read."""
        quota = machine.cores_by_quota()
        if quota is not None:
            library.limit_threads(quota)
        prefetch.tune(weights, "bfloat16" if inputs is None else "integers")

    def quantize_input(self, x: Tensor, how: InputQuantSpec) -> Tensor | native_gemm.QuantizedInput:
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
        start: int | Places,
        *,
        shift_GD: Tensor | None,
        names: tuple[str | None, str | None],
    ) -> None:
        """Keys, then values."""
        assert isinstance(start, int)
        keys.append(key_BGTD, start, shift=shift_GD, name=names[0])
        values.append(value_BGTD, start, name=names[1])

    def attend(
        self,
        query_BHTD: Tensor,
        keys: native_attention.PackedStates,
        values: native_attention.PackedStates,
        length: int | Places,
        *,
        scaling: float | None,
        mask: Tensor | None,
        is_causal: bool,
    ) -> Tensor:
        """In float32."""
        assert isinstance(length, int)
        return native_attention.kv_attention(
            query_BHTD, keys, values, length, scaling=scaling, mask=mask, is_causal=is_causal
        )

    def waits(self, inputs: Format | None, keys: Format | None, values: Format | None) -> str | None:
        """The host is the device."""
        return "native kernels compute on the CPU"

    def defer(self) -> None:
        """Every call looks: it has the numbers at hand."""

    def tell(self) -> None:
        """Nothing is left to tell."""
