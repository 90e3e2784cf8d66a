"""The search of Q-FIT: attention error over its grid, a panel a layer."""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure

from analysis.report import paper, style
from analysis.report.cells import Results
from analysis.report.keys import error_maps
from analysis.report.needs import qfit_cell
from reqat.config.errors import ReqatError

NAME = "qfit"
NEEDS = "qfit"


def build(results: Results, model: str) -> Figure:
    """Q-FIT's search: attention error over the grid of scale exponent and shift, a panel a layer, the chosen point
    marked.

    Colour is the error relative to no Q-FIT (alpha = beta = 0), in percent: every layer has a scale of its own for its
    errors, and what matters is how much of it goes away.
    """
    found = qfit_cell(results.plan, model)
    if found is None:
        raise ReqatError(f"tier {results.plan.tier.name} has no Q-FIT stage for {model}; there is no map to draw")
    id, cell = found
    entry = next(e for e in results.entries if cell in e.cells)
    m = results.metrics(id)
    missing = [k for k in ("error_map", "alphas", "betas", "alpha", "beta") if k not in m]
    if missing:
        raise ReqatError(f"{results.folder(id)}: the record lacks {', '.join(missing)}; {results.remedy([id])}")
    errors = np.array(m["error_map"], dtype=float)  # [L, A, B]
    choice = [(m["alphas"].index(a), m["betas"].index(b)) for a, b in zip(m["alpha"], m["beta"], strict=True)]
    fig = error_maps(errors, m["alphas"], m["betas"], choice)
    note = (
        f"Circle: the chosen point of {len(m['alphas'])} x {len(m['betas'])}; its change of the error stands over each "
        f"layer. {paper.QFIT_GRID}"
    )
    made = results.provenance([entry])
    calibration = results.plan.stage(id).settings.calibration  # type: ignore[union-attr]
    style.footer(
        fig,
        [
            made.notes()[0],
            f"{model}, {entry.precision}, before the QAT of {entry.method}.",
            f"Calibration: {calibration.sequences} sequences of {calibration.sequence_tokens} tokens.",
            note,
            *made.notes()[2:],
        ],
    )
    return fig
