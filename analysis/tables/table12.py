"""Table 12: soft against binary mask of selective entropy minimization, on the first three editions."""

from __future__ import annotations

from analysis.report import paper, pooled
from analysis.report.cells import Entry, Results
from analysis.report.document import Column, Table, Text, best, tokens
from analysis.report.lines import budget_names
from analysis.report.rows import difference_columns, footer, measured_row, paper_row, tidy
from analysis.report.texts import difference_text, measured_text, reported_text
from analysis.tables._columns import PRECISION, SAME_BUDGET

NAME = "table12"

REFERENCE = "binary"


def build(results: Results, artifact: str = NAME) -> Table:
    """Paper Table 12: masks by budgets, over all editions of the artifact together."""
    entries = results.of(artifact)
    models, heads = results.models(artifact), budget_names(entries)
    parts: dict[tuple[str, str, str, int | None], list[Entry]] = {}
    for e in entries:
        parts.setdefault((e.model, e.precision, e.conditions["sem_mask"], e.multiple), []).append(e)
    budgets = paper.budgets("table12")
    columns = [
        *([Column("Model", align="l")] if len(models) > 1 else []),
        PRECISION,
        Column("Mask", align="l"),
        *(Column(head, "Accuracy (%)") for head in heads.values()),
        *(Column(head, f"Difference to {REFERENCE} (points)") for head in heads.values()),
        *(Column(tokens(total), "Paper: R1-Qwen-14B, AIME-90 (%)") for total in budgets),
    ]
    sections, rows = [], []
    for model, precision in dict.fromkeys(key[:2] for key in parts):
        masks = list(dict.fromkeys(key[2] for key in parts if key[:2] == (model, precision)))
        found = {
            (mask, m): pooled.estimate(results, parts[model, precision, mask, m])
            for mask in masks
            for m in heads
            if (model, precision, mask, m) in parts
        }
        bolds = {m: best([100 * found[mask, m].value if (mask, m) in found else None for mask in masks]) for m in heads}
        section = []
        for i, mask in enumerate(masks):
            cells = [Text(model)] if len(models) > 1 else []
            cells += [Text(precision), Text(mask)]
            cells += [measured_text(found[mask, m], bolds[m][i]) if (mask, m) in found else Text() for m in heads]
            for m in heads:
                line, other = parts.get((model, precision, mask, m)), parts.get((model, precision, REFERENCE, m))
                d = pooled.paired(results, line, other) if line and other and mask != REFERENCE else None
                cells.append(difference_text(d))
                if line:
                    rows += [measured_row(results, e) for e in line]
                    rows.append(pooled.pooled_row(results, line) | {"best": bolds[m][i]})
                    if d is not None and other:
                        rows[-1] |= difference_columns(d, other[0])
            reported = paper.by_budget(
                "table12", precision=precision, method="ReQAT-TQS", metric="AIME-90", sem_mask=mask
            )
            cells += [reported_text(reported.get(total)) for total in budgets]
            section.append(tuple(cells))
        sections.append(tuple(section))
    rows += [paper_row(r) for r in paper.select("table12")]
    sets = ", ".join(dict.fromkeys(e.problems for e in entries))
    return Table(
        artifact,
        results.title(artifact),
        "Selective entropy minimization weighs the tokens below the threshold by how far below they are (soft), or all "
        f"alike (binary); QAT after fine-tuning on the same traces, with the block rotation. Problems of {sets} "
        "together, in place of three years of AIME; each by itself is in the CSV.",
        footer(results, entries, "Bold: best of a column, as printed.", SAME_BUDGET, *paper.notes("table12")),
        tuple(columns),
        tuple(sections),
        tidy(rows),
    )
