"""Table 10: editions of rising difficulty, each method at the budget that validation problems choose."""

from __future__ import annotations

from analysis.report import paper, pooled
from analysis.report.cells import Entry, Results
from analysis.report.document import EMPTY, Column, Table, Text, best, number, tokens
from analysis.report.names import BF16
from analysis.report.rows import difference_columns, footer, measured_row, paper_row, tidy
from analysis.report.texts import difference_text, measured_text, reported_text
from analysis.tables._columns import METHOD, PRECISION

NAME = "table10"

VALIDATION = "validation"
_YEARS = ("AIME-2022", "AIME-2023", "AIME-2024", "AIME-2025", "AIME-120")
_METHODS = {"ReQAT-TQS": "ReQAT"}  # the paper's name for it


def editions(entries: list[Entry]) -> list[str]:
    """Names of the sets of problems that are shown, in the plan's order: all but the one that chooses."""
    return [name for name in dict.fromkeys(e.problems for e in entries) if name != VALIDATION]


def best_budgets(results: Results, entries: list[Entry]) -> dict[tuple[str, str, str], int | None]:
    """(model, precision, method) -> the multiple with the highest accuracy on validation problems, the smallest among
    equals. What trains nothing, or has one budget alone, has no choice."""
    found: dict[tuple[str, str, str], dict[int | None, Entry | None]] = {}
    for e in entries:
        line = found.setdefault((e.model, e.precision, e.method), {})
        line[e.multiple] = e if e.problems == VALIDATION else line.get(e.multiple)

    def merit(multiple: int | None, entry: Entry | None) -> tuple[float, int]:
        return (results.estimate(entry).value if entry is not None else -1.0), -(multiple or 0)

    return {key: max(line, key=lambda m: merit(m, line[m])) for key, line in found.items()}


def build(results: Results, artifact: str = NAME) -> Table:
    """Paper Table 10: accuracy by edition and over all, at each method's best budget."""
    entries = results.of(artifact)
    models, names = results.models(artifact), editions(entries)
    chosen = best_budgets(results, entries)
    parts = {
        (*key, multiple): [e for e in entries if (e.model, e.precision, e.method, e.multiple) == (*key, multiple)]
        for key in chosen
        for multiple in dict.fromkeys(e.multiple for e in entries if (e.model, e.precision, e.method) == key)
    }
    shown = {
        key: sorted((e for e in line if e.problems != VALIDATION), key=lambda e: names.index(e.problems))
        for key, line in parts.items()
    }
    columns = [
        *([Column("Model", align="l")] if len(models) > 1 else []),
        PRECISION,
        METHOD,
        Column("Best budget"),
        *(Column(name.replace("-", " "), "Accuracy (%)") for name in names),
        Column("all", "Accuracy (%)"),
        Column(f"Difference to {BF16} (points)"),
        *(Column(year.removeprefix("AIME-").replace("120", "all"), "Paper: R1-Qwen-14B, AIME (%)") for year in _YEARS),
    ]
    sections, rows = [], []
    for model, precision in dict.fromkeys((m, p) for m, p, _ in chosen):
        keys = [key for key in chosen if key[:2] == (model, precision)]
        totals = {key: pooled.estimate(results, shown[*key, chosen[key]]) for key in keys}
        bolds = dict(zip(keys, best([None if precision == BF16 else 100 * totals[k].value for k in keys]), strict=True))
        section = []
        for key in keys:
            line = shown[*key, chosen[key]]
            base = (model, BF16, "Baseline" if chosen[key] is None else "FT")
            other = None if precision == BF16 or base not in chosen else shown[*base, chosen[base]]
            d = pooled.paired(results, line, other) if other else None
            cells = [Text(model)] if len(models) > 1 else []
            cells += [Text(precision), Text(key[2]), Text(tokens(line[0].total_tokens))]
            of = {e.problems: e for e in line}
            cells += [measured_text(results.estimate(of[name])) if name in of else Text() for name in names]
            cells += [measured_text(totals[key], bolds[key]), difference_text(d)]
            cells += [reported_text(_theirs(precision, key[2], year)) for year in _YEARS]
            section.append(tuple(cells))
            for multiple in (m for *k, m in shown if tuple(k) == key):
                is_best = {"chosen": multiple == chosen[key]}
                rows += [measured_row(results, e) | is_best for e in parts[*key, multiple]]
                rows.append(pooled.pooled_row(results, shown[*key, multiple]) | is_best)
                if other and d is not None and multiple == chosen[key]:
                    rows[-1] |= difference_columns(d, other[0])
        sections.append(tuple(section))
    others = [r for r in paper.select("table10") if r.method.startswith("Baseline (")]
    blank = len(columns) - len(_YEARS) - 2 - (len(models) > 1)
    sections.append(
        tuple(
            (
                *([Text(r.model)] if len(models) > 1 else []),
                Text(r.precision),
                Text(r.method),
                *[Text()] * blank,
                *(Text(number(r.value)) if r.metric == year else Text(EMPTY) for year in _YEARS),
            )
            for r in others
        )
    )
    rows += [paper_row(r) for r in paper.select("table10")]
    return Table(
        artifact,
        results.title(artifact),
        "Editions are disjoint sets of problems of rising difficulty, in place of the years of AIME. Each method "
        f"stands at the budget with the highest accuracy on the set {VALIDATION!r}, which shares no problem with any "
        "edition; the test problems choose nothing. Differences over all editions are to BF16 fine-tuning at its own "
        "best budget (untrained: to the BF16 base). All other budgets are in the CSV.",
        footer(
            results,
            entries,
            "Bold: best quantized method over all editions, as printed.",
            *paper.notes("table10"),
            "Last lines: what others report of the paper's base model.",
        ),
        tuple(columns),
        tuple(sections),
        tidy(rows),
    )


def _theirs(precision: str, method: str, year: str) -> float | None:
    return paper.value("table10", precision=precision, method=_METHODS.get(method, method), metric=year)
