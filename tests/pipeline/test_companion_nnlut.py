"""Companion NN-LUT: its settings, and a run of each kind of part at the smallest size."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from analysis.figures import companion_nnlut as figure
from analysis.report import style
from analysis.report.companions import Found
from analysis.tables import companion_nnlut as table
from analysis.tables import companion_nnlut_fits as fits
from reqat.config.base import parse
from reqat.config.companions import Part, note_of
from reqat.config.companions.nnlut import Settings
from reqat.config.errors import ReqatError
from reqat.config.paths import Paths
from reqat.methods.nonlinear import FUNCTIONS
from reqat.pipeline.companions import Given, nnlut, run_part

TINY: dict[str, Any] = {
    "functions": ["silu"], "entries": [8], "seeds": [3], "steps": 4, "candidates": 64, "calibration_steps": 2,
    "calibration_samples": 64, "decoder": "tiny", "windows": 3, "window_tokens": 10, "calibration_windows": 1,
    "tasks": ["generated"], "train_sequences": 16, "test_sequences": 12, "calibration_sequences": 8, "max_tokens": 8,
}  # fmt: skip
ARM = ["method", "entries", "version", "functions", "calibrated", "seed", "scaling"]


def settings(**changes: Any) -> Settings:
    return parse(Settings, TINY | changes, "test")


def ran(given: Settings, part: str, folder: Path) -> pd.DataFrame:
    return nnlut.run(given, part, Given({}, folder, folder / "kept", lambda _: None))


def test_parts_run_and_are_tabled(tmp_path: Path) -> None:
    given = settings()
    assert given.parts() == ("fit-silu", "tiny", "generated") and given.sources() == ()
    rows = pd.concat([ran(given, part, tmp_path).assign(companion="nnlut", part=part) for part in given.parts()])

    fitted = rows[rows["what"] == "fit"]
    assert set(fitted["version"]) == {"fp32", "fp16", "int32"}
    assert set(fitted["method"]) == {"linear", "nli", "nli released", "nn_lut"}
    assert fitted[["mean_abs", "max_abs", "mean_rel", "size", "effective"]].notna().all(axis=None)

    decoder = rows[rows["what"] == "decoder"]
    full, quantized = (decoder[decoder["precision"] == precision] for precision in ("BF16", "NVFP4-W4A4KV4"))
    assert len(full) + len(quantized) == len(decoder) and (decoder["tokens"] == 9).all()
    for part, is_quantized in ((full, False), (quantized, True)):
        arms = list(nnlut.arms(given, quantized=is_quantized))
        assert (part.groupby(ARM).size() == 3).all() and len(part) == 3 * len(arms) == 3 * len(set(arms))
    # Random weights know nothing of 64 tokens.
    exact = full[full["method"] == "exact"]["nats"].sum() / 27
    assert exact == pytest.approx(np.log(64), rel=0.1)
    encoder = rows[rows["what"] == "encoder"]
    assert encoder.groupby(["precision", *ARM])["count"].sum().nunique() == 1
    assert (encoder["right"] <= encoder["count"]).all()
    inputs = rows[(rows["what"] == "inputs") & (rows["model"] == "tiny")].set_index("function")
    assert dict(inputs["places"]) == {"silu": 2, "exp": 2, "reciprocal": 2, "rsqrt": 5}

    found = Found("nnlut", rows, {"nnlut": given.model_dump(mode="json")}, tier="smoke")
    drawn = table.build(found)
    assert len(drawn.sections[0]) == len({tuple(arm) for arm in full[[*ARM[2:5], "method", "scaling"]].to_numpy()})
    assert len(fits.build(found).sections) == 1
    with style.context():
        style.save(figure.build(found), tmp_path, "figure")
    assert (tmp_path / "figure.png").stat().st_size > 1000


def test_exact_functions_in_place_of_tables_lose_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    exact = {name: function.exact for name, function in FUNCTIONS.items()}
    monkeypatch.setattr(nnlut.Tables, "of", lambda self, arm: exact)
    rows = ran(settings(decoder_precision="BF16"), "tiny", tmp_path)
    rows = rows[(rows["what"] == "decoder") & ~rows["calibrated"].astype(bool)]
    losses = rows["nats"] - rows["window"].map(rows[rows["method"] == "exact"].groupby("window")["nats"].first())
    assert len(losses) > 20 and float(losses.abs().max()) < 1e-3 * float(rows["nats"].min())


def test_a_model_that_tables_destroy_is_rows_without_a_value(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def nothing(x: torch.Tensor) -> torch.Tensor:
        return torch.full_like(x, torch.nan)

    monkeypatch.setattr(nnlut.Tables, "of", lambda self, arm: {"rsqrt": nothing})
    rows = ran(settings(), "tiny", tmp_path)
    rows = rows[rows["what"] == "decoder"].set_index("method")
    assert rows.loc["exact", "nats"].notna().all() and rows.loc["linear", "nats"].isna().all()


def test_a_missing_package_is_noted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SPAM_ASSASSIN", "MINILM"):
        monkeypatch.setenv(f"REQAT_{name}", str(tmp_path))  # an empty folder
    part = Part(settings(tasks=["spam_assassin"]), "spam_assassin")
    assert set(part.sources) == {"minilm", "spam-assassin"}
    paths = Paths(root=tmp_path)
    run_part(part, paths, tier="smoke", note_missing=True)
    assert "REQAT_MINILM" in str(note_of(paths.companion(part.id)))


def test_a_text_that_is_too_short_is_refused() -> None:
    with pytest.raises(ReqatError, match="windows 5"):
        nnlut._spread([[1, 2]] * 4, 5, "windows")
    found = nnlut._spread([[i] for i in range(10)], 5, "windows")
    assert found == [[0], [2], [4], [6], [8]]


def test_settings_that_contradict_themselves_are_refused() -> None:
    for more, says in (
        ({"tasks": ["gluee"]}, "gluee"),
        ({"calibration_sequences": 17}, "17"),
        ({"decoder_precision": "FP3"}, "FP3"),
        ({"functions": ["silu", "silu"]}, "silu"),
        ({"entries": []}, "entries"),
    ):
        with pytest.raises(ReqatError, match=says):
            settings(**more)
