"""The five primary claims once more, on the likelihood of held-out solutions at the tokens where BF16 fine-tuning is
sure: a second primary outcome of the protocol, with an adjustment of its own, because accuracy alone could only see
differences that are larger than the paper's.

Nats per token, a - b, paired trace by trace and training seed by training seed; less is better, so a direction of the
paper's accuracies is the other one here. As good as BF16 fine-tuning is what lies less than a tenth above it of what
rounding costs the base, which the study has to have measured.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import pandas as pd

from analysis.report import printed
from analysis.report.claims import Claim, Side
from analysis.report.findings import Finding, adjusted, p_of
from analysis.report.held_out import compared
from analysis.report.names import BF16, REFERENCE_PRECISION
from analysis.report.studies import Study
from analysis.report.verdicts import PRIMARY
from reqat.evaluation.means import Mean

QUANTITY = "low"
PARITY_SHARE = 0.1  # of the base's own loss by rounding
BASE, ROUNDED = Side("base", BF16), Side("ptq", REFERENCE_PRECISION)


@dataclass(frozen=True, kw_only=True)
class TestedLikelihood(Finding):
    """A primary claim on held-out likelihood; nats per low-entropy token."""

    claim: Claim
    a: str
    """Label in the study."""
    b: str


def tested(study: Study) -> tuple[list[TestedLikelihood], dict[str, str]]:
    """The primary claims that a likelihood study has both sides of, adjusted over all five; and of the others (by name)
    what is missing."""
    frame = study.parquet("likelihood")
    if not frame["tokens_low"].any():
        return [], {claim.name: "no token is a low-entropy one" for claim in PRIMARY}
    found, missing = [], {}
    for claim in PRIMARY:
        made = _tested(study, frame, claim)
        if isinstance(made, str):
            missing[claim.name] = made
        else:
            found.append(made)
    return adjusted(found, len(PRIMARY)), missing


def _tested(study: Study, frame: pd.DataFrame, claim: Claim) -> TestedLikelihood | str:
    a, b = (_label(study, side) for side in (claim.a, claim.b))
    if a is None or b is None:
        lacking = [side.recipe for side, label in ((claim.a, a), (claim.b, b)) if label is None]
        return f"the study has no {' and no '.join(lacking)}"
    d = _difference(frame, a, b)
    if d is None:
        return f"{a} and {b} share no training seed"
    if claim.kind == "direction":
        margin, sign = 0.0, -printed.direction(claim, REFERENCE_PRECISION)
    else:
        base, rounded = _label(study, BASE), _label(study, ROUNDED)
        cost = _difference(frame, rounded, base) if base is not None and rounded is not None else None
        if cost is None:
            return "the study does not have the base, rounded and not, which say how much is as good"
        if cost.value <= 0:
            return "rounding costs the base nothing, which leaves nothing to be as good within"
        margin, sign = PARITY_SHARE * cost.value, -1
    made = TestedLikelihood(
        claim=claim,
        a=a,
        b=b,
        value=d.value,
        lo=d.lo,
        hi=d.hi,
        std_error=d.std_error,
        df=d.df,
        seeds=d.n_training_seeds,
        margin=margin,
        sign=sign,
    )
    return replace(made, p=p_of(made, d.p))


def _label(study: Study, side: Side) -> str | None:
    """The label of a side at the reference precision."""
    wanted = side.recipe, side.precision or REFERENCE_PRECISION
    found = [
        label for label, model in study.settings["models"].items() if (model["recipe"], model["precision"]) == wanted
    ]
    return found[0] if found else None


def _difference(frame: pd.DataFrame, a: str, b: str) -> Mean | None:
    return compared(frame[frame["label"] == a], frame[frame["label"] == b], QUANTITY)
