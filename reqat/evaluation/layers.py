"""What rounding does to each quantized layer by itself: its inputs are those of the unrounded model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from reqat.models import QuantLinear, quant_linears
from reqat.models.modes import evaluating
from reqat.quant import Quantizer, without_rounding


@torch.no_grad()
def layer_errors(model: nn.Module, inputs: Tensor) -> dict[str, dict[str, float]]:
    """Of each quantized layer of a prepared model, by name, the squared error over the square of its weight
    (`weight_error`), of its input (`input_error`) and of its output without the bias (`output_error`)."""
    layers = quant_linears(model)
    seen: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            seen[name] = args[0]

        return hook

    handles = [layer.register_forward_pre_hook(keep(name)) for name, layer in layers.items()]
    try:
        with evaluating(model), without_rounding([m for m in model.modules() if isinstance(m, Quantizer)]):
            model(inputs)
    finally:
        for handle in handles:
            handle.remove()
    return {name: _errors(layers[name], x) for name, x in seen.items()}


def _errors(layer: QuantLinear, x: Tensor) -> dict[str, float]:
    bias = 0.0 if layer.bias is None else layer.multiply(torch.zeros_like(x[:1]), torch.zeros_like(layer.weight))
    quantized_x, weight = layer.input_quantizer.compute(x), layer.rotated_weight()
    quantized_weight = layer.weight if layer.frozen else layer.weight_quantizer(layer.weight)
    exact = layer.multiply(x, layer.plain_weight()) - bias
    rounded = layer.multiply(quantized_x, quantized_weight) - bias
    return {
        "weight_error": _relative(quantized_weight, weight),
        "input_error": _relative(quantized_x, x) if layer.rotation is None else float("nan"),
        "output_error": _relative(rounded, exact),
    }


def _relative(found: Tensor, exact: Tensor) -> float:
    return float((found - exact).double().square().sum() / exact.double().square().sum().clamp(min=1e-300))
