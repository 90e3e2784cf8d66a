"""Companion NN-LUT: its table and figure from rows whose losses are known."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from analysis.figures import companion_nnlut as figure
from analysis.report import style
from analysis.report.companions import Found
from analysis.tables import companion_nnlut as table
from analysis.tables import companion_nnlut_fits as fits
from reqat.config.companions.nnlut import Settings

WINDOWS, TOKENS = 12, 50
# Arm -> nats a token above the exact functions.
LOSSES = {
    ("exact", "fp32", "all", False): 0.0,
    ("linear", "fp32", "all", False): 2.0,
    ("nli", "fp32", "all", False): 0.05,
    ("nn_lut", "fp32", "all", False): 0.1,
    ("nn_lut", "fp32", "all", True): 0.001,
    ("nn_lut", "int32", "all", False): np.nan,
    ("nli released", "fp32", "activation+exp", False): 0.002,
    ("nn_lut", "fp32", "activation+exp", False): 0.002,
}


def rows() -> pd.DataFrame:
    rng = np.random.default_rng(0)
    base = rng.normal(3.0, 0.3, WINDOWS)
    out = []
    for (method, version, functions, calibrated), loss in LOSSES.items():
        for seed in (0, 1, 2) if method == "nn_lut" and functions == "all" and version == "fp32" else (0,):
            noise = 1e-4 * rng.normal(size=WINDOWS)
            noise -= noise.mean()  # the losses are met exactly
            arm = {
                "method": method,
                "version": version,
                "functions": functions,
                "calibrated": calibrated,
                "seed": seed,
                "scaling": "full",
            }
            for window in range(WINDOWS):
                nats = TOKENS * (base[window] + loss + noise[window])
                about = {"what": "decoder", "model": "smollm2", "precision": "BF16", "tokens": TOKENS}
                out.append(about | arm | {"window": window, "nats": nats, "entries": 16})
                right = 40 - round(10 * loss) if np.isfinite(loss) else 40
                about = {"what": "encoder", "task": "brown_tagging", "precision": "NVFP4-W4A4", "count": 50}
                out.append(about | arm | {"group": window, "right": right + window % 3, "entries": 16})
    out.append(
        {
            "what": "inputs",
            "model": "smollm2",
            "function": "exp",
            "places": 30,
            "low": -80.0,
            "high": 0.0,
            "outside": 0.25,
        }
    )
    for method, error in (("linear", 1e-2), ("nn_lut", 1e-3)):
        about = {"function": "exp", "method": method, "entries": 16, "seed": 0}
        for version, more in (("fp32", 0.0), ("fp16", 1e-3), ("int32", 2e-3)):
            measured = {"mean_abs": error + more, "max_abs": 0.5, "mean_rel": 1.0}
            out.append({"what": "fit", **about, "version": version, "size": 16, "effective": 12} | measured)
        out += [{"what": "curve", **about, "x": x, "error": error} for x in np.linspace(-256, 0, 20)]
    return pd.DataFrame(out)


@pytest.fixture
def found() -> Found:
    settings = Settings(decoder="smollm2", tasks=("brown_tagging",)).model_dump(mode="json")
    return Found("nnlut", rows().assign(companion="nnlut", part="x"), {"nnlut": settings})


def test_losses_are_those_of_the_rows(found: Found) -> None:
    data = table.build(found).data
    decoder = data[data["kind"] == "decoder"].set_index(["method", "version", "functions", "calibrated"])
    for arm, loss in LOSSES.items():
        if arm[0] != "exact" and np.isfinite(loss):
            assert decoder.loc[arm, "loss"] == pytest.approx(loss, abs=1e-9)
            assert decoder.loc[arm, "loss_lo"] <= loss <= decoder.loc[arm, "loss_hi"]
    exact = decoder.loc["exact", "fp32", "all", False]
    assert np.log(decoder.loc["linear", "fp32", "all", False]["score"] / exact["score"]) == pytest.approx(2.0)
    encoder = data[data["kind"] == "encoder"].set_index(["method", "functions", "calibrated", "version"])
    assert encoder.loc["linear", "all", False, "fp32"]["loss"] == pytest.approx(40.0)


def test_verdicts_follow_the_losses(found: Found) -> None:
    claims = table.build(found).data
    claims = claims[(claims["kind"] == "claim") & (claims["model"] == "smollm2")].set_index("claim")["verdict"]
    by = {claim.text: claims[claim.text] for claim in table.CLAIMS}
    nothing = next(verdict for text, verdict in claims.items() if text.startswith("NN-LUT loses nothing"))
    first, second, third, fourth = by.values()
    assert nothing == "disagrees" and first == second == third == "agrees"
    assert fourth.startswith("cannot tell")


@pytest.mark.parametrize(("loss", "says"), [(0.001, "agrees"), (0.5, "disagrees"), (0.01, "cannot")])
def test_no_loss_is_decided_by_its_margin(loss: float, says: str) -> None:
    values = loss + 0.002 * np.random.default_rng(1).normal(size=(1, 30))
    assert table.no_worse(table.mean_over_runs(values), 0.01, 4).startswith(says)


def test_a_destroyed_model_is_said_to_be_one(found: Found) -> None:
    cells = [[cell.text for cell in row] for row in table.build(found).sections[0]]
    assert sum("destroyed" in row for row in cells) == 1


def test_table_and_figure_are_drawn(found: Found) -> None:
    drawn = table.build(found)
    assert drawn.markdown() and drawn.latex() and "Brown" in " ".join(drawn.footer)
    assert any("25%" in note for note in drawn.footer)
    errors = fits.build(found)
    assert len(errors.sections) == 1 and len(errors.sections[0]) == 2
    with style.context():
        made = figure.build(found)
        made.draw_without_rendering()
    assert len([ax for ax in made.axes if ax.has_data()]) == 2
