"""Terms of the objective by name. A new term is one file in this package that defines ``TERM``, a class of
:class:`reqat.training.objective.Term` whose arguments are its settings in configuration."""

from __future__ import annotations

import importlib
from collections.abc import Callable

from reqat.config.catalogue import OBJECTIVE_TERMS
from reqat.training import Term

TERMS: dict[str, Callable[..., Term]] = {
    name: importlib.import_module(f"{__name__}.{name}").TERM for name in OBJECTIVE_TERMS
}
