"""The Triton kernels as a packed model calls them; see :mod:`reqat.inference.backend`.

Imported only where it is used, because it imports triton.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from reqat.config.errors import ReqatError
from reqat.config.vocabulary import ROUNDED, stored_as
from reqat.formats import Format, PackedTensor, QuantizedTensor, get_format, quantize
from reqat.inference.backend import InputQuantSpec, Places, Table
from reqat.quant import Quantizer, block_hadamard
from reqat_kernels.triton import append as triton_append
from reqat_kernels.triton import attention as triton_attention
from reqat_kernels.triton import gemm, gemv
from reqat_kernels.triton import quantize as triton_quantize
from reqat_kernels.triton.finite import FiniteFlag
from reqat_kernels.triton.kv_side import KVSide


class _Deferred(threading.local):
    """A thread's own flags, one a device, within ``depth`` blocks of ``checked_at_end``."""

    def __init__(self) -> None:
        self.depth = 0
        self.flags: dict[torch.device, FiniteFlag] = {}


@dataclass(frozen=True)
class _DenseTable:
    """A matrix of the vocabulary in bfloat16."""

    weight: Tensor

    def rows_at(self, ids: Tensor) -> Tensor:
        """As they are."""
        return self.weight[ids].float()

    def times(self, x: Tensor, rounded: bool) -> Tensor:
        """Of x in bfloat16."""
        assert not rounded
        return F.linear(x.bfloat16(), self.weight).float()

    def tensors(self) -> dict[str, Tensor]:
        """One piece."""
        return {"weight": self.weight}


@dataclass(frozen=True)
class _Fp4Table:
    """A matrix of the vocabulary in FP4, row after row."""

    weight: PackedTensor

    def rows_at(self, ids: Tensor) -> Tensor:
        """Dequantized, in PyTorch."""
        w, at = self.weight, ids.reshape(-1)
        shape = torch.Size((len(at), w.shape[1]))
        rows = replace(w, packed=w.packed[at], scales=w.scales[at], shape=shape)
        return rows.dequantize(torch.float32).view(*ids.shape, w.shape[1])

    def times(self, x: Tensor, rounded: bool) -> Tensor:
        """float32 sums; of bfloat16 inputs rounded to that type once."""
        assert not rounded
        return gemm.linear_w4a16(x if x.dtype in gemm.DTYPES else x.float(), self.weight).float()

    def tensors(self) -> dict[str, Tensor]:
        """Codes, scales and, in NVFP4, the global scale."""
        return _parts(self.weight)


class TritonBackend:
    """Triton kernels on CUDA tensors (or, in the interpreter, any).

    Rows of up to eight tokens take the GEMV, more the GEMM through ``dot_scaled``; inputs that are not quantized take
    the weight-only GEMM. Formats that the fused quantizers do not write (NVFP4-4/6, a scale for all tokens appended
    together) are quantized in PyTorch, for which the host waits, and then read by the same kernels. NaN and infinity
    are found by the kernels; the host looks after each call, or at the end of a block of ``checked_at_end``.
    """

    name = "triton"
    most_new_tokens: int | None = 8
    own_heads: Mapping[torch.dtype, str] = {}

    def check_table(self, name: str) -> None:
        """FP4 with inputs that are not rounded, and bfloat16."""
        if stored_as(name) == "INT8" or name.endswith(ROUNDED):
            raise ReqatError(
                f"head or embeddings {name!r}: the Triton kernels have no product with int8 weights or inputs: choose "
                "BF16, NVFP4 or MXFP4, or run the model on a CPU"
            )

    def table(self, weight: Tensor, name: str) -> Table:
        """FP4 through the weight-only GEMM, bfloat16 through PyTorch."""
        self.check_table(name)
        weight = weight.detach()
        if name == "BF16":
            return _DenseTable(weight.bfloat16())
        return _Fp4Table(quantize(weight.float(), get_format(name)).pack())

    def __init__(self) -> None:
        self._deferred = _Deferred()

    def supports(self, weights: Format, inputs: Format | None, in_features: int) -> bool:
        """FP4 weights in whole blocks; inputs at 16 bits, or of the same element, scale and block."""
        block = weights.block or 1
        if weights.name not in ("NVFP4", "NVFP4-4/6", "MXFP4") or in_features % block:
            return False
        same = inputs is None or (inputs.element, inputs.scale, inputs.block) == (
            weights.element, weights.scale, weights.block,
        )  # fmt: skip
        return same and (inputs is None or inputs.name in ("NVFP4", "NVFP4-4/6", "MXFP4"))

    def allocate_weight_buffers(self, shapes: Iterable[tuple[int, int]], fmt: Format) -> list[Tensor | None]:
        """PyTorch's allocator keeps them together."""
        return [None for _ in shapes]

    def pack_weight(self, weight: QuantizedTensor, buffer: Tensor | None = None) -> PackedTensor:
        """Row after row, as checkpoints have them."""
        return weight.pack()

    def tensors(self, weight: PackedTensor) -> dict[str, Tensor]:
        """Codes, scales and, in NVFP4, the global scale."""
        return _parts(weight)

    def tune(self, weights: Sequence[PackedTensor], inputs: Format | None) -> None:
        """Nothing: launches are chosen by the architecture, before anything runs."""

    def quantize_input(self, x: Tensor, how: InputQuantSpec) -> Tensor | PackedTensor:
        """Codes and scales; the rotation is fused where the kernel has its size."""
        fmt, rotation = how.format, how.rotation
        fused = fmt is not None and _fused(fmt)
        if rotation is not None and not (fused and rotation in triton_quantize.ROTATIONS):
            x, rotation = block_hadamard(x, rotation), None
        if fmt is None:
            return x
        if fused:
            g, flag = how.global_scale, self._flag(x.device)
            return triton_quantize.quantize(x, fmt, rotation=rotation, global_scale=g, flag=flag, name=how.name)
        return quantize(x, fmt, global_scale=how.global_scale, name=how.name).pack()

    def linear(self, x: Tensor | PackedTensor, weight: PackedTensor, bias: Tensor | None) -> Tensor:
        """Exact products of codes, float32 sums."""
        dtype = x.dtype
        if bias is not None and bias.dtype not in gemm.DTYPES:
            bias = bias.float()
        if isinstance(x, Tensor):
            narrow = x if dtype in gemm.DTYPES else x.float()
            return gemm.linear_w4a16(narrow, weight, bias).to(dtype)
        # The GEMV reads pairs of 64-bit words: it would copy a weight of odd multiples of 16 columns in every call.
        few = x.shape[:-1].numel() <= gemv.MAX_ROWS and x.shape[-1] % 32 == 0
        product = gemv.gemv_w4a4 if few else gemm.linear_w4a4
        return product(x, weight, bias).to(dtype)

    def allocate(self, kind: Literal["key", "value"], quantizer: Quantizer, states: Tensor, capacity: int) -> KVSide:
        """Token after token."""
        batch, heads, _, head_dim = states.shape
        fmt, g = quantizer.format, quantizer.global_scale
        assert fmt is not None
        if not fmt.has_global_scale:
            g = None
        elif g is None and fmt.global_scale == "dynamic":  # of the tokens appended together: one a token is kept
            ones = torch.ones(capacity, dtype=torch.float32, device=states.device)
            side = KVSide.allocate(batch, heads, capacity, head_dim, fmt, global_scale=ones, device=states.device)
            return replace(side, format=fmt)
        return KVSide.allocate(batch, heads, capacity, head_dim, fmt, global_scale=g, device=states.device)

    def append(
        self,
        keys: KVSide,
        values: KVSide,
        key_BGTD: Tensor,
        value_BGTD: Tensor,
        start: int | Places,
        *,
        shift_GD: Tensor | None,
        names: tuple[str | None, str | None],
    ) -> None:
        """One launch for both."""
        if key_BGTD.dtype == torch.float64:  # rounded once, after the subtraction, as the reference does
            key_BGTD = (key_BGTD if shift_GD is None else key_BGTD - shift_GD[:, None]).float()
            value_BGTD, shift_GD = value_BGTD.float(), None
        if shift_GD is not None:
            shift_GD = shift_GD.float()  # converting a model to bfloat16 converted its buffers
        if triton_append.writes(keys.format) and triton_append.writes(values.format):
            place = start.next_B if isinstance(start, Places) else start
            flag = self._flag(key_BGTD.device)
            triton_append.append(key_BGTD, value_BGTD, keys, values, place, shift_GD=shift_GD, names=names, flag=flag)
            return
        assert isinstance(start, int)
        key_BGTD = key_BGTD.float() if shift_GD is None else key_BGTD.float() - shift_GD[:, None]
        for side, x, name in ((keys, key_BGTD, names[0]), (values, value_BGTD.float(), names[1])):
            given = side.global_scale if side.format.global_scale == "static" else None
            side.store(quantize(x, side.format, global_scale=given, name=name), start)

    def attend(
        self,
        query_BHTD: Tensor,
        keys: KVSide,
        values: KVSide,
        length: int | Places,
        *,
        scaling: float | None,
        mask: Tensor | None,
        is_causal: bool,
    ) -> Tensor:
        """Split over the sequence; sums in float32, the result in the query's type."""
        given = {"lengths": length.lengths_B, "trusted": True} if isinstance(length, Places) else {"length": length}
        causal = is_causal and mask is None
        return triton_attention.decode_attention(
            query_BHTD, keys, values, mask=mask, causal=causal, scale=scaling, **given
        )

    def waits(self, inputs: Format | None, keys: Format | None, values: Format | None) -> str | None:
        """For formats that PyTorch quantizes, and for errors that nobody reads later."""
        if inputs is not None and not _fused(inputs):
            return f"inputs in {inputs} are quantized in PyTorch"
        for name, fmt in (("keys", keys), ("values", values)):
            if fmt is not None and not triton_append.writes(fmt):
                return f"{name} in {fmt!r} are quantized in PyTorch"
        return None if self._deferred.depth else "each call looks for NaN: decode within checked_at_end(model)"

    def defer(self) -> None:
        """Give the calls of this thread one flag a device."""
        self._deferred.depth += 1

    def tell(self) -> None:
        """Look at the flags, for which the host waits."""
        self._deferred.depth = max(0, self._deferred.depth - 1)
        if self._deferred.depth:
            return
        flags, self._deferred.flags = self._deferred.flags, {}
        for flag in flags.values():
            flag.check()

    def _flag(self, device: torch.device) -> FiniteFlag | None:
        """The flag of the block that this thread is in; None outside of one."""
        if not self._deferred.depth:
            return None
        if device not in self._deferred.flags:
            self._deferred.flags[device] = FiniteFlag(device)
        return self._deferred.flags[device]


def _fused(fmt: Format) -> bool:
    """Whether the Triton quantizer writes this format of inputs."""
    return not fmt.adaptive and fmt.rounding == "even"


def _parts(weight: PackedTensor) -> dict[str, Tensor]:
    parts = {"codes": weight.packed, "scales": weight.scales, "global_scale": weight.global_scale}
    return {name: part for name, part in parts.items() if part is not None}
