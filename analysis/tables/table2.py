"""Table 2: task families in place of the paper's benchmarks."""

from __future__ import annotations

from typing import Any

from analysis.report import paper
from analysis.report.cells import Results
from analysis.report.document import Column, Table, Text, best, tokens
from analysis.report.lines import bf16_at_budget, grouped, lines
from analysis.report.names import BF16
from analysis.report.rows import footer, measured_row, paper_row, tidy
from analysis.report.texts import difference_text, measured_text, reported_text
from analysis.tables._columns import BOLD, METHOD, PRECISION

NAME = "table2"


def build(results: Results, artifact: str = NAME) -> Table:
    """Paper Table 2: task families in place of GSM8K, MATH-500 and AIME."""
    entries = results.of(artifact)
    many = len(results.models(artifact)) > 1
    families = sorted({f for e in entries for f in results.families(e)})
    parts: list[str | None] = [*families, *([None] if len(families) > 1 else [])]
    metrics = ("GSM8K", "MATH-500", "AIME-120")
    columns = [
        *([Column("Model", align="l")] if many else []),
        PRECISION,
        METHOD,
        Column("Tokens"),
        *(Column("all" if f is None else f.replace("_", " "), "Accuracy (%)") for f in parts),
        Column("all families", f"Difference to {BF16} (points)"),
        *(Column(m, "Paper: R1-Llama-8B, 350M tokens (%)") for m in metrics),
    ]
    rows: list[dict[str, Any]] = []
    sections = []
    for (model, precision), group in grouped(lines(entries), lambda li: (li.model, li.precision)):
        flat = [e for li in group for e in li.by.values()]
        bolds = {
            f: best([100 * results.estimate(e, f).value if precision != BF16 else None for e in flat]) for f in parts
        }
        theirs = {
            m: [paper.value("table2", precision=e.precision, method=e.method, metric=m) for e in flat] for m in metrics
        }
        section = []
        for i, e in enumerate(flat):
            other = bf16_at_budget(e, entries)
            cells = [Text(model)] if many else []
            cells += [Text(precision), Text(e.method), Text(tokens(e.total_tokens))]
            cells += [measured_text(results.estimate(e, f), bolds[f][i]) for f in parts]
            cells.append(difference_text(results.paired(e, other) if other else None))
            cells += [reported_text(theirs[m][i], precision != BF16 and best(theirs[m])[i]) for m in metrics]
            section.append(tuple(cells))
            rows += [measured_row(results, e, family=f, reference=other) | {"best": bolds[f][i]} for f in parts]
        sections.append(tuple(section))
    rows += [paper_row(r) for r in paper.select("table2")]
    return Table(
        artifact,
        results.title(artifact),
        "Accuracy with 95% interval on each family of problems, all methods at one total budget (untrained ones at "
        "none). The difference is to BF16 fine-tuning with the same budget (to the BF16 base where nothing is "
        "trained), over all families.",
        footer(results, entries, BOLD, *paper.notes(artifact)),
        tuple(columns),
        tuple(sections),
        tidy(rows),
    )
