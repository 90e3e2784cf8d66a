"""Graded conditions of one job: outcomes, a row each, and paired differences from the first."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reqat.config.files import write_file

if TYPE_CHECKING:
    from reqat.evaluation import Outcomes
    from reqat.evaluation.intervened import Intervened


class Conditions:
    """Graded conditions, each printed and written when it is there, and compared with the first."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.rows: list[dict[str, Any]] = []
        self.settings: dict[str, Any] = {}
        self._first: Outcomes | None = None

    def add(self, name: str, outcomes: Outcomes, **more: Any) -> None:
        """One condition; `more` goes into its row."""
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

    def add_intervened(self, name: str, found: Intervened) -> None:
        """Add a condition with the number of tokens that the intervention changed."""
        self.add(name, found.outcomes, touched=found.touched, low=found.low)

    def finish(self) -> dict[str, Any]:
        """Write `summary.json`; returns the record's metrics."""
        write_file(self.folder / "summary.json", json.dumps(self.rows, indent=1) + "\n")
        return {"conditions": self.rows}
