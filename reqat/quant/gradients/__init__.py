"""Gradient rules by name. A new rule is one file in this package that defines ``RULE``, a subclass of
:class:`GradientRule` whose arguments are its settings in configuration.

Rounding is flat nearly everywhere and its true gradient useless; a rule says what is taken in its place.
"""

from __future__ import annotations

import importlib

from reqat.config.catalogue import GRADIENT_RULES
from reqat.quant.gradients._rule import GradientRule, Rounding
from reqat.quant.gradients.ste import STE

__all__ = ["RULES", "STE", "GradientRule", "Rounding"]

RULES: dict[str, type[GradientRule]] = {
    name: importlib.import_module(f"{__name__}.{name}").RULE for name in GRADIENT_RULES
}
