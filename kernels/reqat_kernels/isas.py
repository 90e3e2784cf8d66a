"""Names of the instruction sets that native kernels are written for. Without torch: the command line reads them too."""

from __future__ import annotations

ISAS = ("portable", "avx2", "avxvnni", "avx512", "amx")
"""From the least on, by ``reqat::Isa`` of native/common.h."""
CHOICES = ("torch", *ISAS)
"""What ``REQAT_ISA`` may say; ``torch`` is no native code at all."""

#: Why an instruction set cannot be used, by ``reqat::Lack`` of native/common.h.
LACKS = {
    1: "this CPU has no {}",
    2: "the operating system does not save the registers of {}",
    3: "the Linux kernel refused permission to use {}",
    4: "the compiler that built the library does not know {}",
}
