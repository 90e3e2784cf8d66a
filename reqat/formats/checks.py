"""Whether codes, scales and global scale make a quantized tensor: one function for everything that comes from outside.

Codes and scales are read from files, handed over by other code, and read by native kernels that compute addresses from
shapes. What does not fit together is refused here, with the name of the part, what it has and what it must have.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from reqat.formats.format import Format
from reqat.formats.scales import E4M3_MAX, FLOAT32_MAX, SCALE_TYPES

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# Scales are compared as integers: the largest bits that stand for a finite number. Negative numbers, -0.0 among them,
# lie above it (or below zero, where the integer has a sign), and so do infinity, NaN and E8M0's 255.
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}
_LARGEST_BITS = {"E8M0": 254, "E4M3": 0x7E, "E5M2": 0x7B, "FP16": 0x7BFF, "FP32": 0x7F7FFFFF}
#: The smallest global scale: the largest block scale, 448, divided by it is still a float32.
SMALLEST_GLOBAL_SCALE = 1.01 * E4M3_MAX / FLOAT32_MAX


def check_parts(
    codes: Tensor,
    scales: Tensor,
    global_scale: Tensor | None,
    fmt: Format,
    axis: int,
    shape: Sequence[int],
    *,
    dtype: torch.dtype = torch.float32,
    packed: bool = False,
    name: str | None = None,
) -> None:
    """Raise ValueError (TypeError for what is no tensor) unless the parts belong together and hold valid numbers.

    Args:
        codes: uint8, one code an element; ``packed``: ``fmt.codes_per_byte`` codes a byte along ``axis``. As long along
            ``axis`` as ``shape`` says, rounded up to whole blocks.
        scales: one a block along ``axis`` (of formats with ``scale_parts`` 2: and a last axis of 2), in the stored
            type of ``fmt``; finite, not negative (nor -0.0); E8M0 not 255, which is NaN.
        global_scale: for formats that have one: float32, a scalar or of ``shape`` with ``axis`` (and any other axis
            along which it stays the same) of length 1, finite and above :data:`SMALLEST_GLOBAL_SCALE`; else None.
        axis, shape, dtype: of the tensor that was quantized; ``axis`` counts from 0.
        name: what to call the tensor in an error.
    """
    check_structure(codes, scales, global_scale, fmt, axis, shape, dtype=dtype, packed=packed, name=name)
    check_scales(scales, global_scale, fmt, name=name)
    if not packed:
        check_codes(codes, fmt.bits, name=name)


def check_codes(codes: Tensor, bits: int = 4, *, name: str | None = None) -> None:
    """Raise ValueError for codes (uint8, one a byte) of more than ``bits`` bits, on a CPU: elsewhere it would wait for
    the device."""
    if bits == 8 or not _can_look(codes) or not codes.numel():
        return
    largest = int(codes.amax())
    if largest >= 2**bits:
        raise ValueError(f"codes of {name or 'tensor'} hold {largest}; {bits}-bit codes are 0 to {2**bits - 1}")


def check_structure(
    codes: Tensor,
    scales: Tensor,
    global_scale: Tensor | None,
    fmt: Format,
    axis: int,
    shape: Sequence[int],
    *,
    dtype: torch.dtype = torch.float32,
    packed: bool = False,
    name: str | None = None,
) -> None:
    """The part of :func:`check_parts` that looks at no number: types, shapes, devices."""
    label = name or "tensor"
    if not isinstance(fmt, Format):
        raise TypeError(f"format of {label} is a {type(fmt).__name__}, not a Format; get_format(name) makes one")
    wanted: list[tuple[str, object, torch.dtype]] = [
        ("codes", codes, torch.uint8),
        ("scales", scales, SCALE_TYPES[fmt.scale].dtype),
    ]
    if (global_scale is not None) != fmt.has_global_scale:
        raise ValueError(
            f"{label} in {fmt.name} {'needs a' if fmt.has_global_scale else 'has no'} global scale, and "
            f"{'none' if global_scale is None else 'one'} is given"
        )
    if global_scale is not None:
        wanted.append(("global_scale", global_scale, torch.float32))
    for what, part, type_ in wanted:
        if not isinstance(part, Tensor):
            raise TypeError(f"{what} of {label} is a {type(part).__name__}, not a torch tensor")
        if part.dtype != type_:
            raise ValueError(f"{what} of {label} in {fmt.name} (scale {fmt.scale}) must be {type_}, not {part.dtype}")
        if part.device != codes.device:
            raise ValueError(f"{what} of {label} is on {part.device}, its codes on {codes.device}: move one of them")
    if dtype not in _DTYPES:
        raise ValueError(f"dtype of {label} is {dtype}; one of {', '.join(map(str, _DTYPES))} is needed")
    sizes = list(shape)
    if not all(isinstance(size, int) and size >= 0 for size in sizes):
        raise ValueError(f"shape of {label} must be sizes of 0 or more, got {sizes}")
    if not isinstance(axis, int) or not 0 <= axis < len(sizes):
        raise ValueError(f"axis of {label} must be 0 to {len(sizes) - 1} for shape {sizes}, got {axis!r}")
    block = fmt.block or max(1, sizes[axis])
    padded = -(-sizes[axis] // block) * block
    along = -(-padded // fmt.codes_per_byte) if packed else padded
    signs = [2] if fmt.scale_parts > 1 else []
    for what, part, length, more in (("codes", codes, along, []), ("scales", scales, padded // block, signs)):
        expected = [*sizes[:axis], length, *sizes[axis + 1 :], *more]
        if list(part.shape) != expected:
            raise ValueError(
                f"{'packed ' if packed and what == 'codes' else ''}{what} of {label} of shape {sizes} in {fmt.name} "
                f"(blocks of {block} along axis {axis}) must be of shape {expected}, got {list(part.shape)}"
            )
    if global_scale is not None and global_scale.ndim:
        full = [*sizes[:axis], 1, *sizes[axis + 1 :]]
        given = list(global_scale.shape)
        if len(given) != len(full) or any(a not in (1, b) for a, b in zip(given, full, strict=True)):
            raise ValueError(f"global_scale of {label} must be a scalar or of shape {full}, got {given}")


def check_scales(scales: Tensor, global_scale: Tensor | None, fmt: Format, *, name: str | None = None) -> None:
    """The part of :func:`check_parts` that looks at the scales' numbers; their types have been checked."""
    label = name or "tensor"
    if scales.numel():
        bits = scales.detach().view(_INTEGERS[scales.element_size()])
        lowest, highest = (int(bit) for bit in bits.aminmax())
        if lowest < 0 or highest > _LARGEST_BITS[fmt.scale]:
            bad = int(((bits < 0) | (bits > _LARGEST_BITS[fmt.scale])).sum())
            raise ValueError(
                f"scales of {label} hold {bad} of {scales.numel()} that are NaN, infinite or negative "
                f"({fmt.scale}); make the codes and scales again"
            )
    if global_scale is not None and global_scale.numel():
        g = global_scale.detach()
        if not bool(((g > SMALLEST_GLOBAL_SCALE) & (g <= FLOAT32_MAX)).all()):  # false for NaN too
            raise ValueError(
                f"global_scale of {label} must be finite and above {SMALLEST_GLOBAL_SCALE:.2g}, got "
                f"{g.flatten()[:4].tolist()}"
            )


def check_construction(
    codes: Tensor, scales: Tensor, global_scale: Tensor | None, fmt: Format, axis: int, shape: Sequence[int],
    dtype: torch.dtype, packed: bool,
) -> None:  # fmt: skip
    """What QuantizedTensor and PackedTensor check when they are made: all of :func:`check_parts` that costs nothing.

    The numbers of scales are looked at on a CPU alone (elsewhere that would wait for the device) and where no graph is
    traced; codes, of which there are many, where they are read.
    """
    check_structure(codes, scales, global_scale, fmt, axis, shape, dtype=dtype, packed=packed)
    if _can_look(scales):
        check_scales(scales, global_scale, fmt)


def _can_look(t: Tensor) -> bool:
    """Whether the numbers of ``t`` can be had at once: not on another device, nor while a graph is traced."""
    return type(t) in (Tensor, torch.nn.Parameter) and t.device.type == "cpu" and not torch.compiler.is_compiling()
