"""What `reqat entropy` says of a pair of models: one table of headlines, and every statistic as CSV.

All of it is made of a trace folder alone, by the functions of :mod:`analysis.entropy`; a statistic that the folder has
no traces for (no sampled pair, no graded response) is left out of the table, and its CSV is empty but for the header.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from analysis import entropy
from analysis.entropy.frames import tokens_of
from analysis.entropy.tokens import QUARTILES, RARE
from analysis.report.document import EMPTY, MINUS, Column, Table, Text, number, percent
from reqat.config.files import write_file
from reqat.evaluation.trace_folder import TraceFolder

# How a value reads, by unit; entropies move by anything between 1e-6 and 1 nats.
_SHOW: dict[str, Callable[[float], str]] = {
    "%": lambda x: percent(x) + "%",
    "x": lambda x: number(x, 3),
    "nats": lambda x: f"{x:+.3g}".replace("-", MINUS),
}
# Of the tokens with the lowest and the highest mean entropy, so many are named in the table.
_NAMED_TOKENS = 5
# What became of a pair of responses.
_PAIRS = {
    "all": "pairs that part",
    "derailed": "pairs that derail",
    "reversed": "pairs the other way round (reference wrong, candidate right)",
}


@dataclass(frozen=True)
class Report:
    """Data frames by name, as :mod:`analysis.entropy` gives them, and the table of headlines."""

    reference: str
    candidate: str
    frames: dict[str, pd.DataFrame]
    table: Table

    def write(self, folder: Path) -> list[Path]:
        """Write ``summary.csv``, ``summary.md`` and ``tables/<name>.csv``; returns the files."""
        tables = folder / "tables"
        files = {folder / "summary.csv": self.table.csv(), folder / "summary.md": self.table.markdown()}
        for name, frame in self.frames.items():
            files[tables / f"{name}.csv"] = frame.to_csv(index=False, lineterminator="\n")
        for path, text in files.items():
            write_file(path, text)
        return list(files)

    def headline(self, statistic: str, where: str = "") -> dict[str, Any]:
        """A row of the table. Raises KeyError if it has no such row."""
        rows = self.table.data
        found = rows[(rows["statistic"] == statistic) & (rows["where"] == where)]
        if found.empty:
            raise KeyError(f"{statistic}, {where}")
        return found.iloc[0].to_dict()


def report(
    folder: TraceFolder,
    reference: str,
    candidate: str,
    *,
    bins: int = 20,
    eps: float = entropy.EPS,
    more_than: int = 100,
) -> Report:
    """Every statistic of a pair of labels.

    With fewer tokens than bins there are as many bins as tokens. Raises `ReqatError` for labels that the folder does
    not have, and for damaged or non-finite columns, naming the trace.
    """
    where = entropy.trace_source(folder, reference)
    shared = int(tokens_of(folder, where).sum())
    bins = min(bins, shared)
    sources = set(folder.traces["source"])
    frames = {
        "accuracy": entropy.accuracies(folder),
        "accuracy-by-length": entropy.accuracy_by_length(folder),
        "tail-and-mismatch": entropy.damage_by_bin(folder, reference, candidate, bins=bins, eps=eps, source=where),
        "entropy-change": entropy.entropy_change(folder, reference, candidate, bins=min(4, shared), source=where),
        "kinds-by-bin": entropy.kinds_by_bin(folder, reference, bins=bins, source=where),
        "entropy-by-token": entropy.entropy_by_token(folder, reference, more_than=more_than, source=where),
    }
    if {reference, candidate} <= sources:
        frames["first-divergences"] = entropy.first_divergences(folder, reference, candidate)
        low = entropy.low_entropy(folder, reference, reference)
        frames["divergence-shares"] = entropy.divergence_shares(frames["first-divergences"], low)
        frames["derailments"] = entropy.derailments(folder, reference, candidate)
        frames["examples"] = entropy.examples(
            folder, reference, candidate, frames["first-divergences"], frames["derailments"]
        )
        if len(frames["derailments"]):
            frames["derailment-shares"] = entropy.derailment_shares(frames["derailments"], low)
    return Report(reference, candidate, frames, _table(folder, reference, candidate, frames, eps, where))


def _rows(frames: dict[str, pd.DataFrame]) -> Iterator[tuple[str, str, str, pd.Series | dict[str, Any]]]:
    """(statistic, where, how its value reads, row) of each line of the table."""
    for _, row in frames["accuracy"].iterrows():
        yield "accuracy", row["source"], "%", row
    damage = frames["tail-and-mismatch"]
    last = int(damage["bin"].max())
    ends = ((0, f"lowest of {last + 1} bins"), (last, f"highest of {last + 1} bins"))
    for statistic in ("tail ratio (geometric mean)", *QUARTILES, "tail ratio (of means)", "top-1 mismatch"):
        for bin, words in ends:
            row = damage[(damage["statistic"] == statistic) & (damage["bin"] == bin)].iloc[0]
            yield statistic, words, "%" if statistic == "top-1 mismatch" else "x", row
    kinds = frames["kinds-by-bin"]
    for kind in ("digit", "operator"):
        for bin, words in ends:
            yield f"{kind}s", words, "%", kinds[(kinds["kind"] == kind) & (kinds["bin"] == bin)].iloc[0]
    change = frames["entropy-change"]
    top = int(change["bin"].max())
    for bin, words in ((0, f"lowest of {top + 1} bins"), (top, f"highest of {top + 1} bins")):
        for statistic, unit in (("change", "nats"), ("normalized", "x")):
            row = change[(change["statistic"] == statistic) & (change["bin"] == bin)].iloc[0]
            yield f"entropy, {statistic}", words, unit, row
    shares = frames.get("divergence-shares")
    if shares is not None:
        for _, row in shares.iterrows():
            if not row["threshold"]:
                yield _PAIRS[row["pairs"]], "", "%", row
            else:
                yield f"first divergence, {row['pairs']} pairs", _below(row["threshold"], row["chance"]), "%", row
    errors = frames.get("derailment-shares")
    if errors is not None:
        for _, row in errors.iterrows():
            if row["statistic"] == "error":
                yield "first error", row["which"], "%", row
            else:
                yield "first error, its token", _below(row["which"], row["chance"]), "%", row
    for _, row in frames["accuracy-by-length"].iterrows():
        yield f"accuracy, {row['source']}", f"{row['length_lo']} to {row['length_hi']} tokens", "%", row


def _below(threshold: str, chance: float) -> str:
    """A threshold, with the share of tokens below it where the name does not say that."""
    words = f"below {threshold}"
    return words if threshold.startswith("percentile") else f"{words} ({percent(chance)}% of tokens)"


def _table(
    folder: TraceFolder,
    reference: str,
    candidate: str,
    frames: dict[str, pd.DataFrame],
    eps: float,
    where: str | None,
) -> Table:
    lines, data = [], []
    for statistic, place, unit, row in _rows(frames):
        value, lo, hi = float(row["value"]), float(row["lo"]), float(row["hi"])
        if np.isnan(value):
            continue
        show = _SHOW[unit]
        detail = EMPTY if np.isnan(lo) else f"[{show(lo)}, {show(hi)}]"
        n, clusters = int(row["n"]), int(row["clusters"])
        lines.append(
            (
                Text(statistic),
                Text(place or EMPTY),
                Text(show(value)),
                Text(detail),
                Text(f"{n:,}"),
                Text(f"{clusters:,}"),
            )
        )
        data.append(
            {
                "statistic": statistic,
                "where": place,
                "unit": {"%": "share", "x": "ratio"}.get(unit, unit),
                "value": value,
                "lo": lo,
                "hi": hi,
                "n": n,
                "clusters": clusters,
            }
        )
    traces, meta = folder.traces, folder.meta
    counts = ", ".join(f"{n:,} of {source}" for source, n in traces["source"].value_counts().sort_index().items())
    tokens = frames["entropy-by-token"]
    each = min(_NAMED_TOKENS, len(tokens) // 2)  # none is among both
    named = [
        f"{which} mean entropy of tokens seen more than {RARE} times: "
        + ", ".join(f"{t!r} {v:.4f}" for t, v in zip(part["token"], part["value"], strict=True))
        for which, part in (("Lowest", tokens.head(each)), ("Highest", tokens.tail(each)[::-1]))
        if len(part)
    ]
    low = entropy.low_entropy(folder, reference, where)
    notes = [
        f"{len(traces):,} traces ({counts}), {folder.n_tokens:,} tokens, {traces['problem'].nunique():,} problems; "
        f"{int((~traces['finished']).sum()):,} without an end marker (kept), {len(meta.get('left_out', []))} left out.",
        f"Seeds: {', '.join(map(str, meta.get('seeds', []))) or 'none'}. Decoding: {meta.get('decoding', 'none')}. "
        f"Reference: {reference}; candidate: {candidate}.",
        "Thresholds of the reference's entropy: "
        + ", ".join(f"{row.threshold} = {row.nats:.4g} nats" for row in low.head(-1).itertuples())
        + f". Tail ratio with eps = {eps:g}.",
        *named,
    ]
    columns = (
        Column("statistic", align="l"),
        Column("where", align="l"),
        Column("value"),
        Column("95% interval"),
        Column("n"),
        Column("problems"),
    )
    return Table(
        name="summary",
        title=f"Entropies: {candidate} against {reference}",
        caption=(
            "Bins are of the reference's token entropy, equal in count; both models read the same tokens "
            f"({'the traces of ' + where if where else 'all traces'}). Intervals are clustered by problem."
        ),
        footer=tuple(notes),
        columns=columns,
        sections=(tuple(lines),),
        data=pd.DataFrame(data),
    )
