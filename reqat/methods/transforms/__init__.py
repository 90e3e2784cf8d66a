"""Transforms by name: those of this package, one a file that defines ``TRANSFORM``, and those of PTQ methods, by the
method's name."""

from __future__ import annotations

import importlib

from reqat.config.catalogue import TRANSFORM_NAMES
from reqat.methods.ptq import METHODS
from reqat.methods.transform import Transform

__all__ = ["TRANSFORMS", "Transform"]

TRANSFORMS: dict[str, Transform] = {
    name: importlib.import_module(f"{__name__}.{name}").TRANSFORM for name in TRANSFORM_NAMES
}
for _name, _method in METHODS.items():
    _own = [transform for transform in _method.transforms if transform not in TRANSFORMS.values()]
    TRANSFORMS |= {_name if len(_own) == 1 else f"{_name} {i}": transform for i, transform in enumerate(_own)}
