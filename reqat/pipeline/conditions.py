"""Graded conditions of one job: outcomes, a row each, and paired differences from the first.

A condition can take an hour. A job with a folder for what is kept grades none of them twice: killed, it goes on with
the conditions that it has not graded.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reqat.config.files import read_json, write_file

if TYPE_CHECKING:
    from reqat.evaluation import Outcomes
    from reqat.evaluation.intervened import Intervened


class Conditions:
    """Graded conditions, each printed and written when it is there, and compared with the first."""

    def __init__(self, folder: Path, kept: Path | None = None) -> None:
        """``folder``: where outcomes and `summary.json` go. ``kept``: where finished conditions outlive a kill, named
        for this job's settings and models alone; None: nowhere."""
        self.folder = folder
        self.kept = kept
        self.rows: list[dict[str, Any]] = []
        self.settings: dict[str, Any] = {}
        self._first: Outcomes | None = None

    def grade(self, name: str, make: Callable[[], Outcomes | Intervened]) -> None:
        """One condition: what ``make`` grades, or what an earlier attempt at this job has kept of it.

        The row of an intervention also has the shares of tokens that it touched and that were below the threshold.
        """
        from reqat.evaluation.intervened import Intervened

        found = self._restored(name)
        if found is None:
            made = make()
            if isinstance(made, Intervened):
                found = made.outcomes, {"touched": made.touched, "low": made.low}
            else:
                found = made, {}
            self._keep(name, *found)
        self._add(name, found[0], **found[1])

    def _restored(self, name: str) -> tuple[Outcomes, dict[str, Any]] | None:
        from reqat.evaluation import Outcomes

        if self.kept is None or not (self.kept / f"{name}.json").is_file():
            return None
        more = read_json(self.kept / f"{name}.json", "kept condition", "delete that folder to grade it anew")
        return Outcomes.from_parquet(self.kept / f"{name}.parquet"), more

    def _keep(self, name: str, outcomes: Outcomes, more: dict[str, Any]) -> None:
        if self.kept is not None:
            self.kept.mkdir(parents=True, exist_ok=True)
            outcomes.to_parquet(self.kept / f"{name}.parquet")
            write_file(self.kept / f"{name}.json", json.dumps(more) + "\n")  # last: says that the other is whole

    def _add(self, name: str, outcomes: Outcomes, **more: Any) -> None:
        from reqat.evaluation import accuracy, paired

        outcomes.to_parquet(self.folder / f"{name}.parquet")
        found = accuracy(outcomes)
        row = {
            "condition": name,
            **{key: outcomes.metadata[key] for key in ("decoding", "intervention") if key in outcomes.metadata},
            "accuracy": found.value,
            "lo": found.lo,
            "hi": found.hi,
            "problems": found.n_problems,
            "seeds": found.n_seeds,
            "unfinished": found.n_unfinished,
            "mean_tokens": float(outcomes.n_tokens.mean()),
            **more,
        }
        said = f"{name}: {found}"
        if self._first is None:
            self._first = outcomes
        elif outcomes.seeds == self._first.seeds:
            d = paired(outcomes, self._first)
            row |= {"difference": d.value, "difference_lo": d.lo, "difference_hi": d.hi, "p": d.p}
            said += f", {100 * d.value:+.1f} [{100 * d.lo:+.1f}, {100 * d.hi:+.1f}] from {self.rows[0]['condition']}"
        self.rows.append(row)
        print(said, flush=True)

    def finish(self) -> dict[str, Any]:
        """Write `summary.json`; returns the record's metrics."""
        write_file(self.folder / "summary.json", json.dumps(self.rows, indent=1) + "\n")
        return {"conditions": self.rows}
