"""A Format is a frozen value that says everything about how a tensor is quantized: element, block, scale, rounding.

The names are families with defaults; options change what a family leaves open:

| name | element | block | scale | scale_rule | rounding | global scale |
|---|---|---|---|---|---|---|
| MXFP4 | E2M1 | 32 | E8M0 | **ceil**, floor, even | even | none |
| NVFP4 | E2M1 (or E1M2) | 16 | E4M3 | **divide**, multiply, reciprocal | even | dynamic, row, static |
| NVFP4-4/6 | E2M1 | 16 | E4M3 | divide | even | dynamic, row, static |
| AMXFP4 | E2M1 (or E1M2) | 32, one scale a sign | E5M2, E4M3, FP16, or E8M0 | nearest; floor, even for E8M0 | away | none |
| INT4-g128 | INT4 | 128 | FP32 (or FP16) | nearest | even | none |
| INT4-row | INT4 | the whole row | FP32 (or FP16) | nearest | even | none |

MXFP4's default is ``ceil`` because ReQAT uses it; OCP's specification says ``floor`` and compressed-tensors exports
``even``. What each rule computes is in :mod:`reqat.formats.scales`.
"""

from __future__ import annotations

import dataclasses
import difflib
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from reqat.formats.elements import ELEMENTS, Element


@dataclass(frozen=True)
class Format:
    """One way to quantize a tensor. Make it with :func:`get_format`; every combination of fields is checked.

    ``block`` is in elements along the quantized axis (None: the whole axis). ``scale`` names the stored type of the block
    scales, ``scale_rule`` how they follow from the block. ``global_scale``: ``none``; ``dynamic`` (one a tensor, from the
    tensor at hand); ``row`` (one for each index of the other axes); ``static`` (given by the caller, calibrated).
    ``asymmetric``: one scale for the positive and one for the negative numbers of a block. ``adaptive``: four-over-six.
    """

    name: str
    element: str = "E2M1"
    block: int | None = 16
    scale: str = "E4M3"
    scale_rule: str = "divide"
    rounding: str = "even"
    global_scale: str = "none"
    asymmetric: bool = False
    adaptive: bool = False

    def __post_init__(self) -> None:
        family = _FAMILIES.get(self.name)
        if family is None:
            raise ValueError(_unknown("format", self.name, _FAMILIES))
        for option, allowed in family.items():
            value = getattr(self, option)
            if value not in allowed:
                raise ValueError(_unknown(f"{option} of {self.name}", value, allowed))
        if self.name == "AMXFP4" and (self.scale == "E8M0") == (self.scale_rule == "nearest"):
            rules = "'floor' or 'even'" if self.scale == "E8M0" else "'nearest'"
            raise ValueError(f"AMXFP4 with scale={self.scale!r} takes scale_rule={rules}, not {self.scale_rule!r}")

    @property
    def element_type(self) -> Element:
        """The element, with its magnitudes and rounding."""
        return ELEMENTS[self.element]

    @property
    def has_global_scale(self) -> bool:
        """Whether a float32 scale stands above the block scales."""
        return self.global_scale != "none"

    @property
    def scale_cap(self) -> float:
        """What the global scale maps the tensor's largest block scale to (448; 256 leaves four-over-six its headroom)."""
        return 256.0 if self.adaptive else 448.0

    @property
    def bits_per_element(self) -> float:
        """Bits an element costs with its share of the block scales (global scales not counted; a row's scale is 0)."""
        scale_bits = {"E8M0": 8, "E4M3": 8, "E5M2": 8, "FP16": 16, "FP32": 32}[self.scale] * (1 + self.asymmetric)
        return 4 + (scale_bits / self.block if self.block else 0)

    def replace(self, **changes: Any) -> Format:
        """A copy with some fields changed, checked again."""
        return dataclasses.replace(self, **changes)

    def __str__(self) -> str:
        return self.name


# What each field of a family may be; the first value is the default.
_FAMILIES: dict[str, dict[str, tuple[Any, ...]]] = {
    "MXFP4": {
        "element": ("E2M1", "E1M2"),
        "block": (32,),
        "scale": ("E8M0",),
        "scale_rule": ("ceil", "floor", "even"),
        "rounding": ("even", "away"),
        "global_scale": ("none",),
        "asymmetric": (False,),
        "adaptive": (False,),
    },
    "NVFP4": {
        "element": ("E2M1", "E1M2"),
        "block": (16,),
        "scale": ("E4M3",),
        "scale_rule": ("divide", "multiply", "reciprocal"),
        "rounding": ("even", "away"),
        "global_scale": ("dynamic", "row", "static"),
        "asymmetric": (False,),
        "adaptive": (False,),
    },
    "NVFP4-4/6": {
        "element": ("E2M1",),
        "block": (16,),
        "scale": ("E4M3",),
        "scale_rule": ("divide",),
        "rounding": ("even", "away"),
        "global_scale": ("dynamic", "row", "static"),
        "asymmetric": (False,),
        "adaptive": (True,),
    },
    "AMXFP4": {
        "element": ("E2M1", "E1M2"),
        "block": (32,),
        "scale": ("E5M2", "E4M3", "FP16", "E8M0"),
        "scale_rule": ("nearest", "floor", "even"),
        "rounding": ("away", "even"),
        "global_scale": ("none",),
        "asymmetric": (True,),
        "adaptive": (False,),
    },
    "INT4-g128": {
        "element": ("INT4",),
        "block": (128,),
        "scale": ("FP32", "FP16"),
        "scale_rule": ("nearest",),
        "rounding": ("even", "away"),
        "global_scale": ("none",),
        "asymmetric": (False,),
        "adaptive": (False,),
    },
    "INT4-row": {
        "element": ("INT4",),
        "block": (None,),
        "scale": ("FP32", "FP16"),
        "scale_rule": ("nearest",),
        "rounding": ("even", "away"),
        "global_scale": ("none",),
        "asymmetric": (False,),
        "adaptive": (False,),
    },
}

FORMAT_NAMES = tuple(_FAMILIES)
_OPTIONS = ("element", "scale", "scale_rule", "rounding", "global_scale")
_BY_UPPER = {name.upper(): name for name in _FAMILIES}


@lru_cache(maxsize=1024)
def get_format(name: str | Format, **options: str) -> Format:
    """The format of that name (upper or lower case), with options.

    Options: ``element`` (E2M1, E1M2), ``scale`` (type of the block scales), ``scale_rule``, ``rounding`` (even: ties to
    even codes; away: half away from zero), ``global_scale`` (dynamic, row, static). The table above says which family
    leaves which choice. ``scale="PO2"`` is short for E8M0. Given a Format, options change it.

    Raises ValueError for an unknown name, option or value, listing the valid ones.
    """
    for option in options:
        if option not in _OPTIONS:
            raise ValueError(_unknown("format option", option, _OPTIONS))
    if isinstance(name, Format):
        fields = dataclasses.asdict(name)
    else:
        known = _BY_UPPER.get(str(name).upper())
        if known is None:
            raise ValueError(_unknown("format", name, _FAMILIES))
        fields = {"name": known, **{field: values[0] for field, values in _FAMILIES[known].items()}}
    if options.get("scale") == "PO2":
        options["scale"] = "E8M0"
    if fields["name"] == "AMXFP4" and "scale" in options and "scale_rule" not in options:
        # A power of two is not rounded "to nearest"; its default rule is the plain floor.
        options["scale_rule"] = "floor" if options["scale"] == "E8M0" else "nearest"
    return Format(**{**fields, **options})


def _unknown(what: str, value: object, valid: Any) -> str:
    names = [str(v) for v in valid]
    close = difflib.get_close_matches(str(value).upper(), [n.upper() for n in names], n=1, cutoff=0.5)
    hint = next((f"; did you mean {n!r}?" for n in names if close and n.upper() == close[0]), "")
    return f"unknown {what} {value!r}{hint} Valid: {', '.join(names)}"
