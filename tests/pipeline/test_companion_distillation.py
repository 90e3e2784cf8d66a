"""Companions tsld and encoders: their settings, a run of each at the smallest size, and their tables."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from analysis.figures import companion_encoders as encoders_figure
from analysis.figures import companion_tsld as tsld_figure
from analysis.report import companion_claims, style
from analysis.report.companions import Found
from analysis.tables import companion_encoders, companion_tsld
from reqat.config.base import parse
from reqat.config.catalogue import LABELLED_TASKS
from reqat.config.companions import TESTBED
from reqat.config.companions import encoders as encoders_settings
from reqat.config.companions import tsld as tsld_settings
from reqat.config.errors import ReqatError
from reqat.pipeline.companions import Given, encoders, tsld
from reqat.tasks import problems

ROOT = Path(__file__).parents[2]


def encoder_settings(**changes: Any) -> encoders_settings.Settings:
    tiny = {
        "model": "tiny", "tasks": ["generated"], "seeds": [42], "train_sequences": 32, "test_sequences": 20,
        "layers": 1, "max_tokens": 10, "teacher_epochs": 1, "epochs": 1, "rows_per_batch": 16, "baselines": ["score"],
        "mixes": [[1, 0.5]],
    }  # fmt: skip
    return parse(encoders_settings.Settings, tiny | changes, "test")


def tsld_tiny(**changes: Any) -> tsld_settings.Settings:
    shape = {"hidden_size": 16, "layers": 1, "heads": 1, "kv_heads": 1, "mlp": 16, "max_position_embeddings": 32}
    tiny = {
        "text": "generated", "vocabulary": 280, "architecture": shape, "seeds": [42], "block_tokens": 16,
        "teacher_blocks": 16, "student_blocks": 8, "test_blocks": 4, "epochs": 2, "evaluations": 2,
    }  # fmt: skip
    return parse(tsld_settings.Settings, tiny | changes, "test")


def found(kind: str, settings: Any, rows: pd.DataFrame) -> Found:
    rows = rows.assign(companion=kind, part="seed42")
    return Found(kind, rows, {kind: settings.model_dump(mode="json")}, tier="smoke")


def drawn(build: Any, given: Found, folder: Path) -> None:
    with style.context():
        style.save(build(given), folder, "figure")
    assert (folder / "figure.png").stat().st_size > 1000


def test_encoders_run_and_are_tabled(tmp_path: Path) -> None:
    settings = encoder_settings()
    assert settings.parts() == ("generated-seed42",) and settings.sources() == ()
    rows = encoders.run(settings, settings.parts()[0], Given({}, tmp_path, tmp_path / "kept", lambda _: None))
    methods = ["teacher", "ptq", "score", "map+0.5 output"]
    assert list(dict.fromkeys(rows["method"])) == methods and set(rows["seed"]) == {42}
    assert (rows.groupby("method")["count"].sum() == rows["count"].sum() / 4).all()
    assert rows["map_kl_nats"].notna().sum() == 3  # one layer; the teacher has nothing to recover
    given = found("encoders", settings, rows)
    table = companion_encoders.build(given)
    assert len(table.sections[0]) == 4 and any("one training seed" in note for note in table.footer)
    drawn(encoders_figure.build, given, tmp_path)


def test_tsld_runs_in_both_kinds_of_numbers_and_is_tabled(tmp_path: Path) -> None:
    frames = []
    for numbers, losses in (("float32", ["tsld", "l2l"]), ("bfloat16", ["logit", "tsld"])):
        settings = tsld_tiny(numbers=numbers, losses=losses, learned_scale=numbers == "bfloat16")
        folder = tmp_path / numbers
        rows = tsld.run(settings, "seed42", Given({}, folder, folder / "kept", lambda _: None))
        steps = rows.groupby("method")["step"].unique()
        assert set(steps.index) == {"teacher", "ptq", *losses} and list(steps["tsld"]) == [2, 4]
        frames.append(rows)
    same = [frame[frame["method"] == "teacher"]["nats"].to_numpy() for frame in frames]
    assert np.array_equal(*same)
    given = found("tsld", tsld_tiny(), frames[0])
    table = companion_tsld.build(given)
    assert [row[-1].text for row in table.sections[0]] == ["12.34", "–", "13.24", "–"]
    drawn(tsld_figure.build, given, tmp_path)


def test_a_loss_may_have_a_rate_of_its_own(tmp_path: Path) -> None:
    def nats(name: str, **changes: Any) -> dict[str, list[float]]:
        settings = tsld_tiny(losses=["logit", "tsld"], **changes)
        rows = tsld.run(settings, "seed42", Given({}, tmp_path / name, tmp_path / name / "kept", lambda _: None))
        return {method: group["nats"].tolist() for method, group in rows.groupby("method")}

    mixed, low, high = nats("mixed", lr=0.001, rates={"tsld": 0.1}), nats("low", lr=0.001), nats("high", lr=0.1)
    assert mixed["logit"] == low["logit"] != high["logit"]
    assert mixed["tsld"] == high["tsld"] != low["tsld"]


def measured(gap: float, seeds: int) -> pd.DataFrame:
    """Losses whose nats per token differ by ``gap`` each, over groups and seeds with noise; the 2nd step is best."""
    rng, out = np.random.default_rng(0), []
    for seed in range(seeds):
        level = rng.normal(3, 0.1, 20)
        for i, method in enumerate(("tsld", "logit", "logit+gt")):
            for step, more in ((1, 0.5), (2, 0.0), (3, 0.2)):
                nats = 100 * (level + gap * i + more + rng.normal(0, 0.002, 20))
                about = {"method": method, "step": step, "seed": seed, "numbers": "float32", "train_loss": 1.0}
                about |= {"precision": "TERNARY-row-W2A16", "learned_scale": False}
                out += [about | {"group": g, "nats": n, "tokens": 100} for g, n in enumerate(nats)]
    return pd.DataFrame(out)


def test_every_setting_of_tsld_has_a_panel_of_its_own() -> None:
    names = [f"tsld-rate{i}" for i in range(10)]
    rows = pd.concat([measured(0.05, 2).assign(companion=name) for name in names])
    with style.context():
        settings = dict.fromkeys(names, tsld_tiny().model_dump(mode="json"))
        fig = tsld_figure.build(Found("tsld", rows, settings, tier="smoke"))
    drawn_axes = [ax for ax in fig.axes if ax.get_lines()]
    assert len(drawn_axes) == 10
    assert all(name in ax.get_title(loc="left") for name, ax in zip(names, drawn_axes, strict=True))


@pytest.mark.parametrize(("more", "says"), [(3, "agrees"), (-3, "disagrees")])
def test_more_right_answers_are_better(more: int, says: str) -> None:
    rows = measured(0.05, 3)
    solved = rows["method"].map({"tsld": 10 + more, "logit": 10, "logit+gt": 10 - more})
    rows = rows.assign(right=(solved + rows["group"] % 2).where(rows["step"] == 3), answered=25.0)
    rows["answered"] = rows["answered"].where(rows["step"] == 3)
    table = companion_tsld.build(found("tsld", tsld_tiny(seeds=[0, 1, 2]), rows))
    claims = table.data[table.data["unit"] == companion_claims.POINTS].set_index("claim")
    assert claims.loc["TSLD above Logit", "difference"] == pytest.approx(4 * more)
    assert claims.loc["TSLD above Logit + GT", "difference"] == pytest.approx(8 * more)
    assert all(text.startswith(says) for text in claims["verdict"])


def test_evaluations_of_seeds_are_meaned_turn_by_turn() -> None:
    rows = pd.DataFrame(
        {"seed": seed, "step": step, "nats": nats, "tokens": 1}
        for seed, steps in ((1, [10, 20, 21]), (2, [12, 24]))
        for step, nats in zip(steps, (2.0 + seed, 1.0 - seed, 9.0), strict=False)
    )
    curve = tsld_figure.perplexities(rows).set_index("step")
    assert list(curve.index) == [11, 22], "no third in seed 2"
    assert list(curve["mean"]) == pytest.approx([np.exp(3.5), np.exp(-0.5)])
    assert list(curve["low"]) == pytest.approx([np.exp(3), np.exp(-1)])
    assert list(curve["high"]) == pytest.approx([np.exp(4), np.exp(0)])


@pytest.mark.parametrize(("gap", "says"), [(0.05, "agrees"), (-0.05, "disagrees"), (0.0, "cannot tell")])
def test_verdicts_on_tsld_follow_the_best_steps(gap: float, says: str) -> None:
    table = companion_tsld.build(found("tsld", tsld_tiny(seeds=[0, 1, 2]), measured(gap, 3)))
    claims = table.data[table.data["kind"] == "claim"]
    assert len(claims) == 3 and all(text.startswith(says) for text in claims["verdict"])
    assert claims["difference"].iloc[0] == pytest.approx(-gap, abs=0.002)
    best = table.data[table.data["method"] == "tsld"]["perplexity"].iloc[0]
    assert best == pytest.approx(np.exp(3), rel=0.1)


@pytest.mark.parametrize(("gain", "says"), [(0.1, "agrees"), (0.0, "cannot tell")])
def test_verdicts_on_encoders_are_paired_with_the_loss_on_scores(gain: float, says: str) -> None:
    rng, out = np.random.default_rng(0), []
    for seed in (1, 2, 3):
        base = rng.integers(40, 90, 50)
        for method in ("teacher", "score", "map", "output"):
            more = 100 * gain * (method in ("map", "output")) + rng.integers(-1, 2, 50)
            out += [
                {"task": "brown_tagging", "method": method, "seed": seed, "group": g, "right": r, "count": 100}
                for g, r in enumerate(base + more)
            ]
            out.append({"task": "brown_tagging", "method": method, "seed": seed, "layer": 0, "map_kl_nats": 0.1})
    rows = pd.DataFrame(out).assign(output_error=0.01)
    table = companion_encoders.build(found("encoders", encoder_settings(), rows))
    claims = table.data[table.data["kind"] == "claim"]
    assert len(claims) == 2 and all(text.startswith(says) for text in claims["verdict"])
    assert claims["difference"].to_numpy() == pytest.approx(gain, abs=0.01)


def test_settings_of_one_task_are_told_apart() -> None:
    rows = pd.DataFrame(
        {"companion": label, "task": "brown_tagging", "method": method, "seed": seed, **what}
        for label, methods in (("encoders", ["score", "map"]), ("mixes", ["score", "map+0.5 output"]))
        for method in methods
        for seed in (1, 2)
        for what in ({"group": 0, "right": 5, "count": 9}, {"group": 1, "right": 7, "count": 9}, {"layer": 0})
    )
    kl = rows["companion"].map({"encoders": 0.5, "mixes": 0.25}).where(rows["layer"].notna())
    settings = encoder_settings().model_dump(mode="json")
    given = Found("encoders", rows.assign(map_kl_nats=kl, output_error=kl), {"encoders": settings, "mixes": settings})
    table = companion_encoders.build(given)
    names = [section[0][0].text for section in table.sections]
    assert len(set(names)) == 2 and all(label in name for label, name in zip(("encoders", "mixes"), names, strict=True))
    with style.context():
        fig = encoders_figure.build(given)
    fig.draw_without_rendering()
    (legend,) = fig.legends
    labels = [text.get_text() for text in legend.get_texts()]
    assert sorted(labels) == sorted({str(line.get_label()) for ax in fig.axes for line in ax.get_lines()})
    assert not any(legend.get_window_extent().overlaps(ax.get_tightbbox()) for ax in fig.axes)
    drawn_lines = [ax.get_lines() for ax in fig.axes[::2]]
    heights = [{float(y) for line in lines for y in line.get_ydata()} for lines in drawn_lines]  # type: ignore[arg-type]
    assert heights == [{0.5}, {0.25}]
    assert [len(lines) for lines in drawn_lines] == [2, 2]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"tasks": ["brown_tagging"]}, "generated"),
        ({"tasks": ["generated", "brown_tagging"]}, "generated"),
        ({"baselines": ["hidden"]}, "score"),
        ({"mixes": [[0, 0]]}, "hidden"),
        ({"precision": "TERNARY-tensor-W3"}, "2 bits"),
        ({"tasks": ["brown_taging"]}, "Did you mean 'brown_tagging'"),
    ],
)
def test_settings_that_make_no_sense_are_refused(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(ReqatError, match=says):
        encoder_settings(**changes)


def test_blocks_for_validation_are_of_the_text_to_train_on_and_unread(tmp_path: Path) -> None:
    given = Given({}, tmp_path, tmp_path, lambda _: None)
    drawn, graded, tokenizer = tsld._blocks(tsld_tiny(held_out="validation"), 42, given)
    same, test, _ = tsld._blocks(tsld_tiny(), 42, given)
    reading, unseen = (tokenizer.decode(tsld._ids(tokenizer, text)) for text in tsld.texts(tsld_tiny(), given))
    assert drawn == same and len(graded) == len(test) == 4
    assert not {*map(tuple, drawn)} & {*map(tuple, graded)}
    assert all(tokenizer.decode(block) in reading for block in graded)
    assert all(tokenizer.decode(block) in unseen and tokenizer.decode(block) not in reading for block in test)


def test_only_traces_have_problems_to_answer() -> None:
    with pytest.raises(ReqatError, match="answered.*generated"):
        tsld_tiny(answered=5)


@pytest.mark.parametrize("held_out", ["test", "validation"])
def test_students_on_traces_answer_problems_of_the_held_out_split(tmp_path: Path, held_out: str) -> None:
    changes: dict[str, Any] = {"epochs": 1, "evaluations": 1, "block_tokens": 192, "losses": ["logit", "tsld"]}
    settings = tsld_tiny(text="traces", held_out=held_out, answered=6, answer_tokens=150, test_blocks=3, **changes)
    asked = [problem.id for problem in tsld._of_traces(settings, 42, of_testbed(tmp_path)).problems]
    expected = problems(settings.problems, held_out, 6, seed=1)
    assert asked == [problem.id for problem in expected]
    rows = tsld.run(settings, "seed42", of_testbed(tmp_path))
    graded = rows[rows["answered"].notna()]
    assert graded.groupby("method")["answered"].sum().to_dict() == dict.fromkeys(rows["method"].unique(), 6)
    assert (
        graded.groupby("method")["step"]
        .agg(["min", "max"])
        .eq(rows.groupby("method")["step"].max(), axis=0)
        .all(axis=None)
    )
    right = graded.groupby("method")["right"].sum()
    assert right["teacher"] >= 5, "the pinned base has learned problems of this kind"
    table = companion_tsld.build(found("tsld", settings, rows))
    (shown,) = [row for row in table.data.to_dict("records") if row.get("method") == "teacher"]
    assert shown["accuracy"] == pytest.approx(100 * right["teacher"] / 6)
    units = table.data.loc[table.data["kind"] == "claim", "unit"]
    assert list(units) == [companion_claims.NATS, companion_claims.POINTS]
    drawn(tsld_figure.build, found("tsld", settings, rows), tmp_path)


def test_the_token_scaled_term_counts_the_sequences_of_a_step(tmp_path: Path) -> None:
    given = of_testbed(tmp_path)
    traces = tsld._of_traces(tsld_tiny(text="traces", block_tokens=384, student_blocks=8), 42, given)
    assert len(traces.rows) < 8 and traces.sequences == 8 / len(traces.rows), "several solutions share a row"
    assert tsld._of_text(tsld_tiny(), "seed42", given).sequences == 1
    assert tsld.objective_of("tsld", 8.5).terms[1].weight == 8.5


def of_testbed(folder: Path) -> Given:
    return Given({TESTBED: ROOT / "results" / "base" / "model"}, folder, folder / "kept", lambda _: None)


@pytest.mark.parametrize(("rates", "says"), [({"gt": 0.1}, "trained by gt"), ({"tsld": 0}, "greater than 0")])
def test_rates_are_those_of_losses_that_are_there(rates: dict[str, float], says: str) -> None:
    with pytest.raises(ReqatError, match=says):
        tsld_tiny(losses=["logit", "tsld"], rates=rates)


def test_texts_for_validation_are_neither_trained_on_nor_in_the_test(tmp_path: Path) -> None:
    word = [["word", "nn"]] * 6
    records: list[dict[str, Any]] = [{"id": f"ca{i:02}", "sentences": [word]} for i in range(40)]
    reading, (graded, split) = encoders.divided(records, "validation")
    assert split == "train" and len(graded) == 5 and len(reading) == 35
    assert not {text["id"] for text in reading} & {text["id"] for text in graded}
    assert encoders.divided(records, "test") == (records, (records, "test"))
    # Of random words: the same to train on, others to grade on.
    given = Given({}, tmp_path, tmp_path, lambda _: None)
    (train, test, _), (again, other, _) = (
        encoders.material(encoder_settings(), "generated", 42, given, held_out) for held_out in ("test", "validation")
    )
    assert train.digest == again.digest and test.digest != other.digest


def test_every_labelled_task_has_a_corpus() -> None:
    assert {*LABELLED_TASKS, encoders_settings.GENERATED} == set(encoders_settings.CORPORA)


def test_a_text_that_is_too_short_is_said_before_anything_is_trained(tmp_path: Path) -> None:
    with pytest.raises(ReqatError, match="test_blocks 100000"):
        tsld.run(tsld_tiny(test_blocks=100_000), "seed42", Given({}, tmp_path, tmp_path, lambda _: None))
