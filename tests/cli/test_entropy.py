"""`reqat entropy`, for real, on models of a few thousand weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from reqat.cli.main import main
from reqat.data.tokenizer import build_tokenizer
from reqat.evaluation.trace_folder import TraceFolder
from reqat.models import save_model
from reqat.records import record

ROOT = Path(__file__).parents[2]
CORPUS = "So 2 + 2 = 4. So 2 + 1 gives 3, and the answer is 3.\n How many legs have cats and spiders?"


def make(folder: Path, corpus: str = CORPUS, seed: int = 0) -> Path:
    tokenizer = build_tokenizer([corpus])
    torch.manual_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=2,
            head_dim=32,
            vocab_size=len(tokenizer),
            max_position_embeddings=96,
            eos_token_id=tokenizer.eos_token_id,
        )
    )
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(5)
    save_model(model, tokenizer, folder)
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    make(root / "a")
    make(root / "b", seed=1)
    make(root / "other", CORPUS + " more words")
    return root


def reqat(*arguments: object) -> int:
    with pytest.raises(SystemExit) as end:
        main([str(a) for a in arguments])
    return int(end.value.code or 0)


def lines(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


SAMPLED = [{"prompt": "2 + 2 =\n", "answer": "4", "id": "two"}, {"prompt": "2 + 1 =\n", "answer": 3}]


def test_a_pair_of_precisions_sampled_and_forced(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    problems = lines(tmp_path / "p.jsonl", *SAMPLED)
    out = tmp_path / "out"
    args = ("--problems", problems, "--out", out, "--seeds", "0,5", "--max-new-tokens", 12, "--bins", 4, "-q")
    assert reqat("entropy", "--reference", models / "a", *args, "--logprobs", "two:0") == 0
    printed = capsys.readouterr().out
    assert "# Entropies: NVFP4-W4A4KV4 against BF16" in printed
    folder = TraceFolder(out)
    assert folder.labels == ("BF16", "NVFP4-W4A4KV4")
    assert sorted(folder.traces[["problem", "seed", "source"]].itertuples(index=False, name=None)) == sorted(
        (problem, seed, source) for problem in ("two", "line-2") for seed in (0, 5) for source in folder.labels
    )
    assert folder.meta["decoding"] == "sample(temperature=0.6, top_p=0.95)" and folder.meta["seeds"] == [0, 5]
    assert folder.traces["correct"].notna().all()
    summary = pd.read_csv(out / "summary.csv")
    assert {"accuracy", "top-1 mismatch", "pairs that part", "digits"} <= set(summary["statistic"])
    assert {p.name for p in (out / "plots").iterdir()} >= {"entropy-damage.png", "entropy-kinds.pdf"}
    found = record.verify(out, id="out")
    assert found["metrics"]["traces"] == 8 and found["seeds"] == [0, 5] and "meta.json" in found["outputs"]
    assert str(tmp_path) not in (out / "record.json").read_text() + (out / "meta.json").read_text()


def test_given_responses_are_forced_and_faulty_ones_left_out(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [
        {"prompt": "2 + 2 =\n", "response": "So 2 + 2 = 4.", "id": "whole", "answer": "4"},
        {"prompt": "2 + 2 =\n", "response": "So 2 + 2", "id": "cut", "finished": False},
        {"prompt": "2 + 2 =\n", "response": "", "id": "empty", "finished": False},
        {"prompt": "2 + 2 =\n", "response": "So @ is it.", "id": "strange"},
        {"prompt": "2 + 2 =\n", "response_ids": [5, 4000], "id": "foreign"},
    ]
    problems, out = lines(tmp_path / "p.jsonl", *rows), tmp_path / "out"
    both = ("--reference", models / "a", "--candidate", models / "b", "--candidate-precision", "BF16")
    assert reqat("entropy", *both, "--problems", problems, "--out", out, "-q") == 0
    folder = TraceFolder(out)
    assert folder.labels == ("a:BF16", "b:BF16") and set(folder.traces["source"]) == {"given"}
    assert folder.traces.set_index("problem")["finished"].to_dict() == {"whole": True, "cut": False}
    assert folder.traces["correct"].tolist() == [True, None]
    left_out = {entry["problem"]: entry["reason"] for entry in folder.meta["left_out"]}
    assert set(left_out) == {"empty", "strange", "foreign"}
    err = capsys.readouterr().err
    assert "trace of problem 'empty', seed 0, source 'given' is empty" in err
    assert "unknown token id 4000" in err and "'strange'" in err
    assert "1 without an end marker (kept), 3 left out" in (out / "summary.md").read_text()


def test_an_end_marker_flags_what_lacks_it(models: Path, tmp_path: Path) -> None:
    rows = [{"prompt": "2 + 2 =\n", "response": text} for text in ("So the answer is 4.", "So 2 + 2 = 4.")]
    out = tmp_path / "out"
    given = ("--reference", models / "a", "--problems", lines(tmp_path / "p.jsonl", *rows), "--out", out, "-q")
    assert reqat("entropy", *given, "--end-marker", "the answer is") == 0
    assert TraceFolder(out).traces["finished"].tolist() == [True, False]


@pytest.mark.parametrize(
    ("arguments", "rows", "says"),
    [
        (["--candidate", "other"], SAMPLED, "have different tokenizers: they hold"),
        (["--candidate", "nowhere"], SAMPLED, "no model folder at"),
        (["--candidate-precision", "BF16"], SAMPLED, "the same model in BF16"),
        (["--candidate-precision", "NVFP5-W4A4"], SAMPLED, "unknown precision 'NVFP5-W4A4'"),
        (["--seeds", "0,x"], SAMPLED, "--seeds '0,x': write whole numbers"),
        (["--families", "chain_sum"], SAMPLED, "--families chain_sum: give one source"),
        (["--tier", "smoke"], SAMPLED, "--tier smoke"),
        (["--logprobs", "two"], SAMPLED, "--logprobs 'two': write PROBLEM:POSITION"),
        ([], [{"answer": "4"}], "p.jsonl, line 1: it needs a prompt"),
        ([], [{"prompt": "x", "id": 1}, {"prompt": "y", "id": 1}], "line 2: problem '1' with seed 0"),
        ([], [{"prompt": "2 =\n", "response_ids": ["a"]}], "line 1: response_ids"),
        ([], [{"prompt": "2 =\n", "response": "", "finished": False}], "no traces to write"),
        ([], [], "it holds no problem"),
    ],
)
def test_what_a_user_can_mend(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], rows: list[Any], says: str
) -> None:
    arguments = [str(models / a) if a in ("other", "nowhere") else a for a in arguments]
    problems, out = lines(tmp_path / "p.jsonl", *rows), tmp_path / "out"
    assert reqat("entropy", "--reference", models / "a", "--problems", problems, "--out", out, "-q", *arguments) == 2
    err = capsys.readouterr().err
    assert says in err and "Traceback" not in err and not out.exists()


def test_problems_of_task_families(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # --out is relative to where the command is typed
    corpus = "How many legs have 3 cats, 2 spiders? 1 - 2 + 3 * / = gives makes is the answer"
    make(tmp_path / "m", corpus)
    options = ("--families", "chain_sum", "--n", 2, "--tier", "smoke", "--max-new-tokens", 4, "-q")
    assert reqat("--root", ROOT, "entropy", "--reference", "m", *options, "--out", "here/out") == 0
    folder = TraceFolder(tmp_path / "here" / "out")
    assert set(folder.traces["family"]) == {"chain_sum"} and len(folder.traces) == 4
    assert folder.traces["correct"].notna().all()
