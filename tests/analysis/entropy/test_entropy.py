"""Statistics of trace folders against plain loops over the same rows, and the error taxonomy against planted errors."""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from analysis import entropy
from analysis.entropy import Derailment, first_error, solution_steps, steps
from analysis.entropy.pair_plots import draw
from analysis.entropy.pair_report import report
from reqat.config.errors import ReqatError
from reqat.evaluation.outcomes import Outcomes
from reqat.evaluation.statistics import accuracy, clustered_means
from reqat.evaluation.trace_files import TokenColumns, TraceInfo, TraceWriter
from reqat.evaluation.trace_folder import TraceFolder
from reqat.tasks import get_family, problems

WORDS = ["<eos>", "\n", " so", " is", " the", " 1", "2", " 37", " +", " -", "=", " x1", "."]
REF, CAND = "BF16", "NVFP4-W4A4KV4"


# -- clustered means -------------------------------------------------------------------------------------------------
def test_proportions_agree_with_accuracy() -> None:
    rng = np.random.default_rng(0)
    for correct in (rng.random((30, 4)) < rng.random((30, 1)), np.ones((9, 2), bool), np.zeros((9, 2), bool)):
        P, S = correct.shape
        problem = np.repeat(np.arange(P), S)
        outcomes = Outcomes(
            tuple(f"p{i}" for i in problem),
            ("f",) * (P * S),
            np.tile(np.arange(S), P),
            correct.ravel(),
            np.ones(P * S),
            np.ones(P * S, dtype=bool),
        )
        expected = accuracy(outcomes)
        found = clustered_means(correct.ravel(), np.zeros(P * S, dtype=int), problem, 1, proportion=True)
        assert found.value_G[0] == pytest.approx(expected.value, rel=1e-12)
        assert (found.lo_G[0], found.hi_G[0]) == pytest.approx((expected.lo, expected.hi), rel=1e-9)


def test_one_observation_a_cluster_is_students_interval() -> None:
    values = np.random.default_rng(1).normal(3, 2, 25)
    found = clustered_means(values, np.zeros(25, dtype=int), np.arange(25), 1)
    expected = stats.t.interval(0.95, 24, values.mean(), stats.sem(values))
    assert (found.value_G[0], found.lo_G[0], found.hi_G[0]) == pytest.approx((values.mean(), *expected), rel=1e-12)
    assert found.n_G[0] == found.clusters_G[0] == 25


@pytest.mark.parametrize("proportion", [False, True])
def test_a_single_cluster_says_nothing_of_how_sure_its_mean_is(proportion: bool) -> None:
    values, group = np.array([1, 1, 0, 1, 0, 1]), np.array([0, 0, 0, 1, 1, 1])
    found = clustered_means(values, group, np.array([0, 0, 0, 0, 1, 1]), 2, proportion=proportion)
    assert found.value_G == pytest.approx([2 / 3, 2 / 3])
    assert np.isnan([found.lo_G[0], found.hi_G[0]]).all() and found.lo_G[1] < 2 / 3 < found.hi_G[1]


def test_means_of_groups_and_ratios_against_the_formula() -> None:
    rng = np.random.default_rng(2)
    values, weights = rng.random(200), rng.random(200) + 0.5
    group, cluster = rng.integers(-1, 4, 200), rng.integers(0, 12, 200)
    found = clustered_means(values, group, cluster, 5, weights_N=weights)
    for g in range(4):
        inside = group == g
        ratio = values[inside].sum() / weights[inside].sum()
        present = np.unique(cluster[inside])
        C = len(present)
        parts = [
            values[inside & (cluster == c)].sum() - ratio * weights[inside & (cluster == c)].sum() for c in present
        ]
        se = math.sqrt(C / (C - 1) * sum(d * d for d in parts)) / weights[inside].sum()
        half = stats.t.ppf(0.975, C - 1) * se
        assert (found.value_G[g], found.lo_G[g], found.hi_G[g]) == pytest.approx((ratio, ratio - half, ratio + half))
        assert (found.n_G[g], found.clusters_G[g]) == (inside.sum(), C)
    assert np.isnan(found.value_G[4]) and np.isnan(found.lo_G[4]) and found.n_G[4] == 0


def test_equal_copies_of_an_observation_are_no_evidence() -> None:
    values, problem = np.random.default_rng(3).normal(size=20), np.arange(20)
    once = clustered_means(values, np.zeros(20, int), problem, 1)
    often = clustered_means(np.repeat(values, 50), np.zeros(1000, int), np.repeat(problem, 50), 1)
    assert often.hi_G[0] - often.lo_G[0] == pytest.approx(once.hi_G[0] - once.lo_G[0], rel=1e-9)


def test_arrays_of_different_lengths_are_refused() -> None:
    with pytest.raises(ValueError, match="one group and cluster an observation"):
        clustered_means(np.ones(3), np.zeros(2, int), np.zeros(3, int), 1)


# -- folders ---------------------------------------------------------------------------------------------------------
def columns(n: int, rng: np.random.Generator, top: Sequence[int] | None = None) -> TokenColumns:
    tail = (10.0 ** rng.uniform(-9, -0.3, n)).astype(np.float32)
    first = rng.integers(0, len(WORDS), n) if top is None else np.asarray(top)
    tops = np.stack([first, (first + 1) % len(WORDS)], axis=1).astype(np.int32)
    probs = np.stack([1 - tail, tail / 2], axis=1).astype(np.float32)
    return TokenColumns((tail * 7).astype(np.float32), tail, rng.random(n).astype(np.float32), tops, probs)


def info(problem: str, seed: int, source: str, **changes: Any) -> TraceInfo:
    given: dict[str, Any] = {
        "family": "f",
        "prompt": "?",
        "response": "",
        "answer": "",
        "correct": None,
        "finished": True,
        **changes,
    }
    return TraceInfo(problem, seed=seed, source=source, **given)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> TraceFolder:
    """Fourteen problems of two seeds, sampled by both precisions; traces of 5 to 60 tokens."""
    path, rng = tmp_path_factory.mktemp("traces"), np.random.default_rng(5)
    with TraceWriter(path, [REF, CAND], WORDS, k=2, group_tokens=300, metadata={"seeds": [0, 1]}) as writer:
        for p in range(14):
            for seed in (0, 1):
                shared = rng.integers(1, len(WORDS), rng.integers(2, 30))
                for source in (REF, CAND):
                    tokens = np.concatenate([shared, rng.integers(1, len(WORDS), rng.integers(2, 30)), [0]])
                    both = {REF: columns(len(tokens), rng), CAND: columns(len(tokens), rng)}
                    about = info(f"p{p}", seed, source, correct=bool(rng.random() < (0.9 if source == REF else 0.6)))
                    writer.add(about, tokens, both)
    return TraceFolder(path)


def rows_of(folder: TraceFolder, source: str | None = None) -> pd.DataFrame:
    """All token rows as a plain data frame."""
    frame = pd.DataFrame(
        {
            "trace": folder.trace_index,
            "token": folder.column("token"),
            "H": folder.entropy(REF),
            "H_cand": folder.entropy(CAND),
            "M": folder.tail(REF),
            "M_cand": folder.tail(CAND),
            "differ": folder.top1(REF) != folder.top1(CAND),
        }
    ).join(folder.traces[["problem", "source"]], on="trace")
    return frame if source is None else frame[frame["source"] == source]


def test_kinds_of_tokens() -> None:
    kinds = [entropy.KINDS[k] for k in entropy.token_kinds(WORDS)]
    assert kinds == ["other"] * 5 + ["digit"] * 3 + ["operator"] * 3 + ["other"] * 2


def test_bins_hold_equal_counts_in_order() -> None:
    values = np.random.default_rng(0).integers(0, 6, 1003)
    bins = entropy.equal_count_bins(values, 20)
    counts = np.bincount(bins)
    assert len(counts) == 20 and counts.max() - counts.min() <= 1
    for b in range(19):
        assert values[bins == b].max() <= values[bins == b + 1].min()
    with pytest.raises(ReqatError, match="3 tokens do not fill 4 bins"):
        entropy.equal_count_bins(np.arange(3), 4)


def test_damage_by_bin(folder: TraceFolder) -> None:
    found = entropy.damage_by_bin(folder, REF, CAND, bins=5, eps=1e-7)
    rows = rows_of(folder, REF).sort_values("H", kind="stable")
    for b, part in enumerate(np.array_split(np.arange(len(rows)), 5)):
        own = found[found["bin"] == b].set_index("statistic")
        # array_split puts its larger parts first, the bins spread them: compare means over what the bin says it holds
        low, high = own["entropy_lo"].iloc[0], own["entropy_hi"].iloc[0]
        inside = rows[(rows["H"] >= low) & (rows["H"] <= high)]
        assert abs(len(part) - len(inside)) <= 1 and (own["n"] == len(inside)).all()
        rho = (inside["M_cand"] + 1e-7) / (inside["M"] + 1e-7)
        quartiles = rho.quantile([0.25, 0.5, 0.75])
        for statistic, number in zip(("lower quartile", "median", "upper quartile"), quartiles, strict=True):
            assert own.loc[f"tail ratio ({statistic})", "value"] == pytest.approx(number)
        assert "tail ratio (mean)" not in own.index
        assert own.loc["tail ratio (geometric mean)", "value"] == pytest.approx(math.exp(np.log(rho).mean()))
        of_means = (inside["M_cand"] + 1e-7).sum() / (inside["M"] + 1e-7).sum()
        assert own.loc["tail ratio (of means)", "value"] == pytest.approx(of_means)
        assert own.loc["top-1 mismatch", "value"] == pytest.approx(inside["differ"].mean())
        own_intervals = own.dropna(subset=["lo"])
        assert (own_intervals["lo"] <= own_intervals["value"]).all() and (own_intervals["lo"] >= 0).all()
        assert (own_intervals["value"] <= own_intervals["hi"]).all() and len(own) - len(own_intervals) == 3
        assert (own["clusters"] == inside["problem"].nunique()).all()


def test_a_known_tail_ratio_is_found(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    with TraceWriter(tmp_path, [REF, CAND], WORDS, k=2) as writer:
        for p in range(10):
            ref = columns(40, rng)
            ref = dataclasses.replace(ref, tail=ref.tail / 2)  # three times as much is a probability still
            cand = TokenColumns(ref.entropy * 2, ref.tail * 3, ref.prob, ref.top.copy(), ref.top_prob)
            cand.top[:10, 0] = (cand.top[:10, 0] + 1) % len(WORDS)
            writer.add(info(f"p{p}", 0, "given"), np.full(40, 3), {REF: ref, CAND: cand})
    folder = TraceFolder(tmp_path)
    found = entropy.damage_by_bin(folder, REF, CAND, bins=2, eps=0.0)
    ratios = found[found["statistic"].str.startswith("tail")]
    np.testing.assert_allclose(ratios["value"], 3.0, rtol=1e-5)
    of_means = ratios[~ratios["statistic"].isin(entropy.tokens.QUARTILES)]
    np.testing.assert_allclose(of_means[["lo", "hi"]], 3.0, rtol=1e-5)
    assert ratios.loc[ratios["statistic"].isin(entropy.tokens.QUARTILES), ["lo", "hi"]].isna().all(axis=None)
    mismatch = found[found["statistic"] == "top-1 mismatch"]
    assert (mismatch["value"] * mismatch["n"]).sum() == pytest.approx(100)
    change = entropy.entropy_change(folder, REF, CAND, bins=2)
    np.testing.assert_allclose(change[change["statistic"] == "normalized"]["value"], 2.0, rtol=1e-6)
    np.testing.assert_allclose(
        change[change["statistic"] == "change"]["value"], change["entropy_mean"].iloc[:2], rtol=1e-5
    )


def test_entropy_change(folder: TraceFolder) -> None:
    found = entropy.entropy_change(folder, REF, CAND)
    rows = rows_of(folder)
    for b in range(4):
        own = found[found["bin"] == b].set_index("statistic")
        inside = rows[(rows["H"] >= own["entropy_lo"].iloc[0]) & (rows["H"] <= own["entropy_hi"].iloc[0])]
        delta = inside["H_cand"].astype(float) - inside["H"].astype(float)
        assert own.loc["change", "value"] == pytest.approx(delta.mean())
        assert own.loc["normalized", "value"] == pytest.approx(inside["H_cand"].sum() / inside["H"].sum(), rel=1e-5)


def test_entropy_by_token_and_kinds_by_bin(folder: TraceFolder) -> None:
    rows = rows_of(folder)
    found = entropy.entropy_by_token(folder, REF, more_than=60)
    counts = rows["token"].value_counts()
    assert set(found["id"]) == set(counts[counts > 60].index) and found["value"].is_monotonic_increasing
    for row in found.itertuples():
        inside = rows[rows["token"] == row.id]
        assert row.token == WORDS[row.id] and row.n == len(inside)
        assert row.value == pytest.approx(inside["H"].astype(float).mean())
    kinds = entropy.kinds_by_bin(folder, REF, bins=4)
    digits = kinds[kinds["kind"] == "digit"]
    assert (digits["value"] * digits["n"]).sum() == pytest.approx(rows["token"].isin([5, 6, 7]).sum())
    assert entropy.entropy_by_token(folder, REF, more_than=10**6).empty


def test_accuracy_by_length(folder: TraceFolder) -> None:
    found = entropy.accuracy_by_length(folder, edges=[0, 20, 40, 100])
    for row in found.itertuples():
        inside = folder.traces[
            (folder.traces["source"] == row.source) & folder.traces["tokens"].between(row.length_lo, row.length_hi)
        ]
        assert row.n == len(inside) and row.value == pytest.approx(inside["correct"].astype(float).mean(), nan_ok=True)
    quartiles = entropy.accuracy_by_length(folder)
    assert quartiles["n"].sum() == len(folder.traces)
    whole = entropy.accuracies(folder).set_index("source")
    for source in (REF, CAND):
        own = folder.traces[folder.traces["source"] == source]
        assert whole.loc[source, "value"] == pytest.approx(own["correct"].astype(float).mean())


def test_first_divergence(folder: TraceFolder) -> None:
    found = entropy.first_divergences(folder, REF, CAND)
    assert len(found) == 28
    token, H = folder.column("token"), folder.entropy(REF)
    for row in found.itertuples():
        a, b = (
            token[folder.starts[t] : folder.starts[t] + folder.lengths[t]].tolist()
            for t in (row.trace_reference, row.trace_candidate)
        )
        at = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), -1)
        assert row.position == at
        assert row.entropy == pytest.approx(float(H[folder.starts[row.trace_reference] + at]))
        assert row.derailed == (row.correct_reference and not row.correct_candidate)
    low = entropy.low_entropy(folder, REF, REF)
    own = rows_of(folder, REF)["H"]
    assert low["nats"].tolist() == pytest.approx([np.percentile(own, 25), np.percentile(own, 75), 0.6])
    assert low["chance"].iloc[2] == pytest.approx((own < 0.6).mean())
    shares = entropy.divergence_shares(found, low).set_index(["pairs", "threshold"])
    assert shares.loc[("all", ""), "value"] == (found["position"] >= 0).mean()
    derailed = found[found["derailed"]]
    right = {role: [value is True for value in found[f"correct_{role}"]] for role in ("reference", "candidate")}
    back = [b and not a for a, b in zip(right["reference"], right["candidate"], strict=True)]
    assert shares.loc[("reversed", ""), "value"] == np.mean(back) > 0
    assert shares.loc[("reversed", ""), "n"] == len(found)
    for name, nats in zip(low["threshold"], low["nats"], strict=True):
        assert shares.loc[("all", name), "value"] == pytest.approx((found["entropy"] < nats).mean())
        assert shares.loc[("derailed", name), "value"] == pytest.approx((derailed["entropy"] < nats).mean())
        assert shares.loc[("derailed", name), "n"] == len(derailed)


def test_equal_traces_and_cut_ones(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    with TraceWriter(tmp_path, [REF, CAND], WORDS, k=2) as writer:
        for problem, a, b in (("same", [1, 2, 0], [1, 2, 0]), ("cut", [1, 2], [1, 2, 3]), ("long", [1, 2, 3], [1, 2])):
            for source, tokens in ((REF, a), (CAND, b)):
                writer.add(
                    info(problem, 0, source), tokens, {label: columns(len(tokens), rng) for label in (REF, CAND)}
                )
    found = entropy.first_divergences(TraceFolder(tmp_path), REF, CAND).set_index("problem")
    assert found["position"].to_dict() == {"same": -1, "cut": 2, "long": 2}
    assert np.isnan(found.loc["same", "entropy"]) and np.isnan(found.loc["cut", "entropy"])
    assert not np.isnan(found.loc["long", "entropy"])


def test_missing_sources_and_labels_are_named(folder: TraceFolder) -> None:
    with pytest.raises(ReqatError, match="unknown source of traces 'BF61'. Did you mean 'BF16'"):
        entropy.first_divergences(folder, "BF61", CAND)
    with pytest.raises(ReqatError, match="unknown precision label 'MXFP4'"):
        entropy.damage_by_bin(folder, REF, "MXFP4")


# -- what went wrong -------------------------------------------------------------------------------------------------
def test_steps_in_a_text() -> None:
    text = "First, -3 - 4 gives -7. So 2*3=6, then 1 + 2 + 3 = 6. A cat has 4 legs, so 3 * 4 = 12. 7 / 2 = 3.5."
    found = steps(text)
    assert [s.pieces for s in found] == [
        ("-3", "-", "4", "-7"),
        ("2", "*", "3", "6"),
        ("cat", "has", "", "4"),
        ("3", "*", "4", "12"),
        ("7", "/", "2", "3.5"),
    ]
    assert all(step.holds for step in found)
    for step in found:
        for piece, at in zip(step.pieces, step.at, strict=True):
            assert text.startswith(piece, at) or piece == "has"
    assert not steps("2 + 2 = 5")[0].holds and not steps("2 / 0 = 1")[0].holds
    assert steps("10 / 3 = 3.33")[0].holds and not steps("10 / 3 = 3")[0].holds


@pytest.mark.parametrize("family", ["chain_sum", "leg_counting", "simple_equations"])
def test_the_solution_follows_from_the_prompt(family: str) -> None:
    for problem in problems([family], "train", 20, 0):
        expected = solution_steps(family, problem.prompt)
        assert expected and all(step.holds for step in expected)
        for seed in range(3):
            text = get_family(family).trace(problem, random.Random(seed))
            assert [s.pieces for s in steps(text)] == [s.pieces for s in expected]
            error = first_error(text, expected, answer=problem.answer)
            assert error.kind == "other"  # nothing is wrong with it


def test_no_solution_for_other_families_and_wordings() -> None:
    assert solution_steps("gsm_symbolic", "How many?") is None
    assert solution_steps("simple_equations", "no such wording") is None


PROMPT = "5 + 7 - 3 + 20 - 4 =\n"
GOOD = "First, 5 + 7 = 12. Then 12 - 3 makes 9. That leaves 9. Next, 9 + 20 = 29. So 29 - 4 = 25. The answer is 25."


@pytest.mark.parametrize(
    ("old", "new", "kind", "rest"),
    [
        ("makes 9", "makes 8", "wrong digit", "8. That"),
        ("+ 20 = 29", "+ 20 = 28", "wrong digit", "8. So"),  # from the first wrong digit on
        ("9 + 20 = 29", "9 + 26 = 35", "wrong digit", "6 = 35"),
        ("So 29 - 4 = 25", "So 19 - 4 = 15", "wrong digit", "19 - 4"),
        ("12 - 3 makes 9", "12 + 3 makes 15", "wrong operator", "+ 3"),
        ("12 - 3 makes 9", "12 - 3 makes -9", "wrong operator", "-9. That"),  # a wrong sign
        ("12 - 3 makes 9. That leaves 9. Next, 9 + 20 = 29. So 29", "12 + 20 = 32. So 32", "dropped step", "+ 20"),
        ("So 29 - 4 = 25. ", "", "dropped step", ". The answer"),
        ("Next, 9 + 20 = 29", "Next, 12 - 3 makes 9. Next, 9 + 20 = 29", "loop", "12 - 3 makes 9. Next, 9"),
        ("Next, 9 + 20", "Next, 9 - 3 = 6. Next, 6 + 20", "loop", "- 3 = 6"),  # the same term once more
        (" The answer is 25.", " Now 25 - 4 = 21. The answer is 21.", "loop", "25 - 4"),
        ("answer is 25", "answer is 24", "wrong digit", "4."),
        ("answer is 25", "answer is -25", "wrong operator", "-25"),
        (" The answer is 25.", "", "no answer", ""),
    ],
)  # fmt: skip
def test_the_first_error_of_a_chain(old: str, new: str, kind: str, rest: str) -> None:
    assert old in GOOD
    text = GOOD.replace(old, new)
    expected = solution_steps("chain_sum", PROMPT)
    error = first_error(text, expected, answer="25")
    assert error.kind == kind and text[error.at :].startswith(rest), text[error.at :]
    assert error.kind in entropy.ERRORS


def test_a_text_that_repeats_itself_is_a_loop() -> None:
    text = "First, 5 + 7 = 12. We are at 12 now. We are at 12 now. We are at 12 now. We are at"
    error = first_error(text, solution_steps("chain_sum", PROMPT), answer="25", finished=False)
    assert error.kind == "loop" and text[: error.at].count("We are at 12 now") == 1
    cut = "First, 5 + 7 = 12. Then 12 - 3"
    assert first_error(cut, solution_steps("chain_sum", PROMPT), finished=False) == Derailment("no answer", len(cut))


def test_without_a_solution_arithmetic_is_checked() -> None:
    wrong = "We have 2 + 3 = 5 and 5 * 4 = 21. The answer is 21."
    assert first_error(wrong, None, answer="20") == Derailment("wrong digit", wrong.index("21"))
    right = "We have 2 + 3 = 5. The answer is 5."
    assert first_error(right, None, answer="6") == Derailment("wrong digit", right.index("5.", 20))
    assert first_error("no idea", None).kind == "no answer"
    assert first_error("", None) == Derailment("no answer", 0)


def test_legs_looked_up_wrongly() -> None:
    prompt = "How many legs have 3 cats, 2 spiders?\n"
    good = (
        "A cat has 4 legs, so 3 * 4 = 12. Each spider has 8 legs, and 2 * 8 = 16. Now 12 + 16 = 28. The answer is 28."
    )
    expected = solution_steps("leg_counting", prompt)
    assert first_error(good, expected, answer="28").kind == "other"
    text = good.replace(
        "has 8 legs, and 2 * 8 = 16. Now 12 + 16 = 28. The answer is 28",
        "has 6 legs, and 2 * 6 = 12. Now 12 + 12 = 24. The answer is 24",
    )
    assert first_error(text, expected, answer="28") == Derailment("wrong digit", text.index("6 legs"))
    text = good.replace("Now 12 + 16 = 28. ", "").replace("28", "16")
    assert first_error(text, expected, answer="28").kind == "dropped step"


Spell = Callable[[str], list[int]]


@pytest.fixture(scope="module")
def derailed(tmp_path_factory: pytest.TempPathFactory) -> TraceFolder:
    """One problem solved by the reference and lost by the candidate in each of three ways; tokens are letters."""
    path, rng = tmp_path_factory.mktemp("derailed"), np.random.default_rng(0)
    letters = ["<eos>", *sorted({*GOOD, *"86+"})]
    with TraceWriter(path, [REF, CAND], letters, k=2) as writer:
        for p, (old, new) in enumerate([("makes 9", "makes 8"), ("12 - 3 makes 9", "12 + 3 makes 15"), ("", "")]):
            for source, text in ((REF, GOOD), (CAND, GOOD.replace(old, new) if old else GOOD)):
                tokens = [*(letters.index(c) for c in text), 0]
                both = {label: columns(len(tokens), rng, top=np.zeros(len(tokens), int)) for label in (REF, CAND)}
                about = info(
                    f"p{p}",
                    0,
                    source,
                    family="chain_sum",
                    prompt=PROMPT,
                    response=text,
                    answer="25",
                    correct=text == GOOD,
                )
                writer.add(about, tokens, both)
    return TraceFolder(path)


def test_derailments_find_the_token(derailed: TraceFolder) -> None:
    found = entropy.derailments(derailed, REF, CAND).set_index("problem")
    assert found["error"].to_dict() == {"p0": "wrong digit", "p1": "wrong operator"}
    text = {row.problem: row.response for row in derailed.traces.itertuples() if row.source == CAND}
    assert text["p0"][found.loc["p0", "position"]] == "8" and text["p1"][found.loc["p1", "position"]] == "+"
    start = derailed.starts[
        derailed.traces.index[(derailed.traces["problem"] == "p0") & (derailed.traces["source"] == CAND)][0]
    ]
    expected = derailed.entropy(REF)[start + found.loc["p0", "position"]]
    assert found.loc["p0", "entropy"] == pytest.approx(float(expected)) and found["solution"].all()
    low = entropy.low_entropy(derailed, REF, REF)
    shares = entropy.derailment_shares(found.reset_index(), low).set_index("which")
    assert shares.loc["wrong digit", "value"] == shares.loc["wrong operator", "value"] == 0.5
    assert shares.loc["loop", "value"] == 0 and shares.loc["loop", "hi"] > 0.5  # two problems say little
    below = (found["entropy"] < low["nats"].iloc[1]).mean()
    assert shares.loc["percentile 75", "value"] == pytest.approx(below)


def test_text_that_the_tokens_do_not_spell_has_no_position(derailed: TraceFolder) -> None:
    assert entropy.token_at(derailed, np.array([1, 2]), "other text", 3) == -1


# -- the report ------------------------------------------------------------------------------------------------------
def test_report_writes_tables_and_figures(folder: TraceFolder, derailed: TraceFolder, tmp_path: Path) -> None:
    for name, source in (("folder", folder), ("derailed", derailed)):
        found = report(source, REF, CAND, bins=6, more_than=20)
        written = [*found.write(tmp_path / name), *draw(found, tmp_path / name / "plots")]
        assert all(path.stat().st_size > 0 for path in written)
        assert {p.name for p in written} >= {
            "summary.csv",
            "summary.md",
            "tail-and-mismatch.csv",
            "entropy-damage.pdf",
            "entropy-errors.png",
        }
        kept = pd.read_csv(tmp_path / name / "summary.csv")
        assert not kept["value"].isna().any() and {"statistic", "where", "value", "lo", "hi", "n"} <= set(kept.columns)
        row = found.headline("top-1 mismatch", "lowest of 6 bins")
        damage = found.frames["tail-and-mismatch"]
        assert row["value"] == damage[(damage["statistic"] == "top-1 mismatch") & (damage["bin"] == 0)]["value"].iloc[0]
        text = (tmp_path / name / "summary.md").read_text()
        assert "clustered by problem" in text and f"{len(source.traces)} traces" in text


def test_report_of_given_traces_leaves_out_what_needs_samples(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    with TraceWriter(tmp_path / "t", [REF, CAND], WORDS, k=2) as writer:
        writer.add(info("p", 0, "given"), [3, 4, 5], {label: columns(3, rng) for label in (REF, CAND)})
    found = report(TraceFolder(tmp_path / "t"), REF, CAND)
    assert "first-divergences" not in found.frames and found.frames["accuracy"].empty
    assert found.headline("top-1 mismatch", "lowest of 3 bins")["n"] == 1  # as many bins as tokens
    assert draw(found, tmp_path / "plots")
