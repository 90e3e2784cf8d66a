"""Table `likelihood`: its numbers are those of the traces, its differences are paired by trace and training seed."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from analysis.figures import likelihood_dots
from analysis.report import style
from analysis.report.studies import Study
from analysis.tables.likelihood import build, method_rows
from reqat.config.errors import ReqatError
from tests.analysis.study_folders import study

FP4 = "NVFP4-W4A4KV4"
LABELS = ("QAT", "ReQAT-T", "base")


@pytest.fixture
def likelihood(tmp_path: Path) -> Study:
    """Thirty traces; ReQAT-T is worse than QAT by 0.02 nats a token; the base has one run."""
    rng = np.random.default_rng(0)
    low, high = rng.integers(20, 60, 30), rng.integers(5, 20, 30)
    hard = rng.gamma(2, 0.1, 30)
    parts = []
    for label in LABELS:
        for seed in (0,) if label == "base" else (0, 1, 2):
            loss = hard + {"QAT": 0.1, "ReQAT-T": 0.12, "base": 0.5}[label] + rng.normal(0, 0.004)
            noise = rng.normal(0, 0.02, (4, 30))
            part = {
                "label": label,
                "seed": pd.array([seed] * 30, dtype="Int64"),
                "problem": [f"p{i}" for i in range(30)],
                "family": "f",
                "tokens_low": low,
                "tokens_high": high,
                "nll_low": low * (0.1 * loss + noise[0] / 10),
                "nll_high": high * (4 * loss + noise[1]),
                "kl_low": low * 0.001 * (1 + noise[2]),
                "kl_high": high * 0.01 * (1 + noise[3]),
                "threshold_nats": 0.25 + 0.01 * seed,
            }
            parts.append(pd.DataFrame(part))
    folder = tmp_path / "likelihood"
    folder.mkdir()
    pd.concat(parts).to_parquet(folder / "likelihood.parquet", index=False)
    models = {label: {"recipe": "r", "precision": "BF16" if label == "base" else FP4} for label in LABELS}
    reference = {"recipe": "ft", "precision": "BF16"}
    made = study(
        folder, "likelihood", "likelihood", {}, models=models, against="QAT", reference=reference, percentile=75
    )
    made.record["metrics"] = {"traces": 30, "tokens": int((low + high).sum())}
    made.record["config"] = {"problems": {"split": "test"}}
    return made


def test_every_mean_and_difference_is_of_the_traces(likelihood: Study) -> None:
    table = build({"likelihood": [likelihood]})
    rows = pd.read_csv(io.StringIO(table.csv())).set_index("method")
    frame = likelihood.parquet("likelihood")
    tokens = frame["tokens_low"] + frame["tokens_high"]
    for label in LABELS:
        by_seed = [part for _, part in frame[frame["label"] == label].groupby("seed")]
        expected = {
            "low": np.mean([p["nll_low"].sum() / p["tokens_low"].sum() for p in by_seed]),
            "high": np.mean([p["nll_high"].sum() / p["tokens_high"].sum() for p in by_seed]),
            "all": np.mean([(p["nll_low"] + p["nll_high"]).sum() / tokens[:30].sum() for p in by_seed]),
            "kl": np.mean([(p["kl_low"] + p["kl_high"]).sum() / tokens[:30].sum() for p in by_seed]),
        }
        for name, value in expected.items():
            assert rows.loc[label, name] == pytest.approx(value)
            assert rows.loc[label, f"{name}_lo"] < value < rows.loc[label, f"{name}_hi"]
    assert rows.loc["ReQAT-T", "difference_all"] == pytest.approx(rows.loc["ReQAT-T", "all"] - rows.loc["QAT", "all"])
    assert rows.loc["QAT", "runs"] == 3 and rows.loc["base", "runs"] == 1
    # The base is compared with the run of its own seed, trace by trace: a paired Student interval of the ratios.
    a, b = (frame[(frame["label"] == label) & (frame["seed"] == 0)].reset_index() for label in ("base", "QAT"))
    n = a["tokens_low"] + a["tokens_high"]
    excess = (a["nll_low"] + a["nll_high"]) - (b["nll_low"] + b["nll_high"])
    value = excess.sum() / n.sum()
    half = stats.t.ppf(0.975, 29) * np.sqrt(30 * ((excess - value * n).var(ddof=1))) / n.sum()
    row = rows.loc["base"]
    found = [row["difference_all"], row["difference_all_lo"], row["difference_all_hi"]]
    assert found == pytest.approx([value, value - half, value + half])
    # Hard traces are hard for both, so that pairing tells apart what two intervals do not.
    assert rows.loc["QAT", "all_hi"] > rows.loc["ReQAT-T", "all_lo"] and rows.loc["ReQAT-T", "difference_all_lo"] > 0
    assert pd.isna(rows.loc["QAT", "difference_all"])
    assert "0.2500 to 0.2700 nats" in " ".join(table.footer)


def test_every_mean_is_drawn_with_its_interval(likelihood: Study) -> None:
    with style.context():
        fig = likelihood_dots.build({"likelihood": [likelihood]})
    rows = pd.DataFrame(method_rows(likelihood))
    assert [tick.get_text() for tick in fig.axes[0].get_yticklabels()] == [
        f"{label} ({'BF16' if label == 'base' else FP4})" for label in LABELS
    ]
    for ax, quantity in zip(fig.axes, ("low", "high", "all", "kl"), strict=True):
        points = [container[0].get_xdata()[0] for container in ax.containers]
        ends = [container[2][0].get_segments()[0][:, 0] for container in ax.containers]
        np.testing.assert_allclose(points, rows[quantity])
        np.testing.assert_allclose(ends, rows[[f"{quantity}_lo", f"{quantity}_hi"]])


@pytest.mark.parametrize(
    ("values", "far"),
    [
        ([0.7, 0.75, 0.001, 0.002, 0.0005, 0.0015], {0, 1}),
        ([0.0007, 0.0137, 0.0001, 0.0065, 0.0007, 0.0011, 0.0037, 0.0017], set()),
        ([1.0, 2.0, 300.0], set()),  # too few to say what is usual
    ],
)
def test_means_that_would_squeeze_the_others_stand_as_numbers(values: list[float], far: set[int]) -> None:
    assert likelihood_dots.far_above(dict(enumerate(values))) == far


def test_a_mean_far_above_does_not_widen_the_axis(likelihood: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    path = likelihood.path / "likelihood.parquet"
    frame = pd.read_parquet(path)
    frame.loc[frame["label"] == "base", ["nll_low", "nll_high"]] *= 1000
    frame.to_parquet(path)
    rows = pd.DataFrame(method_rows(likelihood)).set_index("method")
    monkeypatch.setattr(likelihood_dots, "far_above", lambda values: {list(rows.index).index("base")})  # of three rows
    with style.context():
        fig = likelihood_dots.build({"likelihood": [likelihood]})
    assert fig.axes[2].get_xlim()[1] < rows.loc["base", "all"]
    (said,) = fig.axes[2].texts
    assert said.get_text().split()[0] == f"{rows.loc['base', 'all']:.2g}"


def test_a_quantity_without_tokens_is_left_open(likelihood: Study) -> None:
    path = likelihood.path / "likelihood.parquet"
    frame = pd.read_parquet(path)
    frame.assign(tokens_low=0, nll_low=0.0, kl_low=0.0).to_parquet(path, index=False)
    table = build({"likelihood": [likelihood]})
    assert "low" not in table.data and table.data["all"].notna().all()


def test_a_run_that_is_missing_is_named(likelihood: Study) -> None:
    path = likelihood.path / "likelihood.parquet"
    frame = pd.read_parquet(path)
    frame[frame["label"] != "base"].to_parquet(path, index=False)
    with pytest.raises(ReqatError, match="no run of 'base'"):
        build({"likelihood": [likelihood]})
    frame.drop(index=frame.index[-1]).query("label != 'base'").iloc[:-1].to_parquet(path, index=False)
    with pytest.raises(ReqatError, match="run the study again"):
        build({"likelihood": [likelihood]})
    path.write_bytes(b"PAR1")
    with pytest.raises(ReqatError, match="not a table"):
        build({"likelihood": [likelihood]})
