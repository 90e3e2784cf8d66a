"""NaN and infinity, found by kernels on the device and told by the host when it looks.

A number that is not finite has no code, so every quantizing kernel looks for one. What it finds is one integer in
device memory: the number of the call that met one first. Kernels of one stream run one after the other, and the first
to exchange a 0 for its number wins, so later calls, which may only have inherited the NaN, do not hide it.

Reading that integer makes the host wait for the device. Called without a flag, a function of this package makes one
and reads it before it returns. A decoding passes one flag to all its calls and reads it at the end: hundreds of waits
become one, and the calls can be captured in a CUDA graph, since a call's number and the flag's address stay the same.
"""

from __future__ import annotations

import torch
from torch import Tensor

from reqat_kernels.triton.runtime import tl, triton

#: The bits of float32 infinity as an integer; those of a magnitude that is infinite or NaN are no smaller.
INFINITY_BITS = tl.constexpr(0x7F800000)


class NotFinite(ValueError):
    """A tensor to be quantized holds NaN or infinity."""


class FiniteFlag:
    """The number of the first call that met NaN or infinity (``found``, int32 [1] on ``device``; 0: none did).

    Calls that learn on the device alone that their arguments do not fit raise it, too.
    """

    def __init__(self, device: torch.device | str) -> None:
        self.found = torch.zeros(1, dtype=torch.int32, device=device)
        self._numbers: dict[str, int] = {}
        self._errors: list[ValueError] = []

    def number(self, message: str, kind: type[ValueError] = NotFinite) -> int:
        """The number of a call whose error is a ``kind`` of ``message``: from 1 on, the same for the same message."""
        if message not in self._numbers:
            self._errors.append(kind(message))
            self._numbers[message] = len(self._errors)
        return self._numbers[message]

    def check(self) -> None:
        """Wait for the device; raise the error of the first call that raised the flag, if one did.

        The flag is down again then.
        """
        found = int(self.found)
        if found:
            self.found.zero_()
            raise self._errors[found - 1]


def refusal(name: str, shape: torch.Size, what: str = "NaN or infinity") -> str:
    """The words of the error."""
    return f"{name} of shape {tuple(shape)} holds {what}; only finite numbers can be quantized"


def refuse(name: str, x: Tensor) -> None:
    """Wait for the device; raise NotFinite if ``x`` holds NaN or infinity."""
    if not bool(torch.isfinite(x).all()):
        raise NotFinite(refusal(name, x.shape))


@triton.jit
def raise_flag(flag_ptr, bits, call):
    """Write ``call`` to the flag if it is down and one of the magnitudes whose ``bits`` (int32 [R, C]) are given is
    infinite or NaN."""
    if tl.max(tl.max(bits, axis=1), axis=0) >= INFINITY_BITS:
        tl.atomic_cas(flag_ptr, 0, call)
