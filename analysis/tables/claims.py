"""The paper's comparisons, tested: made of the cells of every artifact that has both sides of one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from analysis.report import paper
from analysis.report.cells import Entry, Results
from analysis.report.claims import of_other_elements
from analysis.report.document import EMPTY, Column, Table, Text, number, p_value, tokens
from analysis.report.findings import AGREES, ALPHA, DISAGREES, POWER
from analysis.report.names import REFERENCE_PRECISION
from analysis.report.rows import footer, made_by, tidy
from analysis.report.verdicts import FLOOR, PARITY_POINTS, PRIMARY, Tested, family_size, missing, tested
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
        Column("Training seeds"),
        Column("Difference (points)", "Measured"),
        Column("p", "Measured"),
        Column("Holm", "Measured"),
        Column("detectable", "Measured"),
        Column("Verdict", "Measured", "l"),
        Column("mean (points)", "Paper"),
        Column("range over its budgets", "Paper", "c"),
        Column("is of", "Paper", "l"),
    ]
    sections, rows = [], []
    for block in dict.fromkeys(t.block for t in found):
        section = []
        for t in (t for t in found if t.block == block):
            section.append(((Text(t.model),) if many else ()) + _line(t))
            rows.append(_row(results, t))
        sections.append(tuple(section))
    used = [e for t in found for e in (*t.a, *t.b)]
    return Table(
        artifact,
        "The paper's claims, tested",
        f"Paired comparisons at equal total budget (but for TAQ's epochs). First block: the primary claims "
        f"({REFERENCE_PRECISION}, at the budget that claims rest on). Below, a block a precision: the same at other "
        "budgets and precisions, and comparisons for context. p: of no difference, or, for claims to be as good and of "
        f"no gain, of a difference of {number(-PARITY_POINTS, 0)} and {number(PARITY_POINTS, 0, sign=True)} points. "
        "Holm: adjusted for all comparisons that the protocol has in the block, those that this run lacks included. "
        f"Detectable: the smallest distance from that value that would have been found with {POWER:.0%} probability at "
        "the level of Holm's first step, from the measured standard error. Verdict: agrees or disagrees with the paper "
        f"if Holm's p is below {ALPHA}. One training seed: its interval is over problems alone, so nothing is tested. "
        f"At the floor: neither side solves {FLOOR:.0%}, so nothing is tested. "
        "No direction: the paper prints none, or none of one sign, or one below its own sampling noise. Paper: its "
        "mean difference with the noise of its sampling (95%, responses taken as independent), where it is of this "
        "precision; else the precision that it is of.",
        (
            *footer(results, used),
            *_notes(results, found),
            f"Numbers of the paper: {paper.CITATION}, within its tables.",
        ),
        tuple(columns),
        tuple(sections),
        tidy(rows),
    )


def _line(t: Tested) -> tuple[Text, ...]:
    spread = f"{number(min(t.paper), sign=True)} to {number(max(t.paper), sign=True)}" if t.paper else EMPTY
    noise = "" if math.isnan(t.paper_noise) else f"\u00b1{number(t.paper_noise)}"
    why = "below the paper's own sampling noise" if t.within_noise else ""
    return (
        Text(t.claim.name),
        Text(t.precision),
        Text(tokens(_total(t))),
        Text(str(t.seeds) if t.seeds else EMPTY),
        Text(number(t.value, sign=True), detail=f"[{number(t.lo, sign=True)}, {number(t.hi, sign=True)}]"),
        Text(p_value(t.p)),
        Text(p_value(t.holm)),
        Text(number(t.detectable)),
        Text(t.verdict, bold=t.primary and t.verdict in (AGREES, DISAGREES), detail=f"({why})" if why else ""),
        Text(number(t.paper_mean, sign=True), detail=noise),
        Text(spread),
        Text(t.paper_of or EMPTY),
    )


def _total(t: Tested) -> int | None:
    """Of the first side that trains."""
    return t.a[0].total_tokens or t.b[0].total_tokens


def _row(results: Results, t: Tested) -> dict[str, Any]:
    return {
        "tier": results.plan.tier.name,
        "model": t.model,
        "claim": t.claim.name,
        "block": t.block,
        "precision": t.precision,
        "total_tokens": _total(t),
        "multiple": t.multiple,
        "a": _name(t.a[0]),
        "b": _name(t.b[0]),
        **t.columns(),
        "paper_mean": t.paper_mean,
        "paper_min": min(t.paper, default=math.nan),
        "paper_max": max(t.paper, default=math.nan),
        "paper_noise": t.paper_noise,
        "paper_of": t.paper_of,
        "within_paper_noise": t.within_noise,
        **made_by(results, t.a[0], sum(results.estimate(e).n_problems for e in t.a)),
        "trained_seeds": t.seeds,
        "evaluations": _ids(t.a),
        "evaluations_b": _ids(t.b),
        "evaluations_beyond": _ids(t.beyond[:1]) if t.beyond else None,
        "evaluations_beyond_b": _ids(t.beyond[1:]) if t.beyond else None,
    }


def _name(e: Entry) -> str:
    return f"{e.precision} {e.method} {e.condition}".strip()


def _ids(side: Sequence[Entry]) -> str:
    return " ".join(cell.evaluation for e in side for cell in e.cells)


def _notes(results: Results, found: list[Tested]) -> list[str]:
    """How large the families are, which primary claims the run does not have, and what was left out."""
    out = []
    models = dict.fromkeys(t.model for t in found)
    for model in models:
        where = f"{model}: " if len(models) > 1 else ""
        blocks = dict.fromkeys(["primary", *(t.block for t in found if t.model == model)])
        sizes = ", ".join(f"{block} {family_size(results, model, block)}" for block in blocks)
        out.append(f"{where}Comparisons that Holm's p is adjusted for: {sizes}.")
        if lacking := missing(found, model):
            budget = tokens(results.plan.tier.claim_total(model) * results.plan.tier.budget.qat_tokens)
            out.append(
                f"{where}Primary claims without both sides at {REFERENCE_PRECISION} and {budget} tokens here: "
                f"{', '.join(lacking)}; they count among the {len(PRIMARY)}."
            )
    if left := of_other_elements(results.plan):
        names = ", ".join(claim.name for claim in left)
        out.append(f"Left out, because keys and values have another element here than the claim is about: {names}.")
    return out
