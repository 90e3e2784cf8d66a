"""The form of most tables: lines by budgets, then the difference to a reference, then the paper's numbers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from analysis.report import paper
from analysis.report.cells import Entry, Results
from analysis.report.document import Column, Table, Text, best, tokens
from analysis.report.lines import Line, Reference, budget_names, grouped, lines
from analysis.report.rows import footer, measured_row, paper_row, tidy
from analysis.report.texts import difference_text, measured_text, reported_text


def grid(
    results: Results,
    artifact: str,
    *,
    caption: str,
    reference: Reference,
    reference_name: str,
    stub: Sequence[Column],
    labels: Callable[[Line], Sequence[str]],
    method: Callable[[Entry], str] = lambda e: e.method,
    reported: Callable[[Line, int | None], float | None] | None = None,
    reported_name: str = "",
    reported_columns: Sequence[tuple[int | None, str]] = (),
    reported_rows: Sequence[paper.Reported] = (),
    bold: bool = True,
    notes: Sequence[str] = (),
) -> Table:
    """Lines x budgets: accuracy with interval, difference to a reference with p, the paper's number.

    Bold is the best quantized line of a precision and budget. A section a model and precision.
    """
    entries = results.of(artifact)
    many = len(results.models(artifact)) > 1
    heads = budget_names(entries)
    all_lines = lines(entries, method)
    compared = [m for m in heads if any(reference(li.by[m], entries) for li in all_lines if m in li.by)]
    columns = [
        *([Column("Model", align="l")] if many else []),
        *stub,
        *(Column(h, "Accuracy (%)") for h in heads.values()),
        *(Column(heads[m], reference_name) for m in compared),
        *(Column(h, reported_name) for _, h in reported_columns),
    ]
    sections: list[tuple[tuple[Text, ...], ...]] = []
    rows: list[dict[str, Any]] = []
    for (model, _), group in grouped(all_lines, lambda li: (li.model, li.precision)):
        bolds = {
            m: _bold(group, [results.estimate(li.by[m]).value if m in li.by else None for li in group], bold)
            for m in heads
        }
        paper_bolds = {
            m: _bold(group, [_fraction(reported(li, m)) if reported else None for li in group], bold)
            for m, _ in reported_columns
        }
        section = []
        for i, li in enumerate(group):
            cells = [Text(model)] if many else []
            cells += [Text(label) for label in labels(li)]
            cells += [measured_text(results.estimate(li.by[m]), bolds[m][i]) if m in li.by else Text() for m in heads]
            for m in compared:
                other = reference(li.by[m], entries) if m in li.by else None
                cells.append(difference_text(results.paired(li.by[m], other)) if other else Text())
            cells += [
                reported_text(reported(li, m) if reported else None, paper_bolds[m][i]) for m, _ in reported_columns
            ]
            section.append(tuple(cells))
            rows += [
                measured_row(results, e, reference=reference(e, entries)) | {"best": bolds[m][i]}
                for m, e in li.by.items()
            ]
        sections.append(tuple(section))
    # Neighbouring one-line sections read better as one block.
    if all(len(s) == 1 for s in sections):
        sections = [tuple(s[0] for s in sections)]
    rows += [paper_row(r) for r in reported_rows]
    note = paper.notes(artifact) if reported_columns else ()
    return Table(
        artifact,
        results.title(artifact),
        caption,
        footer(results, entries, *notes, *note),
        tuple(columns),
        tuple(sections),
        tidy(rows),
    )


def _bold(group: Sequence[Line], values: Sequence[float | None], wanted: bool) -> list[bool]:
    """Best as printed (one decimal of a percent) among a section's quantized lines."""
    if not wanted:
        return [False] * len(group)
    return best([None if v is None or not li.quantized else 100 * v for li, v in zip(group, values, strict=True)])


def _fraction(value: float | None) -> float | None:
    return None if value is None else value / 100


def paper_heads(artifact: str, *, untrained: bool) -> list[tuple[int | None, str]]:
    heads: list[tuple[int | None, str]] = [(paper.multiple(t), tokens(t)) for t in paper.budgets(artifact)]
    return [(None, "untrained"), *heads] if untrained else heads


def paper_lookup(artifact: str) -> Callable[[Line, int | None], float | None]:
    """(line, multiple) -> number of the paper's `artifact`, by precision, method and condition."""
    table: dict[tuple[Any, ...], float] = {}
    for r in paper.select(artifact, metric="AIME-120"):
        condition = frozenset((k, v) for k, v in r.condition.items() if k != "total_tokens")
        table[r.precision, r.method, condition, paper.multiple(r.total_tokens)] = r.value
    return lambda li, m: table.get((li.precision, li.method, frozenset(paper.parse_condition(li.condition).items()), m))
