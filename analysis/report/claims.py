"""The comparisons that the paper makes, and whether a plan has both sides of any. They are tested in
:mod:`analysis.report.verdicts`; this module reads plans alone, so that the DAG can ask it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from analysis.report.names import BF16

if TYPE_CHECKING:
    from reqat.config.plan import Plan


@dataclass(frozen=True)
class Claim:
    """A comparison that the paper makes. `a` and `b` are (precision or None for "at hand", method, condition)."""

    name: str
    artifact: str
    a: tuple[str | None, str, str]
    b: tuple[str | None, str, str]
    parity: bool = False  # the paper says "as good as", not "better than"
    main: bool = True  # one of the five that the paper rests on; the others are context


CLAIMS = (
    Claim("ReQAT-TQS reaches BF16 FT", "table1", (None, "ReQAT-TQS", ""), (BF16, "FT", ""), parity=True),
    Claim("ReQAT-TQS above QAT", "table1", (None, "ReQAT-TQS", ""), (None, "QAT", "")),
    Claim("ReQAT-T above QAT", "table1", (None, "ReQAT-T", ""), (None, "QAT", "")),
    Claim("ReQAT-TQ above ReQAT-T", "table1", (None, "ReQAT-TQ", ""), (None, "ReQAT-T", "")),
    Claim("same traces above different", "table4", (None, "FT+QAT", "aligned=yes"), (None, "FT+QAT", "aligned=no")),
    Claim("FT+PTQ below BF16 FT", "table1", (None, "FT+PTQ", ""), (BF16, "FT", ""), main=False),
    Claim("QAT above FT+PTQ", "table1", (None, "QAT", ""), (None, "FT+PTQ", ""), main=False),
    Claim("ReQAT-TQS above ReQAT-TQ", "table1", (None, "ReQAT-TQS", ""), (None, "ReQAT-TQ", ""), main=False),
)


def has_claims(plan: Plan) -> bool:
    """Whether the plan has both sides of at least one claim."""
    sides = {(c.artifact, c.model, c.precision, c.method, c.condition, c.multiple) for c in plan.cells}

    def both(claim: Claim, model: str, precision: str, multiple: int | None) -> bool:
        return all(
            (claim.artifact, model, part[0] or precision, part[1], part[2], multiple) in sides
            for part in (claim.a, claim.b)
        )

    return any(
        both(claim, model, precision, multiple)
        for claim in CLAIMS
        for _, model, precision, _, _, multiple in sides
        if precision != BF16 and multiple is not None
    )
