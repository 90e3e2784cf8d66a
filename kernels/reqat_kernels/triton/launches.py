"""How kernels are launched: tile sizes, warps and stages, by kernel and architecture, from a table.

``launches.json`` was chosen by ``python -m reqat_kernels.schedules.launches`` from what the compiler made of some
candidates: registers, spills, shared memory, how many blocks fit on a multiprocessor. It is a model of resources;
nothing in it was timed. A table rather than a search at run time, so that results are reproducible.

Names in capitals are constants of the kernel, ``elements`` is a tile's size where its sides follow from the tensor's,
``num_warps`` and ``num_stages`` are triton's options. A GPU takes the entry of its own architecture or of the nearest
older one.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

FILE = Path(__file__).with_suffix(".json")
#: Ampere, Hopper, datacenter Blackwell, consumer Blackwell (and DGX Spark's close relative).
CAPABILITIES = (80, 90, 100, 120)


@cache
def table() -> dict[str, Any]:
    """The file as it is: ``launches`` has, by kind of launch and capability, ``launch`` and what was found of it."""
    found: dict[str, Any] = json.loads(FILE.read_text())
    return found


def nearest(capability: int) -> int:
    """The architecture of the table for a GPU of ``capability`` (10 * major + minor): its own or the nearest older one;
    for those older than all, the oldest."""
    return max((known for known in CAPABILITIES if known <= capability), default=CAPABILITIES[0])


@cache
def _launch(kind: str, capability: int) -> dict[str, int]:
    entries = table()["launches"][kind]
    # A kind that an architecture has no use for, because another kernel is launched there, has no entry of its own.
    known = [int(name) for name in entries]
    at = max((one for one in known if one <= nearest(capability)), default=min(known))
    launch: dict[str, int] = entries[str(at)]["launch"]
    return launch


def launch(kind: str, capability: int) -> dict[str, int]:
    """Constants and options of a ``kind`` of launch on a GPU of ``capability``."""
    return dict(_launch(kind, capability))
