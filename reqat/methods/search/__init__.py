"""Search for the fastest schedule of a program: methods by name. A new method is one file here that defines ``METHOD``.

A *schedule* says how a computation is divided and ordered; its choices are *knobs* with a few values each, and only a
clock says what a combination is worth. A search spends as few measurements as it can. :func:`search` runs one,
:class:`Table` replays it from measurements of the whole space, and :func:`analytic` is a table in closed form.
"""

from __future__ import annotations

import importlib

from reqat.config.catalogue import SEARCH_METHODS
from reqat.config.errors import unknown
from reqat.methods.search._analytic import analytic
from reqat.methods.search._annealing import Annealing
from reqat.methods.search._method import Candidates, Method
from reqat.methods.search._run import Budget, History, search
from reqat.methods.search._space import Space
from reqat.methods.search._table import Table

__all__ = [
    "METHODS",
    "Annealing",
    "Budget",
    "Candidates",
    "History",
    "Method",
    "Space",
    "Table",
    "analytic",
    "method_called",
    "search",
]

METHODS: dict[str, Method] = {name: importlib.import_module(f"{__name__}.{name}").METHOD for name in SEARCH_METHODS}


def method_called(name: str) -> Method:
    """The method of this name. Raises ReqatError with the closest one if there is none."""
    if name not in METHODS:
        raise unknown("search method", name, METHODS)
    return METHODS[name]
