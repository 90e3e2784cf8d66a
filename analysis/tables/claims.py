"""The paper's comparisons, tested: made of the cells of every artifact that has both sides of one."""

from __future__ import annotations

import math

from analysis.report import paper
from analysis.report.cells import Results
from analysis.report.document import EMPTY, Column, Table, Text, number, p_value, tokens
from analysis.report.names import REFERENCE_PRECISION
from analysis.report.rows import footer, made_by, tidy
from analysis.report.verdicts import ALPHA, PARITY_POINTS, POWER, tested
from analysis.tables._columns import PRECISION
from reqat.config.errors import ReqatError

NAME = "claims"
NEEDS = "claims"


def build(results: Results, artifact: str = NAME) -> Table:
    """The paper's comparisons, tested here: difference, interval, p, Holm's adjustment, and a verdict on the paper's
    direction.
    """
    found = tested(results)
    if not found:
        raise ReqatError(
            f"tier {results.plan.tier.name} has both sides of none of the claims; they need table1 or claims-rows in "
            "its artifacts."
        )
    many = len({t.model for t in found}) > 1
    columns = [
        *([Column("Model", align="l")] if many else []),
        Column("Claim", align="l"),
        PRECISION,
        Column("Tokens"),
        Column("Difference (points)", "Measured"),
        Column("p", "Measured"),
        Column("Holm", "Measured"),
        Column("detectable", "Measured"),
        Column("Verdict", "Measured", "l"),
        Column("mean (points)", "Paper"),
        Column("range over its budgets", "Paper", "c"),
    ]
    sections, rows = [], []
    for block in dict.fromkeys(t.block for t in found):
        section = []
        for t in (t for t in found if t.block == block):
            spread = f"{number(min(t.paper), sign=True)} to {number(max(t.paper), sign=True)}" if t.paper else EMPTY
            cells = [Text(t.model)] if many else []
            cells += [
                Text(t.claim.name),
                Text(t.precision),
                Text(tokens(t.a.total_tokens)),
                Text(number(t.value, sign=True), detail=f"[{number(t.lo, sign=True)}, {number(t.hi, sign=True)}]"),
                Text(p_value(t.p)),
                Text(p_value(t.holm)),
                Text(number(t.detectable)),
                Text(t.verdict, bold=t.primary and t.verdict in ("agrees", "disagrees")),
                Text(number(t.paper_mean, sign=True)),
                Text(spread),
            ]
            section.append(tuple(cells))
            rows.append(
                {
                    "tier": results.plan.tier.name,
                    "model": t.model,
                    "claim": t.claim.name,
                    "block": t.block,
                    "precision": t.precision,
                    "total_tokens": t.a.total_tokens,
                    "multiple": t.multiple,
                    "a": f"{t.a.precision} {t.a.method} {t.a.condition}".strip(),
                    "b": f"{t.b.precision} {t.b.method} {t.b.condition}".strip(),
                    "difference": t.value,
                    "lo": t.lo,
                    "hi": t.hi,
                    "p": t.p,
                    "p_holm": t.holm,
                    "std_error": t.std_error,
                    "detectable": t.detectable,
                    "verdict": t.verdict,
                    "paper_mean": t.paper_mean,
                    "paper_min": min(t.paper, default=math.nan),
                    "paper_max": max(t.paper, default=math.nan),
                    **made_by(results, Results.common(t.a, t.b)[0], results.estimate(t.a).n_problems),
                }
            )
        sections.append(tuple(section))
    used = [e for t in found for e in (t.a, t.b)]
    return Table(
        artifact,
        "The paper's claims, tested",
        f"Paired comparisons at equal total budget (but for TAQ's epochs). First block: the primary claims (budget "
        f"{tokens(results.plan.tier.budget.claim_total * results.plan.tier.budget.qat_tokens)}; {REFERENCE_PRECISION}, "
        "or the paper's precision where the tier has a claim there alone). Below, a block a precision: the same at "
        "other budgets and precisions, and comparisons for context. Holm: adjusted for the number of comparisons in "
        f"the block. Detectable: the smallest difference that would have been found with {POWER:.0%} probability at "
        "the level of Holm's first step, from the measured standard error. Verdict: the direction agrees or disagrees "
        f"with the paper's if Holm's p is below {ALPHA}; reaching BF16 FT agrees if the whole interval lies above "
        f"{number(-PARITY_POINTS, 0)} points and disagrees if it lies below, no gain likewise of "
        f"{number(PARITY_POINTS, 0)} points; no direction: the paper's own differences have no common sign, or it has "
        "none.",
        footer(results, used, f"Numbers of the paper: {paper.CITATION}; differences within its tables."),
        tuple(columns),
        tuple(sections),
        tidy(rows),
    )
