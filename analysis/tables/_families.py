"""The form of tables by task family: lines by families and over all, the difference to a reference over all, then the
paper's benchmarks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from analysis.report import paper
from analysis.report.cells import Entry, Results
from analysis.report.document import Column, Table, Text, best
from analysis.report.lines import Reference
from analysis.report.rows import footer, measured_row, paper_row, tidy
from analysis.report.texts import difference_text, measured_text, reported_text


def by_family(
    results: Results,
    artifact: str,
    *,
    caption: str,
    sections: Sequence[Sequence[Entry]],
    stub: Sequence[Column],
    labels: Callable[[Entry], Sequence[str]],
    whole: str,
    reference: Reference,
    compared: Column,
    metrics: Sequence[str],
    reported: Callable[[Entry, str], float | None],
    reported_name: str,
    bold: Callable[[Entry], bool] = lambda e: True,
    notes: Sequence[str] = (),
) -> Table:
    """Entries x families: accuracy with interval, and over all, under the head `whole`, the difference to a reference.

    Bold is the best of a column and section among entries that `bold` admits, ours and the paper's alike.
    """
    entries = results.of(artifact)
    many = len(results.models(artifact)) > 1
    families = sorted({f for e in entries for f in results.families(e)})
    parts: list[str | None] = [*families, *([None] if len(families) > 1 else [])]
    columns = [
        *([Column("Model", align="l")] if many else []),
        *stub,
        *(Column(whole if f is None else f.replace("_", " "), "Accuracy (%)") for f in parts),
        compared,
        *(Column(metric.replace("Avg", "average"), reported_name) for metric in metrics),
    ]
    filled: list[tuple[tuple[Text, ...], ...]] = []
    rows: list[dict[str, Any]] = []
    for group in sections:
        ours = {f: best([100 * results.estimate(e, f).value if bold(e) else None for e in group]) for f in parts}
        theirs = {metric: [reported(e, metric) for e in group] for metric in metrics}
        section = []
        for i, e in enumerate(group):
            other = reference(e, entries)
            cells = [Text(label) for label in (*([e.model] if many else []), *labels(e))]
            cells += [measured_text(results.estimate(e, f), ours[f][i]) for f in parts]
            cells.append(difference_text(results.paired(e, other) if other else None))
            cells += [reported_text(theirs[m][i], bold(e) and best(theirs[m])[i]) for m in metrics]
            section.append(tuple(cells))
            rows += [measured_row(results, e, family=f, reference=other) | {"best": ours[f][i]} for f in parts]
        filled.append(tuple(section))
    rows += [paper_row(r) for r in paper.select(artifact)]
    return Table(
        artifact,
        results.title(artifact),
        caption,
        footer(results, entries, *notes, *paper.notes(artifact)),
        tuple(columns),
        tuple(filled),
        tidy(rows),
    )
