"""Quantized linear layers."""

from __future__ import annotations

from torch import nn


class QuantLinear(nn.Module):
    """Placeholder until the quantizers land."""
