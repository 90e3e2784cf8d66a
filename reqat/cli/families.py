"""Which problems a task family makes for a verb that takes its name: one rule for `evaluate`, `entropy` and `traces`.

How hard the problems are is a setting of the family's generator (how many terms, of how many digits). By default a
family has settings of its own; with ``--tier`` those that the tier's models are graded with. A model that was trained
at one difficulty may solve nothing of another, so each of these verbs says which settings it took.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import typer

from reqat.cli.app import session
from reqat.config.errors import unknown
from reqat.pipeline.task import Task
from reqat.tasks import get_family

FamilyTier = Annotated[
    str | None,
    typer.Option(
        "--tier", "-t", help="Tier whose settings (difficulty) the task families have (default: each family's own)."
    ),
]


@dataclass(frozen=True)
class Chosen:
    """Task families with all settings of their generators, and the tier that these come from (None: their own)."""

    families: Mapping[str, Mapping[str, Any]]
    tier: str | None

    def __str__(self) -> str:
        """``chain_sum (min_terms 5, max_terms 9): settings of its own``"""
        each = []
        for name, settings in self.families.items():
            said = ", ".join(f"{option} {value}" for option, value in settings.items())
            each.append(f"{name} ({said})" if said else name)
        whose = f"tier {self.tier}'s settings" if self.tier else "the generator's own settings (--tier: a tier's)"
        return f"{', '.join(each)}: {whose}"


def choose(names: str, tier: str | None) -> Chosen:
    """Families by their names, ``a,b``, with their settings.

    Raises ReqatError for a family that there is none of, or that the tier does not have.
    """
    asked = [name.strip() for name in names.split(",")]
    there = {name: {} for name in asked} if tier is None else Task.of_tier(session.plan_from_here(tier).tier).families
    for name in asked:
        if name not in there:
            raise unknown("task family", name, there, where=f"tier {tier}")
    return Chosen({name: get_family(name).settings(there[name]) for name in asked}, tier)
