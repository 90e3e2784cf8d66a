"""Nonlinear functions as small piecewise-linear tables. A new way to make one is one file in this package that defines
``FIT``: a function from a :class:`Function` and a number of entries to a :class:`Table`.

The nonlinear operations of a Transformer are functions of one number and sums: GELU and SiLU; softmax is exp, a sum and
1/x; LayerNorm and RMSNorm are sums and 1/sqrt(x). One unit with one table of 16 slopes and intercepts can do them all.

    nn_lut, nli, linear     how a table is made
    VERSIONS                how hardware computes with it: float32, FP16, 32-bit integers
    replace, observe        tables in a model; what its functions read
    calibrated              tables that learned from that
"""

from __future__ import annotations

import importlib
from collections.abc import Callable

from reqat.config.catalogue import NONLINEAR_METHODS
from reqat.methods.nonlinear._calibrate import calibrated
from reqat.methods.nonlinear._function import FUNCTIONS, Evaluate, Function, function_named
from reqat.methods.nonlinear._replace import Replacement, Seen, observe, replace
from reqat.methods.nonlinear._table import Table, merged, through
from reqat.methods.nonlinear._versions import VERSIONS
from reqat.methods.nonlinear.nn_lut import Network

__all__ = [
    "FUNCTIONS",
    "METHODS",
    "VERSIONS",
    "Evaluate",
    "Function",
    "Network",
    "Replacement",
    "Seen",
    "Table",
    "calibrated",
    "function_named",
    "merged",
    "observe",
    "replace",
    "through",
]

METHODS: dict[str, Callable[..., Table]] = {
    name: importlib.import_module(f"{__name__}.{name}").FIT for name in NONLINEAR_METHODS
}
