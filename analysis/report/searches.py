"""What replayed searches show: curves, and differences between methods seed by seed.

The unit of evidence is the seed. Tables are what they are, not drawn from anything, so a mean over tables is taken
within a seed first, and the interval is Student's over seeds: it speaks about these tables on this machine. A search
that did not come to the target within its budget counts with its whole budget, which understates the slower method.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from analysis.report.findings import Finding, adjusted
from reqat.evaluation.means import Mean, mean_over_runs

TITLES = {
    "uniform": "Random",
    "autotvm": "AutoTVM",
    "autotvm_filter": "AutoTVM with its filter",
    "distinctive": "Distinctive candidates",
}
OURS, RIVALS = "distinctive", ("autotvm", "autotvm_filter")
MEASURED = "GMAC/s"
"""The unit of tables that a clock has made; others are modelled."""


def title_of(method: str) -> str:
    """What a method is called."""
    return TITLES.get(method, method)


def methods_in(rows: pd.DataFrame) -> list[str]:
    """Methods in their order, those unknown here at the end."""
    there = [name for name in rows["method"].unique() if isinstance(name, str) and name]
    return sorted(there, key=lambda name: (list(TITLES).index(name) if name in TITLES else len(TITLES), name))


def by_seed(rows: pd.DataFrame, measure: str, method: str, at: int | None = None) -> NDArray[np.float64]:
    """[tables, seeds]: a measure of a method, after `at` measurements (None: the last ones of each table)."""
    found = rows[(rows["measure"] == measure) & (rows["method"] == method)]
    if at is not None:
        found = found[found["measurements"] == at]
    last = found.sort_values("measurements", kind="stable").groupby(["companion", "part", "seed"], sort=True).tail(1)
    return last.pivot(index=["companion", "part"], columns="seed", values="value").to_numpy(float)


def to_target(rows: pd.DataFrame, method: str) -> NDArray[np.float64]:
    """[tables, seeds]: measurements to the target, the whole budget where it was not reached."""
    found = rows[(rows["measure"] == "to_target") & (rows["method"] == method)]
    found = found.assign(value=found["value"].fillna(found["measurements"]))
    return found.pivot(index=["companion", "part"], columns="seed", values="value").to_numpy(float)


def mean_of(values_TS: NDArray[np.float64]) -> Mean | float:
    """The mean over tables and seeds with its interval over seeds; the mean alone where there is one seed."""
    values_S = values_TS.mean(axis=0)
    return mean_over_runs(values_S[None]) if len(values_S) > 1 else float(values_S.mean())


def findings(rows: pd.DataFrame) -> dict[str, Finding]:
    """Rival -> measurements to the target of the distinctive candidates minus those of the rival, the claim being that
    it is below 0; p-values adjusted over the rivals. Empty where a method or a second seed is missing."""
    there = methods_in(rows)
    if OURS not in there:
        return {}
    ours, found = to_target(rows, OURS), {}
    for rival in RIVALS:
        if rival in there and ours.shape[1] > 1:
            mean = mean_over_runs((ours - to_target(rows, rival)).mean(axis=0)[None])
            # seeds=0: nothing is trained here; the seeds are the unit that the interval is over.
            found[rival] = Finding(
                value=mean.value,
                lo=mean.lo,
                hi=mean.hi,
                std_error=mean.std_error,
                df=mean.df,
                seeds=0,
                sign=-1,
                p=mean.p,
            )
    return dict(zip(found, adjusted(list(found.values()), len(RIVALS)), strict=True))


def groups(rows: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Unit -> the rows of its tables, measured ones first."""
    units: Sequence[str] = sorted(rows["unit"].unique(), key=lambda unit: (unit != MEASURED, unit))
    return {unit: rows[rows["unit"] == unit] for unit in units}
