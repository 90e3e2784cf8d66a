"""What a tensor must be before its address goes to native code, which knows no lengths and believes every number.

Every operator checks all that C will read or write: types, shapes, contiguity, sizes, and that there is memory. The
checks compare Python integers; a token's time has no room for more. An error names the argument, what it has and what
is needed: TypeError for what is no tensor or no number, ValueError for the rest.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from reqat.formats.checks import SMALLEST_GLOBAL_SCALE
from reqat.formats.scales import FLOAT32_MAX

#: C computes addresses in 64 bits; a size below this cannot overflow when it is multiplied by a type's bytes and by 2.
MAX_SIZE = 1 << 58
_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_INTEGERS, _NUMBERS = (int, torch.SymInt), (int, float, torch.SymInt, torch.SymFloat)  # made once: unions cost


def tensor(name: str, t: Any) -> Tensor:
    """``t`` itself; TypeError unless it is a tensor."""
    if not isinstance(t, Tensor):
        raise TypeError(f"{name} is a {type(t).__name__}, not a torch tensor")
    return t


def floats(name: str, t: Any, *, ndim: int | None = None, device: torch.device | None = None) -> Tensor:
    """``t`` itself; refused unless it is a tensor of float32, bfloat16, float16 or float64 (of ``ndim`` axes)."""
    tensor(name, t)
    if t.dtype not in _FLOATS:
        raise ValueError(f"{name} has dtype {t.dtype}; a float dtype is needed: float32, bfloat16, float16 or float64")
    if ndim is not None and t.ndim != ndim:
        raise ValueError(f"{name} of shape {list(t.shape)} must have {ndim} axes")
    if device is not None and t.device != device:
        raise ValueError(f"{name} is on {t.device}, the other arguments on {device}: move one of them")
    return t


def exactly(name: str, t: Any, dtype: torch.dtype, shape: tuple[int, ...], device: torch.device) -> Tensor:
    """``t`` itself; refused unless it is a contiguous tensor of this type and shape on this device."""
    tensor(name, t)
    if t.dtype != dtype or t.shape != shape or t.device != device or not t.is_contiguous():
        how = "" if t.is_contiguous() else ", not contiguous"
        raise ValueError(
            f"{name} must be contiguous {dtype} of shape {list(shape)} on {device}, got {t.dtype} of shape "
            f"{list(t.shape)} on {t.device}{how}"
        )
    return t


def rows(name: str, ids: Tensor, n: int) -> Tensor:
    """``ids`` itself, integers; IndexError unless each is a row of a weight of ``n`` rows (none is counted from the
    end)."""
    if ids.numel():
        lowest, highest = (int(number) for number in tensor(name, ids).aminmax())
        if lowest < 0 or highest >= n:
            raise IndexError(f"{name} name row {lowest if lowest < 0 else highest} of a weight of {n} rows")
    return ids


def on_cpu(name: str, t: Tensor) -> Tensor:
    """``t`` itself; ValueError unless it lies on the CPU."""
    if not t.is_cpu:
        raise ValueError(f"{name} is on {t.device}: native kernels take CPU tensors, move it with .cpu()")
    return t


def bias(t: Any, rows: int, device: torch.device) -> None:
    """Refuse what is not None nor a bias of a weight with ``rows`` rows."""
    if t is None:
        return
    floats("bias", t, ndim=1, device=device)
    if t.shape[0] != rows:
        raise ValueError(f"bias of shape {list(t.shape)} must have one number a row of the weight, [{rows}]")


def integer(name: str, n: Any) -> int:
    """``n`` itself; TypeError unless it is an integer."""
    if isinstance(n, bool) or not isinstance(n, _INTEGERS):
        raise TypeError(f"{name} is {n!r}, not an integer")
    return n  # type: ignore[return-value]


def size(name: str, n: Any, *, least: int = 0, most: int = MAX_SIZE) -> int:
    """``n`` itself; refused unless it is an integer from ``least`` to ``most``."""
    if not least <= integer(name, n) <= most:
        raise ValueError(f"{name} is {n}: {least} to {most} is possible")
    return n


def global_scale(name: str, g: Any) -> float:
    """``g`` as a number; refused unless it is one number, finite and large enough that 448 / g is a float32."""
    if isinstance(g, Tensor):
        if g.numel() != 1:
            raise ValueError(f"{name} of shape {list(g.shape)} must be one number")
        g = on_cpu(name, g).item()
    if isinstance(g, bool) or not isinstance(g, int | float):
        raise TypeError(f"{name} is {g!r}, not a number")
    if not SMALLEST_GLOBAL_SCALE < g <= FLOAT32_MAX:  # false for NaN
        raise ValueError(f"{name} must be finite and above {SMALLEST_GLOBAL_SCALE:.2g}, got {g}")
    return float(g)


def finite(name: str, number: Any) -> float:
    """``number`` itself; refused unless it is a finite number."""
    if isinstance(number, bool) or not isinstance(number, _NUMBERS):
        raise TypeError(f"{name} is {number!r}, not a number")
    if not math.isfinite(number):
        raise ValueError(f"{name} must be finite, got {number}")
    return number  # type: ignore[return-value]


def address(t: Tensor | None) -> int | None:
    """Where the numbers of ``t`` begin; None for None. ValueError for a tensor whose memory was taken away."""
    if t is None:
        return None
    at = t.data_ptr()
    if not at and t.numel():
        raise ValueError(f"a tensor of shape {list(t.shape)} has no memory: its storage was freed or never allocated")
    return at
