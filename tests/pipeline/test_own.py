"""`reqat train` end to end on a tiny model: the result, a run that was interrupted, and what is refused before work."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

import reqat.pipeline.own as own
from reqat.config.errors import ReqatError
from reqat.config.stage import Training
from reqat.config.tier import load_catalogue
from reqat.data import build_tokenizer
from reqat.data.sources import Columns
from reqat.export import export_model
from reqat.models import load_model, load_tokenizer, prepare, save_model
from reqat.pipeline.own import Run, train_own
from reqat.records import record

ROOT = Path(__file__).parents[2]
CATALOGUE = load_catalogue(ROOT / "config")
KV4 = "NVFP4-W4A4KV4"


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model and traces."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("own")
    rows = [{"prompt": f"{i} + {i + 1} =\n", "response": f"The answer is {2 * i + 1}."} for i in range(40)]
    (folder / "traces.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenizer = build_tokenizer(row[key] for row in rows for key in row)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    save_model(LlamaForCausalLM(config), tokenizer, folder / "model")
    return folder


def run(folder: Path, recipe: str = "reqat-ts", precision: str = KV4, **changes: Any) -> Run:
    training = Training(lr=1e-3, rows_per_batch=2, autocast="none")
    settings = {"model": str(folder / "model"), "data": str(folder / "traces.jsonl"), "training": training, **changes}
    return Run(recipe=recipe, precision=precision, columns=Columns(), progress=False, **settings)


def train(asked: Run, out: Path, **options: Any) -> dict[str, Any]:
    train_own(asked, CATALOGUE, out, ROOT, **options)
    return record.verify(out)


@pytest.fixture(scope="module")
def undisturbed(given: Path) -> tuple[Path, dict[str, Any]]:
    return given / "whole", train(run(given), given / "whole")


def test_the_result_loads_here_and_in_plain_transformers(given: Path, undisturbed: Any) -> None:
    out, about = undisturbed
    model, tokenizer = load_model(out), load_tokenizer(out)
    prepare(model, KV4)
    ids = torch.tensor([tokenizer("3 + 4 =\n")["input_ids"]])
    logits = model(ids).logits
    plain = AutoModelForCausalLM.from_pretrained(out)
    assert AutoTokenizer.from_pretrained(out)("3 + 4 =\n")["input_ids"] == ids[0].tolist()
    assert bool(torch.isfinite(plain(ids).logits).all())
    # Weights are those of the codes already: quantizing the plain model's changes nothing but inputs and cache.
    names = [name for name in plain.state_dict() if "mlp" in name or "self_attn" in name]
    assert all(torch.equal(plain.state_dict()[name], model.state_dict()[name]) for name in names)
    assert bool(torch.isfinite(logits).all()) and not torch.equal(logits, plain(ids).logits)
    assert about["kind"] == "train" and about["config"]["recipe"] == "reqat-ts"
    assert about["config"]["data (sha256)"] == record.sha256(given / "traces.jsonl")
    read = {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert set(about["config"]["model's files (sha256)"]) >= read
    assert not out.with_name("whole.unfinished").exists()


def test_the_result_can_be_exported_unless_scales_were_not_to_be_shared(
    given: Path, undisturbed: Any, tmp_path: Path
) -> None:
    ids = torch.tensor([load_tokenizer(undisturbed[0])("3 + 4 =\n")["input_ids"]])
    train(run(given, "gptq", total=400), tmp_path / "gptq")
    for number, folder in enumerate((undisturbed[0], tmp_path / "gptq")):
        with pytest.warns(UserWarning, match="KV cache"):
            export_model(load_model(folder), None, tmp_path / f"{number}", "compressed-tensors", calibration=[ids])
        codes, written = (
            load_file(folder / "reqat.safetensors"),
            load_file(tmp_path / f"{number}" / "model.safetensors"),
        )
        names = [name for name in codes if name.endswith("weight_packed")]
        assert len(names) == 7 and all(torch.equal(codes[name], written[name]) for name in names)
    train(run(given, "qat", share_global_scale=False), tmp_path / "apart")
    with pytest.raises(ReqatError, match="--no-share-global-scale"):
        export_model(load_model(tmp_path / "apart"), None, tmp_path / "no", "compressed-tensors", calibration=[ids])


def test_budgets_are_one_pass_over_the_data_a_quarter_of_it_qat(undisturbed: Any) -> None:
    metrics = undisturbed[1]["metrics"]
    finetune, qat = metrics["stages"]
    assert (finetune["kind"], qat["kind"]) == ("finetune", "qat")
    tokens = metrics["traces"]["tokens"]
    longest = metrics["traces"]["longest"]
    assert metrics["total_tokens"] == tokens and metrics["qat_tokens"] == tokens // 4
    assert tokens <= finetune["tokens"] + qat["tokens"] < tokens + 2 * longest
    for stage in (finetune, qat):
        assert stage["metrics"]["steps"] == stage["steps"] and stage["metrics"]["tokens"] == stage["tokens"]


def test_an_interrupted_run_goes_on_to_the_same_weights(
    given: Path, undisturbed: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = given / "resumed"

    def interrupted(plan: Any, id: str, *args: Any, **options: Any) -> None:
        if id.startswith("qat"):
            raise KeyboardInterrupt
        real(plan, id, *args, **options)

    real = own.run_stage
    with monkeypatch.context() as patch:
        patch.setattr(own, "run_stage", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train(run(given), out)
    assert not out.exists() and out.with_name("resumed.unfinished").is_dir()
    with pytest.raises(ReqatError, match=r"other settings: seed 0, now 1\..*--no-resume"):
        train(run(given, seed=1), out)
    about = train(run(given), out)
    assert about["resumed"] is True and undisturbed[1]["resumed"] is False
    for name in ("model.safetensors", "reqat.safetensors"):
        assert about["outputs"][name] == undisturbed[1]["outputs"][name]
    capsys.readouterr()
    train(run(given), out)  # again: nothing to do
    assert "already there" in capsys.readouterr().out
    with pytest.raises(ReqatError, match="there already"):
        train(run(given, seed=1), out)


@pytest.mark.parametrize("resume", [True, False])
def test_only_an_unfinished_run_is_taken_up_or_deleted(given: Path, tmp_path: Path, resume: bool) -> None:
    work = tmp_path / "notes.unfinished"

    def refused(says: str, **changes: Any) -> None:
        before = record.files(work)
        with pytest.raises(ReqatError, match=says):
            train(run(given, **changes), tmp_path / "notes", resume=resume)
        assert record.files(work) == before and not (tmp_path / "notes").exists()

    work.mkdir()
    (work / "settings.json").write_text('{"editor.fontSize": 12}')
    refused("no unfinished run")
    settings = {"schema": own.SCHEMA, "seed": 3}
    (work / "settings.json").write_text(json.dumps(settings))
    (work / "diary.txt").write_text("dear diary")
    refused("diary.txt")
    (work / "diary.txt").unlink()
    shutil.copytree(given / "model", work / "stages" / "finetune-0" / "model")
    refused("made from", model=str(work / "stages" / "finetune-0" / "model"))
    (work / ".git").mkdir()
    refused("checkout")
    (work / ".git").rmdir()
    work.rename(tmp_path / "elsewhere")
    work.symlink_to(tmp_path / "elsewhere")
    refused("link")


def test_a_result_is_there_already_only_if_all_that_was_read_of_the_model_is_the_same(
    given: Path, undisturbed: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tmp_path / "model"
    shutil.copytree(given / "model", model)
    train(run(given, model=str(model)), undisturbed[0])
    assert "already there" in capsys.readouterr().out
    (model / "README.md").write_text("not read")
    train(run(given, model=str(model)), undisturbed[0])
    for name in ("config.json", "tokenizer_config.json", "chat_template.jinja"):
        file = model / name
        before = file.read_text() if file.exists() else None
        file.write_text((before or "") + " ")
        with pytest.raises(ReqatError, match="there already"):
            train(run(given, model=str(model)), undisturbed[0])
        file.unlink() if before is None else file.write_text(before)


def test_data_that_change_between_stages_are_refused(given: Path, tmp_path: Path, monkeypatch: Any) -> None:
    data = tmp_path / "traces.jsonl"
    shutil.copy(given / "traces.jsonl", data)
    real = own.run_stage

    def changing(plan: Any, id: str, *args: Any, **options: Any) -> None:
        real(plan, id, *args, **options)
        if id.startswith("finetune"):
            data.write_text(data.read_text() + "\n")

    monkeypatch.setattr(own, "run_stage", changing)
    with pytest.raises(ReqatError, match="changed since the run began"):
        train(run(given, data=str(data)), tmp_path / "out")
    with pytest.raises(ReqatError, match=r"other settings: data \(sha256\)"):
        train(run(given, data=str(data)), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_more_tokens_than_there_are_mean_the_same_traces_again(given: Path, tmp_path: Path) -> None:
    about = train(run(given, epochs=3), tmp_path / "out")
    finetune, qat = about["metrics"]["stages"]
    tokens = about["metrics"]["traces"]["tokens"]
    assert about["metrics"]["total_tokens"] == 3 * tokens
    assert finetune["traces"] <= 40 and qat["traces"] <= finetune["traces"]  # aligned: none that stage 1 did not see
    assert finetune["tokens"] + qat["tokens"] == pytest.approx(3 * tokens, rel=0.1)


def test_post_training_quantization_and_plain_fine_tuning(given: Path, tmp_path: Path) -> None:
    for recipe, precision, saved in (("gptq", KV4, True), ("ft", "BF16", False)):
        about = train(run(given, recipe, precision, total=400), tmp_path / recipe)
        assert ("reqat.json" in about["outputs"]) is saved
        prepare(load_model(tmp_path / recipe), precision)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"recipe": "reqat-tsq"}, "unknown recipe 'reqat-tsq'.*reqat-tqs"),
        ({"precision": "BF16"}, "recipe reqat-ts quantizes"),
        ({"data": "nothing.jsonl"}, "nothing.jsonl: no such file"),
        ({"model": "nothing"}, "no model folder at 'nothing'"),
        ({"row_tokens": 65}, "--row-tokens 65: the model has 64 positions"),
        ({"total": 10, "qat_tokens": 10}, "--qat-tokens 10 must be fewer"),
    ],
)
def test_what_cannot_be_is_refused_before_training(given: Path, changes: Any, says: str, tmp_path: Path) -> None:
    with pytest.raises(ReqatError, match=says):
        train(run(given, **changes), tmp_path / "out")
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob("out.unfinished/stages/finetune-*"))


def test_models_that_no_adapter_knows_and_tokenizers_of_other_models(given: Path, tmp_path: Path) -> None:
    shutil.copytree(given / "model", tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps({**config, "model_type": "phi3", "architectures": None}))
    with pytest.raises(ReqatError, match="phi3.*not supported"):
        train(run(given, model=str(tmp_path / "model")), tmp_path / "out")
    assert not (tmp_path / "out.unfinished" / "data").exists()
    small = LlamaConfig(**{key: config[key] for key in ("hidden_size", "intermediate_size", "num_hidden_layers",
        "num_attention_heads", "num_key_value_heads")}, vocab_size=20)  # fmt: skip
    save_model(LlamaForCausalLM(small), load_tokenizer(given / "model"), tmp_path / "small")
    with pytest.raises(ReqatError, match=r"row-\d+ of the traces: token id \d+ .* vocabulary has 20 tokens"):
        train(run(given, model=str(tmp_path / "small")), tmp_path / "other")
