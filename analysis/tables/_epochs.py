"""Entries by epochs over one subset of traces, for Tables 9, 13 and 15, which one set of runs stands behind."""

from __future__ import annotations

from collections.abc import Sequence

from analysis.report.cells import Entry, Results
from reqat.config.stage import TrainSettings

HANDED_OVER = 4
"""Epochs of fine-tuning that QAT follows."""


def epochs_of(results: Results, entry: Entry) -> int:
    """Epochs of the last training behind an entry; 0 where nothing is trained."""
    for stage in results.plan.since_base(results.plan.evaluation(entry.cells[0].evaluation).stage):
        if isinstance(stage.settings, TrainSettings):
            return stage.settings.traces.epochs
    return 0


def by_epochs(results: Results, entries: Sequence[Entry], model: str, method: str) -> dict[int, Entry]:
    """Epochs -> entry, of a model and method."""
    return {epochs_of(results, e): e for e in entries if (e.model, e.method) == (model, method)}
