"""Post-training quantization methods by name. A new method is one file and one line in ``METHODS``.

A method takes a model prepared for its precision and leaves it frozen: codes chosen, no gradients. Most are a
*transform* that rewrites the model without changing what it computes (scales, rotations), then a *solver* that chooses
the codes of one weight at a time: :func:`reqat.recipes.layerwise.solve_weights` walks the model for it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from reqat.config.errors import ReqatError, unknown
from reqat.models import calibrate_static
from reqat.recipes.gptq import gptq
from reqat.recipes.layerwise import BATCH_TOKENS, check_input_ids
from reqat.recipes.rtn import rtn


@dataclass(frozen=True)
class Method:
    """``run(model, [input_ids,] **options)`` quantizes and returns JSON-ready metrics; ``options`` are those it has."""

    run: Callable[..., dict[str, Any]]
    options: tuple[str, ...] = ()
    needs_calibration: bool = True


METHODS: dict[str, Method] = {
    "rtn": Method(rtn, needs_calibration=False),
    "gptq": Method(gptq, options=("act_order", "damp", "progress")),
}


def solve(method: str, model: PreTrainedModel, input_ids: Tensor | None = None, **options: Any) -> dict[str, Any]:
    """Quantize the weights of a prepared ``model`` in place by the named method; returns its metrics.

    Static global scales that are not set yet are calibrated first, on the same sequences.

    Args:
        method: a key of :data:`METHODS`.
        model: prepared for the precision wanted, not frozen.
        input_ids: ``[n, T]`` int64 calibration sequences without padding; methods that look at no data do without.
        options: settings, of which a method takes those that it has; ``progress`` shows a bar.

    Raises:
        ValueError: unknown method, an option that no method has, missing calibration data, or what the method refuses.
    """
    if method not in METHODS:
        raise unknown("PTQ method", method, METHODS)
    known = {option for m in METHODS.values() for option in m.options}
    if others := sorted(set(options) - known):
        raise unknown("option of PTQ methods", others[0], known)
    chosen = METHODS[method]
    if input_ids is not None:
        check_input_ids(model, input_ids)
        if any(getattr(module, "needs_calibration", False) for module in model.modules()):
            calibrate_static(model, input_ids.split(max(1, BATCH_TOKENS // input_ids.shape[1])))
    elif chosen.needs_calibration:
        raise ReqatError(f"{method} looks at what flows through the model: give it calibration input_ids")
    taken = {key: value for key, value in options.items() if key in chosen.options}
    return chosen.run(model, input_ids, **taken) if chosen.needs_calibration else chosen.run(model, **taken)
