"""What ``config.json`` says of a model that transformers quantized through reqat (:mod:`reqat.hf`).

transformers decides by ``quantization_config`` in ``config.json`` which quantizer a folder needs, before it looks at
anything else. Ours says the precision and the layers that were left alone; what was measured, and codes, stand in the
sidecar (:mod:`reqat.models.sidecar`), which has to agree. The weights themselves stay dense: without reqat such a
folder is the plain model.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

from reqat.config.errors import ReqatError
from reqat.formats.precision import Precision
from reqat.formats.stored import JSON, stored_precision

METHOD = "reqat"
"""``quant_method`` of such a folder."""
SCHEMA = 1

_KEYS = ("quant_method", "schema", "precision", "skip")
_PLACE = "config.json (quantization_config)"


class Says(Protocol):
    """A sidecar, as far as it repeats what config.json says."""

    @property
    def precision(self) -> Precision:
        """What the model was prepared for."""

    @property
    def skip(self) -> tuple[str, ...] | None:
        """Patterns of layers that were left alone."""


def is_ours(about: object) -> bool:
    """Whether a ``quantization_config`` is of this package."""
    return isinstance(about, Mapping) and about.get("quant_method") == METHOD


def described(precision: Precision, skip: Iterable[str]) -> dict[str, Any]:
    """The ``quantization_config`` of a model prepared for ``precision``, without the layers that ``skip`` matches."""
    return {"quant_method": METHOD, "schema": SCHEMA, "precision": precision.to_dict(), "skip": list(skip)}


def read_described(about: Mapping[str, Any], where: Path | str = _PLACE) -> tuple[Precision, tuple[str, ...]]:
    """Precision and skipped layers of what :func:`described` wrote. Raises ReqatError, naming ``where`` it stands, for
    one of a newer version, or a damaged one."""
    if about.get("schema") != SCHEMA or type(about.get("schema")) is not int:
        raise ReqatError(
            f"{where} has schema {about.get('schema')!r}, this version of reqat reads {SCHEMA}: update reqat, or make "
            "the checkpoint again."
        )
    unknown = [key for key in about if key not in _KEYS]
    missing = [key for key in _KEYS if key not in about]
    if unknown or missing:
        what = f"has the unknown key {unknown[0]!r}: update reqat, or" if unknown else f"lacks {', '.join(missing)};"
        raise ReqatError(f"{where} {what} make the checkpoint again.")
    skip = about["skip"]
    if not isinstance(skip, list) or not all(isinstance(pattern, str) for pattern in skip):
        raise ReqatError(f"{where}: skip is {skip!r}, where a list of patterns is needed; make the checkpoint again.")
    return stored_precision(where, about["precision"]), tuple(skip)


def check_agrees(folder: Path | str, about: Mapping[str, Any], sidecar: Says | None) -> None:
    """Raise ReqatError if the sidecar of ``folder`` (None where there is none) is not that of its ``config.json``.

    Without the sidecar, static scales, shift and codes would be missing without a word.
    """
    precision, skip = read_described(about, Path(folder) / _PLACE)
    if sidecar is None:
        if precision == Precision():
            return
        raise ReqatError(
            f"{folder} has no {JSON}, which its config.json needs (scales, shift and codes are there): copy the whole "
            "folder, or delete quantization_config from config.json to take the dense weights alone."
        )
    if (sidecar.precision, sidecar.skip or ()) != (precision, skip):
        raise ReqatError(
            f"{folder}: config.json says {precision} without {list(skip)}, {JSON} says {sidecar.precision} without "
            f"{list(sidecar.skip or ())}: they are of different models; copy or make the checkpoint again."
        )
