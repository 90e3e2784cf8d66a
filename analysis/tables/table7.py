"""Table 7: programs, of models that were trained on chains of reasoning alone."""

from __future__ import annotations

from typing import Any

from analysis.report import paper
from analysis.report.cells import Entry, Results
from analysis.report.document import Column, Table, Text, best, percent, tokens
from analysis.report.lines import bf16_at_budget, grouped, lines
from analysis.report.names import BF16
from analysis.report.rows import footer, measured_row, paper_row, tidy
from analysis.report.texts import difference_text, measured_text, reported_text
from analysis.tables._columns import BOLD, METHOD, PRECISION, SAME_BUDGET
from reqat.config.errors import ReqatError

NAME = "table7"


def malformed(results: Results, entry: Entry) -> float:
    """Share of an entry's responses without a program that parses. Raises `ReqatError` where a record does not say."""
    found = [results.metrics(cell.evaluation).get("malformed") for cell in entry.cells]
    if None in found:
        id = entry.cells[found.index(None)].evaluation
        raise ReqatError(
            f"{results.folder(id)}: the record does not say how many answers are malformed, so it is of an older "
            f"version; {results.remedy([id])}"
        )
    return sum(int(n) for n in found if n is not None) / results.estimate(entry).n_responses


def build(results: Results, artifact: str = NAME) -> Table:
    """Paper Table 7: pass@1 on programs, with the share of answers that do not parse."""
    entries = results.of(artifact)
    many = len(results.models(artifact)) > 1
    columns = [
        *([Column("Model", align="l")] if many else []),
        PRECISION,
        METHOD,
        Column("Tokens"),
        Column("pass@1 (%)"),
        Column("does not parse (%)"),
        Column(f"Difference to {BF16} (points)"),
        Column("LiveCodeBench, pass@1 (%)", "Paper: R1-Qwen-14B"),
    ]
    sections, rows = [], []
    for (model, precision), group in grouped(lines(entries), lambda li: (li.model, li.precision)):
        flat = [e for li in group for e in li.by.values()]
        bolds = best([100 * results.estimate(e).value if precision != BF16 else None for e in flat])
        section = []
        for e, bold in zip(flat, bolds, strict=True):
            other, theirs = bf16_at_budget(e, entries), paper.select("table7", precision=e.precision, method=e.method)
            unread = malformed(results, e)
            cells = [Text(model)] if many else []
            cells += [Text(precision), Text(e.method), Text(tokens(e.total_tokens))]
            cells += [measured_text(results.estimate(e), bold), Text(percent(unread))]
            cells.append(difference_text(results.paired(e, other) if other else None))
            cells.append(reported_text(theirs[0].value if theirs else None))
            section.append(tuple(cells))
            rows.append(measured_row(results, e, reference=other) | {"malformed": unread, "best": bold})
        sections.append(tuple(section))
    reported: list[dict[str, Any]] = [paper_row(r) for r in paper.select("table7")]
    return Table(
        artifact,
        results.title(artifact),
        "The base saw programs in its pretraining, and no fine-tuning or QAT contains any: what a method loses here, "
        "it forgot or rounding took. pass@1: the share of responses whose program agrees with the right one on every "
        "hidden input, with 95% interval; a program that does not parse counts as wrong. Differences are to BF16 with "
        "the same budget.",
        footer(results, entries, BOLD, SAME_BUDGET, *paper.notes("table7")),
        tuple(columns),
        tuple(sections),
        tidy([*rows, *reported]),
    )
