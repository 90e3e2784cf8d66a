"""Quantized models in the layouts that inference engines read. A new format is one file here that defines ``EXPORTER``.

The codes are those of the frozen model (:func:`reqat.models.freeze`), which are those that :func:`reqat.pack` computes
with: codes are never quantized a second time. Where engines join layers (q, k and v; gate and up), those share one
global scale; dense weights that were rounded with scales of their own before are rounded again, which a note says.
Beside what the engine reads lies our sidecar (``reqat.json``: the precision, and what the format cannot say).
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from reqat.config.catalogue import EXPORT_FORMATS
from reqat.config.errors import ReqatError, unknown
from reqat.config.precision import without_skip
from reqat.export._exporter import (
    Exporter,
    Frozen,
    Layer,
    check_model,
    check_precision,
    check_prepared,
)
from reqat.models import (
    QuantLinear,
    calibrate_static,
    freeze,
    precision_of,
    prepare,
    quant_linears,
    share_global_scales,
)
from reqat.models.asked import settle
from reqat.models.saving import source_of, whole_folder
from reqat.models.sidecar import Sidecar
from reqat.quant import Precision

__all__ = ["EXPORTERS", "Exported", "Exporter", "check_asked", "check_format", "export_into", "export_model"]

EXPORTERS: dict[str, Exporter] = {
    name: importlib.import_module(f"{__name__}.{name.replace('-', '_')}").EXPORTER for name in EXPORT_FORMATS
}
_KIND = "export"
_STORED = 2**-7
"""More than storing a rounded weight in bfloat16 changes of it, and far less than rounding to four bits does."""


@dataclass(frozen=True)
class Exported:
    """What was written. ``notes``: what engines that read it leave out or do otherwise, one sentence each."""

    format: str
    precision: Precision
    layers: int
    dense: tuple[str, ...]
    notes: tuple[str, ...]

    def __str__(self) -> str:
        left = f", left as they are: {', '.join(self.dense)}" if self.dense else ""
        return f"{self.format}: {self.layers} layers at {self.precision}{left if len(self.dense) < 9 else ''}"


def check_format(name: object) -> str:
    """``name`` itself. Raises ReqatError if it is no format."""
    if not isinstance(name, str) or name not in EXPORTERS:
        raise unknown("export format", name, EXPORTERS)
    return name


def export_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    folder: str | Path,
    format: str,
    *,
    precision: str | Precision | None = None,
    skip: Iterable[str] | None = None,
    calibration: Iterable[Tensor | Mapping[str, Tensor]] | None = None,
    overwrite: bool = False,
    **options: Any,
) -> Exported:
    """Write ``model`` for inference engines into ``folder``, which appears whole or not at all.

    Args:
        model: as loaded, or prepared; it is prepared, calibrated and frozen in place.
        tokenizer: saved along, or None (GGUF then has none either).
        folder: absent or empty.
        format: ``compressed-tensors``, ``modelopt``, ``gguf``, ``reqat``, or another key of :data:`EXPORTERS`.
        precision, skip, options: of :func:`reqat.models.prepare`; None for what the model was prepared for, or its
            folder was saved with. Inputs of NVFP4 become ``static`` where the format stores their scale.
        calibration: batches of :func:`reqat.models.calibrate_static`, for static scales that the model does not have.
        overwrite: replace an earlier export by this function.

    What the format cannot say about the cache is a warning and stands in the sidecar.

    Raises ReqatError, naming the remedy, for a folder that is there, an unknown format, a model without a precision, a
    precision, layer or model that the format cannot hold, and scales that need calibration where none is given.
    """
    check_format(format)
    with whole_folder(Path(folder), _KIND, "export", overwrite=overwrite, inputs=source_of(model)) as partial:
        done = export_into(
            partial, model, tokenizer, format, precision=precision, skip=skip, calibration=calibration, **options
        )
    for note in done.notes:
        warnings.warn(f"{format}: {note}", stacklevel=2)
    return done


def check_asked(format: str, precision: str) -> None:
    """Raise ReqatError for a ``precision`` that a format cannot say, which needs no model to be known. What a folder
    was saved with may add options, so :func:`export_model` looks again."""
    check_precision(Precision.parse(without_skip(precision)[0]), check_format(format), EXPORTERS[format])


@torch.no_grad()
def export_into(
    folder: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    format: str,
    *,
    precision: str | Precision | None = None,
    skip: Iterable[str] | None = None,
    calibration: Iterable[Tensor | Mapping[str, Tensor]] | None = None,
    **options: Any,
) -> Exported:
    """What :func:`export_model` does, into a ``folder`` of the caller's that is empty."""
    exporter = EXPORTERS[check_format(format)]
    if getattr(model, "_reqat_packed", False):
        raise ReqatError("a packed model cannot be exported: load the model again, and export it instead of packing it")
    wanted, patterns = _wanted(model, format, exporter, precision, skip, options)
    if exporter.families is not None:
        check_model(model, format)
    already = precision_of(model)
    if already not in (None, Precision(), wanted):
        raise ReqatError(
            f"the model was prepared for {already}, and {format} needs {wanted}: load it again, and prepare it for "
            "that or leave that to the export"
        )
    prepare(model, wanted, skip=patterns, override=True)
    if exporter.families is not None:
        check_prepared(model, wanted, format, exporter)
    _calibrate(model, calibration, format)
    notes = []
    if exporter.fuses and exporter.families is not None:
        rounded = _rounded_before(model, wanted)
        share_global_scales(model)
        notes = _rounded_again(rounded, format)
    freeze(model)
    layers = {
        name: Layer(layer.quantized, layer.input_quantizer.global_scale)
        for name, layer in quant_linears(model).items()
        if layer.quantized is not None
    }
    frozen = Frozen(model, tokenizer, wanted, layers, notes)
    exporter.write(frozen, folder)
    if exporter.families is not None:
        whole = Sidecar.collect(model)
        of_cache = {name: tensor for name, tensor in whole.tensors.items() if name.startswith("layers.")}
        Sidecar(wanted, of_cache, skip=whole.skip).write(folder)
    return Exported(format, wanted, len(layers), tuple(frozen.dense), tuple(frozen.notes))


def _wanted(
    model: PreTrainedModel,
    format: str,
    exporter: Exporter,
    precision: str | Precision | None,
    skip: Iterable[str] | None,
    options: Mapping[str, Any],
) -> tuple[Precision, list[str]]:
    """The precision to prepare, and the layers to skip: those asked for, or the model's own."""
    report = getattr(model, "_reqat_report", None)
    sidecar: Sidecar | None = getattr(model, "_reqat_sidecar", None)
    own = report if report is not None and report.precision != Precision() else None
    saved, saved_skip = (own.precision, own.skip) if own is not None else (Precision(), None)
    if own is None and sidecar is not None:
        saved, saved_skip = sidecar.precision, sidecar.skip
    if precision is None and saved == Precision():
        raise ReqatError(
            "the model is not quantized and no precision is given; name one, such as NVFP4-W4A16 or MXFP4-W4A16 "
            "(--precision), or give the folder that `reqat quantize` or QAT wrote"
        )
    asked = settle(saved.name if precision is None else precision, skip, options, saved, saved_skip)
    check_precision(asked.precision, format, exporter)
    wanted = asked.precision
    if exporter.families is not None and exporter.static_inputs:
        fmt = wanted.inputs
        if fmt is not None and fmt.has_global_scale:
            wanted = wanted.replace(inputs=fmt.replace(global_scale="static"))
    return wanted, list(asked.skip)


def _rounded_before(model: PreTrainedModel, precision: Precision) -> dict[str, QuantLinear]:
    """Layers with dense weights that lie on the grid of a global scale of their own (fake-quantized, as released
    checkpoints are): rounding leaves them as they are, up to the type that they were stored in."""
    if precision.weights is None or not precision.weights.has_global_scale:
        return {}
    dense = {name: layer for name, layer in quant_linears(model).items() if not layer.frozen}
    return {name: layer for name, layer in dense.items() if _change(layer) < _STORED}


def _rounded_again(layers: Mapping[str, QuantLinear], format: str) -> list[str]:
    """A note of what shared global scales change in weights that were rounded before."""
    changes = {name: change for name, layer in layers.items() if (change := _change(layer)) >= _STORED}
    if not changes:
        return []
    most = max(changes, key=lambda name: changes[name])
    return [
        f"weights: {len(changes)} layers had been rounded with global scales of their own, and {format} has one for q, "
        f"k and v and one for gate and up: rounded again, {most} most, by {changes[most]:.2%} of its norm"
    ]


def _change(layer: QuantLinear) -> float:
    """What rounding to the layer's codes changes in its weight, as a share of the weight's norm."""
    weight = layer.rotated_weight().float()
    rounded = layer.quantize_weight().dequantize(torch.float32)
    return float((rounded - weight).norm() / weight.norm().clamp(min=torch.finfo(torch.float32).tiny))


def _calibrate(model: PreTrainedModel, calibration: Any, format: str) -> None:
    """Measure static scales that the model does not have. Raises ReqatError where that takes data and there is none."""
    missing = [module.name for module in model.modules() if getattr(module, "needs_calibration", False)]
    if not missing:
        return
    if calibration is None:
        raise ReqatError(
            f"{missing[0]}: {format} stores a calibrated (static) global scale of it, and the model has none: give "
            "data to measure it on (--calibration FILE; Python: calibration=batches), or export weights alone (W4A16)"
        )
    calibrate_static(model, calibration)
