"""The plugin: what vLLM computes of folders that reqat wrote, against transformers with our quantization."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from reqat.config.policy import Decoding
from reqat.decoding import entropy_nats
from reqat.export import export_model
from reqat.generation.reset import ReSET
from reqat.models import calibrate_static, prepare
from reqat.models.kv import kv_quantizers
from reqat.models.saving import save_model
from tests.vllm.conftest import VLLM, Answer, run

Tiny = Callable[..., PreTrainedModel]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not VLLM, reason="REQAT_VLLM names no environment: python tools/vllm_cpu.py create DIR"),
]

PRECISION: dict[str, Any] = {"precision": "NVFP4-W4A4KV4", "kv_element": "E1M2"}
LONG = 40


def shifted(model: PreTrainedModel) -> PreTrainedModel:
    """With a shift of each layer's keys."""
    generator = torch.Generator().manual_seed(2)
    for kv in kv_quantizers(model):
        kv.set_shift(torch.randn(kv.shape, generator=generator) / 2)
    return model


def words() -> PreTrainedTokenizerFast:
    """61 tokens, as many as the models have; every third one holds a blank line, and ends a step."""
    vocabulary = {f"w{i}\n\n" if i % 3 == 0 else f"w{i}": i for i in range(61)}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token="w1")))


@torch.no_grad()
def prompt_logprobs(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """Log-probability of each id of the rows after the first."""
    return model(ids).logits.log_softmax(-1)[:, :-1].gather(-1, ids[:, 1:, None])[..., 0]


@torch.no_grad()
def greedy(model: PreTrainedModel, ids: Tensor, tokens: int, processor: Any = None) -> tuple[Tensor, Tensor]:
    """The likeliest tokens [B, tokens] and their log-probabilities, each from all ids before it at once."""
    chosen, start = [], ids.shape[1]
    for _ in range(tokens):
        logits = model(ids).logits[:, -1]
        scores = (logits if processor is None else processor(ids, logits)).log_softmax(-1)
        best, token = scores.max(-1, keepdim=True)
        chosen.append(best)
        ids = torch.cat([ids, token], 1)
    return ids[:, start:], torch.cat(chosen, 1)


def middle_entropy(model: PreTrainedModel, ids: Tensor) -> float:
    """A threshold that half of the tokens of greedy responses lie below, far from each of them."""
    entropies: list[float] = []

    def note(_: Tensor, logits: Tensor) -> Tensor:
        entropies.extend(entropy_nats(logits).tolist())
        return logits

    greedy(model, ids, LONG, note)
    middle = sorted(entropies)[len(entropies) // 2 - 1 : len(entropies) // 2 + 1]
    return sum(middle) / 2


def column(found: list[dict[str, Any]], name: str) -> Tensor:
    return torch.tensor([row[name] for row in found])


def close(found: Tensor, expected: Tensor, atol: float = 1e-5) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=atol)


@pytest.mark.parametrize("eager", [True, False])
def test_a_folder_with_dense_weights_a_shift_and_reset(
    tiny: Tiny, ids: Tensor, tmp_path: Path, answer: Answer, eager: bool
) -> None:
    """Log-probabilities of prompts, greedy tokens, rows alone as in a batch, and ReSET's temperatures, which show in
    the log-probabilities that vLLM would sample from."""
    model = tiny()
    prepare(model, **PRECISION)
    save_model(shifted(model), words(), tmp_path / "model")
    plain = {"temperature": 0, "max_tokens": 10, "ignore_eos": True}
    policy = Decoding.reset(0.5, middle_entropy(model, ids), t_high=1.5, top_p=1.0, window=3)
    reset = {"temperature": 0, "max_tokens": LONG, "ignore_eos": True, "extra_args": {"reqat_decoding": str(policy)}}
    calls = [{"rows": ids.tolist(), "params": plain}] + [{"rows": [row], "params": plain} for row in ids.tolist()]
    together, *alone, tempered = answer(
        tmp_path / "model",
        [*calls, {"rows": ids.tolist(), "params": reset}],
        {"VLLM_USE_V2_MODEL_RUNNER": "0"},
        quantization="reqat",
        enforce_eager=eager,
        skip_tokenizer_init=False,
        logits_processors=["reqat.vllm.reset:ReSET"],
        logprobs_mode="processed_logprobs",
    )
    tokens, of_tokens = greedy(model, ids, 10)
    close(column(together, "prompt"), prompt_logprobs(model, ids))
    assert torch.equal(column(together, "ids"), tokens)
    close(column(together, "logprobs"), of_tokens)
    single = [rows[0] for rows in alone]
    close(column(single, "prompt"), column(together, "prompt"), atol=2e-6)
    assert torch.equal(column(single, "ids"), tokens)

    assert policy.rule is not None
    tokens, expected = greedy(model, ids, LONG, ReSET(policy.rule, words()))
    assert torch.equal(column(tempered, "ids"), tokens)
    close(column(tempered, "logprobs"), expected, atol=1e-5 / policy.rule.t_low)
    raw = greedy(model, ids, LONG)[1]
    assert bool((expected > raw + 0.01).any()) and bool((expected < raw - 0.01).any())  # both temperatures were at work


def test_a_frozen_folder_under_tensor_parallelism(tiny: Tiny, ids: Tensor, tmp_path: Path, answer: Answer) -> None:
    """Codes of biased layers, static scales, rotated layers and keys, a skipped layer; on two ranks."""
    model = tiny("qwen2", hidden_size=128, intermediate_size=128)
    options = {"global_scale": "static", "rotation": 16, "kv_rotation": 32, "kv_signs": 5}
    prepare(model, **PRECISION, **options, skip=["model.layers.1.mlp.down_proj"])
    calibrate_static(shifted(model), [ids])
    export_model(model, None, tmp_path / "model", "reqat")
    check_on_two_ranks(model, ids, tmp_path / "model", answer)


def test_scales_by_row_under_tensor_parallelism(tiny: Tiny, ids: Tensor, tmp_path: Path, answer: Answer) -> None:
    """A rank has a share of a row, and of a weight; scales are those of the whole."""
    model = tiny()
    prepare(model, **PRECISION)
    save_model(shifted(model), None, tmp_path / "model")
    check_on_two_ranks(model, ids, tmp_path / "model", answer)


def check_on_two_ranks(model: PreTrainedModel, ids: Tensor, folder: Path, answer: Answer) -> None:
    calls = [{"rows": ids.tolist(), "params": {"temperature": 0, "max_tokens": 10, "ignore_eos": True}}]
    ranks = {"tensor_parallel_size": 2, "distributed_executor_backend": "mp"}
    (found,) = answer(folder, calls, quantization="reqat", **ranks)
    close(column(found, "prompt"), prompt_logprobs(model, ids))
    assert torch.equal(column(found, "ids"), greedy(model, ids, 10)[0])


REFUSED = """
import json, sys
from reqat.vllm.config import ReqatQuantization
from vllm.sampling_params import SamplingParams
from reqat.vllm.reset import ReSET

def error(call):
    try:
        call()
    except ValueError as found:
        return str(found)

def read(folder):
    ReqatQuantization.from_config({}).maybe_update_config(folder)

def ask(**params):
    ReSET.validate_params(SamplingParams(**params))

said = {folder.rpartition("/")[2]: error(lambda: read(folder)) for folder in sys.argv[1:]}
policy = {"extra_args": {"reqat_decoding": "reset(t_low=0.5, tau0=1.0, top_p=0.9)"}}
said["ask, right"] = error(lambda: ask(temperature=1.0, top_p=0.9, **policy))
said["ask, greedy"] = error(lambda: ask(temperature=0, **policy))
said["ask, temperature"] = error(lambda: ask(temperature=0.6, top_p=0.9, **policy))
said["ask, top_p"] = error(lambda: ask(temperature=1.0, **policy))
said["ask, other"] = error(lambda: ask(extra_args={"reqat_decoding": "sample(temperature=1.0)"}))
print("SAID " + json.dumps(said))
"""


def test_what_is_refused_is_named(tiny: Tiny, ids: Tensor, tmp_path: Path) -> None:
    """Before any weight is read, and before a request is queued."""
    expected = {
        "right": None,
        "dynamic": "global_scale",
        "no-sidecar": "reqat.json",
        "bases": "basis",
        "edited": "q_proj",
    }
    for name in expected:
        model = tiny()
        prepare(model, **PRECISION, global_scale="dynamic" if name == "dynamic" else "row")
        if name == "bases":
            kv_quantizers(model)[0].basis.set(None, torch.eye(32))
        if name == "edited":
            export_model(model, None, tmp_path / name, "reqat")
            file = tmp_path / name / "model.safetensors"
            tensors = load_file(file)
            tensors["model.layers.0.self_attn.q_proj.weight"] += 1
            save_file(tensors, file)
        else:
            save_model(model, None, tmp_path / name)
    (tmp_path / "no-sidecar" / "reqat.json").unlink()
    printed = run(["-c", REFUSED, *(tmp_path / name for name in expected)], tmp_path, {})
    said = json.loads(next(line for line in printed.splitlines() if line.startswith("SAID "))[5:])
    expected |= {"ask, right": None, "ask, greedy": None}
    expected |= {"ask, temperature": "temperature=0.6", "ask, top_p": "top_p", "ask, other": "reset"}
    assert said.keys() == expected.keys()
    for name, part in expected.items():
        assert (said[name] is None) if part is None else (part in (said[name] or "")), (name, said[name])


def test_the_plugin_loads_nothing_of_another_transformers(tmp_path: Path) -> None:
    code = "import sys, reqat.vllm.config, reqat.vllm.reset; print(*(m for m in sys.modules if m.startswith('reqat')))"
    loaded = run(["-c", code], tmp_path, {}).splitlines()[-1].split()
    packages = {".".join(name.split(".")[:2]) for name in loaded}
    assert packages == {"reqat", "reqat.config", "reqat.formats", "reqat.decoding", "reqat.vllm"}
