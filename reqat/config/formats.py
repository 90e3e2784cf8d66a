"""The families of formats and what each leaves open, readable without torch.

Configuration, precision names and :class:`reqat.formats.Format` all read this one table. The first value of a field is
its default.

| name | element | block | scale | scale_rule | rounding | global_scale |
|---|---|---|---|---|---|---|
| MXFP4 | E2M1, E1M2 | 32 | E8M0 | ceil, floor, even | even, away | none |
| NVFP4 | E2M1, E1M2 | 16 | E4M3 | divide, multiply, reciprocal | even, away | dynamic, row, static |
| NVFP4-4/6 | E2M1 | 16 | E4M3 | divide | even, away | dynamic, row, static |
| AMXFP4 | E2M1, E1M2 | 32, a scale a sign | E5M2, E4M3, FP16 | nearest | away, even | none |
| | | | E8M0 ("PO2") | floor, even | away, even | none |
| INT4-g128 | INT4 | 128 | FP32, FP16 | nearest | even, away | none |
| INT4-row | INT4 | the whole row | FP32, FP16 | nearest | even, away | none |

MXFP4's default is ``ceil`` because ReQAT uses it; OCP's specification says ``floor``, compressed-tensors exports
``even``. What each rule computes is in :mod:`reqat.formats.scales`.
"""

from __future__ import annotations

from typing import Any


def _family(block: int | None, *, asymmetric: bool = False, adaptive: bool = False, **choices: str) -> dict[str, Any]:
    """What each field of a Format may be, the default first."""
    fields = {"element": "E2M1", "global_scale": "none", "rounding": "even away", **choices}
    return {
        "block": (block,),
        "asymmetric": (asymmetric,),
        "adaptive": (adaptive,),
        **{field: tuple(values.split()) for field, values in fields.items()},
    }


FAMILIES: dict[str, dict[str, tuple[Any, ...]]] = {
    "MXFP4": _family(32, element="E2M1 E1M2", scale="E8M0", scale_rule="ceil floor even"),
    "NVFP4": _family(
        16,
        element="E2M1 E1M2",
        scale="E4M3",
        scale_rule="divide multiply reciprocal",
        global_scale="dynamic row static",
    ),
    "NVFP4-4/6": _family(16, adaptive=True, scale="E4M3", scale_rule="divide", global_scale="dynamic row static"),
    "AMXFP4": _family(
        32,
        asymmetric=True,
        element="E2M1 E1M2",
        scale="E5M2 E4M3 FP16 E8M0",
        scale_rule="nearest floor even",
        rounding="away even",
    ),
    "INT4-g128": _family(128, element="INT4", scale="FP32 FP16", scale_rule="nearest"),
    "INT4-row": _family(None, element="INT4", scale="FP32 FP16", scale_rule="nearest"),
}

FORMATS = tuple(FAMILIES)
"""Names of the families, as configuration and the command line take them."""


def has_global_scale(family: str) -> bool:
    """Whether a float32 scale stands above the block scales of this family."""
    return FAMILIES[family]["global_scale"] != ("none",)
