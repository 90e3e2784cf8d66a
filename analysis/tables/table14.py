"""Table 14: what 4 bits take from reasoning, and what from knowledge."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from analysis.report import paper
from analysis.report.cells import Entry, Results
from analysis.report.document import Column, Table, Text, number, tokens
from analysis.report.lines import bf16_at_budget
from analysis.report.rows import footer, measured_row, paper_row, tidy
from analysis.report.texts import difference_text, measured_text, reported_text
from analysis.tables._columns import METHOD, PRECISION
from reqat.config.recipe import OWN

if TYPE_CHECKING:
    from reqat.evaluation.statistics import Difference

NAME = "table14"

REASONING, KNOWLEDGE = OWN, "facts"
_SETS = {REASONING: ("reasoning", "AIME-120"), KNOWLEDGE: ("knowledge", "MMLU")}
_METHODS = {"ReQAT-TQS": "ReQAT"}


def chance(results: Results, entry: Entry) -> float:
    """Share of an entry's problems that guessing gets right."""
    from reqat.tasks import get_family

    families = results.plan.evaluation(entry.cells[0].evaluation).problems.families
    return sum(get_family(name).chance for name in families) / len(families)


def relative(d: Difference, chance: float) -> float:
    """A drop as a share of what the reference knows beyond chance, in percent; NaN where it knows no more."""
    above = d.value_b - chance
    return -100 * d.value / above if above > 0 else math.nan


def build(results: Results, artifact: str = NAME) -> Table:
    """Paper Table 14: accuracy on reasoning and on facts, and the drops of both to BF16."""
    entries = results.of(artifact)
    models = results.models(artifact)
    lines: dict[tuple[str, str, str, int | None], dict[str, Entry]] = {}
    for e in entries:
        lines.setdefault((e.model, e.precision, e.method, e.multiple), {})[e.problems] = e
    sides = [(name, *_SETS[name]) for name in _SETS]
    columns = [
        *([Column("Model", align="l")] if len(models) > 1 else []),
        PRECISION,
        METHOD,
        Column("Tokens"),
        *(Column(head, "Accuracy (%)") for _, head, _ in sides),
        *(Column(head, "Difference to BF16 (points)") for _, head, _ in sides),
        *(Column(head, "Drop, of what is beyond chance (%)") for _, head, _ in sides),
        *(Column(metric, "Paper: R1-Qwen-14B (%)") for *_, metric in sides),
    ]
    groups: dict[tuple[str, str], list[tuple[Text, ...]]] = {}
    rows = []
    for (model, precision, method, _), of in lines.items():
        first = next(iter(of.values()))
        cells = [Text(model)] if len(models) > 1 else []
        cells += [Text(precision), Text(method), Text(tokens(first.total_tokens))]
        cells += [measured_text(results.estimate(of[name])) if name in of else Text() for name, *_ in sides]
        compared: list[Text] = []
        shares: list[Text] = []
        for name, *_ in sides:
            if name not in of:
                compared.append(Text())
                shares.append(Text())
                continue
            asked, guessed = of[name], chance(results, of[name])
            other = bf16_at_budget(asked, entries)
            d = results.paired(asked, other) if other else None
            share = relative(d, guessed) if d else math.nan
            compared.append(difference_text(d))
            shares.append(Text(number(share)))
            rows.append(measured_row(results, asked, reference=other) | {"problems": name, "chance": 100 * guessed})
            if d:
                rows[-1]["relative_drop"] = share
        theirs = [
            paper.value("table14", precision=precision, method=_METHODS.get(method, method), metric=metric)
            for *_, metric in sides
        ]
        groups.setdefault((model, precision), []).append(
            (*cells, *compared, *shares, *(reported_text(value) for value in theirs))
        )
    rows += [paper_row(r) for r in paper.select("table14")]
    return Table(
        artifact,
        results.title(artifact),
        "Reasoning: the tier's problems, answered by generation. Knowledge: facts that the base learned in its "
        "pretraining and no fine-tuning contains, chosen among four by likelihood. Differences are to BF16 with the "
        "same budget (untrained: to the BF16 base), on the same problems; the last columns divide the drop by what "
        "that model knows beyond guessing, so that four options and free answers compare. They have no interval.",
        footer(results, entries, *paper.notes("table14")),
        tuple(columns),
        tuple(tuple(group) for group in groups.values()),
        tidy(rows),
    )
