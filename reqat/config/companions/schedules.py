"""Schedules of matrix instructions from distinctive candidates (arXiv 2202.06819), against AutoTVM's search.

A reduced-precision convolution can be divided in thousands of ways, and only a clock says which is fast. Searches are
replayed from tables in which every schedule was measured once (`python -m reqat_kernels.schedules.measure`), so that
the best one is known and twenty seeds cost minutes.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, Field, field_validator, model_validator

from reqat.config.base import Count, Seeds, Size, distinct
from reqat.config.catalogue import SEARCH_METHODS
from reqat.config.companions import Companion
from reqat.config.errors import ReqatError, unknown

ANALYTIC = "analytic"
"""The table in closed form, which nobody has to measure."""
SOURCE = "schedule-tables"
TableName = Annotated[str, Field(pattern=r"^[a-z0-9]+(-[a-z0-9]+)*$")]


def _distinct_names(values: tuple[str, ...]) -> tuple[str, ...]:
    return distinct(values)  # type: ignore[no-any-return]


class Settings(Companion):
    """Searches replayed from tables."""

    kind: Literal["schedules"] = "schedules"
    tables: Annotated[tuple[TableName, ...], AfterValidator(_distinct_names)] = Field(min_length=1)
    """`analytic`, or tables of the source `schedule-tables`: `int8-3x3-56-64-64` (bits, kernel, size, channels,
    filters), `triton-nvfp4-sm100`."""
    methods: Annotated[tuple[str, ...], AfterValidator(_distinct_names)] = Field(default=SEARCH_METHODS, min_length=1)
    """Files of `reqat/methods/search/`."""
    seeds: Seeds = Field(default=list(range(20)), min_length=1)
    """Each of a whole search; a seed's first plan is the same for all methods."""
    measurements: Count = 128
    plan: Size = 16
    """Measurements from one fit of the model to the next. AutoTVM's default is 64, for much larger spaces."""
    target: float = Field(default=0.95, gt=0, le=1)
    """Share of the optimum that a search is to reach."""
    every: Size = 4
    """Measurements from one point of a curve to the next."""
    chains: Size = 128
    steps: Size = 500
    patience: Size = 30
    """Of the annealing; AutoTVM's defaults."""

    @field_validator("methods")
    @classmethod
    def _known(cls, methods: tuple[str, ...]) -> tuple[str, ...]:
        for name in methods:
            if name not in SEARCH_METHODS:
                raise unknown("search method", name, SEARCH_METHODS)
        return methods

    @model_validator(mode="after")
    def _plans_fit(self) -> Settings:
        if self.plan > self.measurements:
            raise ReqatError(f"plan {self.plan}: a plan holds at most all measurements ({self.measurements}).")
        return self

    def parts(self) -> tuple[str, ...]:
        """A table each."""
        return self.tables

    def sources(self) -> tuple[str, ...]:
        """The measured tables, if one is asked for."""
        return (SOURCE,) if any(table != ANALYTIC for table in self.tables) else ()

    def sources_of(self, part: str) -> tuple[str, ...]:
        """None of the analytic table."""
        return () if part == ANALYTIC else (SOURCE,)
