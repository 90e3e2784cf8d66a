"""The accelerator memory that a tier needs, computed from model sizes before anything is downloaded or started.

Training: :mod:`reqat.config.memory`, for as many GPUs as it takes to share weights, gradients and moments. Decoding
keeps float32 weights and a KV cache, of a whole response for each row. Q-FIT and PTQ keep float32 weights and what one
layer computes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from reqat.config.errors import ReqatError
from reqat.config.memory import GIB, TrainingMemory, parameters, training_memory
from reqat.config.plan import Plan
from reqat.config.stage import Calibration, Decoding, Training
from reqat.config.tier import Resources, Shape

Job = Literal["training", "calibrating", "evaluating"]
"""Kinds of jobs that need memory of a GPU: stages that train, Q-FIT and PTQ, evaluations."""
# Share of a GPU's memory that weights and activations may fill; the rest goes to the context, workspaces and
# fragmentation.
_USABLE = 0.9
_MOST_GPUS = 1024


@dataclass(frozen=True)
class Need:
    """What the largest job of a tier needs: bytes on accelerators in all, GPUs of the tier's size, bytes of host
    memory of each of the machines that share it."""

    what: str
    device_bytes: float
    gpus: int
    gpu_memory_gib: float
    host_bytes: float
    machines: int = 1

    def __str__(self) -> str:
        each = f", on each of {self.machines} machines" if self.machines > 1 else ""
        return (
            f"{self.what} needs {self.device_bytes / GIB:.0f} GiB of accelerator memory ({self.gpus} GPUs of "
            f"{self.gpu_memory_gib:g} GiB) and {self.host_bytes / GIB:.0f} GiB of host memory{each}"
        )


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
        usable, shape = _USABLE * tier.resources.gpu_memory_gib * GIB, model.shape
        plain = 4.0 * parameters(shape)
        jobs: list[tuple[Job, float, int, float]] = []
        for training, quantized in ((tier.train.finetune, False), (tier.train.qat, True)):
            gpus, memory = _shared(f"tier {tier.name}, {label}", shape, training, quantized, usable, tier.resources)
            # The first process reads the whole model, and a teacher beside it, before each keeps its part.
            models = 2 if memory.teacher else 1
            host = max(models * plain, memory.host) + (tier.resources.processes - 1) * memory.host
            jobs.append(("training", gpus * memory.peak, gpus, host))
        for calibration in (tier.qfit.calibration, tier.ptq.calibration):
            device = calibrating_bytes(shape, calibration)
            jobs.append(("calibrating", device, math.ceil(device / usable), plain))
        device = decoding_bytes(shape, tier.evaluation.decoding)
        jobs.append(("evaluating", device, math.ceil(device / usable), plain))
        for kind, device, gpus, host in jobs:
            if job in (None, kind):
                machines = tier.resources.nodes if kind == "training" else 1
                needs.append(Need(f"{kind} {label}", device, gpus, tier.resources.gpu_memory_gib, host, machines))
    return max(needs, key=lambda n: n.device_bytes)


def _shared(
    what: str, shape: Shape, training: Training, quantized: bool, usable: float, resources: Resources
) -> tuple[int, TrainingMemory]:
    """GPUs that hold a training together, and the memory of each process: a GPU a process, or the fewest where the tier
    asks for one process."""
    processes = resources.processes * resources.nodes
    for gpus in range(processes, _MOST_GPUS + 1):
        memory = training_memory(shape, training, quantized=quantized, ranks=gpus, offload=resources.offload)
        each = memory.peak
        if each <= usable:
            if processes not in (1, gpus):
                raise ReqatError(
                    f"{what}: {processes} processes are too few, {gpus} hold it: raise resources.processes."
                )
            return gpus, memory
    raise ReqatError(
        f"{what}: a batch takes {each / GIB:.0f} GiB on each of {_MOST_GPUS} GPUs, and {usable / GIB:.0f} are usable: "
        "lower rows_per_batch or row_tokens, or set gradient_checkpointing."
    )


def require(plan: Plan, gpu_bytes: Sequence[float], host_bytes: float, job: Job | None = None) -> None:
    """Raise `ReqatError` unless GPUs of `gpu_bytes` memory each and `host_bytes` of host memory do for the tier, or for
    its jobs of a kind: on a cluster a job sees the GPUs that it was given."""
    wanted = need(plan, job)
    if wanted is None:
        return
    settings = plan.tier.resources
    if wanted.what.startswith("training") and settings.processes * settings.nodes == 1 and wanted.gpus > 1:
        raise ReqatError(
            f"tier {plan.tier.name} cannot start here: {wanted}, and resources.processes 1 computes on one GPU: set "
            f"resources.processes to {wanted.gpus}, or resources.offload."
        )
    enough = [size for size in gpu_bytes if size >= 0.97 * wanted.gpu_memory_gib * GIB]
    have = f"this machine has {len(gpu_bytes)} GPUs" + (
        f" of {', '.join(f'{size / GIB:.0f}' for size in gpu_bytes)} GiB" if gpu_bytes else ""
    )
    if len(enough) < math.ceil(wanted.gpus / wanted.machines) or host_bytes < wanted.host_bytes:
        raise ReqatError(
            f"tier {plan.tier.name} cannot start here: {wanted}; {have} and {host_bytes / GIB:.0f} GiB of host memory. "
            f"Run it on such a machine (profiles/gpu, profiles/slurm), look at it with --dry-run, or pick another tier."
        )
