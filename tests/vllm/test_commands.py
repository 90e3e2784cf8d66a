"""The commands of docs/vllm.md: ``vllm serve``, and lm-eval with its backend ``vllm``, on folders that reqat wrote."""

from __future__ import annotations

import json
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import Request, urlopen

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from reqat.evaluation import evaluate
from reqat.evaluation.loading import load_at
from reqat.export import export_model
from reqat.lm_eval import TASKS
from reqat.lm_eval.scores import score
from reqat.models import load_model, load_tokenizer, prepare
from reqat.models.saving import save_model
from reqat.tasks import problems
from tests.vllm.conftest import ROOT, VLLM, run, with_ours
from tests.vllm.test_plugin import PRECISION, close, greedy, shifted, words

pytestmark = [
    pytest.mark.slow,
    pytest.mark.long,
    pytest.mark.skipif(not VLLM, reason="REQAT_VLLM names no environment: python tools/vllm_cpu.py create DIR"),
]

BASE = ROOT / "results" / "base" / "model"
STARTS_WITHIN = 600  # seconds
ON_A_CPU = {
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
}


@contextmanager
def server(folder: Path, cwd: Path) -> Iterator[str]:
    """The address of ``vllm serve FOLDER --quantization reqat``, stopped afterwards."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = ["--dtype", "float32", "--max-model-len", "64", "--enforce-eager", "--host", "127.0.0.1", "--port", port]
    command = [f"{VLLM}/bin/vllm", "serve", folder, "--quantization", "reqat", *options]
    log = cwd / "serve.log"
    with log.open("w") as out:
        process = subprocess.Popen(
            [str(word) for word in command], cwd=cwd, env=with_ours(ON_A_CPU), stdout=out, stderr=out
        )
    try:
        address, begun = f"http://127.0.0.1:{port}", time.monotonic()
        while True:
            assert process.poll() is None and time.monotonic() < begun + STARTS_WITHIN, log.read_text()[-4000:]
            try:
                with urlopen(f"{address}/health"):
                    break
            except URLError:
                time.sleep(1)
        yield address
    finally:
        process.terminate()
        process.wait(60)


def test_a_served_model_answers_as_ours(tiny: Callable[..., PreTrainedModel], ids: Tensor, tmp_path: Path) -> None:
    """Greedy tokens and their log-probabilities over HTTP, with quantized inputs, keys and values and a shift."""
    model, folder = tiny(), tmp_path / "model"
    prepare(model, **PRECISION)
    save_model(shifted(model), words(), folder)
    asked = {"model": str(folder), "prompt": ids.tolist(), "max_tokens": 10, "temperature": 0, "ignore_eos": True}
    asked |= {"logprobs": 1, "return_token_ids": True}
    with server(folder, tmp_path) as address:
        body = Request(f"{address}/v1/completions", json.dumps(asked).encode(), {"Content-Type": "application/json"})
        with urlopen(body) as answered:
            found = sorted(json.load(answered)["choices"], key=lambda choice: choice["index"])
    tokens, expected = greedy(model, ids, 10)
    assert [choice["token_ids"] for choice in found] == tokens.tolist()
    close(torch.tensor([choice["logprobs"]["token_logprobs"] for choice in found]), expected)


@pytest.mark.parametrize("sampled", [False, True])
def test_lm_evals_backend_asks_and_grades_as_we_do(tmp_path: Path, sampled: bool) -> None:
    """Scores of each problem are our grader's of the same responses; greedy ones are those of `reqat evaluate`."""
    if not (Path(str(VLLM)) / "bin" / "lm_eval").exists():
        pytest.skip("lm-eval is not in REQAT_VLLM: docs/vllm.md, Evaluate")
    # Inputs stay unrounded: float sums in another order would round some of them to other numbers, and change tokens.
    precision, options, length, count = "NVFP4-W4A16", {"min_terms": 3, "max_terms": 6}, 70, 4
    folder, out = tmp_path / "model", tmp_path / "out"
    export_model(load_model(BASE), load_tokenizer(BASE), folder, "reqat", precision=precision)
    how = f"max_gen_toks={length}" + ("" if sampled else ",do_sample=False,temperature=0")
    model = f"pretrained={folder},quantization=reqat,dtype=float32,enforce_eager=True,max_model_len=256"
    words = ["--model", "vllm", "--model_args", model, "--include_path", TASKS, "--tasks", "reqat_chain_sum"]
    words += ["--limit", str(count), "--gen_kwargs", how, "--batch_size", "auto", "--log_samples", "--output_path", out]
    words += ["--metadata", json.dumps({"n_problems": 10, "chain_sum": options})]
    run(["-m", "lm_eval", *words], tmp_path, ON_A_CPU)

    (file,) = out.rglob("samples_*.jsonl")
    samples: list[dict[str, Any]] = [json.loads(line) for line in file.read_text().splitlines()]
    samples.sort(key=lambda sample: sample["doc_id"])
    assert len(samples) == count
    for sample in samples:
        (responses,) = sample["resps"]
        assert len(responses) == 8 and (len(set(responses)) == 1 or sampled)
        ours = score(sample["doc"], [responses])
        assert {name: sample[name] for name in ours} == ours
    (report,) = out.rglob("results_*.json")
    reported = json.loads(report.read_text())["results"]["reqat_chain_sum"]
    assert reported["avg@k,all"] == pytest.approx(sum(sample["avg@k"] for sample in samples) / count)
    if sampled:
        assert any(len(set(sample["resps"][0])) > 1 for sample in samples)
        return
    asked = problems({"chain_sum": options}, "test", count, 1)
    found = evaluate(
        load_at(str(BASE), precision), load_tokenizer(BASE), asked, seeds=range(1), decoding="greedy",
        max_new_tokens=length,
    )  # fmt: skip
    assert 0 < found.correct.mean() < 1, "a model that solves none or all would show nothing"
    assert [sample["resps"][0][0] for sample in samples] == list(found.response or ())
    assert [sample["avg@k"] for sample in samples] == found.correct.reshape(-1).tolist()
