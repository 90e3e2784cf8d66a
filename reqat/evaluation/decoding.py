"""Decoding policies. They are defined in :mod:`reqat.config.policy`, where configuration can check them, too."""

from __future__ import annotations

from reqat.config.policy import Decoding, Kind, ReSETRule, StepName

__all__ = ["Decoding", "Kind", "ReSETRule", "StepName"]
