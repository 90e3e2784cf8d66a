"""LoRA whose merged weight is the one that was trained.

PEFT's LoRA adds ``B A x`` beside a layer. Beside a quantized layer that trains ``Q(W) x + B A x``, and merging makes
``Q(W + B A) x`` of it, which is another function: the update is rounded for the first time. Here the update is added
to the weight before it is quantized, in training already, so that merging changes nothing and the merged model is one
that quantization-aware training has seen.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from torch import Tensor

from reqat.config.errors import ReqatError
from reqat.models import QuantLinear

_BESIDE = (
    "use_dora", "lora_bias", "use_bdlora", "arrow_config", "alora_invocation_tokens", "velora_config",
    "monteclora_config", "mica", "kasa_config", "use_qalora",
)  # fmt: skip


def quantized_lora(config: Any) -> Any:
    """Let ``config`` (a ``peft.LoraConfig``) train quantized layers as ``Q(W + B A)``; returns it.

    For ``get_peft_model(model, quantized_lora(LoraConfig(...)))`` of a prepared model that is not frozen. PEFT stores
    no such thing with an adapter: give it again where one is loaded, ``PeftModel.from_pretrained(model, folder,
    config=quantized_lora(LoraConfig.from_pretrained(folder)))``. Layers that are not quantized get PEFT's own LoRA.

    Raises ReqatError without PEFT, for another kind of adapter, and for what is no change of a weight: dropout, a bias,
    DoRA and other variants.
    """
    layer = _layer()
    from peft import LoraConfig

    if not isinstance(config, LoraConfig):
        raise ReqatError(f"quantized_lora takes a peft.LoraConfig, not {type(config).__name__}")
    if config.lora_dropout:
        raise ReqatError(
            f"lora_dropout={config.lora_dropout}: it drops inputs of the update alone, which is part of the weight "
            "here; set it to 0"
        )
    given = [name for name in _BESIDE if getattr(config, name, None)]
    if given:
        raise ReqatError(
            f"{given[0]}={getattr(config, given[0])!r} is more than a change of the weight by B A, which alone is "
            "quantized with it; leave it out, or take the LoraConfig as it is (its update stays beside the layer)"
        )
    config._register_custom_module({QuantLinear: layer})
    return config


@cache
def _layer() -> type:
    """PEFT's linear layer with the update inside; made here, for PEFT is not always installed, and slow to import."""
    try:
        from peft.tuners.lora import Linear
        from peft.tuners.tuners_utils import check_adapters_to_merge
    except ImportError as error:
        raise ReqatError("quantized_lora needs PEFT: pip install peft") from error

    class QuantLoraLinear(Linear):
        """A :class:`~reqat.models.QuantLinear` with weight ``W + B A``; x [..., K]."""

        def __init__(self, base_layer: Any, adapter_name: str, **kwargs: Any) -> None:
            _check_trainable(base_layer)
            super().__init__(base_layer, adapter_name, **kwargs)

        def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
            """Q(x) Q(W + B A)^T + b with the active adapters."""
            inside = [name for name in self.active_adapters if name in self.lora_A]
            if self.disable_adapters or self.merged or not inside:
                return super().forward(x, *args, **kwargs)
            if kwargs.get("adapter_names") is not None:
                raise ReqatError("adapter_names: a weight that is quantized has one update for all rows of a batch")
            base: Any = self.get_base_layer()
            _check_trainable(base)
            weight = base.weight
            for name in inside:
                weight = self.updated(weight, name)
            return base.with_weight(x, weight)

        def updated(self, weight: Tensor, name: str) -> Tensor:
            """The weight with one adapter's update, in the weight's dtype."""
            return (weight + self.get_delta_weight(name)).to(weight.dtype)

        def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
            """As PEFT's, with the very weight that was trained; refused before anything is changed if it is frozen."""
            base: Any = self.get_base_layer()
            _check_trainable(base)
            for name in check_adapters_to_merge(self, adapter_names):
                if name not in self.lora_A:
                    continue
                weight = self.updated(base.weight.data, name)
                if safe_merge and not bool(weight.isfinite().all()):
                    raise ReqatError(f"{base.name}: adapter {name!r} makes its weight NaN or infinite; train it again")
                base.weight.data = weight
                self.merged_adapters.append(name)

    return QuantLoraLinear


def _check_trainable(layer: QuantLinear) -> None:
    if layer.frozen:
        raise ReqatError(
            f"{layer.name} is frozen: its codes cannot take an update. Train and merge before freeze(), on the model "
            "as it was loaded from its dense folder; or take the LoraConfig as it is, which keeps the update beside "
            "the frozen layer, and never merge it"
        )
