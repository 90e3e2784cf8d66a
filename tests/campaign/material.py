"""What bad inputs are made from: a checkout with configuration, and small good results of every kind.

:func:`build` makes it once a campaign (all of it through the command line and the library, so that good inputs are
seen to be accepted); every case works on a copy.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CORPUS = "So 2 + 2 = 4. So 2 + 1 gives 3, and the answer is 3.\n How many legs have cats and spiders?"
PROBLEMS = [
    {"id": "p1", "prompt": "How many legs have cats?", "answer": "4", "response": "So the answer is 4."},
    {"id": "p2", "prompt": "So 2 + 2 =", "answer": "4", "response": "So 2 + 2 = 4."},
]


def build(folder: Path) -> Path:
    """Fill ``folder``: config/, results/base/, model/, quantized/, store/, traces/, problems.jsonl, plan.json,
    fit.json, checkpoint/, text.txt. Returns it."""
    import torch

    from reqat.data import Trace, write_store
    from reqat.data.tokenizer import build_tokenizer
    from reqat.models import save_model

    folder.mkdir(parents=True, exist_ok=True)
    shutil.copytree(ROOT / "config", folder / "config", dirs_exist_ok=True)
    tokenizer = build_tokenizer([CORPUS])
    model = tiny_model(len(tokenizer), tokenizer.eos_token_id)
    save_model(model, tokenizer, folder / "model")
    (folder / "problems.jsonl").write_text("".join(json.dumps(row) + "\n" for row in PROBLEMS), encoding="utf-8")
    (folder / "text.txt").write_text(CORPUS * 40, encoding="utf-8")
    write_store(folder / "store", {"train": [_trace(Trace, tokenizer, i) for i in range(40)]})
    with inside(folder):
        good("quantize", "--model", "model", "--precision", "NVFP4-W4A4KV4", "--out", "quantized", "--quiet")
        good(
            "entropy",
            "--reference",
            "model",
            "--out",
            "traces",
            "--problems",
            "problems.jsonl",
            "--max-new-tokens",
            "4",
            "--no-sample",
            "--quiet",
        )
        (folder / "plan.json").write_text(good("plan", "--tier", "smoke", "--json"), encoding="utf-8")
        policy = "reset(t_low=0.3, tau0=0.5)"
        (folder / "fit.json").write_text(json.dumps({"schema": "reqat.reset/1", "policy": policy}), encoding="utf-8")
        good("view", "traces", "--out", "page.html")
    _checkpoint(folder / "checkpoint")
    torch.manual_seed(0)
    return folder


def tiny_model(vocabulary: int, end: int | None):
    """A Llama of some thousand weights."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=2,
            head_dim=32,
            vocab_size=vocabulary,
            max_position_embeddings=96,
            eos_token_id=end,
        )
    ).eval()


def _trace(kind, tokenizer, i: int):
    prompt, response = f"How many legs have {i % 7} cats?\n", f"So {i % 9} + 2 = {i % 9 + 2}."
    ids = [tuple(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in (prompt, response)]
    return kind(f"t{i}", f"p{i}", "chain_sum", prompt, response, ids[0], (*ids[1], tokenizer.eos_token_id))


def _checkpoint(folder: Path) -> None:
    import torch

    from reqat.training import checkpoint

    layer = torch.nn.Linear(4, 4)
    optimizer = torch.optim.AdamW(layer.parameters())
    layer(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    checkpoint.save(folder, layer, optimizer, {"step": 1, "run": {}})


@contextmanager
def inside(folder: Path) -> Iterator[None]:
    """With ``folder`` as the working directory."""
    here = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(here)


def good(*arguments: str) -> str:
    """Run a command that must succeed; returns what it printed."""
    from reqat.cli.main import main

    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main(list(arguments))
            code: object = 0
        except SystemExit as end:
            code = end.code or 0
    if code != 0:
        raise RuntimeError(f"reqat {' '.join(arguments)} ended with {code}: {err.getvalue()[-2000:]}")
    return out.getvalue()


def copy(material: Path, folder: Path) -> Path:
    """A copy to spoil."""
    shutil.copytree(material, folder, copy_function=shutil.copyfile)
    return folder
