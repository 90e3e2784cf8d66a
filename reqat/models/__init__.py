"""Models: loading, swapping layers in, quantized cache, saving (floor 2)."""

from __future__ import annotations

from reqat.models.prepare import Report, prepare

__all__ = ["Report", "prepare"]
