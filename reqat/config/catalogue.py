"""Names of the library's methods, terms and task families, discovered from file names without importing torch."""

from __future__ import annotations

import pkgutil
from pathlib import Path

_LIBRARY = Path(__file__).resolve().parent.parent


def modules_of(package: str) -> tuple[str, ...]:
    """Names of the public modules of a package of `reqat` (``methods.ptq``), in alphabetical order."""
    folder = _LIBRARY.joinpath(*package.split("."))
    return tuple(sorted(m.name for m in pkgutil.iter_modules([str(folder)]) if not m.name.startswith("_")))


PTQ_METHODS = modules_of("methods.ptq")
"""Post-training quantization methods, one a file of `reqat/methods/ptq/`."""

OBJECTIVE_TERMS = modules_of("methods.terms")
"""Terms of the training objective, one a file of `reqat/methods/terms/`."""

TRANSFORM_NAMES = modules_of("methods.transforms")
"""Transforms that stand by themselves, one a file of `reqat/methods/transforms/`."""

NONLINEAR_METHODS = modules_of("methods.nonlinear")
"""Ways to make a table of a nonlinear function, one a file of `reqat/methods/nonlinear/`."""

SEARCH_METHODS = modules_of("methods.search")
"""Methods of search over schedules, one a file of `reqat/methods/search/`."""

GRADIENT_RULES = modules_of("quant.gradients")
"""Gradient rules of quantizers, one a file of `reqat/quant/gradients/`."""

TASK_FAMILIES = modules_of("tasks.families")
"""Task families, one a file of `reqat/tasks/families/`."""

MODEL_ADAPTERS = modules_of("models.adapters")
"""Adapters of model families, one a file of `reqat/models/adapters/`."""

EXPORT_FORMATS = tuple(name.replace("_", "-") for name in modules_of("export"))
"""Formats that models are exported in, one a file of `reqat/export/`."""

LABELLED_TASKS = modules_of("tasks.labelled")
"""Tasks of encoders, one a file of `reqat/tasks/labelled/`."""
