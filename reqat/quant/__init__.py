"""Precisions, fake quantization and rotations."""

from __future__ import annotations

from reqat.config.precision import KNOWN
from reqat.formats.hadamard import block_hadamard, hadamard, hadamard_factors, signs, with_signs
from reqat.formats.precision import Precision
from reqat.quant.autocast import autocast
from reqat.quant.basis import FACTORS, Basis, inverse_transposed, kronecker
from reqat.quant.fake import fake_quantize, straight_through
from reqat.quant.gradients import RULES, GradientRule
from reqat.quant.quantizer import Quantizer, bounds, calibrating, clipped, dynamic, without_rounding
from reqat.quant.state import MeasuredState

__all__ = [
    "FACTORS",
    "KNOWN",
    "RULES",
    "Basis",
    "GradientRule",
    "MeasuredState",
    "Precision",
    "Quantizer",
    "autocast",
    "block_hadamard",
    "bounds",
    "fake_quantize",
    "hadamard",
    "hadamard_factors",
    "inverse_transposed",
    "calibrating",
    "clipped",
    "dynamic",
    "kronecker",
    "signs",
    "straight_through",
    "with_signs",
    "without_rounding",
]
