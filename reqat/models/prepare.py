"""Put a model into a precision, in place."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel

from reqat.models.architecture import decoder_layers
from reqat.models.attention import ATTENTION


@dataclass(frozen=True)
class Report:
    """What :func:`prepare` did."""

    precision: str


def prepare(model: PreTrainedModel, precision: str, **options: Any) -> Report:
    """Install the attention function ``"reqat"`` (BF16 only, so far)."""
    decoder_layers(model)
    if str(precision) != "BF16":
        raise NotImplementedError(f"precision {precision!r}")
    model.set_attn_implementation(ATTENTION)
    return Report("BF16")
