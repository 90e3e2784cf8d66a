"""The one generation path: batches of rows through a model, decoding policies, and processors of logits."""

from __future__ import annotations

from reqat.config.policy import Decoding
from reqat.generation.batches import Generation, generate
from reqat.generation.lookup import Guessed, generate_with_lookup
from reqat.generation.processors import BatchStart, StatefulProcessor

__all__ = [
    "BatchStart",
    "Decoding",
    "Generation",
    "Guessed",
    "StatefulProcessor",
    "generate",
    "generate_with_lookup",
]
