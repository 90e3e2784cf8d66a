"""Likelihood studies of other training seeds, read as one study."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from analysis.report import likelihood_claims
from analysis.report.held_out import together
from analysis.report.studies import Study
from reqat.config import ReqatError
from reqat.config.studies import LikelihoodStudy
from tests.analysis.study_folders import CLAIMED as MODELS
from tests.analysis.study_folders import study

UNTRAINED = ("Base", "PTQ")
TRACES = [f"chain_sum-{i}" for i in range(30)]


def rows(label: str, seed: int, base_seed: int) -> pd.DataFrame:
    """Of one model's run; an untrained model read beside another reference has other low-entropy tokens."""
    rng = np.random.default_rng([list(MODELS).index(label), base_seed if label in UNTRAINED else seed])
    low = rng.integers(20, 60, len(TRACES)) if label in UNTRAINED else np.full(len(TRACES), 40)
    nats = low * (0.1 + 0.05 * list(MODELS).index(label) + rng.normal(0, 0.01, len(TRACES)))
    found = pd.DataFrame({"problem": TRACES, "tokens_low": low, "nll_low": nats})
    found.insert(0, "seed", pd.array([seed] * len(TRACES), dtype="Int64"))
    found.insert(0, "label", label)
    return found


def of_seeds(folder: Path, seeds: tuple[int, ...], **settings: Any) -> Study:
    """A study as it is made: of untrained models at the plan's first seed alone."""
    models = {label: {"recipe": recipe, "precision": at} for label, (recipe, at) in MODELS.items()}
    asked = LikelihoodStudy(kind="likelihood", models=models, n=len(TRACES), training_seeds=seeds, **settings)  # type: ignore[arg-type]
    runs = [(label, seed) for label in MODELS for seed in (seeds[:1] if label in UNTRAINED else seeds)]
    folder.mkdir()
    pd.concat([rows(label, seed, seeds[0]) for label, seed in runs]).to_parquet(folder / "likelihood.parquet")
    given = asked.model_dump(mode="json")
    made = study(
        folder,
        "likelihood",
        "likelihood",
        {},
        **{k: v for k, v in given.items() if k not in ("n", "decoding", "name", "kind")},
    )
    planned = {
        asked.role(label, seed): {"stage": label if label in UNTRAINED else f"{label}-{seed}", "precision": {}}
        for label, seed in runs
    }
    made.record["config"] = {"settings": given, "models": planned, "problems": {"n": len(TRACES)}, "given": {}}
    return made


def test_two_studies_are_the_one_of_all_their_seeds(tmp_path: Path) -> None:
    whole = of_seeds(tmp_path / "whole", (0, 1, 2, 3, 4))
    first, more = of_seeds(tmp_path / "first", (0, 1, 2)), of_seeds(tmp_path / "more", (3, 4))
    more.record["config"]["problems"]["benchmark"] = None  # a setting that is newer than the first record

    def ordered(frame: pd.DataFrame) -> pd.DataFrame:
        return frame.sort_values(["label", "seed", "problem"]).reset_index(drop=True)

    pd.testing.assert_frame_equal(ordered(together(first, more)), ordered(whole.parquet("likelihood")))
    found, expected = likelihood_claims.tested(first, more)[0], likelihood_claims.tested(whole)[0]
    assert [(t.claim.name, t.value, t.p, t.margin, t.seeds) for t in found] == [
        (t.claim.name, pytest.approx(t.value), pytest.approx(t.p), pytest.approx(t.margin), t.seeds) for t in expected
    ]
    assert {t.seeds for t in found} == {5}


def test_studies_that_differ_otherwise_are_refused(tmp_path: Path) -> None:
    first = of_seeds(tmp_path / "first", (0, 1, 2))
    with pytest.raises(ReqatError, match="other settings"):
        together(first, of_seeds(tmp_path / "other", (3, 4), percentile=60))
    twice = of_seeds(tmp_path / "twice", (2, 3))
    for model in twice.record["config"]["models"].values():
        model["stage"] += " again"
    with pytest.raises(ReqatError, match="another training"):
        together(first, twice)
    elsewhere = of_seeds(tmp_path / "elsewhere", (3, 4))
    frame = elsewhere.parquet("likelihood")
    frame.assign(problem=frame["problem"] + "x").to_parquet(elsewhere.path / "likelihood.parquet")
    with pytest.raises(ReqatError, match="other traces"):
        together(first, elsewhere)
