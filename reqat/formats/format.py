"""A Format is a frozen value that says everything about how a tensor is quantized: element, block, scale, rounding.

A name stands for a family with defaults; options change what the family leaves open. The table of families is
:mod:`reqat.config.formats`.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from reqat.config.errors import unknown_text
from reqat.config.formats import FAMILIES, POWER_RULES, rule_for, standard
from reqat.formats.elements import ELEMENTS, Element
from reqat.formats.scales import E4M3_MAX


@dataclass(frozen=True)
class Format:
    """One way to quantize a tensor. Make it with :func:`get_format`; the fields are checked against the family's.

    ``block``: elements along the quantized axis that share a scale (None: the whole axis, a row; with ``per_tensor``
    all rows have the same scale, which is stored once a row like any other). ``scale``: the stored type
    of the block scales; ``scale_rule``: how they follow from the block. ``global_scale``: ``none``; ``dynamic``, one a
    tensor, from the tensor at hand; ``row``, one for each index of the other axes; ``static``, calibrated, given by
    the caller. ``asymmetric``: one scale for a block's positive and one for its negative numbers. ``adaptive``:
    four-over-six, which lets each block choose whether its maximum becomes 4 or 6.
    """

    name: str
    element: str = "E2M1"
    block: int | None = 16
    scale: str = "E4M3"
    scale_rule: str = "divide"
    rounding: str = "even"
    global_scale: str = "dynamic"
    asymmetric: bool = False
    adaptive: bool = False
    per_tensor: bool = False

    def __post_init__(self) -> None:
        if self.name not in FAMILIES:
            raise ValueError(unknown_text("format", self.name, FAMILIES))
        for field in ("scale", "scale_rule"):
            object.__setattr__(self, field, standard(field, getattr(self, field)))
        for field, allowed in FAMILIES[self.name].items():
            if getattr(self, field) not in allowed:
                raise ValueError(unknown_text(f"{field} of {self.name}", getattr(self, field), allowed))
        if (self.scale == "E8M0") != (self.scale_rule in POWER_RULES):
            rules = [
                repr(rule)
                for rule in FAMILIES[self.name]["scale_rule"]
                if rule_for(self.name, self.scale, rule) == rule
            ]
            raise ValueError(
                f"{self.name} with scale {self.scale!r} takes scale_rule {' or '.join(rules)}, not {self.scale_rule!r}"
            )

    @property
    def element_type(self) -> Element:
        """The element, with its magnitudes and rounding."""
        return ELEMENTS[self.element]

    @property
    def bits(self) -> int:
        """Bits of a code: 2, 3, 4 or 8."""
        return self.element_type.bits

    @property
    def codes_per_byte(self) -> int:
        """Codes that one byte of a packed tensor holds: 4, 2 or 1. Codes of 3 bits take half a byte each."""
        return {2: 4, 3: 2, 4: 2, 8: 1}[self.bits]

    @property
    def zero_point(self) -> bool:
        """Whether each block has a zero point beside its scale: affine integers."""
        return not self.element_type.signed

    @property
    def scale_parts(self) -> int:
        """Numbers that are stored for a block: 2 with one scale a sign, or with a zero point."""
        return 2 if self.asymmetric or self.zero_point else 1

    @property
    def has_global_scale(self) -> bool:
        """Whether a float32 scale stands above the block scales."""
        return self.global_scale != "none"

    @property
    def scale_cap(self) -> float:
        """What the global scale maps the largest block scale to: E4M3's 448, or 256, four-over-six's headroom."""
        return 256.0 if self.adaptive else E4M3_MAX

    def replace(self, **changes: Any) -> Format:
        """A copy with some fields changed, checked again."""
        return dataclasses.replace(self, **changes)

    def __str__(self) -> str:
        return self.name


_OPTIONS = ("element", "scale", "scale_rule", "rounding", "global_scale")


@lru_cache(maxsize=1024)
def get_format(name: str | Format, **options: str | None) -> Format:
    """The format of that name (in upper or lower case), with options.

    Options (None: the default): ``element`` (E2M1, E1M2), ``scale`` (type of the block scales; ``PO2`` is E8M0),
    ``scale_rule`` (``ceil`` is rceil), ``rounding`` (even: ties to the even code; away: half away from zero),
    ``global_scale`` (dynamic, row, static). The module's table says which family leaves which choice. Given a
    Format, options change it.

    Raises ValueError for an unknown name, option or value, with the valid ones.
    """
    for option in options:
        if option not in _OPTIONS:
            raise ValueError(unknown_text("format option", option, _OPTIONS))
    chosen: dict[str, Any] = {option: value for option, value in options.items() if value is not None}
    if isinstance(name, Format):
        fields = dataclasses.asdict(name)
    else:
        known = next((family for family in FAMILIES if family.upper() == str(name).upper()), None)
        if known is None:
            raise ValueError(unknown_text("format", name, FAMILIES))
        fields = {"name": known, **{field: values[0] for field, values in FAMILIES[known].items()}}
    chosen = {option: standard(option, value) for option, value in chosen.items()}
    if "scale" in chosen and "scale_rule" not in chosen:
        chosen["scale_rule"] = rule_for(fields["name"], chosen["scale"], fields["scale_rule"])
    return Format(**{**fields, **chosen})
