"""The companion NCE from settings to table and figure, on digits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from analysis.figures.companion_nce import build as figure
from analysis.report.companions import Found
from analysis.tables.companion_nce import arms, claims, correlations
from analysis.tables.companion_nce import build as table
from analysis.tables.companion_nce_layers import build as layer_table
from reqat.config.base import parse
from reqat.config.companions.nce import ARMS, Settings, of_part
from reqat.config.errors import ReqatError
from reqat.pipeline.companions import Given
from reqat.pipeline.companions.nce import run

TINY: dict[str, Any] = {
    "data": "digits",
    "train_images": 64,
    "test_images": 40,
    "width": 4,
    "seeds": [1],
    "search": {"weights": {"epochs": 1, "rows_per_batch": 16}, "macs": 0.7, "parameters": 0.7, "threshold": 0.2},
    "full": {"epochs": 1, "rows_per_batch": 32},
    "qat": {"epochs": 1, "rows_per_batch": 32},
}


def test_parts_run_to_tidy_rows(tmp_path: Path) -> None:
    settings = parse(Settings, TINY, "test")
    assert [of_part(part) for part in settings.parts()] == [(1, arm) for arm in ARMS] and settings.sources() == ()
    frames = {}
    for part in ("seed1-original", "seed1-nce", "seed1-random"):
        given = Given({}, tmp_path, tmp_path / "kept" / part, say=lambda _: None)
        frames[part] = run(settings, part, given)
    rows = pd.concat(frames.values())
    assert list(rows["layer"]) == 3 * list(frames["seed1-nce"]["layer"]) and rows["two_bit"].between(0, 1).all()
    original = frames["seed1-original"]
    assert (original["width"] == original["original"]).all() and original["output_error"].notna().sum() == 6
    for part in ("seed1-nce", "seed1-random"):
        for name in ("macs", "parameters"):
            assert frames[part][name].iloc[0] <= 0.7 * original[name].iloc[0]
    assert len(json.loads((tmp_path / "search.json").read_text())["epochs"]) == 1


def test_settings_that_contradict_themselves_are_refused() -> None:
    for more, says in (
        ({"search": {**TINY["search"], "threshold": None}}, "TAS"),
        ({"search": {**TINY["search"], "shares": [0.5, 3.0]}}, "most"),
        ({"search": {**TINY["search"], "temperature": [0.1, 5.0]}}, "temperature"),
        ({"arms": ["nce", "nce"]}, "nce"),
        ({"full": {"epoch": 3}}, "epochs"),
        ({"search": {**TINY["search"], "weights": {"epochs": 1, "accumulation": 2}}}, "accumulation"),
    ):
        with pytest.raises(ReqatError, match=says):
            parse(Settings, {**TINY, **more}, "test")


def made(gain: float, noise: float = 0.001) -> Found:
    """Rows of three seeds in which NCE gains so much over TAS, and widens the layers that lose most."""
    rng = np.random.default_rng(0)
    names = ["stem", *(f"blocks.{i}.conv{j}" for i in range(3) for j in (1, 2))]
    errors = [np.nan, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6]
    base = {"original": 0.80, "tas": 0.79, "nce": 0.79 + gain, "random": 0.78}
    out = []
    for seed in (1, 2, 3):
        for arm, accuracy in base.items():
            shared = {"companion": "nce", "part": f"seed{seed}-{arm}", "arm": arm, "seed": seed, "macs": 1e6}
            shared |= {"parameters": 2e4, "full": 0.9, "two_bit": accuracy + noise * rng.standard_normal()}
            for i, name in enumerate(names):
                width = 8 + i if arm == "nce" else 8
                row = {"images": 100, "expansions": 1, "layer": name, "original": 8, "width": width}
                out.append({**shared, **row, "weight_error": 0.1, "input_error": 0.1, "output_error": errors[i]})
    return Found("nce", pd.DataFrame(out), {"nce": {}}, tier="test")


def test_verdicts_follow_the_differences_over_seeds() -> None:
    found = made(0.03)
    means = {claim.b: (mean, p) for claim, mean, p, _ in claims(found.rows)}
    assert set(means) == {"tas", "original", "random", ""}  # no arm `uniform` there
    pivot = found.rows.drop_duplicates(["arm", "seed"]).pivot(index="seed", columns="arm", values="two_bit")
    assert means["tas"][0].value == pytest.approx((pivot["nce"] - pivot["tas"]).mean())
    assert correlations(found.rows) == pytest.approx({1: 1.0, 2: 1.0, 3: 1.0})
    text = table(found).markdown()
    assert text.count("agrees") - text.count("disagrees") >= 3 and "disagrees" in table(made(-0.05)).markdown()
    assert "cannot tell" in table(made(0.01, noise=0.03)).markdown()
    assert list(arms(found)["arm"]) == ["original", "random", "tas", "nce"]
    assert "3 of 3 seeds" in layer_table(found).markdown()
    one = Found("nce", found.rows[found.rows["seed"] == 1], {"nce": {}})
    assert "one training seed" in table(one).markdown()
    assert len(figure(one).axes) == 3 == len(figure(found).axes)
