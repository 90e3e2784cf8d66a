"""Typed configuration and the plan that follows from it: what is to be computed, under which names, without torch.

`load(tier)` reads `config/`, `plan(...)` turns it into stages, evaluations and table cells; `reqat.config.paths` says
where each lies.
"""

from __future__ import annotations

from reqat.config.base import canonical, digest
from reqat.config.errors import ReqatError, unknown
from reqat.config.paths import Paths, load, pinned_base
from reqat.config.plan import Cell, Plan, plan
from reqat.config.precision import PrecisionSpec
from reqat.config.recipe import Catalogue, Recipe, amount
from reqat.config.stage import (
    Architecture,
    BaseSettings,
    Calibration,
    DataSettings,
    Decoding,
    Evaluation,
    NLLTerm,
    ProblemSet,
    PTQSettings,
    QFitSettings,
    Selection,
    SEMTerm,
    Stage,
    Training,
    TrainSettings,
)
from reqat.config.tier import Tier, load_catalogue, load_tier, tier_names

__all__ = [
    "Architecture",
    "BaseSettings",
    "Calibration",
    "Catalogue",
    "Cell",
    "DataSettings",
    "Decoding",
    "Evaluation",
    "NLLTerm",
    "PTQSettings",
    "Paths",
    "Plan",
    "PrecisionSpec",
    "ProblemSet",
    "QFitSettings",
    "Recipe",
    "ReqatError",
    "SEMTerm",
    "Selection",
    "Stage",
    "Tier",
    "TrainSettings",
    "Training",
    "amount",
    "canonical",
    "digest",
    "load",
    "load_catalogue",
    "load_tier",
    "pinned_base",
    "plan",
    "tier_names",
    "unknown",
]
