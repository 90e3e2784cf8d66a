"""The text form of decoding policies and thresholds, shared by configuration and command line.

A policy (`sample(temperature=0.6, top_p=0.95)`) is read by `reqat.config.policy.Decoding`; here stand the policy that
holds where none is given, and thresholds of entropy, which are either nats or a percentile still to be measured.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from reqat.config.errors import ReqatError

SAMPLE = "sample(temperature=0.6, top_p=0.95)"
_THRESHOLD = re.compile(r"(?P<percentile>p)?(?P<number>\d+(\.\d+)?([eE][+-]?\d+)?)")


@dataclass(frozen=True)
class Threshold:
    """A threshold of entropy: `value` in nats, or the percentile (0 < value < 100) of entropies that a model shows."""

    value: float
    is_percentile: bool = False

    @classmethod
    def parse(cls, text: object) -> Threshold:
        """`0.6` is nats, `p75` a percentile. Raises `ReqatError` naming anything else."""
        match = _THRESHOLD.fullmatch(text) if isinstance(text, str) else None
        if match is None or not math.isfinite(value := float(match["number"])):
            raise ReqatError(f"threshold {text!r}: write nats (0.6) or a percentile (p75).")
        if match["percentile"] and not 0 < value < 100:
            raise ReqatError(f"threshold {text!r}: a percentile lies between p0 and p100.")
        return cls(value, match["percentile"] is not None)
