"""Searches over schedules, replayed from one table: how fast each method comes near the best schedule."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd

from reqat.config.companions.schedules import ANALYTIC, SOURCE, Settings
from reqat.config.errors import ReqatError
from reqat.config.files import write_file
from reqat.pipeline.companions import Given

OF_TABLE = ""
"""The method in rows that are about the table itself."""
META = "table.json"
"""Beside the rows: what the measured table says of itself, its machine and digest among it."""


def run(settings: Settings, part: str, given: Given) -> pd.DataFrame:
    """A row a value: `measure` of a `method` and `seed` after so many `measurements`. Measures: `best`, the best speed
    so far as a share of the optimum; `to_target`, the measurements until it reached the target (NaN: never);
    `rank_correlation` of the model fitted then with the points not measured yet. Of the table itself: `points`,
    `failed` and `near` (shares of points with speed 0, and within the target), and `optimum`, in `unit`."""
    from reqat.methods.search import Annealing, Budget, method_called, search

    table = _table(part, given)
    annealing = Annealing(chains=settings.chains, steps=settings.steps, patience=settings.patience)
    budget = Budget(settings.measurements, settings.plan, annealing)
    rows = list(_of_table(table, settings.target))
    for name in settings.methods:
        for seed in settings.seeds:
            history = search(method_called(name), table.space, table.measure, budget, seed)
            row: dict[str, Any] = {"method": name, "seed": seed}
            progress = table.progress(history)
            for n in range(settings.every, settings.measurements + 1, settings.every):
                rows.append({**row, "measure": "best", "measurements": n, "value": progress[n - 1]})
            reached = table.measurements_to(settings.target, history)
            rows.append({**row, "measure": "to_target", "measurements": settings.measurements, "value": reached})
            for n, value in table.rank_correlations(history):
                rows.append({**row, "measure": "rank_correlation", "measurements": n, "value": value})
        given.say(f"{part}: {name}, {len(settings.seeds)} searches")
    frame = pd.DataFrame(rows, columns=["method", "seed", "measure", "measurements", "value"])
    frame["seed"] = frame["seed"].astype("Int64")
    frame["unit"] = table.unit
    return frame


def _table(part: str, given: Given) -> Any:
    from reqat.data.packaged import schedule_tables
    from reqat.methods.search import Table, analytic

    if part == ANALYTIC:
        return analytic()
    found = schedule_tables.load(given.source(SOURCE), part)
    write_file(given.out / META, json.dumps(found.meta, indent=2) + "\n")
    try:
        return Table.of(pd.read_csv(found.csv), list(found.meta["knobs"]), "speed", found.meta["unit"])
    except ValueError as error:  # no CSV, or one that is no table; a ReqatError, too
        raise ReqatError(f"{found.csv}: {error}") from None


def _of_table(table: Any, target: float) -> Iterator[dict[str, Any]]:
    speeds: np.ndarray = table.speeds
    found = {
        "points": len(speeds),
        "failed": float((speeds == 0).mean()),
        "near": float((speeds >= target * table.best).mean()),
        "optimum": table.best,
    }
    for measure, value in found.items():
        yield {"method": OF_TABLE, "seed": None, "measure": measure, "measurements": 0, "value": value}
