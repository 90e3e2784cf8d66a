"""`reqat generate`, and `reqat serve`: transformers' own server answers with the tokens of our model."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase
from transformers.utils.import_utils import is_serve_available

from reqat.cli.main import main
from reqat.data import build_tokenizer
from reqat.hf import serving
from reqat.inference import pack
from reqat.models import load_model, load_tokenizer, prepare, save_model

PROMPT = "3 + 4 - 12 ="
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }} : {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant : {% endif %}"
)
NEW = 12


def reqat(*arguments: str) -> int:
    """Exit code of the command."""
    with pytest.raises(SystemExit) as end:
        main([*arguments])
    return int(end.value.code or 0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama at NVFP4-W4A4KV4, as `reqat quantize` leaves one: its precision is in the sidecar alone."""
    tokenizer = build_tokenizer([PROMPT, "user : assistant : the answer is 0 1 2 5 6 7 8 9 * / so we get"])
    tokenizer.chat_template = TEMPLATE
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2,
                    num_attention_heads=4, num_key_value_heads=2, eos_token_id=tokenizer.eos_token_id)
    )  # fmt: skip
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "proj" in name:
                parameter.mul_(4)  # or every position would get the same token
    prepare(model, "NVFP4-W4A4KV4")
    path = tmp_path_factory.mktemp("serving") / "model"
    save_model(model, tokenizer, path)
    return path


def packed_tokens(folder: Path) -> tuple[PreTrainedTokenizerBase, Tensor, Tensor]:
    """The prompt's ids [1, T], and the ids that `generate()` of the packed model adds."""
    model, tokenizer = load_model(folder), load_tokenizer(folder)
    prepare(model, "NVFP4-W4A4KV4")
    pack(model)
    ids: Any = tokenizer.apply_chat_template(
        [{"role": "user", "content": PROMPT}], add_generation_prompt=True, return_tensors="pt", return_dict=False
    )
    out: Any = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=NEW)
    assert len(set(out[0, ids.shape[1] :].tolist())) > 1
    return tokenizer, ids, out[0, ids.shape[1] :]


def test_generate_prints_the_response(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer, _, expected = packed_tokens(folder)
    given = ("generate", "--model", str(folder), "--prompt", PROMPT, "--max-new-tokens", str(NEW), "--threads", "1")
    assert reqat(*given, "--decoding", "greedy") == 0
    assert capsys.readouterr().out == tokenizer.decode(expected, skip_special_tokens=True) + "\n"
    printed = []
    for seed in ("0", "0", "1"):
        assert reqat(*given, "--decoding", "sample(temperature=2)", "--seed", seed, "--no-packed") == 0
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1] != printed[2]


def test_prompt_lookup_and_a_head_in_four_bits_print_a_response(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ("generate", "--model", str(folder), "--prompt", PROMPT, "--max-new-tokens", str(NEW), "--threads", "1")
    printed = []
    for more in ((), ("--prompt-lookup", "4"), ("--head", "NVFP4", "--embeddings", "INT8")):
        assert reqat(*given, "--decoding", "greedy", *more) == 0
        printed.append(capsys.readouterr())
    assert printed[1].out == printed[0].out and f"{NEW} tokens in" in printed[1].err
    assert printed[2].out.strip()
    for bad, named in ((("--head", "FP5"), "FP5"), (("--no-packed", "--head", "INT8"), "--no-packed")):
        assert reqat(*given, *bad) == 2
        assert named in capsys.readouterr().err


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[str]:
    """The address of `reqat serve` in a process of its own."""
    if not is_serve_available():
        pytest.skip("transformers' server is not installed: pip install 'transformers[serving]'")
    with closing(socket.socket()) as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "reqat.cli", "serve", "--model", str(folder), "--host", "127.0.0.1"]
    process = subprocess.Popen([*command, "--port", str(port), "--threads", "1"], cwd=folder.parent)
    address = f"http://127.0.0.1:{port}"
    try:
        while True:
            assert process.poll() is None, "the server has ended"
            try:
                with urllib.request.urlopen(f"{address}/health") as answer:
                    assert json.load(answer) == {"status": "ok"}
                    break
            except urllib.error.URLError:
                time.sleep(0.5)
        yield address
    finally:
        process.terminate()
        process.wait()


def ask(address: str, **body: Any) -> dict[str, Any]:
    request = urllib.request.Request(
        f"{address}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request) as answer:
        found: dict[str, Any] = json.load(answer)
    return found


def test_a_chat_completion_is_what_generate_answers(server: str, folder: Path) -> None:
    tokenizer, ids, expected = packed_tokens(folder)
    messages = [{"role": "user", "content": PROMPT}]
    found = ask(server, model=str(folder), messages=messages, temperature=0, max_tokens=NEW)
    assert found["choices"][0]["message"]["content"] == tokenizer.decode(expected, skip_special_tokens=True)
    assert found["usage"]["prompt_tokens"] == ids.shape[1]
    assert found["usage"]["completion_tokens"] == len(expected)
    with pytest.raises(urllib.error.HTTPError, match="400"):
        ask(server, model="another", messages=messages)


def test_what_stands_in_the_way_is_said_before_a_model_is_loaded(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def loaded(*_: Any, **__: Any) -> None:
        raise AssertionError("loaded for nothing")

    monkeypatch.setattr("reqat.evaluation.loading.load_at", loaded)
    monkeypatch.setattr(serving, "is_serve_available", lambda: False)
    given = ("serve", "--model", str(folder), "--host", "127.0.0.1", "--threads", "1")
    assert reqat(*given) == 2 and "transformers[serving]" in capsys.readouterr().err
    monkeypatch.setattr(serving, "is_serve_available", lambda: True)
    with closing(socket.socket()) as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        assert reqat(*given, "--port", port) == 2 and f"--port {port}" in capsys.readouterr().err
    assert reqat(*given[:4], "no such host", "--threads", "1") == 2 and "no such host" in capsys.readouterr().err


@pytest.mark.parametrize("template", [True, False])
def test_the_address_that_is_told_can_answer(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], template: bool
) -> None:
    monkeypatch.setattr(serving, "check_server", lambda *_: None)
    monkeypatch.setattr(serving, "serve", lambda *_: None)
    served = shutil.copytree(folder, tmp_path / "served")
    if not template:
        (served / "chat_template.jinja").unlink(missing_ok=True)
        settings = json.loads((served / "tokenizer_config.json").read_text())
        settings.pop("chat_template", None)
        (served / "tokenizer_config.json").write_text(json.dumps(settings))
    assert reqat("serve", "--model", str(served), "--threads", "1") == 0
    assert ("/v1/chat/completions" in capsys.readouterr().out) == template
