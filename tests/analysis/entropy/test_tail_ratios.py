"""Statistics of tail-mass ratios where a denominator is next to nothing."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from analysis import entropy
from analysis.entropy.tokens import QUARTILES
from reqat.evaluation.trace_files import TokenColumns, TraceInfo, TraceWriter
from reqat.evaluation.trace_folder import TraceFolder

TOKENS = 40


def columns(rng: np.random.Generator) -> TokenColumns:
    float_N = rng.random((3, TOKENS)).astype(np.float32)
    top = np.zeros((TOKENS, 1), dtype=np.int32)
    return TokenColumns(float_N[0], 0.1 + float_N[1] / 2, float_N[2], top, np.full((TOKENS, 1), 0.5, dtype=np.float32))


def test_one_token_without_mass_to_divide_by_does_not_decide(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    with TraceWriter(tmp_path, ["BF16", "FP4"], ["a", "b"], k=1) as writer:
        for p in range(10):
            reference = columns(rng)
            tail = reference.tail / 2
            if p == 0:
                reference.tail[0], tail[0] = 0.0, 1e-3
            candidate = TokenColumns(reference.entropy, tail, reference.prob, reference.top, reference.top_prob)
            about = TraceInfo(f"p{p}", "f", 0, "given", "", "", "", None, True)
            writer.add(about, np.zeros(TOKENS, dtype=int), {"BF16": reference, "FP4": candidate})
    found = entropy.damage_by_bin(TraceFolder(tmp_path), "BF16", "FP4", bins=2)
    ratios = found[found["statistic"].str.startswith("tail ratio")]
    assert ratios["value"].max() < 1  # the mean of ratios would be 5e6
    np.testing.assert_allclose(ratios.loc[ratios["statistic"].isin(QUARTILES), "value"], 0.5, rtol=1e-6)
