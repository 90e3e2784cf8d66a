"""Table 13: more epochs of trace-aligned QAT against one epoch of ReQAT."""

from __future__ import annotations

from analysis.report import paper
from analysis.report.cells import Entry, Results
from analysis.report.document import Column, Table, Text, best, tokens
from analysis.report.rows import footer, measured_row, paper_row, tidy
from analysis.report.texts import difference_text, measured_text, reported_text
from analysis.tables._columns import METHOD, PRECISION
from analysis.tables._epochs import HANDED_OVER, epochs_of

NAME = "table13"


def build(results: Results, artifact: str = NAME) -> Table:
    """Paper Table 13: accuracy by epochs of QAT, with the difference to ReQAT's one."""
    entries = results.of(artifact)
    models = results.models(artifact)
    theirs = {
        (r.method, paper.multiple(paper.parse_tokens(r.condition["taq_tokens"]))): r for r in paper.select("table13")
    }
    columns = [
        *([Column("Model", align="l")] if len(models) > 1 else []),
        PRECISION,
        METHOD,
        Column("Epochs of QAT"),
        Column("Tokens of QAT"),
        Column("Accuracy (%)"),
        Column("Difference to ReQAT (points)"),
        Column("AIME-120 (%)", "Paper: R1-Llama-8B"),
    ]
    sections, rows = [], []
    for model in models:
        flat = [e for e in entries if e.model == model]
        reference = next((e for e in flat if e.method == "ReQAT"), None)
        bolds = best([100 * results.estimate(e).value for e in flat])
        section = []
        for e, bold in zip(flat, bolds, strict=True):
            k = epochs_of(results, e)
            other: Entry | None = None if e is reference else reference
            of_paper = theirs.get(("TAQ multi-epoch" if e.method == "TAQ" else e.method, k))
            cells = [Text(model)] if len(models) > 1 else []
            cells += [Text(e.precision), Text(e.method), Text(str(k))]
            cells += [Text(tokens(k * results.plan.tier.budget.qat_tokens)), measured_text(results.estimate(e), bold)]
            cells.append(difference_text(results.paired(e, other) if other else None))
            cells.append(reported_text(of_paper.value if of_paper else None))
            section.append(tuple(cells))
            rows.append(measured_row(results, e, reference=other) | {"qat_epochs": k, "best": bold})
        sections.append(tuple(section))
    rows += [paper_row(r) for r in paper.select("table13")]
    return Table(
        artifact,
        results.title(artifact),
        f"QAT of 1 to 5 epochs over one subset of traces, after {HANDED_OVER} epochs of fine-tuning on the same, "
        "beside ReQAT (Q-FIT and selective entropy minimization) of one epoch. Differences are to ReQAT, which spends "
        "fewer tokens than the lines of several epochs.",
        footer(results, entries, "Tables 9, 13 and 15 are of the same runs.", *paper.notes("table13")),
        tuple(columns),
        tuple(sections),
        tidy(rows),
    )
