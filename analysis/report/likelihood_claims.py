"""The five primary claims once more, on the likelihood of held-out solutions at the tokens where BF16 fine-tuning is
sure: a second primary outcome of the protocol, with an adjustment of its own, because accuracy alone could only see
differences that are larger than the paper's.

Nats per token, a - b, paired trace by trace and training seed by training seed; less is better, so a direction of the
paper's accuracies is the other one here. As good as BF16 fine-tuning is what lies less than a tenth above it of what
rounding costs the base, which the study has to have measured. That cost is estimated on the same traces and is no
constant: tested is, trace by trace, the difference minus a tenth of the cost, against 0.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from analysis.report import printed
from analysis.report.claims import Claim, Side
from analysis.report.findings import Finding, adjusted
from analysis.report.held_out import differences, together
from analysis.report.names import BF16, REFERENCE_PRECISION
from analysis.report.studies import Study
from analysis.report.verdicts import PRIMARY
from reqat.evaluation.means import mean_over_runs

QUANTITY = "low"
PARITY_SHARE = 0.1  # of the base's own loss by rounding
BASE, ROUNDED = Side("base", BF16), Side("ptq", REFERENCE_PRECISION)


@dataclass(frozen=True, kw_only=True)
class TestedLikelihood(Finding):
    """A primary claim on held-out likelihood; nats per low-entropy token. `value` with `lo` and `hi` is the difference
    a - b; `std_error`, `df` and `p` are of what is tested, `value - margin`, whose margin may be an estimate too."""

    claim: Claim
    a: str
    """Label in the study."""
    b: str


def tested(study: Study, *more: Study) -> tuple[list[TestedLikelihood], dict[str, str]]:
    """The primary claims that a likelihood study has both sides of, adjusted over all five; and of the others (by name)
    what is missing. `more` are studies of the same settings under further training seeds.

    Raises `ReqatError` for `more` of other settings, or of a seed that is there already."""
    frame = together(study, *more)
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
        return f"the study has no {' and no '.join(lacking)} of the first model at the total that claims rest on"
    d_RP = _differences(frame, a, b)
    if d_RP is None:
        return f"{a} and {b} share no training seed"
    shown = against_margin = mean_over_runs(d_RP)
    if claim.kind == "direction":
        margin, sign = 0.0, -printed.direction(claim, REFERENCE_PRECISION)
    else:
        base, rounded = _label(study, BASE), _label(study, ROUNDED)
        cost_RP = _differences(frame, rounded, base) if base is not None and rounded is not None else None
        if cost_RP is None:
            return "the study does not have the base, rounded and not, which say how much is as good"
        margin_P = PARITY_SHARE * cost_RP.mean(axis=0)
        margin, sign = float(margin_P.mean()), -1
        if margin <= 0:
            return "rounding costs the base nothing, which leaves nothing to be as good within"
        against_margin = mean_over_runs(d_RP - margin_P)
    made = TestedLikelihood(
        claim=claim,
        a=a,
        b=b,
        value=shown.value,
        lo=shown.lo,
        hi=shown.hi,
        std_error=against_margin.std_error,
        df=against_margin.df,
        seeds=shown.n_training_seeds,
        margin=margin,
        sign=sign,
    )
    return replace(made, p=against_margin.p) if made.testable else made


def _label(study: Study, side: Side) -> str | None:
    """The label of a side at the reference precision: of the tier's first model, at the total that claims rest on and
    with all of the study's training seeds, which is what a choice that names none of these means."""
    wanted = {"recipe": side.recipe, "precision": side.precision or REFERENCE_PRECISION}
    for label, model in study.settings["models"].items():
        named = {key: value for key, value in model.items() if value is not None}
        if named == wanted:
            return str(label)
    return None


def _differences(frame: pd.DataFrame, a: str, b: str) -> NDArray[np.float64] | None:
    return differences(frame[frame["label"] == a], frame[frame["label"] == b], QUANTITY)
