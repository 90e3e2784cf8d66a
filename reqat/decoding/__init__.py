"""What next-token distributions say, and the temperatures that ReSET makes of it.

It needs torch alone, so that inference engines with another transformers (:mod:`reqat.vllm`) compute the very same.
"""

from __future__ import annotations

from reqat.decoding.distributions import Statistics, entropy_nats, token_statistics
from reqat.decoding.reset import STEP_ENDS, ResetState, StepEnds, step_tables

__all__ = [
    "STEP_ENDS",
    "ResetState",
    "Statistics",
    "StepEnds",
    "entropy_nats",
    "step_tables",
    "token_statistics",
]
