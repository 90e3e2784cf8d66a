"""Figure 7's measurement on a tiny chain of stages: same weights, shares that add up, a kill that loses nothing."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
import torch

from reqat.config.errors import ReqatError
from reqat.config.precision import PrecisionSpec
from reqat.config.stage import (
    Architecture,
    BaseSettings,
    DataStageSettings,
    Gradient,
    Selection,
    Stage,
    Training,
    TrainSettings,
)
from reqat.models import load_model, load_tokenizer, save_model
from reqat.pipeline import gradients
from reqat.pipeline.gradients import COLUMNS, GRADIENTS, low_entropy_share, run_gradients, shares
from reqat.pipeline.stages import carry_out
from reqat.training.gradients import TokenGradients

TRAINING = Training(lr=3e-3, rows_per_batch=4, row_tokens=160)
EVERY = 2


class Chain:
    def __init__(self, root: Path) -> None:
        self.root = root
        self.data = self.run(
            kind="data", settings=DataStageSettings(families={"chain_sum": {}, "simple_equations": {}}, tokens=6000)
        )
        shape = Architecture(hidden_size=32, layers=2, heads=2, kv_heads=1, mlp=64)
        traces = Selection(tokens=1500)
        settings = BaseSettings(source="scratch", name="tiny", architecture=shape, training=TRAINING, traces=traces)
        self.base = self.run(kind="base", settings=settings, data=self.data.id)
        self.qat = self.run(
            kind="qat",
            settings=TrainSettings(training=TRAINING, traces=Selection(tokens=5000)),
            precision=PrecisionSpec(name="NVFP4-W4A4KV4"),
            parent=self.base.id,
            data=self.data.id,
        )

    def inputs(self, stage: Stage) -> dict[str, Path]:
        return {role: self.root / id for role, id in stage.inputs.items()}

    def run(self, **stage) -> Stage:
        made = Stage(**stage)
        carry_out(made, self.inputs(made), self.root / made.id, progress=False)
        return made


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Chain:
    torch.set_num_threads(1)
    return Chain(tmp_path_factory.mktemp("gradients"))


@pytest.fixture(scope="module")
def whole(chain: Chain, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict, list[dict[str, str]], bytes]:
    out = tmp_path_factory.mktemp("whole") / "out"
    trained = chain.root / chain.qat.id
    metrics = run_gradients(chain.qat, chain.inputs(chain.qat), out, every=EVERY, trained=trained, progress=False)
    text = (out / GRADIENTS).read_bytes()
    return metrics, list(csv.DictReader(text.decode().splitlines())), text


def test_the_stage_trained_anew_has_its_own_weights_bit_for_bit(whole) -> None:
    metrics, rows, _ = whole
    assert metrics["same_weights"] is True
    assert metrics["looks"] == len({row["step"] for row in rows}) == -(-metrics["steps"] // EVERY) > 1


def test_so_has_a_stage_with_learned_scales(chain: Chain, tmp_path: Path) -> None:
    gradient = Gradient(rule="learned", roles=("weights",))
    training = TRAINING.model_copy(update={"gradient": gradient})
    stage = chain.run(
        kind="qat",
        settings=TrainSettings(training=training, traces=Selection(tokens=1000)),
        precision=PrecisionSpec(name="INT4-row-W4"),
        parent=chain.base.id,
        data=chain.data.id,
    )
    trained, inputs = chain.root / stage.id, chain.inputs(stage)
    metrics = run_gradients(stage, inputs, tmp_path / "out", every=1000, trained=trained, progress=False)
    assert metrics["same_weights"] is True


def test_rows_are_shares(whole) -> None:
    _, rows, _ = whole
    assert tuple(rows[0]) == COLUMNS
    assert [row["threshold"] for row in rows[:3]] == ["percentile 25", "percentile 75", "0.6 nats"]
    for row in rows:
        number = {name: float(row[name]) for name in COLUMNS if name != "threshold"}
        assert number["c_low"] + number["c_high"] == pytest.approx(1, abs=1e-12)
        assert number["lo"] <= number["c_low"] <= number["hi"]
        assert number["low_share"] == pytest.approx(number["low_tokens"] / number["tokens"])
        if row["threshold"] == "percentile 25":
            assert abs(number["low_tokens"] - number["tokens"] / 4) <= 1
    by = {(row["step"], row["threshold"]): float(row["c_low"]) for row in rows}
    for step in {row["step"] for row in rows}:
        assert by[step, "percentile 25"] <= by[step, "percentile 75"]


def test_a_killed_run_goes_on_and_gives_the_same_file(
    chain: Chain, whole, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from reqat.training import loop

    save, saves = loop.checkpoint.save, []

    def save_and_die(*args) -> None:
        save(*args)
        saves.append(1)
        if len(saves) == 3:
            raise KeyboardInterrupt

    of = loop.RunSettings.of
    monkeypatch.setattr(loop.checkpoint, "save", save_and_die)
    monkeypatch.setattr(loop.RunSettings, "of", lambda *given, **more: of(*given, **more, checkpoint_seconds=1e-9))
    out, inputs = tmp_path / "out", chain.inputs(chain.qat)
    with pytest.raises(KeyboardInterrupt):
        run_gradients(chain.qat, inputs, out, every=EVERY, progress=False)
    assert not (out / GRADIENTS).exists()
    log = tmp_path / ".out.checkpoints" / "gradients.jsonl"
    log.write_text(log.read_text() + '{"step": 4, "thresh')  # a line that the kill cut short
    looked: list[int] = []
    monkeypatch.setattr(gradients, "shares", lambda step, found: (looked.append(step), shares(step, found))[1])
    run_gradients(chain.qat, inputs, out, every=EVERY, progress=False)
    assert (out / GRADIENTS).read_bytes() == whole[2]
    assert min(looked) > 0, "what was seen before the kill is not looked at again"


def test_other_weights_are_said_to_be_other(chain: Chain, tmp_path: Path) -> None:
    folder = chain.root / chain.qat.id / "model"
    model = load_model(folder)
    with torch.no_grad():
        next(model.parameters())[0, 0] += 1e-3
    save_model(model, load_tokenizer(folder), tmp_path / "other" / "model")
    with pytest.warns(UserWarning, match="differs from"):
        metrics = run_gradients(
            chain.qat,
            chain.inputs(chain.qat),
            tmp_path / "out",
            every=1000,
            trained=tmp_path / "other",
            progress=False,
        )
    assert metrics["same_weights"] is False


def test_only_trainings_have_gradients_and_inputs_must_be_there(chain: Chain, tmp_path: Path) -> None:
    with pytest.raises(ReqatError, match="is a base stage"):
        run_gradients(chain.base, {}, tmp_path / "out")
    with pytest.raises(ReqatError, match=f"{chain.base.id}, which is not there"):
        run_gradients(chain.qat, {"data": chain.root / chain.data.id}, tmp_path / "out")


def test_share_and_interval_are_the_clustered_ratio() -> None:
    rng = np.random.default_rng(0)
    square, entropy, trace = rng.exponential(size=600), rng.exponential(size=600), np.arange(600) % 12
    found = TokenGradients(*(torch.from_numpy(x) for x in (square, entropy, trace)))
    row = next(row for row in shares(3, found) if row["threshold"] == "0.6 nats")
    assert row["c_low"] == pytest.approx(square[entropy < 0.6].sum() / square.sum(), abs=1e-15)
    top, bottom = (np.bincount(trace, x) for x in (square * (entropy < 0.6), square))
    from scipy.stats import t

    ratio = top.sum() / bottom.sum()
    half = t.ppf(0.975, 11) * np.sqrt(12 / 11 * ((top - ratio * bottom) ** 2).sum()) / bottom.sum()
    assert (row["lo"], row["hi"]) == pytest.approx((ratio - half, ratio + half))
    assert (row["step"], row["tokens"], row["clusters"]) == (3, 600, 12)


def test_the_share_goes_from_none_to_all_and_is_unknown_without_a_gradient() -> None:
    found = TokenGradients(torch.rand(20).double(), torch.rand(20).double(), torch.arange(20) % 4)
    for nats, share in ((0.0, 0.0), (100.0, 1.0)):
        assert low_entropy_share(found, nats).value_G == [share]
    nothing = TokenGradients(torch.zeros(20).double(), found.entropy_N, found.trace_N)
    assert np.isnan(low_entropy_share(nothing, 0.6).value_G).all()
    alone = TokenGradients(found.square_N, found.entropy_N, torch.zeros(20, dtype=torch.int64))
    assert np.isnan(low_entropy_share(alone, 0.6).lo_G).all()


def test_an_interval_beyond_the_ends_is_kept_whole() -> None:
    square, entropy, trace = np.array([1.0, 1e-3, 1.0, 0.2]), np.array([0.1, 2.0, 0.1, 2.0]), np.array([0, 0, 1, 1])
    row = next(
        row
        for row in shares(0, TokenGradients(*(torch.from_numpy(x) for x in (square, entropy, trace))))
        if row["threshold"] == "0.6 nats"
    )
    assert row["hi"] > 1
    assert row["hi"] - row["c_low"] == pytest.approx(row["c_low"] - row["lo"])
