"""`reqat train` and `reqat evaluate --model` from the command line."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from reqat.cli.main import main
from reqat.data import build_tokenizer
from reqat.evaluation import Outcomes
from reqat.models import load_model, load_tokenizer, prepare, save_model
from reqat.quant import Precision
from reqat.records import record
from reqat.tasks import problems, verify, write_trace


def reqat(*arguments: str) -> int:
    with pytest.raises(SystemExit) as end:
        main([*arguments])
    return int(end.value.code or 0)


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    folder, rng = tmp_path_factory.mktemp("train"), random.Random(0)
    rows = [{"prompt": p.prompt, "response": write_trace(p, rng)} for p in problems(["chain_sum"], "train", 30, 0)]
    (folder / "traces.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "asked.jsonl").write_text(
        "".join(json.dumps({"prompt": row["prompt"], "answer": "7"}) + "\n" for row in rows[:3])
    )
    tokenizer = build_tokenizer(row[key] for row in rows for key in row)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    save_model(LlamaForCausalLM(config), tokenizer, folder / "model")
    return folder


def test_train_then_grade(given: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(given)
    common = ["--model", "model", "--data", "traces.jsonl", "--precision", "NVFP4-W4A4KV4", "--out", "out", "--quiet"]
    asked = ["train", "--recipe", "reqat-ts", *common, "--lr", "1e-3", "--accumulation", "2", "--threads", "1"]
    asked += ["--autocast", "none"]
    assert reqat(*asked, "--plan") == 0
    planned = capsys.readouterr().out
    assert planned.count("weights for products") == 1 and planned.count("with gradient checkpointing") == 2
    assert "attention mask" not in planned and not Path("out").exists()
    assert reqat(*asked) == 0
    printed = capsys.readouterr().out
    assert planned[planned.index("traces:") : planned.index("then:")] in printed
    assert record.verify(Path("out"))["resumed"] is True
    assert "1. finetune" in printed and "2. qat" in printed and "30 of traces.jsonl" in printed
    grading = ["--model", "out", "--max-new-tokens", "6", "--quiet"]
    assert reqat("evaluate", *grading, "--tasks", "chain_sum", "--n", "4", "--seeds", "0,1", "--out", "graded") == 0
    problems_line, result = capsys.readouterr().out.splitlines()
    assert "min_terms 5" in problems_line and result.startswith("NVFP4-W4A4KV4: ")
    about = record.verify(Path("graded"))
    outcomes = Outcomes.from_parquet("graded/outcomes.parquet")
    assert about["kind"] == "evaluate" and len(outcomes) == 8
    assert about["metrics"]["accuracy"] == float(outcomes.correct.mean())
    drawn = {key: about["config"].get(key) for key in ("tasks", "split", "problem_seed", "problems")}
    assert drawn == {"tasks": "chain_sum", "split": "test", "problem_seed": 1, "problems": None}
    assert about["config"]["tier"] is None and about["config"]["families"]["chain_sum"]["min_terms"] == 5
    assert about["inputs"]["model"]["weights"].keys() == {"model.safetensors", "reqat.safetensors"}
    (line, *_) = Path("asked.jsonl").read_text().splitlines()
    many = f"{line}\n" * 103
    Path("asked.jsonl").write_text(many)
    file = ["--problems", "asked.jsonl", "--max-new-tokens", "2"]
    assert reqat("evaluate", *grading, *file, "--out", "graded-file") == 0
    assert "of 103 problems" in capsys.readouterr().out
    about = record.verify(Path("graded-file"))
    assert about["inputs"]["problems"] == {"id": "asked.jsonl", "sha256": record.sha256(Path("asked.jsonl"))}
    assert about["config"]["problems"] == "asked.jsonl"
    assert not {"tasks", "split", "problem_seed"} & about["config"].keys()  # problems of a file were not drawn
    assert reqat("evaluate", *grading, *file, "--n", "3", "--precision", "NVFP4-W4A16") == 0
    assert "of 3 problems" in capsys.readouterr().out


def test_a_record_says_what_was_computed(
    given: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    model = load_model(given / "model")
    prepare(model, "NVFP4-W4A4KV4", kv_element="E1M2", skip=["*.down_proj"])
    save_model(model, load_tokenizer(given / "model"), tmp_path / "saved")
    hub = f"owner/name@{'0' * 40}"
    monkeypatch.setattr("reqat.models.loading.hub_folder", lambda _: tmp_path / "saved")
    grading = ("--problems", str(given / "asked.jsonl"), "--decoding", "greedy", "--seeds", "0,1,2", "--quiet")
    grading += ("--max-new-tokens", "4", "--out", "graded", "--force")
    for source in ("saved", hub):
        assert reqat("evaluate", "--model", source, *grading) == 0
        about = record.verify(Path("graded"))
        computed = about["config"]["precision"]
        assert Precision.parse(computed) == Precision.parse("NVFP4-W4A4KV4", kv_element="E1M2")
        assert about["metrics"]["precision"] == computed and capsys.readouterr().out.startswith(f"{computed}: ")
        assert (about["config"]["skip"], about["config"]["seeds"], about["seeds"]) == (["*.down_proj"], [0], [0])
        files = tmp_path.glob("saved/*.safetensors")
        assert about["inputs"]["model"]["weights"] == {path.name: record.sha256(path) for path in files}


@pytest.mark.slow
@pytest.mark.long
def test_traces_to_train_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    given = ("traces", "--tasks", "chain_sum,gsm_symbolic", "--n", "12", "--seed", "3")
    assert reqat(*given, "--out", "a.jsonl") == 0 and reqat(*given, "--out", "b.jsonl") == 0
    written = Path("a.jsonl").read_bytes()
    assert Path("b.jsonl").read_bytes() == written
    rows = [json.loads(line) for line in written.decode().splitlines()]
    drawn = {problem.prompt: problem for problem in problems(["chain_sum", "gsm_symbolic"], "train", 12, 3)}
    assert 6 < len(rows) <= 12 and all(verify(drawn[row["prompt"]], row["response"]) for row in rows)
    assert f"{len(rows)} traces" in capsys.readouterr().out
    for out, says in (("a.jsonl", "a.jsonl"), ("c.json", "c.json")):
        assert reqat(*given, "--out", out) == 2 and says in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", "b.jsonl"]
    assert Path("a.jsonl").read_bytes() == written


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["evaluate"], "nothing to grade"),
        (["evaluate", "--model", "model"], "--tasks a,b or --problems FILE"),
        (["evaluate", "--model", "model", "--tasks", "chain_some"], "unknown task family 'chain_some'"),
        (["evaluate", "--model", "model", "--problems", "traces.jsonl"], "unknown key 'response'|no answer to grade"),
        (["evaluate", "evaluation-0", "--tasks", "chain_sum"], "an option of --model"),
        (["evaluate", "evaluation-0", "--split", "test"], "an option of --model"),
        (["evaluate", "--model", "model", "--problems", "asked.jsonl", "--split", "test"], "--split test"),
        (["evaluate", "--model", "model", "--problems", "asked.jsonl", "--tier", "smoke"], "--tier smoke"),
        (["evaluate", "--model", "model", "--problems", "asked.jsonl", "--problem-seed", "0"], "--problem-seed 0"),
        (["evaluate", "evaluation-0", "--model", "model", "--tasks", "chain_sum"], "one or the other"),
        (["train", "--recipe", "ft", "--model", "model", "--data", "traces.jsonl", "--out", "model"], "model"),
        (
            ["train", "--recipe", "ft", "--model", "model", "--data", "traces.jsonl", "--out", "new",
             "--messages-column", "m", "--prompt-column", "p"],
            "--messages-column",
        ),
    ],
)  # fmt: skip
def test_what_makes_no_sense_ends_in_one_line(
    arguments: list[str], says: str, given: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import re

    monkeypatch.chdir(given)
    assert reqat(*arguments) == 2
    error = capsys.readouterr().err
    assert re.search(says, error) and error.count("\n") == 1
