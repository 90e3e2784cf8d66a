"""The primary claims on held-out likelihood: differences of traces, a margin of the base's own, a family of five."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from analysis.report import likelihood_claims
from analysis.report.studies import Study
from analysis.tables.claims_likelihood import build
from reqat.config.studies import ModelChoice
from reqat.evaluation.statistics import holm
from tests.analysis.study_folders import CAND, study
from tests.analysis.study_folders import CLAIMED as MODELS

# Nats per low-entropy token. Rounding costs the base 0.2, so 0.02 above FT is as good.
LEVEL = {
    "Base": 0.3,
    "PTQ": 0.5,
    "FT": 0.1,
    "QAT": 0.18,
    "FT+QAT, different traces": 0.13,
    "ReQAT-T": 0.13,
    "ReQAT-TQ": 0.12,
    "ReQAT-TQS": 0.105,
}


def choice(recipe: str, precision: str, **named: Any) -> dict[str, Any]:
    return ModelChoice(recipe=recipe, precision=precision, **named).model_dump(mode="json")


@pytest.fixture
def make_study(tmp_path: Path) -> Callable[..., Study]:
    def made(labels: tuple[str, ...] = tuple(MODELS), seeds: int = 3) -> Study:
        rng = np.random.default_rng(2)
        low = rng.integers(20, 60, 40)
        hard = rng.gamma(2, 0.05, 40)
        parts = []
        for label in labels:
            trained = label not in ("Base", "PTQ")
            for seed in range(seeds) if trained else (None,):
                loss = hard + LEVEL[label] + (rng.normal(0, 0.0015) if trained else 0) + rng.normal(0, 0.003, 40)
                part = {"label": label, "seed": pd.array([seed] * 40, dtype="Int64"), "tokens_low": low}
                parts.append(pd.DataFrame(part | {"nll_low": low * loss}))
        folder = tmp_path / f"likelihood-{len(labels)}-{seeds}"
        folder.mkdir()
        pd.concat(parts).to_parquet(folder / "likelihood.parquet", index=False)
        models = {label: choice(*MODELS[label]) for label in labels}
        reference = choice("ft", "BF16")
        found = study(
            folder, "likelihood", "likelihood", {}, models=models, percentile=60, reference=reference, title="of x"
        )
        found.record["metrics"] = {"traces": 40, "tokens": int(low.sum())}
        found.record["config"] = {"problems": {"split": "test"}}
        return found

    return made


def test_the_five_claims_in_nats(make_study: Callable[..., Study]) -> None:
    a_study = make_study()
    found, missing = likelihood_claims.tested(a_study)
    assert missing == {} and [t.claim.main for t in found] == [True] * 5
    frame = a_study.parquet("likelihood")

    def mean(label: str) -> float:
        part = frame[frame["label"] == label]
        return float(
            (part["nll_low"].groupby(part["seed"], dropna=False).sum() / part["tokens_low"].iloc[:40].sum()).mean()
        )

    for t in found:
        assert t.value == pytest.approx(mean(t.a) - mean(t.b)) and t.comparisons == 5 and t.seeds == 3
        assert t.p == pytest.approx(2 * stats.t.sf(abs(t.value - t.margin) / t.std_error, t.df))
    assert [t.holm for t in found] == pytest.approx(holm([t.p for t in found]))
    parity = found[0]
    assert parity.margin == pytest.approx((mean("PTQ") - mean("Base")) / 10) and parity.verdict == "agrees"
    verdicts = {t.claim.name: t.verdict for t in found}
    # Less is better: below QAT's is above it.
    assert verdicts["ReQAT-TQS above QAT"] == verdicts["ReQAT-T above QAT"] == "agrees"
    assert verdicts["same traces above different"] == "inconclusive"


def test_what_a_study_lacks_is_named_and_counts(make_study: Callable[..., Study]) -> None:
    a_study = make_study(tuple(label for label in MODELS if label not in ("Base", "FT+QAT, different traces")))
    found, missing = likelihood_claims.tested(a_study)
    assert len(found) == 3 and {t.comparisons for t in found} == {5}
    assert set(missing) == {"ReQAT-TQS reaches BF16 FT", "same traces above different"}
    assert [t.holm for t in found] == pytest.approx(holm([*(t.p for t in found), 1.0, 1.0])[:3])
    table = build({"likelihood": [a_study]})
    assert all(any(name in note for note in table.footer) for name in missing) and table.latex()
    assert table.data["p_holm"].tolist() == [t.holm for t in found]


def test_one_training_seed_concludes_nothing(make_study: Callable[..., Study]) -> None:
    found, _ = likelihood_claims.tested(make_study(seeds=1))
    assert {t.verdict for t in found} == {"one training seed"} and all(np.isnan([t.p, t.holm]).all() for t in found)
    assert all(t.lo < t.value < t.hi for t in found)


def test_the_margin_of_parity_is_an_estimate_of_the_same_traces(make_study: Callable[..., Study]) -> None:
    a_study = make_study()
    frame = a_study.parquet("likelihood")
    # What rounding costs the base differs from trace to trace, far more than trained models differ.
    noise = np.random.default_rng(5).normal(0, 0.3, 40)
    rounded = frame["label"] == "PTQ"
    frame.loc[rounded, "nll_low"] += noise * frame.loc[rounded, "tokens_low"].to_numpy()
    frame.to_parquet(a_study.path / "likelihood.parquet", index=False)
    parity = likelihood_claims.tested(a_study)[0][0]

    # Oracle: the jackknife over traces of the tested difference, and the variance over training seeds, by hand.
    def ratios(label: str, keep: np.ndarray) -> np.ndarray:
        groups = [group.iloc[keep] for _, group in frame[frame["label"] == label].groupby("seed", dropna=False)]
        return np.array([group["nll_low"].sum() / group["tokens_low"].sum() for group in groups])

    def runs(keep: np.ndarray) -> np.ndarray:
        cost = (ratios("PTQ", keep) - ratios("Base", keep)).item()
        return np.asarray(ratios("ReQAT-TQS", keep) - ratios("FT", keep) - 0.1 * cost)

    left = np.array([runs(np.delete(np.arange(40), i)).mean() for i in range(40)])
    traces = 39 / 40 * ((left - left.mean()) ** 2).sum()
    training = runs(np.arange(40)).var(ddof=1) / 3
    assert parity.value - parity.margin == pytest.approx(runs(np.arange(40)).mean())
    assert parity.std_error == pytest.approx(np.sqrt(traces + training), rel=0.03)
    assert parity.p == pytest.approx(2 * stats.t.sf(abs(parity.value - parity.margin) / parity.std_error, parity.df))


def test_only_the_models_that_claims_rest_on_stand_for_a_side(make_study: Callable[..., Study]) -> None:
    a_study = make_study()
    models = a_study.record["settings"]["models"]
    models["QAT"] = choice("qat", CAND, total=2)
    models["ReQAT-TQS"] = choice("reqat-tqs", CAND, seed=1)
    models["ReQAT-TQ"] = choice("reqat-tq", CAND, model="another")
    found, missing = likelihood_claims.tested(a_study)
    assert [(t.a, t.b) for t in found] == [("ReQAT-T", "FT+QAT, different traces")]
    assert len(missing) == 4
    # The first that fits, not the first of the recipe.
    models |= {"QAT at claim total": choice("qat", CAND)}
    assert likelihood_claims._label(a_study, likelihood_claims.Side("qat")) == "QAT at claim total"


def test_the_table_says_what_the_study_was_asked_for(make_study: Callable[..., Study]) -> None:
    a_study = make_study()
    table = build({"likelihood": [a_study]})
    words = " ".join([table.caption, *table.footer])
    assert "percentile 60" in words and "75" not in words and a_study.tier in words and "(of x)" in words
