"""How much longer a QAT step takes than a BF16 one: the same loop's step, the same rows, in turns.

A step is what the training loop does between two optimizer steps: forward, loss on response tokens,
backward, clipping, AdamW. Models start from the same weights. One micro-batch a step, so weights and
inputs are both quantized once.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from reqat.config.allocator import freed_memory_kept
from reqat.data import Batch
from reqat.models import load_model, prepare
from reqat.quant.autocast import resolve
from reqat.training.loop import batch_loss
from reqat.training.objective import Objective


@dataclass
class Trainer:
    """One model in training; ``step()`` runs one optimizer step on the batch."""

    name: str
    format: str
    model: PreTrainedModel
    optimizer: torch.optim.Optimizer
    batch: Batch
    autocast: bool

    def step(self) -> float:
        """Seconds that one step took."""
        began = time.perf_counter()
        loss, _ = batch_loss(self.model, None, Objective(), self.batch, autocast=self.autocast)
        (loss / self.batch.n_response_tokens).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return time.perf_counter() - began


def trainers(
    path: str, precision: str, rows: int, row_tokens: int, seed: int = 6, autocast: str = "bf16"
) -> list[Trainer]:
    """A BF16 and a QAT trainer of the model at ``path`` on the same random tokens, all of them response; ``autocast``
    as in the settings of a training."""
    found = []
    bf16 = resolve(autocast, "cpu") == "bf16"
    for name in ("BF16", precision):
        model: Any = load_model(path)
        prepare(model, name, override=True)
        model.train()
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(0, model.config.vocab_size, (rows, row_tokens), generator=generator)
        batch = Batch(ids, ids.roll(-1, 1), _counting(rows, row_tokens), torch.ones_like(ids))
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, weight_decay=0.0, fused=True)
        found.append(Trainer("fine-tuning" if name == "BF16" else "QAT", name, model, optimizer, batch, bf16))
    return found


@freed_memory_kept()
def measure_steps(
    path: str,
    precision: str,
    *,
    rows: int,
    row_tokens: int,
    rounds: int,
    autocast: str = "bf16",
    before: Callable[[], Any] = lambda: None,
) -> dict[str, list[float]]:
    """Seconds of ``rounds`` steps of each trainer, in turns after one step each to warm up; by format.

    ``before`` runs ahead of each step (the benchmark reads its bandwidth probe there).
    """
    both = trainers(path, precision, rows, row_tokens, autocast=autocast)
    for trainer in both:
        trainer.step()
    seconds: dict[str, list[float]] = {trainer.format: [] for trainer in both}
    for turn in range(rounds):
        for trainer in both if turn % 2 == 0 else both[::-1]:
            before()
            seconds[trainer.format].append(trainer.step())
    return seconds


def _counting(rows: int, row_tokens: int) -> Tensor:
    return torch.arange(row_tokens)[None].expand(rows, row_tokens).contiguous()
