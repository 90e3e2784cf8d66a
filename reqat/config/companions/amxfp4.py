"""AMXFP4 (ACL Findings 2025): asymmetric microscaling FP4, by direct cast, against other four-bit formats.

Blocks of 32 numbers are often one-sided; one scale for the positive and one for the negative numbers then uses the
codes that a symmetric scale leaves empty. The companion measures perplexity of models whose weights, inputs and both
attention products are rounded without any calibration, over formats, types of scales, and with rotations.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from reqat.config.base import Families, Seed, Size, distinct
from reqat.config.companions import SMOLLM2, TESTBED, Companion

Family = Literal["INT4", "AINT4", "MXFP4", "AMXFP4", "NVFP4", "NVFP4-4/6"]
Scale = Literal["PoT", "PoT-R", "E4M3", "E5M2", "FP16"]
Model = Literal["smollm2", "testbed", "tiny"]
PLAIN, ROTATED, BLOCKS = "plain", "rotated", "blocks"


class Settings(Companion):
    """Perplexity by direct cast, and how one-sided blocks are."""

    kind: Literal["amxfp4"] = "amxfp4"
    models: Annotated[tuple[Model, ...], AfterValidator(distinct)] = Field(min_length=1)
    """`smollm2` on a text; `testbed`, the pinned base, on verified traces; `tiny`, random weights, to check."""
    text: Literal["austen", "brown"] = "austen"
    """That SmolLM2 reads. Brown's licence is commonly read as non-commercial, so it is never the default."""
    windows: Annotated[int, Field(ge=2, le=10**6)] = 8
    """Windows of text, without overlap."""
    window_tokens: Size = 128
    traces: Annotated[int, Field(ge=2, le=10**6)] = 128
    """Of the testbed."""
    problems: Families = {
        "chain_sum": {"min_terms": 3, "max_terms": 7, "min_digits": 1, "max_digits": 1},
        "leg_counting": {"min_animals": 2, "max_animals": 4},
    }
    """Of the testbed, by default of the kind that its pinned base has learned."""
    families: Annotated[tuple[Family, ...], AfterValidator(distinct)] = Field(
        default=("INT4", "AINT4", "MXFP4", "AMXFP4", "NVFP4", "NVFP4-4/6"), min_length=1
    )
    scales: Annotated[tuple[Scale, ...], AfterValidator(distinct)] = Field(
        default=("PoT", "PoT-R", "E4M3", "E5M2", "FP16"), min_length=1
    )
    seed: Seed = 0
    """Of the signs of the rotations, and of generated problems."""

    def parts(self) -> tuple[str, ...]:
        """Of each model: perplexities without and with rotations, and its blocks."""
        return tuple(f"{model}-{what}" for model in self.models for what in (PLAIN, ROTATED, BLOCKS))

    def sources(self) -> tuple[str, ...]:
        """Of all models."""
        return tuple(dict.fromkeys(name for part in self.parts() for name in self.sources_of(part)))

    def sources_of(self, part: str) -> tuple[str, ...]:
        """SmolLM2 and its text, or the pinned base."""
        model, _ = part.split("-")
        return {"smollm2": (SMOLLM2, self.text), "testbed": (TESTBED,), "tiny": ()}[model]
