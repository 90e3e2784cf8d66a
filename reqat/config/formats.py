"""The families of formats and what each leaves open, readable without torch.

Configuration, precision names and :class:`reqat.formats.Format` all read this one table. The first value of a field is
its default.

| name | element | block | scale | scale_rule | rounding | global_scale |
|---|---|---|---|---|---|---|
| MXFP4 | E2M1, E1M2 | 32 | E8M0 | rceil, floor, even | even, away | none |
| MXFP4-4/3 | E2M1 | 32 | E8M0 times 4/3 | four_thirds | even, away | none |
| NVFP4 | E2M1, E1M2 | 16 | E4M3 | divide, multiply, reciprocal | even, away | dynamic, row, static |
| NVFP4-4/6 | E2M1 | 16 | E4M3 | divide | even, away | dynamic, row, static |
| AMXFP4 | E2M1, E1M2 | 32, a scale a sign | E5M2, E4M3, FP16 | nearest | away, even | none |
| | | | E8M0 ("PO2") | floor, even | away, even | none |
| INT2-g128, INT3-g128, INT4-g128, INT8-g128 | INT2 ... INT8 | 128 | FP32, FP16 | nearest | even, away | none |
| INT2-row, INT3-row, INT4-row, INT8-row | INT2 ... INT8 | the whole row | FP32, FP16 | nearest | even, away | none |
| INT4-g32 | INT4 | 32 | FP32, FP16, E5M2, E4M3 | nearest | even, away | none |
| | | | E8M0 | floor, even | even, away | none |
| AINT4-g32 | UINT4 | 32 | FP32, FP16, E5M2, E4M3; zero points | minmax | even, away | none |
| | | | E8M0; zero points | floor, even | even, away | none |
| AINT4-g128, AINT4-row | UINT4 | 128, the row | FP32, FP16; zero points | minmax | even, away | none |
| AINT2-tensor ... AINT4-tensor | UINT2 ... UINT4 | the tensor | FP32, FP16; zero points | minmax | even, away | none |
| FP4-g32 | E2M1 | 32 | FP16, E5M2, E4M3 | nearest | even, away | none |
| FP4-g16 | E2M1 | 16 | FP16, E5M2, E4M3 | nearest | even, away | none |
| | | | E8M0 | floor, even | even, away | none |
| INT2-tensor ... INT8-tensor | INT2 ... INT8 | the whole tensor | FP32, FP16 | nearest | even, away | none |
| SAWB2-tensor ... SAWB4-tensor | MID2, INT2 ... MID4, INT4 | the whole tensor | FP32, FP16 | sawb | even | none |
| TERNARY-row, TERNARY-tensor | TERNARY | the whole row or tensor | FP32, FP16 | twn | even | none |
| FP8-row, FP8-tensor | E4M3 | the whole row or tensor | FP32, FP16 | nearest | even, away | none |

A row is a weight's output channel, or a token. The scale of a whole tensor is that of the tensor at hand: inputs, keys
and values then depend on what else is in the batch, as under ``dynamic``.

AINT4 is affine: codes 0 to 15 reach from the least to the largest number of a block (and to zero), as AWQ quantizes
weights and QuaRot and FlatQuant quantize activations. Of numbers that are not negative its zero point is 0, and what is
left are the levels of PACT (arXiv 1805.06085), whose learned range is a gradient rule (:mod:`reqat.quant.gradients`).
SAWB (arXiv 1807.06964) takes the range of a whole tensor from its first two moments; MID2 puts its levels at both sides
of zero, INT2 instead leaves one out for the sake of a zero. MXFP4-4/3 is MR-GPTQ's: the power of two of ``floor`` times
4/3, which puts the top of the binade, 8, at 6, so that nothing saturates.

FP4-g32 and FP4-g16 are MXFP4 and NVFP4 with other scales, none of them above a whole tensor: what AMXFP4 is compared
with. They and INT4-g32, AINT4-g32 with such scales exist for that comparison; nobody packs or exports them.

MXFP4's default is ``rceil`` (also called ``ceil``) because ReQAT uses it; OCP's specification says ``floor``,
compressed-tensors exports ``even``. What each rule computes is in :mod:`reqat.formats.scales`.
"""

from __future__ import annotations

from typing import Any

ELEMENT_BITS = {
    **{"E2M1": 4, "E1M2": 4, "INT2": 2, "INT3": 3, "INT4": 4, "INT8": 8, "TERNARY": 2, "E4M3": 8},
    **{f"{kind}{bits}": bits for kind in ("UINT", "MID") for bits in (2, 3, 4)},
}
"""Bits of a code of each element type."""

_ALIASES = {"scale": {"PO2": "E8M0"}, "scale_rule": {"ceil": "rceil"}}


def standard(field: str, value: Any) -> Any:
    """The standard name of a value of a format's field: ``rceil`` of ``ceil``, ``E8M0`` of ``PO2``."""
    return _ALIASES.get(field, {}).get(value, value) if isinstance(value, str) else value


POWER_RULES = ("rceil", "floor", "even", "four_thirds")
"""Rules whose scales are powers of two (E8M0); the others are of scales that are stored as small floats."""


def rule_for(family: str, scale: str, rule: str) -> str:
    """`rule`, if scales of this type follow from it, or else the family's first rule that they follow from."""
    fits = [one for one in FAMILIES[family]["scale_rule"] if (scale == "E8M0") == (one in POWER_RULES)]
    return rule if rule in fits or not fits else str(fits[0])


def _family(
    block: int | None, *, asymmetric: bool = False, adaptive: bool = False, per_tensor: bool = False, **choices: str
) -> dict[str, Any]:
    """What each field of a Format may be, the default first."""
    fields = {"element": "E2M1", "global_scale": "none", "rounding": "even away", **choices}
    return {
        "block": (block,),
        "asymmetric": (asymmetric,),
        "adaptive": (adaptive,),
        "per_tensor": (per_tensor,),
        **{field: tuple(values.split()) for field, values in fields.items()},
    }


FAMILIES: dict[str, dict[str, tuple[Any, ...]]] = {
    "MXFP4": _family(32, element="E2M1 E1M2", scale="E8M0", scale_rule="rceil floor even"),
    "NVFP4": _family(
        16,
        element="E2M1 E1M2",
        scale="E4M3",
        scale_rule="divide multiply reciprocal",
        global_scale="dynamic row static",
    ),
    "NVFP4-4/6": _family(16, adaptive=True, scale="E4M3", scale_rule="divide", global_scale="dynamic row static"),
    "MXFP4-4/3": _family(32, scale="E8M0", scale_rule="four_thirds"),
    "AMXFP4": _family(
        32,
        asymmetric=True,
        element="E2M1 E1M2",
        scale="E5M2 E4M3 FP16 E8M0",
        scale_rule="nearest floor even",
        rounding="away even",
    ),
    **{
        f"INT{bits}-{sharing}": _family(
            128 if sharing == "g128" else None,
            per_tensor=sharing == "tensor",
            element=f"INT{bits}",
            scale="FP32 FP16",
            scale_rule="nearest",
        )
        for bits in (2, 3, 4, 8)
        for sharing in ("g128", "row", "tensor")
    },
    "INT4-g32": _family(32, element="INT4", scale="FP32 FP16 E5M2 E4M3 E8M0", scale_rule="nearest floor even"),
    "AINT4-g32": _family(32, element="UINT4", scale="FP32 FP16 E5M2 E4M3 E8M0", scale_rule="minmax floor even"),
    **{
        f"AINT{bits}-{sharing}": _family(
            block,
            per_tensor=sharing == "tensor",
            element=f"UINT{bits}",
            scale="FP32 FP16",
            scale_rule="minmax",
        )
        for sharing, block, some in (("g128", 128, (4,)), ("row", None, (4,)), ("tensor", None, (2, 3, 4)))
        for bits in some
    },
    **{
        f"SAWB{bits}-tensor": _family(
            None,
            per_tensor=True,
            element=f"MID{bits} INT{bits}",
            scale="FP32 FP16",
            scale_rule="sawb",
            rounding="even",
        )
        for bits in (2, 3, 4)
    },
    "FP4-g32": _family(32, scale="FP16 E5M2 E4M3", scale_rule="nearest"),
    "FP4-g16": _family(16, scale="FP16 E5M2 E4M3 E8M0", scale_rule="nearest floor even"),
    **{
        f"{name}-{sharing}": _family(
            None, per_tensor=sharing == "tensor", element=element, scale="FP32 FP16", scale_rule=rule, rounding=rounding
        )
        for name, element, rule, rounding in (
            ("TERNARY", "TERNARY", "twn", "even"),
            ("FP8", "E4M3", "nearest", "even away"),
        )
        for sharing in ("row", "tensor")
    },
}

FORMATS = tuple(FAMILIES)
"""Names of the families, as configuration and the command line take them."""


def bits_of(family: str) -> int:
    """Bits of a code of this family: the number behind W, A and KV in a precision's name."""
    return ELEMENT_BITS[FAMILIES[family]["element"][0]]


def has_global_scale(family: str) -> bool:
    """Whether a float32 scale stands above the block scales of this family."""
    return FAMILIES[family]["global_scale"] != ("none",)
