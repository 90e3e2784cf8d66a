"""Precisions, fake quantization and rotations."""

from __future__ import annotations

from reqat.config.precision import KNOWN
from reqat.quant.autocast import autocast
from reqat.quant.fake import fake_quantize, straight_through
from reqat.quant.gradients import RULES, GradientRule
from reqat.quant.hadamard import block_hadamard, hadamard, signs, with_signs
from reqat.quant.precision import Precision
from reqat.quant.quantizer import Quantizer, calibrating, without_rounding
from reqat.quant.state import MeasuredState

__all__ = [
    "KNOWN",
    "RULES",
    "GradientRule",
    "MeasuredState",
    "Precision",
    "Quantizer",
    "autocast",
    "block_hadamard",
    "fake_quantize",
    "hadamard",
    "calibrating",
    "signs",
    "straight_through",
    "with_signs",
    "without_rounding",
]
