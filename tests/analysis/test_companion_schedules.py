"""Table and figure of companion schedules, from rows whose differences are planted."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from analysis.figures import companion_schedules as figure
from analysis.report import searches, style
from analysis.report.companion_claims import claims_of
from analysis.report.companions import Found
from analysis.report.findings import AGREES, DISAGREES, INCONCLUSIVE
from analysis.tables import companion_schedules as table

BUDGET, SEEDS = 40, range(12)


def rows(shift: dict[str, float], *, tables: tuple[str, ...] = ("t1", "t2"), unit: str = "GMAC/s") -> pd.DataFrame:
    """Searches that reach the target after 20 measurements and `shift`, with noise that methods do not share."""
    random = np.random.default_rng(0)
    out = []
    for part in tables:
        for measure, value in (("points", 100), ("failed", 0.1), ("near", 0.02), ("optimum", 200.0)):
            out.append((part, None, None, measure, 0, value))
        for method, by in shift.items():
            for seed in SEEDS:
                n = 20 + by + random.normal()
                out += [(part, method, seed, "best", at, min(1.0, 0.95 * at / n)) for at in range(10, BUDGET + 1, 10)]
                out.append((part, method, seed, "to_target", BUDGET, n if n <= BUDGET else np.nan))
                if method != "uniform":
                    out.append((part, method, seed, "rank_correlation", 10, 0.3))
                    out.append((part, method, seed, "rank_correlation", 20, 0.6))
    frame = pd.DataFrame(out, columns=["part", "method", "seed", "measure", "measurements", "value"])
    frame.insert(0, "companion", "schedules")
    return frame.assign(unit=unit)


def found(frame: pd.DataFrame) -> Found:
    return Found("schedules", frame, {"schedules": {"target": 0.95}})


@pytest.mark.parametrize(("by", "verdict"), [(-8, AGREES), (8, DISAGREES), (0, INCONCLUSIVE)])
def test_the_verdict_follows_the_difference(by: float, verdict: str) -> None:
    frame = rows({"uniform": 15, "autotvm": 0, "autotvm_filter": 3, "distinctive": by})
    finding = searches.findings(frame)["autotvm"]
    assert finding.verdict == verdict
    assert finding.lo <= by <= finding.hi and finding.detectable < 3
    sentences = [line for line in table.build(found(frame)).footer if "than AutoTVM," in line]
    assert len(sentences) == 1 and verdict in sentences[0]


def test_a_search_that_did_not_arrive_counts_with_its_budget() -> None:
    frame = rows({"autotvm": 0, "distinctive": 90})
    assert (searches.to_target(frame, "distinctive") == BUDGET).all()
    data = table.build(found(frame)).data
    reached = data[(data["measure"] == "reached") & (data["table"] == "t1")].set_index("method")["value"]
    assert reached.to_dict() == {"autotvm": 1.0, "distinctive": 0.0}


def test_means_are_taken_within_a_seed_first() -> None:
    frame = rows({"autotvm": 0, "distinctive": -2})
    values = frame[(frame["measure"] == "to_target") & (frame["method"] == "distinctive")]
    by_seed = values.groupby("seed")["value"].mean()
    mean = searches.mean_of(searches.to_target(frame, "distinctive"))
    half = (mean.hi - mean.lo) / 2  # type: ignore[union-attr]
    assert mean.value == pytest.approx(by_seed.mean())  # type: ignore[union-attr]
    assert half == pytest.approx(2.200985 * by_seed.std() / np.sqrt(len(SEEDS)), rel=1e-5)  # Student, 11 degrees


def test_what_was_not_measured_is_labelled_and_kept_apart() -> None:
    shift = {"autotvm": 0.0, "distinctive": -5.0}
    frame = pd.concat([rows(shift), rows(shift, tables=("triton-x",), unit="modelled TFLOP/s")])
    made = table.build(found(frame))
    assert set(made.data[made.data["claim"].isna()]["unit"]) == {"GMAC/s", "modelled TFLOP/s"}
    claims = claims_of("schedules", made, table.HEADLINE)
    assert [("modelled" in one.where, one.headline) for one in claims] == [(False, True), (True, True)]
    assert all(one.lo <= one.value <= one.hi < 0 for one in claims)
    verdicts = [line for line in made.footer if "than AutoTVM," in line]
    assert len(verdicts) == 2 and "measured on this CPU" in verdicts[0] and "not measured" in verdicts[1]
    assert made.markdown() and made.latex()


def test_one_method_and_one_seed_make_a_table_without_verdict() -> None:
    frame = rows({"uniform": 0}, tables=("t1",))
    frame = frame[frame["seed"].isna() | (frame["seed"] == 0)]
    made = table.build(found(frame))
    assert made.sections[0][0][-1].text == "–" and not searches.findings(frame)


def test_the_figure_has_a_panel_a_table() -> None:
    frame = rows({"uniform": 15, "autotvm": 0, "distinctive": -5}, tables=("t1", "t2", "t3", "t4"))
    with style.context():
        made = figure.build(found(frame))
    shown = [ax for ax in made.axes if ax.get_visible()]
    assert [ax.get_title(loc="left").split()[-1] for ax in shown] == ["t1", "t2", "t3", "t4"]
    curve = shown[0].get_lines()[0].get_ydata()
    wanted = searches.by_seed(frame[frame["part"] == "t1"], "best", "uniform", 20).mean()
    assert curve[1] == pytest.approx(100 * wanted)
