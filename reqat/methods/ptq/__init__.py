"""Post-training quantization methods by name. A new method is one file in this package that defines ``METHOD``.

A method is *transforms* (:mod:`reqat.methods.transform`), which rewrite the full-precision model without changing what
it computes (scales folded into neighbouring layers), then a *solver*, which chooses the codes of the prepared model's
weights: :func:`reqat.methods.layerwise.solve_weights` walks the model for it.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from reqat.config.catalogue import PTQ_METHODS
from reqat.config.errors import ReqatError, unknown
from reqat.config.ptq import settled
from reqat.methods.layerwise import BATCH_TOKENS, check_input_ids
from reqat.methods.ptq._method import Method, taken
from reqat.models import Report, calibrate_static, prepare, share_global_scales
from reqat.models.experts import Experts
from reqat.models.prepare import check_geometry
from reqat.quant import Precision

__all__ = ["METHODS", "Method", "quantize"]

METHODS: dict[str, Method] = {name: importlib.import_module(f"{__name__}.{name}").METHOD for name in PTQ_METHODS}


def quantize(
    method: str,
    model: PreTrainedModel,
    precision: str | Precision,
    input_ids: Tensor | None = None,
    *,
    precision_options: Mapping[str, Any] | None = None,
    override: bool = False,
    share_global_scale: bool = False,
    progress: bool = True,
    **options: Any,
) -> tuple[Report, dict[str, Any]]:
    """Quantize ``model`` in place by the named method: transform, prepare, calibrate static scales, choose codes.

    Args:
        method: a key of :data:`METHODS`.
        model: as loaded, not prepared (a transform may have left a KV shift in it).
        precision, precision_options, override: of :func:`reqat.models.prepare`.
        input_ids: ``[n, T]`` int64 calibration sequences without padding; methods that look at no data do without,
            unless the precision has static scales.
        share_global_scale: one for q, k and v, and one for gate and up (:func:`reqat.models.share_global_scales`).
        progress: show bars.
        options: of the method (:mod:`reqat.config.ptq`); None stands for the default.

    Returns what was prepared, and the method's metrics. The model is frozen.

    Raises:
        ReqatError: unknown method, an option that it does not have or a value out of range, missing calibration data, a
            model that is prepared for another precision, or what the method refuses.
    """
    if method not in METHODS:
        raise unknown("PTQ method", method, METHODS)
    chosen = METHODS[method]
    options = settled(method, options, chosen.settings)
    if input_ids is not None:
        check_input_ids(model, input_ids)
    elif chosen.needs_calibration:
        raise ReqatError(f"{method} looks at what flows through the model: give it calibration input_ids")
    asked = wanted = Precision.parse(precision, **(precision_options or {}))
    for transform in chosen.transforms:
        wanted = transform.prepared_for(wanted)
    if chosen.transforms:  # a search takes minutes: what prepare() would refuse after it is refused before
        check_geometry(model, wanted, [])
    metrics: dict[str, Any] = {}
    for transform in chosen.transforms:
        of_transform = taken(transform.rewrite, options)
        metrics |= transform.apply(model, wanted, input_ids, progress=progress, **of_transform)[1]
    if wanted == asked:
        report = prepare(model, precision, override=override, **(precision_options or {}))
    else:
        report = prepare(model, wanted, override=override)
    if input_ids is not None and any(getattr(module, "needs_calibration", False) for module in model.modules()):
        calibrate_static(model, input_ids.split(max(1, BATCH_TOKENS // input_ids.shape[1])))
    if share_global_scale:
        share_global_scales(model)
    settings = taken(chosen.solver, options)
    if chosen.solver_needs_data:
        found = chosen.solver(model, input_ids, progress=progress, **settings)
    else:
        found = chosen.solver(model, **settings)
    if found["method"] == "rtn" and chosen.transforms and any(isinstance(m, Experts) for m in model.modules()):
        metrics["experts"] = "rounded to nearest"  # transforms leave them alone: a router reads what they read
    return report, {**found, **metrics, "method": method}
