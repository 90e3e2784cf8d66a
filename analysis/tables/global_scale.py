"""Three modes of the global scale of activations, keys and values, of one trained model."""

from __future__ import annotations

from analysis.report.cells import Results
from analysis.report.document import Table
from analysis.tables import _generic

NAME = "global-scale"


def build(results: Results, artifact: str = NAME) -> Table:
    """The generic table under a caption of its own, against the mode of the paper."""
    caption = (
        "One trained model, evaluated with three modes of the FP32 global scale of activations, keys and values: from "
        "the whole tensor at hand (dynamic, the paper's), from each row alone (row: a response does not depend on its "
        "batch), or fixed by calibration (static)."
    )
    return _generic.build(results, artifact, caption=caption, first="global_scale=dynamic")
