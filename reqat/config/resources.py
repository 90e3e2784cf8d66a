"""The accelerator memory that a tier needs, computed from model sizes before anything is downloaded or started.

Training keeps, per parameter, a float32 weight, a float32 gradient, two float32 Adam moments and a bf16 copy under
autocast: 18 bytes. With gradient checkpointing one hidden state a layer is kept per token; one layer at a time is
computed again. The logits of the response tokens stand three times in float32 (logits, log-probabilities, gradient).
A teacher adds its weights. Decoding keeps float32 weights and a KV cache, of a whole response for each row. Q-FIT and
PTQ keep float32 weights and what one layer computes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from reqat.config.errors import ReqatError
from reqat.config.plan import Plan
from reqat.config.stage import Calibration, Decoding, Training
from reqat.config.tier import Shape

GIB = 2**30
Job = Literal["training", "calibrating", "evaluating"]
"""Kinds of jobs that need memory of a GPU: stages that train, Q-FIT and PTQ, evaluations."""
_TRAIN_BYTES = 4 + 4 + 8 + 2
# Share of a GPU's memory that weights and activations may fill; the rest goes to the context, workspaces and
# fragmentation.
_USABLE = 0.9


@dataclass(frozen=True)
class Need:
    """What the largest job of a tier needs: bytes on accelerators in all, GPUs of the tier's size, bytes of host
    memory."""

    what: str
    device_bytes: float
    gpus: int
    gpu_memory_gib: float
    host_bytes: float

    def __str__(self) -> str:
        return (
            f"{self.what} needs {self.device_bytes / GIB:.0f} GiB of accelerator memory ({self.gpus} GPUs of "
            f"{self.gpu_memory_gib:g} GiB) and {self.host_bytes / GIB:.0f} GiB of host memory"
        )


def parameters(shape: Shape) -> int:
    """Number of weights of a Llama- or Qwen-like decoder of that shape."""
    s = shape
    attention = s.hidden_size * s.head_dim * (2 * s.heads + 2 * s.kv_heads)
    layer = attention + 3 * s.hidden_size * s.mlp + 2 * s.hidden_size
    embeddings = s.vocabulary * s.hidden_size * (1 if s.tie_embeddings else 2)
    return s.layers * layer + embeddings + s.hidden_size


def training_bytes(shape: Shape, training: Training) -> float:
    """Peak accelerator memory of training a model of that shape, in bytes."""
    s = shape
    tokens = training.rows_per_batch * training.row_tokens
    layer = tokens * (6 * s.hidden_size + 2 * (s.heads + s.kv_heads) * s.head_dim + 4 * s.mlp) * 4
    kept = tokens * s.hidden_size * s.layers * 4 if training.gradient_checkpointing else layer * s.layers
    logits = 3 * tokens * s.vocabulary * 4
    # All other terms compare with a teacher; thought to be of the student's size.
    teacher = 4 * parameters(s) if any(term.name not in ("nll", "sem") for term in training.objective) else 0
    return _TRAIN_BYTES * parameters(s) + kept + layer + logits + teacher


def decoding_bytes(shape: Shape, decoding: Decoding) -> float:
    """Peak accelerator memory of batched decoding with a model of that shape, in bytes."""
    s = shape
    cache = decoding.batch_rows * decoding.max_new_tokens * s.layers * 2 * s.kv_heads * s.head_dim * 4
    return 4 * parameters(s) + cache + 3 * decoding.batch_rows * s.vocabulary * 4


def calibrating_bytes(shape: Shape, calibration: Calibration) -> float:
    """Peak accelerator memory of Q-FIT or PTQ of a model of that shape, in bytes: weights, inputs and outputs of one
    layer."""
    s = shape
    tokens = calibration.sequences * calibration.sequence_tokens
    return 4 * parameters(s) + 4 * tokens * 2 * s.hidden_size


def need(plan: Plan, job: Job | None = None) -> Need | None:
    """What the tier's largest job needs, or the largest of a kind; None for tiers that run on a CPU."""
    tier = plan.tier
    if tier.resources.device == "cpu":
        return None
    needs: list[Need] = []
    for label, model in tier.models.items():
        if model.shape is None:
            raise ReqatError(f"tier {tier.name}: models.{label} needs a `shape` to compute the memory of device cuda.")
        jobs: list[tuple[Job, float]] = [
            ("training", training_bytes(model.shape, tier.train.finetune)),
            ("training", training_bytes(model.shape, tier.train.qat)),
            ("calibrating", calibrating_bytes(model.shape, tier.qfit.calibration)),
            ("calibrating", calibrating_bytes(model.shape, tier.ptq.calibration)),
            ("evaluating", decoding_bytes(model.shape, tier.evaluation.decoding)),
        ]
        for kind, device in jobs:
            gpus = math.ceil(device / (_USABLE * tier.resources.gpu_memory_gib * GIB))
            what, host = f"{kind} {label}", 4.0 * parameters(model.shape)
            if job in (None, kind):
                needs.append(Need(what, device, gpus, tier.resources.gpu_memory_gib, host))
    return max(needs, key=lambda n: n.device_bytes)


def require(plan: Plan, gpu_bytes: Sequence[float], host_bytes: float, job: Job | None = None) -> None:
    """Raise `ReqatError` unless GPUs of `gpu_bytes` memory each and `host_bytes` of host memory do for the tier, or for
    its jobs of a kind: on a cluster a job sees the GPUs that it was given."""
    wanted = need(plan, job)
    if wanted is None:
        return
    enough = [size for size in gpu_bytes if size >= 0.97 * wanted.gpu_memory_gib * GIB]
    have = f"this machine has {len(gpu_bytes)} GPUs" + (
        f" of {', '.join(f'{size / GIB:.0f}' for size in gpu_bytes)} GiB" if gpu_bytes else ""
    )
    if len(enough) < wanted.gpus or host_bytes < wanted.host_bytes:
        raise ReqatError(
            f"tier {plan.tier.name} cannot start here: {wanted}; {have} and {host_bytes / GIB:.0f} GiB of host memory. "
            f"Run it on such a machine (profiles/gpu, profiles/slurm), look at it with --dry-run, or pick another tier."
        )
