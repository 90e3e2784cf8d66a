"""Packed keys or values of one layer, row after row, as the Triton kernels append to them and read them.

A token's codes lie together, so a program loads a tile of tokens with one strided read, and appending one writes one
contiguous piece. (The native kernels keep tiles of 16 tokens, for registers that hold a channel of 16 tokens each.)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from reqat.formats import Format, QuantizedTensor, get_format, pack_codes, unpack_codes
from reqat.formats.checks import SMALLEST_GLOBAL_SCALE
from reqat.formats.scales import FLOAT32_MAX
from reqat_kernels.native import check
from reqat_kernels.native.states import check_batch_rows


@dataclass(frozen=True, eq=False)
class KVSide:
    """Packed keys, or packed values, of one layer; ``S`` is the capacity.

    ``codes``: uint8 [B, G, S, D/2], the low nibble holds the even channel. ``scales``: uint8 [B, G, S, D/block], the
    bits of E4M3 or E8M0. ``global_scale``: None for MXFP4; else float32, a scalar, [S], or [B, G, S] (anything that
    broadcasts to it). ``format``: NVFP4, NVFP4-4/6 or MXFP4, with its element. Raises ValueError for parts that do not
    fit together.
    """

    codes: Tensor
    scales: Tensor
    global_scale: Tensor | None
    format: Format

    def __post_init__(self) -> None:
        if not isinstance(self.format, Format):
            raise TypeError(f"format is a {type(self.format).__name__}, not a Format; get_format(name) makes one")
        check_format(self.format)
        check.tensor("codes", self.codes)
        check.tensor("scales", self.scales)
        codes, scales, block = self.codes, self.scales, self.format.block
        if codes.ndim != 4 or codes.dtype != torch.uint8:
            raise ValueError(f"codes must be uint8 [B, G, S, D/2], got {codes.dtype} {tuple(codes.shape)}")
        assert block is not None
        if codes.shape[-1] * 2 % block:
            raise ValueError(_ragged(codes.shape[-1] * 2, self.format))
        wanted = (*codes.shape[:3], codes.shape[-1] * 2 // block)
        if scales.dtype != torch.uint8 or tuple(scales.shape) != wanted:
            raise ValueError(
                f"scales must be uint8 {wanted} for codes of {tuple(codes.shape)} in {self.format}, got {scales.dtype} "
                f"{tuple(scales.shape)}; view float8 scales as torch.uint8"
            )
        if codes.stride(-1) != 1 or scales.stride(-1) != 1:
            raise ValueError("the last axis of codes and scales must be contiguous: call .contiguous() once")
        if codes.device != scales.device:
            raise ValueError(f"codes are on {codes.device}, scales on {scales.device}: move them to one device")
        if (self.global_scale is None) == self.format.has_global_scale:
            needs = "needs a global_scale" if self.format.has_global_scale else "has no global scale: pass None"
            raise ValueError(f"{self.format} {needs}")
        if self.global_scale is not None:
            check.tensor("global_scale", self.global_scale)
            self.global_scale_BGS()

    @classmethod
    def allocate(
        cls,
        batch: int,
        kv_heads: int,
        capacity: int,
        head_dim: int,
        fmt: Format | str,
        *,
        global_scale: Tensor | float | None = None,
        device: torch.device | str | None = None,
    ) -> KVSide:
        """An empty cache of tokens to append.

        ``global_scale`` of NVFP4: the calibrated number (or [S] or [B, G, S] of them), which makes the format
        ``static``; None keeps one a row, [B, G, S], computed as tokens come, and makes it ``row``.
        """
        fmt = get_format(fmt)
        for what, size in (("batch", batch), ("heads", kv_heads), ("capacity", capacity), ("head_dim", head_dim)):
            check.size(what, size)
        shape = (batch, kv_heads, capacity)
        g: Tensor | None = None
        if fmt.has_global_scale:
            fmt = fmt.replace(global_scale="row" if global_scale is None else "static")
            g = torch.ones(shape, dtype=torch.float32, device=device)
            if global_scale is not None:
                g = torch.as_tensor(global_scale, dtype=torch.float32, device=device)
                if not bool(((g > SMALLEST_GLOBAL_SCALE) & (g <= FLOAT32_MAX)).all()):  # false for NaN
                    raise ValueError(f"global_scale must be finite and above {SMALLEST_GLOBAL_SCALE:.2g}, got {g}")
        elif global_scale is not None:
            raise ValueError(f"{fmt} has no global scale: pass None")
        check_format(fmt)
        assert fmt.block is not None
        if head_dim % fmt.block:
            raise ValueError(_ragged(head_dim, fmt))
        codes = torch.zeros(*shape, head_dim // 2, dtype=torch.uint8, device=device)
        scales = torch.zeros(*shape, head_dim // fmt.block, dtype=torch.uint8, device=device)
        return cls(codes, scales, g, fmt)

    @property
    def head_dim(self) -> int:
        """D."""
        return self.codes.shape[-1] * 2

    @property
    def nbytes(self) -> int:
        """Bytes of all parts, as allocated."""
        return self.codes.nbytes + self.scales.nbytes + (0 if self.global_scale is None else self.global_scale.nbytes)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(B, G, tokens that fit, D)."""
        B, G, S, pairs = self.codes.shape
        return B, G, S, 2 * pairs

    def store(self, q: QuantizedTensor, offset: int) -> None:
        """Write tokens that were quantized elsewhere, [B, G, T, D] along D, from place ``offset`` on.

        Their global scales are written where the cache keeps them a token or a row. Raises ValueError for tokens that
        do not fit.
        """
        if not isinstance(q, QuantizedTensor):
            raise TypeError(f"tokens are a {type(q).__name__}, not a QuantizedTensor; reqat.quantize makes one")
        check_rows("tokens", q.shape, self)
        mine, theirs = self.format, q.format
        if (theirs.element, theirs.scale, theirs.block, q.axis) != (mine.element, mine.scale, mine.block, 3):
            raise ValueError(f"tokens in {theirs!r} along axis {q.axis} do not fit a cache in {mine!r}")
        if q.codes.device != self.codes.device:
            raise ValueError(f"tokens are on {q.codes.device}, the cache on {self.codes.device}: move one of them")
        check.integer("offset", offset)
        end = offset + q.shape[2]
        if not 0 <= offset <= end <= self.shape[2]:
            raise ValueError(f"{q.shape[2]} tokens at {offset} do not fit the cache's capacity of {self.shape[2]}")
        self.codes[:, :, offset:end] = pack_codes(q.codes)
        self.scales[:, :, offset:end] = q.scales.view(torch.uint8)
        if self.format.global_scale in ("dynamic", "row"):
            assert self.global_scale is not None and q.global_scale is not None
            g = q.global_scale
            self.global_scale[..., offset:end] = g[..., 0] if g.ndim == 4 else g

    def quantized(self, length: int) -> QuantizedTensor:
        """The first ``length`` tokens as codes [B, G, length, D] and scales in the types of ``reqat.quantize``."""
        B, G, room, D = self.shape
        check.size("length", length, most=room)
        g = None if self.global_scale is None else self.global_scale_BGS()[:, :, :length, None]
        scales = self.scales[:, :, :length].contiguous()
        if self.format.scale == "E4M3":
            scales = scales.view(torch.float8_e4m3fn)
        codes = unpack_codes(self.codes[:, :, :length], D)
        return QuantizedTensor(codes, scales, g, self.format, 3, torch.Size((B, G, length, D)), torch.float32)

    def dequantize(self, length: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """The first ``length`` tokens as numbers, [B, G, length, D]: bit for bit what fake quantization gives."""
        return self.quantized(length).dequantize(dtype)

    def resized(self, capacity: int, length: int) -> KVSide:
        """A copy with room for ``capacity`` tokens that holds the first ``length``."""
        return self._copied(capacity, length, lambda part: part)

    def select_rows(self, rows: Tensor, length: int) -> KVSide:
        """A copy with these batch rows (integers [rows], perhaps none), in this order, of the first ``length`` tokens.

        Raises ValueError for a row that is not there.
        """
        check_batch_rows(rows, self.shape[0])
        return self._copied(self.shape[2], length, lambda part: part.index_select(0, rows.long()))

    def _copied(self, capacity: int, length: int, chosen: Callable[[Tensor], Tensor]) -> KVSide:
        check.size("capacity", capacity)
        check.size("length", length, most=min(capacity, self.shape[2]))

        def copy(part: Tensor) -> Tensor:
            kept = chosen(part[:, :, :length])
            # Ones: a global scale divides, also where no token is yet.
            new = part.new_ones(len(kept), part.shape[1], capacity, *part.shape[3:])
            new[:, :, :length] = kept
            return new

        g = self.global_scale
        if g is not None and g.ndim == 1 and g.numel() > 1:
            g = torch.cat((g[:length], g.new_ones(capacity - length)))
        elif g is not None and g.numel() > 1:
            g = copy(self.global_scale_BGS())
        return KVSide(copy(self.codes), copy(self.scales), g, self.format)

    def global_scale_BGS(self) -> Tensor:
        """The global scale seen as float32 [B, G, S], without a copy: stride 0 along the axes that share it."""
        g = self.global_scale
        if g is None:  # never read by a kernel; any float32 pointer does
            return torch.ones((), dtype=torch.float32, device=self.codes.device).expand(self.codes.shape[:3])
        if g.dtype != torch.float32 or g.device != self.codes.device:
            raise ValueError(f"global_scale must be float32 on {self.codes.device}, got {g.dtype} on {g.device}")
        if g.ndim == 4 and g.shape[-1] == 1:
            g = g[..., 0]
        try:
            return g.reshape(()).expand(self.codes.shape[:3]) if g.numel() == 1 else g.expand(self.codes.shape[:3])
        except RuntimeError as error:
            raise ValueError(
                f"global_scale of shape {tuple(g.shape)} must be a scalar, [S] or [B, G, S] for codes of "
                f"{tuple(self.codes.shape)}"
            ) from error


def check_format(fmt: Format) -> Format:
    """``fmt`` itself; raises ValueError unless it stores one E4M3 or E8M0 scale a block of E2M1 or E1M2."""
    if fmt.name not in ("NVFP4", "NVFP4-4/6", "MXFP4"):
        raise ValueError(f"the cache kernels take NVFP4, NVFP4-4/6 and MXFP4, not {fmt}: use the PyTorch path for it")
    return fmt


def _ragged(head_dim: int, fmt: Format) -> str:
    return (
        f"head_dim {head_dim} is not a multiple of {fmt}'s block of {fmt.block}: pad the heads with zeros, or choose a "
        "format of a smaller block"
    )


def check_rows(name: str, shape: torch.Size | tuple[int, ...], side: KVSide, *, grouped: bool = False) -> None:
    """Raise ValueError unless ``shape`` is [B, heads, T, D] with the cache's B, D and heads.

    ``grouped``: query heads, of which each of the cache's serves the same number.
    """
    B, G, _, D = side.shape
    heads = len(shape) == 4 and G > 0 and (shape[1] % G == 0 if grouped else shape[1] == G)
    if not heads or (shape[0], shape[3]) != (B, D):
        raise ValueError(f"{name} {tuple(shape)} does not fit a cache of batch {B}, {G} KV heads and head_dim {D}")


def check_pair(key: KVSide, value: KVSide) -> None:
    """Raise ValueError unless keys and values are of one shape on one device."""
    if key.shape != value.shape:
        raise ValueError(f"keys of shape {key.shape} and values of shape {value.shape} must have one shape")
    if key.codes.device != value.codes.device:
        raise ValueError(f"keys on {key.codes.device}, values on {value.codes.device}: move them to one device")
