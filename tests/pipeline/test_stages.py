"""The chain of stages on a tiny model, and what each leaves behind."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from reqat.config.catalogue import OBJECTIVE_TERMS
from reqat.config.errors import ReqatError
from reqat.config.precision import PrecisionSpec
from reqat.config.stage import (
    Architecture,
    BaseSettings,
    Calibration,
    DataStageSettings,
    Gradient,
    PTQSettings,
    QADTerm,
    QFitSettings,
    Selection,
    SEMTerm,
    Stage,
    Training,
    TrainSettings,
)
from reqat.data import TraceStore
from reqat.data.tokenizer import build_tokenizer
from reqat.evaluation.loading import load_at
from reqat.models import load_model, load_tokenizer, prepare, quant_linears
from reqat.pipeline.keys import run_keys
from reqat.pipeline.stages import calibration_ids, carry_out, objective, selected

KV4 = PrecisionSpec(name="NVFP4-W4A4KV4")
TRAINING = Training(lr=3e-3, rows_per_batch=4, row_tokens=160)
CALIBRATION = Calibration(sequences=2, sequence_tokens=48)


class Chain:
    """Runs stages under one folder, by id."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.metrics: dict[str, dict] = {}

    def run(self, **stage) -> Stage:
        made = Stage(**stage)
        inputs = {role: self.root / id for role, id in made.inputs.items()}
        self.metrics[made.id] = carry_out(made, inputs, self.root / made.id, progress=False)
        return made

    def model(self, stage: Stage):
        return load_model(self.root / stage.id / "model")


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory):
    torch.set_num_threads(1)
    chain = Chain(tmp_path_factory.mktemp("stages"))
    families = {"chain_sum": {}, "simple_equations": {}}
    chain.data = chain.run(kind="data", settings=DataStageSettings(families=families, tokens=6000))
    shape = Architecture(hidden_size=32, layers=2, heads=2, kv_heads=1, mlp=64)
    settings = BaseSettings(
        source="scratch", name="tiny", architecture=shape, training=TRAINING, traces=Selection(tokens=1500)
    )
    chain.base = chain.run(kind="base", settings=settings, data=chain.data.id)
    return chain


def train_stage(chain: Chain, kind: str, parent: Stage, precision: PrecisionSpec, tokens: int, **training) -> Stage:
    settings = TrainSettings(training=TRAINING.model_copy(update=training), traces=Selection(tokens=tokens))
    return chain.run(kind=kind, settings=settings, precision=precision, parent=parent.id, data=chain.data.id)


def test_data_is_a_verified_store_with_its_tokenizer(chain: Chain) -> None:
    folder = chain.root / chain.data.id
    store = TraceStore.read(folder)
    assert 6000 <= store.n_tokens < 6200
    tokenizer = load_tokenizer(folder / "tokenizer")
    for trace in store.traces[:20]:
        assert tokenizer.decode(trace.prompt_ids) == trace.prompt
        assert tokenizer.decode(trace.response_ids[:-1]) == trace.response
        assert trace.response_ids[-1] == tokenizer.eos_token_id
    assert {t.family for t in store.traces} == {"chain_sum", "simple_equations"}


def test_the_whole_chain_of_reqat_tqs(chain: Chain) -> None:
    ft = train_stage(chain, "finetune", chain.base, PrecisionSpec(), 3000)
    fit = chain.run(
        kind="qfit",
        settings=QFitSettings(grid=3, calibration=CALIBRATION),
        precision=KV4,
        parent=ft.id,
        data=chain.data.id,
    )
    terms = (*TRAINING.objective, SEMTerm(name="sem"))
    qat = train_stage(chain, "qat", fit, KV4, 1500, objective=terms)
    metrics = chain.metrics[qat.id]
    assert 1500 <= metrics["tokens"] < 1700
    assert {"nll", "sem", "loss", "tokens"} <= metrics["curve"][0].keys()
    # Q-FIT changes no BF16 function.
    ids = calibration_ids(
        chain.root / chain.data.id, load_tokenizer(chain.root / chain.data.id / "tokenizer"), CALIBRATION
    )
    before, after = chain.model(ft), chain.model(fit)
    for model in (before, after):
        prepare(model, "BF16")
        model.eval()
    with torch.no_grad():
        torch.testing.assert_close(before(ids).logits, after(ids).logits, rtol=1e-4, atol=1e-4)
    # The shift travels through QAT to whoever loads the model.
    trained = chain.model(qat)
    prepare(trained, KV4.name, **KV4.options())
    from reqat.models import kv_quantizers

    assert all(kv.shift is not None for kv in kv_quantizers(trained))


def test_qat_starts_from_its_parent_and_moves_the_weights(chain: Chain) -> None:
    qat = train_stage(chain, "qat", chain.base, KV4, 600)
    a, b = chain.model(chain.base), chain.model(qat)
    moved = [n for (n, p), q in zip(a.named_parameters(), b.parameters(), strict=True) if not torch.equal(p, q)]
    assert any("q_proj" in n for n in moved) and any("embed" in n for n in moved)


def test_layers_left_alone_are_not_quantized_in_training_nor_when_loaded(chain: Chain) -> None:
    at = PrecisionSpec(name="MXFP4-W4A4", skip=("*.down_proj",))
    qat = train_stage(chain, "qat", chain.base, at, 600)
    plain = train_stage(chain, "qat", chain.base, PrecisionSpec(name="MXFP4-W4A4"), 600)
    losses = [chain.metrics[stage.id]["curve"][0]["nll"] for stage in (qat, plain)]
    assert losses[0] != losses[1]  # the first step already computes something else
    loaded = load_at(chain.root / qat.id / "model", at.name, override=True, **at.for_prepare())
    named = set(quant_linears(loaded))
    assert len(named) == 2 * 6 and not any("down_proj" in name for name in named)


@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_ptq_leaves_frozen_codes(chain: Chain, method: str) -> None:
    stage = chain.run(
        kind="ptq",
        settings=PTQSettings(method=method, calibration=CALIBRATION),
        precision=KV4,
        parent=chain.base.id,
        data=chain.data.id,
    )
    model = chain.model(stage)
    prepare(model, KV4.name, **KV4.options())
    assert all(layer.frozen for layer in quant_linears(model).values())


def test_stages_of_other_ids_for_other_settings_and_the_same_id_for_the_same(chain: Chain) -> None:
    def stage(**training) -> Stage:
        settings = TrainSettings(training=TRAINING.model_copy(update=training), traces=Selection(tokens=100))
        return Stage(kind="finetune", settings=settings, parent=chain.base.id, data=chain.data.id)

    assert stage().id == stage().id != stage(lr=1e-4).id


def test_a_missing_parent_is_named(chain: Chain, tmp_path: Path) -> None:
    stage = Stage(
        kind="finetune",
        settings=TrainSettings(training=TRAINING, traces=Selection(tokens=100)),
        parent=chain.base.id,
        data=chain.data.id,
    )
    with pytest.raises(ReqatError, match=f"needs its parent stage {chain.base.id}"):
        carry_out(stage, {"data": chain.root / chain.data.id}, tmp_path / "out", progress=False)


def test_calibration_wants_enough_traces(chain: Chain) -> None:
    folder = chain.root / chain.data.id
    tokenizer = load_tokenizer(folder / "tokenizer")
    assert calibration_ids(folder, tokenizer, CALIBRATION).shape == (2, 48)
    with pytest.raises(ReqatError, match="lower calibration.sequences"):
        calibration_ids(folder, tokenizer, Calibration(sequences=100, sequence_tokens=1000))


def test_the_objective_is_what_configuration_says() -> None:
    made = objective(
        Training(objective=[*TRAINING.objective, SEMTerm(name="sem", weight=0.5, percentile=0.6, binary=True)])
    )
    assert [t.name for t in made.terms] == ["nll", "sem"]
    assert made.terms[1].weight == 0.5 and made.terms[1].percentile == 0.6 and made.terms[1].binary  # type: ignore[attr-defined]


def test_every_term_of_configuration_has_a_class() -> None:
    assert {"nll", "sem", "qad"} <= set(OBJECTIVE_TERMS)
    for name in OBJECTIVE_TERMS:
        (made,) = objective(Training(objective=[{"name": name, "weight": 0.25}])).terms  # type: ignore[list-item]
        assert made.name == name and made.weight == 0.25
    with pytest.raises(ValueError, match="semm.*sem"):
        Training(objective=[{"name": "semm"}])  # type: ignore[list-item]


def test_distillation_gives_the_student_its_parent_for_a_teacher(chain: Chain) -> None:
    """At BF16 student and teacher are one model: the loss starts at 0, not at the likelihood."""
    first = {}
    for precision in (PrecisionSpec(), KV4):
        made = train_stage(chain, "qat", chain.base, precision, 800, objective=(QADTerm(name="qad"),))
        first[precision.name] = chain.metrics[made.id]["curve"][0]["qad"]
    assert abs(first["BF16"]) < 1e-8 and first[KV4.name] > 1e-6


def test_selection_of_a_stage_is_a_prefix_of_a_longer_one(chain: Chain) -> None:
    store = TraceStore.read(chain.root / chain.data.id)
    short, long = selected(store, Selection(tokens=800)), selected(store, Selection(tokens=2400))
    assert list(short) == list(long[: len(short)])
    assert not set(t.id for t in selected(store, Selection(tokens=800, skip_tokens=2400))) & set(t.id for t in long)


def test_the_teacher_is_the_model_that_is_named(chain: Chain) -> None:
    """From a fine-tuned parent the loss starts at 0 against the parent and above it against the untrained base."""
    tuned = train_stage(chain, "finetune", chain.base, PrecisionSpec(), 800)
    settings = TrainSettings(
        training=TRAINING.model_copy(update={"objective": (QADTerm(name="qad"),)}), traces=Selection(tokens=800)
    )
    first = {}
    for teacher in (None, tuned.id, chain.base.id):
        made = chain.run(kind="qat", settings=settings, parent=tuned.id, data=chain.data.id, teacher=teacher)
        first[teacher] = chain.metrics[made.id]["curve"][0]["qad"]
    assert first[None] == first[tuned.id] and abs(first[None]) < 1e-8 and first[chain.base.id] > 1e-4


def test_a_teacher_of_another_tokenizer_is_refused(chain: Chain, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(chain.root / chain.base.id, other)
    build_tokenizer(["one two\n"]).save_pretrained(other / "model")
    settings = TrainSettings(
        training=TRAINING.model_copy(update={"objective": (QADTerm(name="qad"),)}), traces=Selection(tokens=800)
    )
    stage = Stage(kind="qat", settings=settings, parent=chain.base.id, data=chain.data.id, teacher="base-other")
    inputs = {role: chain.root / id for role, id in stage.inputs.items()} | {"teacher": other}
    with pytest.raises(ReqatError, match="base-other.*tokenizer"):
        carry_out(stage, inputs, tmp_path / "out", progress=False)


def test_a_gradient_rule_of_configuration_is_trained_with_and_learned_scales_are_kept(chain: Chain) -> None:
    ternary = PrecisionSpec(name="TERNARY-row-W2A16")
    losses = {}
    for gradient in ({}, {"rule": "clipped", "roles": ["weights"]}, {"rule": "learned", "roles": ["weights"]}):
        made = train_stage(chain, "qat", chain.base, ternary, 800, gradient=Gradient(**gradient))
        losses[gradient.get("rule", "ste")] = chain.metrics[made.id]["final_loss"]
        restored = prepare(chain.model(made), ternary.name).restored
        assert restored == (["14 quantized weights"] if "learned" in gradient.values() else [])
    assert len(set(losses.values())) == 3
    with pytest.raises(ValueError, match="clip.*clipped"):
        Training(gradient={"rule": "clip"})  # type: ignore[arg-type]


def test_keys_before_and_after_rope_and_inputs_before_and_after_rotation(chain: Chain, tmp_path: Path) -> None:
    fit = chain.run(
        kind="qfit",
        settings=QFitSettings(grid=3, calibration=CALIBRATION),
        precision=KV4,
        parent=chain.base.id,
        data=chain.data.id,
    )
    metrics = chain.metrics[fit.id]
    folders = {"before": chain.root / chain.base.id, "data": chain.root / chain.data.id}
    found = run_keys(fit, metrics, folders, tmp_path, sequences=2, rotation=32)["measured"]
    tables = {name: pd.read_csv(tmp_path / f"{name}.csv") for name in ("surfaces", "profiles", "errors", "inputs")}
    # RoPE turns the pair (r, r + D/2): the length of each is what it was.
    surfaces = tables["surfaces"]
    channels = [f"c{i}" for i in range(16)]
    for layer in set(found["layers"].values()):
        pairs = []
        for words in ("before RoPE", "after RoPE"):
            rows = surfaces[(surfaces["layer"] == layer) & (surfaces["keys"] == words)][channels].to_numpy()
            assert rows.shape == (48, 16) and (rows >= 0).all()
            pairs.append(np.hypot(rows[:, :8], rows[:, 8:]))
        np.testing.assert_allclose(pairs[0], pairs[1], rtol=1e-3)
        after = tables["profiles"].query("layer == @layer and along == 'token'")["largest"]
        np.testing.assert_allclose(after, rows.max(axis=1), rtol=1e-4)
    alpha = found["alpha"]
    assert alpha[found["layers"]["smallest"]] == min(alpha) and alpha[found["layers"]["largest"]] == max(alpha)
    for _, rows in tables["errors"].groupby("layer"):
        assert len(rows) == 9 and rows["chosen"].sum() == 1
        assert rows.loc[rows["chosen"], "error"].iloc[0] == rows["error"].min()
    # A rotation keeps the length of each block of each token.
    squares = []
    for words in ("before rotation", "after rotation"):
        rows = tables["inputs"][tables["inputs"]["inputs"] == words].filter(regex=r"^d\d+$").to_numpy()
        assert rows.shape[1] == 64
        squares.append((rows**2).reshape(len(rows), 2, 32).sum(-1))
    np.testing.assert_allclose(squares[0], squares[1], rtol=2e-3)
    window = tables["inputs"][tables["inputs"]["inputs"] == "before rotation"].filter(regex=r"^d\d+$")
    assert window.to_numpy().max() == pytest.approx(found["largest_input"]["before"], rel=1e-4)
    with pytest.raises(ReqatError, match="calibrated on 2 sequences, not on 3"):
        run_keys(fit, metrics, folders, tmp_path, sequences=3, rotation=32)
    with pytest.raises(ReqatError, match="no whole error map"):
        run_keys(fit, {"alphas": [0.0]}, folders, tmp_path, sequences=2, rotation=32)
    with pytest.raises(ReqatError, match="64 inputs do not divide into blocks of 128"):
        run_keys(fit, metrics, folders, tmp_path, sequences=2, rotation=128)
