"""Table 16: Q-FIT, and the weight of selective entropy minimization."""

from __future__ import annotations

from analysis.report import paper
from analysis.report.cells import Entry, Results
from analysis.report.document import EMPTY, Column, Table, tokens
from analysis.report.lines import where
from analysis.tables._families import by_family

NAME = "table16"

_FIRST = "qfit=0;sem_lambda=none"


def labels(e: Entry) -> tuple[str, str, str]:
    """Whether Q-FIT, the weight of SEM, tokens."""
    given = e.conditions
    weight = EMPTY if given["sem_lambda"] == "none" else given["sem_lambda"]
    return "yes" if given["qfit"] == "1" else EMPTY, weight, tokens(e.total_tokens)


def build(results: Results, artifact: str = NAME) -> Table:
    """Paper Table 16: accuracy by task family and over all, by weight of SEM."""
    entries = results.of(artifact)
    return by_family(
        results,
        artifact,
        sections=[[e for e in entries if e.model == model] for model in results.models(artifact)],
        stub=(Column("Q-FIT", align="c"), Column("SEM weight \u03bb"), Column("Tokens")),
        labels=labels,
        whole="average",
        reference=where(_FIRST),
        compared=Column("Difference to neither (points)"),
        metrics=("GSM8K", "MATH-500", "AIME-120", "Avg"),
        reported=lambda e, m: paper.value("table16", precision=e.precision, method=e.method, metric=m, **e.conditions),
        reported_name="Paper: R1-Llama-8B (%)",
        caption="ReQAT-T in the first line, with Q-FIT in the second, below with selective entropy minimization of "
        "rising weight. Families have equal shares of the problems, so their average is the accuracy over all. "
        "Differences over all are to the first line.",
        notes=("Bold: best of a column, as printed.",),
    )
