"""Table 16: Q-FIT, and the weight of selective entropy minimization."""

from __future__ import annotations

from analysis.report import paper
from analysis.report.cells import Results
from analysis.report.document import EMPTY, Column, Table, Text, best, tokens
from analysis.report.lines import where
from analysis.report.rows import footer, measured_row, paper_row, tidy
from analysis.report.texts import difference_text, measured_text, reported_text

NAME = "table16"

_METRICS = ("GSM8K", "MATH-500", "AIME-120", "Avg")
_FIRST = "qfit=0;sem_lambda=none"


def build(results: Results, artifact: str = NAME) -> Table:
    """Paper Table 16: accuracy by task family and over all, by weight of SEM."""
    entries = results.of(artifact)
    models = results.models(artifact)
    families = sorted({f for e in entries for f in results.families(e)})
    parts: list[str | None] = [*families, *([None] if len(families) > 1 else [])]
    reference = where(_FIRST)
    columns = [
        *([Column("Model", align="l")] if len(models) > 1 else []),
        Column("Q-FIT", align="c"),
        Column("SEM weight \u03bb"),
        Column("Tokens"),
        *(Column("average" if f is None else f.replace("_", " "), "Accuracy (%)") for f in parts),
        Column("Difference to neither (points)"),
        *(Column(metric.replace("Avg", "average"), "Paper: R1-Llama-8B (%)") for metric in _METRICS),
    ]
    sections, rows = [], []
    for model in models:
        flat = [e for e in entries if e.model == model]
        bolds = {f: best([100 * results.estimate(e, f).value for e in flat]) for f in parts}
        theirs = {
            metric: [
                paper.value("table16", precision=e.precision, method=e.method, metric=metric, **e.conditions)
                for e in flat
            ]
            for metric in _METRICS
        }
        section = []
        for i, e in enumerate(flat):
            other, given = reference(e, entries), e.conditions
            cells = [Text(model)] if len(models) > 1 else []
            cells += [Text("yes" if given["qfit"] == "1" else EMPTY)]
            cells += [Text(EMPTY if given["sem_lambda"] == "none" else given["sem_lambda"])]
            cells += [Text(tokens(e.total_tokens))]
            cells += [measured_text(results.estimate(e, f), bolds[f][i]) for f in parts]
            cells.append(difference_text(results.paired(e, other) if other else None))
            cells += [reported_text(theirs[metric][i], best(theirs[metric])[i]) for metric in _METRICS]
            section.append(tuple(cells))
            rows += [measured_row(results, e, family=f, reference=other) | {"best": bolds[f][i]} for f in parts]
        sections.append(tuple(section))
    rows += [paper_row(r) for r in paper.select("table16")]
    return Table(
        artifact,
        results.title(artifact),
        "ReQAT-T in the first line, with Q-FIT in the second, below with selective entropy minimization of rising "
        "weight. Families have equal shares of the problems, so their average is the accuracy over all. Differences "
        "over all are to the first line.",
        footer(results, entries, "Bold: best of a column, as printed.", *paper.notes("table16")),
        tuple(columns),
        tuple(sections),
        tidy(rows),
    )
