"""Types of machines: the processor's vendor and family, and the instruction set in use, such as ``AMD EPYC, avx512``.

Times of two machines of one type may be held against each other; those of different types are numbers about different
things. Derived from what every record holds, so that older ones have a type, too.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

UNKNOWN = "instruction set not recorded"
_MARKS = re.compile(r"\((R|TM|C)\)", re.IGNORECASE)
_FAMILY = re.compile(r"\b(AMD|Intel|ARM|Ampere|Apple|IBM)\b\s*([A-Za-z]\w*)?")


def machine_type(record: Mapping[str, Any]) -> str:
    """The type of the machine that a record was made on: of its ``hardware`` and ``native``."""
    hardware = record.get("hardware") or {}
    name = _MARKS.sub("", str(hardware.get("cpu", ""))).strip()
    found = _FAMILY.search(name)
    family = " ".join(filter(None, found.groups())) if found else name or "unknown processor"
    return f"{family}, {instructions_of(record) or UNKNOWN}"


def instructions_of(record: Mapping[str, Any]) -> str | None:
    """The instruction set in use: the processor's best that torch or the native kernels have code for, or the lesser
    one that the native kernels were limited to; None in records that say neither."""
    best = (record.get("hardware") or {}).get("instructions")
    native = (record.get("native") or {}).get("instruction_set")
    if native is None or (native == "avx512" and best is not None):
        return best
    return str(native)


def of_flags(flags: str) -> str | None:
    """The best instruction set for matrix products in a processor's flags as Linux lists them; None if it is none of
    those that have kernels of their own."""
    there = set(flags.split())
    for name, needed in (("amx", {"amx_tile", "amx_bf16"}), ("avx512", {"avx512f"}), ("avx2", {"avx2"}),
                         ("neon", {"asimd"})):  # fmt: skip
        if needed <= there:
            return name
    return None
