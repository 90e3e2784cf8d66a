"""What `reqat entropy` says of a pair of models: one table of headlines, every statistic as CSV, and three figures.

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
from analysis.document import EMPTY, MINUS, Column, Table, Text, number, percent
from reqat.config.files import write_file
from reqat.evaluation.trace_files import TraceFolder

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
    shared = int(entropy._tokens_of(folder, where).sum())
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
    for statistic in ("tail ratio (geometric mean)", "tail ratio (of means)", "tail ratio (mean)", "top-1 mismatch"):
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
        f"{which} mean entropy: "
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


# -- figures ---------------------------------------------------------------------------------------------------------
def draw(found: Report, folder: Path) -> list[Path]:
    """Draw the figures that the report has numbers for, as PNG and PDF; returns the files."""
    from analysis import style

    written = []
    for name, fig in figures(found).items():
        with style.context():
            written += style.save(fig, folder, name)
    return written


def figures(found: Report) -> dict[str, Any]:
    """The figures that the report has numbers for, by name: ``entropy-damage``, ``entropy-kinds``, and
    ``entropy-errors`` where both models sampled.
    """
    from analysis import style

    make = {"entropy-damage": _damage, "entropy-kinds": _kinds}
    if "divergence-shares" in found.frames:
        make["entropy-errors"] = _errors
    with style.context():
        return {name: one(found) for name, one in make.items()}


def draw_interval_line(ax: Any, x: Any, rows: pd.DataFrame, colour: str, marker: str, label: str) -> None:
    """A line through ``rows``' values with their intervals; none where an interval is unknown."""
    value, lo, hi = (rows[name].to_numpy() for name in ("value", "lo", "hi"))
    known = ~np.isnan(lo)
    error = np.where(known, [value - lo, hi - value], 0.0).clip(min=0)
    ax.errorbar(x, value, yerr=error, color=colour, marker=marker, markersize=3.5, linewidth=1.1, label=label)


def percentiles(rows: pd.DataFrame) -> Any:
    """The middle of each bin, in percentiles of the reference's entropy."""
    return (rows["bin"].to_numpy() + 0.5) * 100 / (rows["bin"].max() + 1)


def _damage(found: Report) -> Any:
    from analysis import style

    fig = style.figure(2.7)
    left, right = fig.subplots(1, 2)
    frame = found.frames["tail-and-mismatch"]
    for statistic, colour, marker in (
        ("tail ratio (geometric mean)", style.BLUE, "o"),
        ("tail ratio (of means)", style.ORANGE, "s"),
    ):
        rows = frame[frame["statistic"] == statistic]
        words = statistic.removeprefix("tail ratio (").removesuffix(")")
        draw_interval_line(left, percentiles(rows), rows, colour, marker, words)
    left.axhline(1, color=style.GREY, linewidth=0.8)
    left.set_yscale("log")
    left.set_ylabel("tail-mass ratio")
    left.legend(loc="best")
    style.panel(left, "a", "Tail mass, candidate over reference")
    rows = frame[frame["statistic"] == "top-1 mismatch"]
    draw_interval_line(
        right,
        percentiles(rows),
        rows.assign(**{c: 100 * rows[c] for c in ("value", "lo", "hi")}),
        style.VERMILION,
        "D",
        "",
    )
    right.set_ylabel("top-1 mismatch, %")
    right.set_ylim(bottom=0)
    style.panel(right, "b", "Another most likely token")
    for ax in (left, right):
        ax.set_xlabel(f"percentile of token entropy under {found.reference}")
        ax.set_xlim(0, 100)
    style.footer(fig, found.table.footer[:2])
    return fig


def _kinds(found: Report) -> Any:
    from analysis import style

    fig = style.figure(2.5, width_in=style.WIDTH_IN / 1.6)
    ax = fig.subplots()
    frame = found.frames["kinds-by-bin"]
    for kind, colour, marker in (("digit", style.BLUE, "o"), ("operator", style.VERMILION, "s")):
        rows = frame[frame["kind"] == kind]
        scaled = rows.assign(**{c: 100 * rows[c] for c in ("value", "lo", "hi")})
        draw_interval_line(ax, percentiles(rows), scaled, colour, marker, f"{kind}s")
    ax.set_ylabel("share of tokens, %")
    ax.set_xlabel(f"percentile of token entropy under {found.reference}")
    ax.set_xlim(0, 100)
    ax.set_ylim(0, 1.35 * ax.get_ylim()[1])  # room for the legend
    ax.legend(loc="upper left", ncols=2)
    style.footer(fig, found.table.footer[:2])
    return fig


def _errors(found: Report) -> Any:
    from analysis import style

    shares, errors = found.frames["divergence-shares"], found.frames.get("derailment-shares")
    if errors is None:  # no response derailed: there is one panel, of all pairs
        fig = style.figure(2.7, style.WIDTH_IN / 1.6)
        left, right = fig.subplots(), None
    else:
        fig = style.figure(2.7)
        left, right = fig.subplots(1, 2)
    series = [
        ("first divergence, all pairs", shares[(shares["pairs"] == "all") & (shares["threshold"] != "")], style.SKY),
    ]
    if errors is not None:
        derailed = shares[(shares["pairs"] == "derailed") & (shares["threshold"] != "")]
        series.append(("first divergence, derailed", derailed, style.BLUE))
        series.append(("first error, derailed", errors[errors["statistic"] == "low entropy"], style.VERMILION))
    low = shares[(shares["pairs"] == "all") & (shares["threshold"] != "")]
    draw_bars(left, [f"below\n{name}" for name in low["threshold"]], series)
    for i, chance in enumerate(low["chance"]):
        left.plot([i - 0.45, i + 0.45], [100 * chance] * 2, color=style.BLACK, linewidth=0.9, linestyle="--")
    left.set_ylim(0, 150)  # room for the legend
    left.set_yticks(range(0, 101, 25))
    left.set_ylabel("share, %")
    left.legend(loc="upper left")
    style.panel(left, "a" if right is not None else "", "Where responses part (dashed: by chance)")
    if errors is not None and right is not None:
        kinds = errors[errors["statistic"] == "error"]
        draw_bars(right, [k.replace(" ", "\n") for k in kinds["which"]], [("", kinds, style.VERMILION)])
        right.set_ylabel("share of derailed responses, %")
        style.panel(right, "b", "What went wrong first")
    style.footer(fig, found.table.footer[:2])
    return fig


def draw_bars(ax: Any, ticks: list[str], series: list[tuple[str, pd.DataFrame, str]]) -> None:
    """Groups of bars in percent, with intervals: one group a tick, one bar a series of (label, rows, colour)."""
    width = 0.8 / len(series)
    for j, (label, rows, colour) in enumerate(series):
        value, lo, hi = (100 * rows[name].to_numpy(dtype=float) for name in ("value", "lo", "hi"))
        x = np.arange(len(ticks)) + (j - (len(series) - 1) / 2) * width
        known = ~np.isnan(value)
        error = np.array([value - lo, hi - value])[:, known].clip(min=0)
        ax.bar(
            x[known],
            value[known],
            width * 0.92,
            yerr=error,
            color=colour,
            label=label or None,
            error_kw={"linewidth": 0.9},
        )
    ax.set_xticks(np.arange(len(ticks)), ticks)
