"""`reqat study`, and `report` and `pin` of studies, for real, on stages of a few thousand random weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from analysis.report.studies import Study, by_kind, load_studies, pinned_studies
from analysis.tables import likelihood
from reqat.config import Paths, load
from reqat.config import studies as config
from reqat.config.paths import made
from reqat.config.studies import PlannedStudy
from reqat.evaluation import Outcomes, entropies
from reqat.evaluation.dynamics import verified_traces
from reqat.evaluation.loading import load_at
from reqat.evaluation.trace_folder import TraceFolder
from reqat.generation.batches import RunningBatch
from reqat.models import load_tokenizer
from reqat.pipeline.studies import stages_there
from reqat.records import pinned, record
from reqat.records.same_stages import same_stages
from tests.cli.smoke_studies import LOADED, NOISE, PIN, REPORT, STUDIES, ask, reqat


def test_a_study_says_what_it_stands_on(
    finished: tuple[Path, dict[str, PlannedStudy]], loaded: dict[str, Study]
) -> None:
    root, studies = finished
    assert list(loaded) == [study["kind"] for study in STUDIES]
    for study in loaded.values():
        found, planned = record.verify(study.path, id=study.id), studies[study.id]
        assert (found["kind"], found["tier"], found["id"]) == ("study", "smoke", planned.id)
        for role, id in planned.inputs.items():
            stage = record.read(root / "build" / "stages" / id)
            assert found["inputs"][role] == {"id": id, "sha256": record.outputs_digest(stage)}
        assert found["seeds"] == ([0, 3] if study.kind not in ("dynamics", "likelihood") else [])
        assert str(root) not in (study.path / "record.json").read_text()
        assert study.settings["precisions"].keys() == planned.models.keys()


def test_all_models_are_loaded_as_evaluations_load_them(finished: tuple[Path, dict[str, PlannedStudy]]) -> None:
    models = [model for study in finished[1].values() for model in study.models.values()]
    assert sorted(LOADED) == sorted((model.stage, model.precision.name) for model in models)


def test_studies_compute_as_the_tiers_evaluations_do(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tier = checkout / "config" / "tiers" / "smoke.yaml"
    given = yaml.safe_load(tier.read_text())
    given["evaluation"]["decoding"] = given["evaluation"].get("decoding", {}) | {"autocast": "bf16"}
    tier.write_text(yaml.safe_dump(given))
    pair, dynamics = (next(s for s in STUDIES if s["kind"] == kind) for kind in ("pair", "dynamics"))
    studies = ask(checkout, pair | {"n": 2}, NOISE | {"n": 2}, dynamics | {"n": 2})
    assert all(study.decoding is not None and study.decoding.autocast == "bf16" for study in studies.values())
    used: list[tuple[str, Any]] = []
    decode, force = RunningBatch.__init__, entropies._force

    def decoded(self: Any, *given: Any) -> None:
        used.append(("decoded", given[-1]))
        decode(self, *given)

    def forced(*given: Any) -> Any:
        used.append(("forced", given[-1]))
        return force(*given)

    monkeypatch.setattr(RunningBatch, "__init__", decoded)
    monkeypatch.setattr(entropies, "_force", forced)
    ways = {"pair": {"decoded", "forced"}, "noise": {"decoded"}, "dynamics": {"forced"}}
    for study in studies.values():
        used.clear()
        assert reqat("study", study.id, "--tier", "smoke", "-q") == 0
        assert set(used) == {(way, torch.bfloat16) for way in ways[study.kind]}


def test_a_pair_is_read_token_by_token(loaded: dict[str, Study]) -> None:
    pair = loaded["pair"]
    folder = TraceFolder(pair.path)
    assert folder.labels == ("BF16", "NVFP4-W4A4KV4") and len(folder.traces) == 4 * 2 * 2
    assert folder.traces["correct"].notna().all()
    assert set(pair.table("tail-and-mismatch")["statistic"]) >= {"top-1 mismatch"}
    assert (pair.path / "summary.md").is_file() and not (pair.path / "plots").exists()


def test_conditions_are_those_of_the_verbs(loaded: dict[str, Study]) -> None:
    names = {kind: list(loaded[kind].conditions["condition"]) for kind in ("routing", "noise", "reset")}
    assert names == {
        "routing": ["all-reference", "low-reference", "low-candidate", "all-candidate"],
        "noise": ["none", "low-0.5", "high-0.5"],
        "reset": ["quantized", "reset", "reset-0.1", "bf16", "also-0"],
    }
    for kind in names:
        study = loaded[kind]
        for row in study.conditions.itertuples():
            outcomes = Outcomes.from_parquet(study.path / f"{row.condition}.parquet")
            assert row.accuracy == pytest.approx(float(outcomes.correct.mean())) and outcomes.n_problems == 4
    reset = loaded["reset"].settings
    assert f"tau0={reset['tau0']['value']}" in reset["decodings"]["reset"] and reset["tau0"]["n_problems"] == 3
    assert "t_low=0.1" in reset["decodings"]["reset-0.1"]
    assert loaded["routing"].settings["threshold_nats"] > 0


def test_a_study_and_the_verb_of_its_kind_give_the_same_outcomes(checkout: Path, loaded: dict[str, Study]) -> None:
    study = loaded["noise"]
    model = checkout / "build" / "stages" / study.record["config"]["models"]["model"]["stage"] / "model"
    told = ("--model", model, "--tier", "smoke", "--n", 4, "--seeds", "0,3", "--sigmas", "0.5", "-q")
    assert reqat("noise", *told, "--out", "noisy") == 0
    for name in study.conditions["condition"]:
        ours, theirs = (Outcomes.from_parquet(folder / f"{name}.parquet") for folder in (study.path, Path("noisy")))
        assert ours.digest == theirs.digest


def test_dynamics_compare_each_model_with_the_base(loaded: dict[str, Study]) -> None:
    study = loaded["dynamics"]
    folder = TraceFolder(study.path)
    assert folder.labels == ("base", "FT", "QAT") and folder.traces["correct"].all()
    moved = study.table("dynamics")
    assert set(moved["label"]) == {"FT", "QAT"} and set(moved["bin"]) == {0, 1, 2}
    change = moved[(moved["label"] == "FT") & (moved["statistic"] == "change")]
    mean = float((folder.entropy("FT").astype("f8") - folder.entropy("base").astype("f8")).mean())
    assert (change["value"] * change["n"]).sum() / change["n"].sum() == pytest.approx(mean, abs=1e-9)


def test_likelihoods_are_those_of_the_models_themselves(loaded: dict[str, Study]) -> None:
    study = loaded["likelihood"]
    found, planned = study.parquet("likelihood"), study.record["config"]
    asked = planned["problems"]
    root = study.path.parents[1]

    def model(role: str) -> Any:
        spec = PlannedStudy.model_validate(planned).models[role]
        return load_at(root / "stages" / spec.stage / "model", spec.precision.name, **spec.precision.options())

    tokenizer = load_tokenizer(root / "stages" / planned["models"]["reference"]["stage"] / "model")
    traces = verified_traces(asked["families"], tokenizer, n=4, split=asked["split"], seed=asked["seed"])
    assert sorted(found["label"]) == ["FT+PTQ"] * 4 + ["QAT"] * 4 and asked["split"] == "test"
    log_p = [log_softmax(model("reference"), trace) for trace in traces]
    entropy = np.concatenate([-(p.exp() * p).sum(-1).numpy() for p in log_p])
    threshold = np.percentile(entropy, 75)
    for label in ("QAT", "FT+PTQ"):
        rows = found[found["label"] == label]
        log_q = [log_softmax(model(label), trace) for trace in traces]
        for row, trace, p, q in zip(rows.itertuples(), traces, log_p, log_q, strict=True):
            low = -(p.exp() * p).sum(-1) < threshold
            nll = -q.gather(-1, torch.tensor(trace.response_ids)[:, None])[:, 0]
            kl = (p.exp() * (p - q)).sum(-1)
            assert (row.problem, row.tokens_low, row.tokens_high) == (trace.info.problem, low.sum(), (~low).sum())
            given = [row.nll_low, row.nll_high, row.kl_low, row.kl_high]
            expected = [float(x[mask].sum()) for x in (nll, kl) for mask in (low, ~low)]
            assert given == pytest.approx(expected, rel=1e-4, abs=1e-5)
    assert study.metrics["tokens"] == len(entropy)
    assert study.metrics["nll_nats"]["QAT"] == pytest.approx(
        float(found.loc[found["label"] == "QAT", ["nll_low", "nll_high"]].to_numpy().sum() / len(entropy))
    )


def log_softmax(model: Any, trace: Any) -> torch.Tensor:
    """Log-probabilities before each response token, from one pass over the whole sequence, float64 [tokens, V]."""
    with torch.no_grad():
        logits = model(torch.tensor([[*trace.prompt_ids, *trace.response_ids]])).logits[0]
    return torch.as_tensor(logits[len(trace.prompt_ids) - 1 : -1].double().log_softmax(-1))


def test_a_footer_says_what_the_tier_is(finished: tuple[Path, dict[str, PlannedStudy]]) -> None:
    root, studies = finished
    title = "weights once quantized"
    for study in load_studies(studies, root / "build" / "studies", title=title):
        assert study.tier == f"Tier smoke ({title})"
    table = likelihood.build(by_kind(load_studies(studies, root / "build" / "studies", title=title)))
    assert any(title in note for note in table.footer)


def test_what_is_done_is_not_done_again_and_what_is_damaged_is(
    checkout: Path, loaded: dict[str, Study], capsys: pytest.CaptureFixture[str]
) -> None:
    study = loaded["noise"]
    folder = checkout / "build" / "studies" / study.id
    before = (folder / "record.json").read_bytes()
    assert reqat("study", study.id, "--tier", "smoke", "-q") == 0
    assert f"{study.id}: already there" in capsys.readouterr().out
    assert (folder / "record.json").read_bytes() == before
    (folder / "summary.json").write_text("[")
    assert reqat(*REPORT) == 2
    assert "summary.json is not the file that its record describes" in capsys.readouterr().err
    assert reqat("study", "--tier", "smoke", "-q") == 0
    printed = capsys.readouterr().out
    assert printed.count("already there") == len(STUDIES) - 1 and f"{study.id}: done" in printed
    assert json.loads((folder / "summary.json").read_text()) == study.metrics["conditions"]


def train_again(root: Path, id: str) -> str:
    """Other weights under the id of a stage, whole with a record; returns the digest of the outputs."""
    folder, partial = root / "build" / "stages" / id, root / "build" / "partial" / id
    with record.job("finetune", id, {}, root=root, out=folder, partial=partial) as job:
        shutil.copytree(folder / "model", job.partial / "model")
        file = job.partial / "model" / "model.safetensors"
        save_file({name: 1.5 * w for name, w in load_file(file).items()}, file, {"format": "pt"})
    return record.outputs_digest(record.read(folder))


def test_a_study_of_weights_that_are_no_longer_there_is_not_finished(
    checkout: Path, finished: tuple[Path, dict[str, PlannedStudy]], capsys: pytest.CaptureFixture[str]
) -> None:
    studies = finished[1]
    (noise,) = (study for study in studies.values() if study.kind == "noise")
    stage = noise.models["model"].stage
    new = train_again(checkout, stage)
    says = f"was made from another candidate ({stage}) than the one that is there now"
    for verb in (REPORT, PIN):
        capsys.readouterr()
        assert reqat(*verb) == 2
        err = capsys.readouterr().err
        assert says in err and f"reqat study {next(iter(studies))} --tier smoke" in err
    assert not (checkout / "results").exists()
    assert reqat("study", noise.id, "--tier", "smoke", "-q") == 0
    out = capsys.readouterr().out
    assert "was made from another model" in out and f"{noise.id}: done" in out
    assert record.read(checkout / "build" / "studies" / noise.id)["inputs"]["model"] == {"id": stage, "sha256": new}
    assert reqat("study", noise.id, "--tier", "smoke", "-q") == 0
    assert f"{noise.id}: already there" in capsys.readouterr().out


def test_pinned_studies_say_whether_the_pinned_run_has_their_weights(
    checkout: Path, finished: tuple[Path, dict[str, PlannedStudy]], capsys: pytest.CaptureFixture[str]
) -> None:
    plan, paths = load("smoke", Paths(checkout)), Paths(checkout)
    there = stages_there(plan, finished[1].values(), paths)
    used = sorted({id for study in finished[1].values() for id in study.inputs.values() if made(plan.stage(id))})
    run = {id: record.read(checkout / "build" / "stages" / id) for id in used}

    def same() -> bool | None:
        return same_stages(plan, finished[1].values(), there, run)

    assert same() is True and "warning" not in capsys.readouterr().err
    run[used[0]]["outputs"]["model/model.safetensors"]["sha256"] = "0" * 64
    assert same() is False
    assert capsys.readouterr().err.count(f"other weights than the pinned run: {used[0]};") == 1
    del run[used[0]]
    assert same() is None
    run.clear()
    assert same() is None, "no run is pinned"


def test_studies_are_not_pinned_without_the_stages_that_they_were_made_from(
    checkout: Path, loaded: dict[str, Study], capsys: pytest.CaptureFixture[str]
) -> None:
    stage = loaded["noise"].record["config"]["models"]["model"]["stage"]
    shutil.rmtree(checkout / "build" / "stages" / stage)
    assert reqat(*PIN) == 2
    assert f"{stage} is not there any more" in capsys.readouterr().err
    assert not (checkout / "results").exists()


def test_a_report_of_all_draws_what_is_there_and_names_what_is_not(
    checkout: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert reqat("report", "--tier", "smoke") == 0
    said = capsys.readouterr()
    assert "studies.csv" in said.out and "no results of its benchmark" in said.err
    assert (checkout / "build/tables/smoke/studies.csv").is_file()
    assert reqat("report", "--tier", "smoke", "--what", "benchmark") == 2, "what is asked for by name must be there"


@pytest.mark.slow
@pytest.mark.long
def test_pinned_studies_come_back_whole_and_give_the_same_report(
    checkout: Path, finished: tuple[Path, dict[str, PlannedStudy]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert reqat(*REPORT) == 0
    assert reqat(*PIN[:-1]) == 2  # no checkout of git, so nobody knows the code
    assert "uncommitted changes" in capsys.readouterr().err
    assert reqat(*PIN, "--name", "2026-01-02-smoke") == 0
    kept, studies = checkout / "results" / "2026-01-02-smoke", checkout / "build" / "studies"
    assert pinned.manifest(kept)["same_stages_as_pinned_run"] is None
    with pinned.restored(kept, "studies") as again:
        planned = pinned_studies(again.root / "studies")
        assert json.dumps([study.model_dump(mode="json") for study in planned.values()]) == json.dumps(
            [study.model_dump(mode="json") for study in finished[1].values()]
        ), "and in the same order, of models too"
        (again.root / "studies" / "studies.json").unlink()
        files = {path.relative_to(studies) for path in studies.rglob("*") if path.is_file()}
        back = {path.relative_to(again.root / "studies") for path in again.root.rglob("*") if path.is_file()}
        assert back == {path for path in files if path.name != pinned.TRACES} < files
        for path in back:
            assert (again.root / "studies" / path).read_bytes() == (studies / path).read_bytes(), path
    shutil.rmtree(studies)
    assert reqat("report", "--pinned", "--tier", "smoke") == 0
    for name in ("tables", "plots"):
        fresh, drawn = checkout / "build" / name / "smoke", checkout / "build" / "pinned" / name / "smoke"
        assert {p.name for p in fresh.glob("*")} == {p.name for p in drawn.glob("*")}
        for path in fresh.glob("*"):
            assert path.read_bytes() == (drawn / path.name).read_bytes(), path.name
    rows = pd.read_csv(kept / "tables" / "studies.csv")
    assert list(rows["study"]) == list(finished[1]) and set(rows["problems"]) == {4}
    damaged = next(kept.glob("studies/*/summary.json"))
    damaged.write_bytes(damaged.read_bytes()[:-1])
    capsys.readouterr()
    assert reqat("report", "--pinned", "--tier", "smoke") == 2
    assert f"{damaged.relative_to(checkout)} is not the file that was pinned" in capsys.readouterr().err


def test_a_training_made_anew_gets_the_stage_and_what_it_read(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    studies = ask(
        checkout, {"kind": "gradients", "model": {"recipe": "qat", "precision": "NVFP4-W4A4KV4"}, "every_steps": 3}
    )
    (study,) = studies.values()
    told: dict[str, Any] = {}

    def run(stage: Any, inputs: dict[str, Path], out: Path, **options: Any) -> dict[str, Any]:
        told.update(options, stage=stage.id, inputs=inputs)
        (out / "gradients.csv").write_text("step\n")
        options["checkpoints"].mkdir(parents=True)
        return {"looks": 0}

    monkeypatch.setattr("reqat.pipeline.gradients.run_gradients", run)
    for id in study.inputs.values():
        folder = checkout / "build" / ("data" if id.startswith("data-") else "stages") / id
        shutil.rmtree(folder, ignore_errors=True)
        partial = checkout / "build" / "partial" / id
        with record.job("x", id, {}, root=checkout, out=folder, partial=partial) as job:
            (job.partial / "file").write_text(id)
    assert reqat("study", study.id, "--tier", "smoke", "-q") == 0
    assert told["stage"] == study.models["model"].stage and told["every"] == 3 and not told["progress"]
    assert {role: folder.name for role, folder in told["inputs"].items()} == study.given
    assert told["trained"].name == told["stage"] and not told["checkpoints"].exists()
    (found,) = by_kind(load_studies(studies, checkout / "build" / "studies"))["gradients"]
    assert found.metrics == {"looks": 0} and found.seeds == []


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["study", "--tier", "claims"], "tier claims has no studies; give it a section in config/studies.yaml"),
        (["study", "study-noise-0", "--tier", "smoke"], "unknown study 'study-noise-0'"),
        (["report", "--what", "studies", "--tier", "claims"], "tier claims has no studies"),
        (["report", "--pinned", "--tier", "laptop"], "no pinned results of tier 'laptop'"),
    ],
)
def test_what_a_user_can_mend(
    checkout: Path, arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert reqat(*arguments) == 2
    err = capsys.readouterr().err
    assert says in err and "Traceback" not in err


def test_what_is_missing_is_named_with_its_command(checkout: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (new,) = ask(checkout, NOISE | {"n": 3}).values()
    assert reqat(*REPORT) == 2
    assert f"study noise is not there; `reqat study {new.id}` makes it" in capsys.readouterr().err
    shutil.rmtree(checkout / "build" / "stages" / new.models["model"].stage)
    assert reqat("study", "--tier", "smoke") == 2
    assert f"reqat stage {new.models['model'].stage} --tier smoke" in capsys.readouterr().err
    with pytest.raises(config.ReqatError, match="sampled"):
        ask(checkout, NOISE | {"decoding": "sampled"})
    assert reqat("study", "--tier", "smoke") == 2
    assert "sampled" in capsys.readouterr().err
