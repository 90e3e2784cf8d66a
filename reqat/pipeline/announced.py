"""What `reqat train` is going to do, in words: stages, optimizer steps, and the memory that they take."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from reqat.config import machine
from reqat.config.memory import TrainingMemory, shown, training_memory
from reqat.config.plan import Plan
from reqat.config.precision import PrecisionSpec
from reqat.config.stage import PTQSettings, QFitSettings, Stage, Training, TrainSettings
from reqat.config.tier import Shape

if TYPE_CHECKING:
    from reqat.data.packing import PackedRows
    from reqat.data.traces import Traces


def announce(
    data: str,
    plan: Plan,
    last: Stage,
    at: PrecisionSpec,
    traces: Traces,
    imported: Mapping[str, Any],
    sizes: tuple[Shape, int],
) -> list[dict[str, Any]]:
    """Print what is going to be done, and the memory that it takes; returns a line of it for each stage."""
    from reqat.data import Traces as All
    from reqat.data import pack, select

    left_out = f"; {imported['left_out']} longer than {imported['row_tokens']} left out" if imported["left_out"] else ""
    cut = f"; {imported['cut']} cut to {imported['row_tokens']}" if imported["cut"] else ""
    print(f"traces: {len(traces)} of {data}, {traces.n_tokens} tokens{left_out}{cut}")
    entries = []
    for stage in reversed(list(plan.lineage(last.id))):
        if stage.kind == "base":
            continue
        entry: dict[str, Any] = {"stage": stage.id, "kind": stage.kind, "precision": stage.precision.name}
        what, takes = "", []
        if isinstance(stage.settings, TrainSettings):
            training, selection = stage.settings.training, stage.settings.traces
            chosen = All.of(select(traces, selection.tokens, skip_tokens=selection.skip_tokens))
            rows = pack(chosen, training.row_tokens, bos_id=0, pad_id=0)  # the ids only fill in
            micro = -(-len(rows) * selection.epochs // training.rows_per_batch)
            steps = -(-micro // training.accumulation)
            entry |= {"traces": len(chosen), "tokens": chosen.n_tokens * selection.epochs, "steps": steps}
            passes = f", {selection.epochs} times" if selection.epochs > 1 else ""
            what = (
                f"{chosen.n_tokens} tokens of {len(chosen)} traces{passes}: {steps} steps of "
                f"{training.rows_per_batch * training.accumulation} rows of {training.row_tokens}, lr {training.lr:g}"
            )
            takes = memory_lines(*sizes, training, stage.kind == "qat", most_responses(rows, training.rows_per_batch))
        elif isinstance(stage.settings, QFitSettings | PTQSettings):
            looked = stage.settings.calibration
            what = f"looks at {looked.sequences} sequences of {looked.sequence_tokens} tokens"
        entries.append(entry)
        print(f"{len(entries)}. {stage.kind:9}{stage.precision.name:15}{what}")
        for line in takes:
            print(f"   {line}")
    print(f"then: {at.name}, weights quantized once" if at != PrecisionSpec() else "then: BF16")
    sys.stdout.flush()
    return entries


def most_responses(rows: PackedRows, together: int) -> int:
    """The most response tokens that ``together`` rows hold."""
    traces = rows.traces
    tokens = (traces.lengths - traces.prompts - traces.bos)[rows.order]
    return int(sum(sorted(np.add.reduceat(tokens, rows.starts[:-1]).tolist())[-together:]))


def memory_lines(shape: Shape, count: int, training: Training, quantized: bool, response_tokens: int) -> list[str]:
    """What a training of a model of ``shape`` and ``count`` parameters takes, in lines to print before it starts.

    Where :func:`reqat.training.distributed.joined` put it, with the processes that torchrun started. Says what gradient
    checkpointing changes, and warns where less is free.
    """
    import torch

    from reqat.quant.autocast import resolve
    from reqat.training import distributed

    shared = distributed.current()
    gpu = shared.device is not None and shared.device.type == "cuda"
    ranks, here = shared.size, int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if shared.size > 1 else 1
    autocast = resolve(training.autocast, "cuda" if gpu else "cpu") == "bf16"

    def planned(asked: Training) -> TrainingMemory:
        return training_memory(
            shape,
            asked,
            quantized=quantized,
            autocast=autocast,
            count=count,
            response_tokens=response_tokens,
            ranks=ranks,
            offload=shared.offload,
            cpu=not gpu,
        )

    memory, on = planned(training), training.gradient_checkpointing
    other = planned(training.model_copy(update={"gradient_checkpointing": not on})).peak
    each = f" on each of {ranks} ranks" if ranks > 1 else ""
    lines = [f"memory: {memory}{each}; {'without' if on else 'with'} gradient checkpointing {shown(other)}"]
    if memory.host:
        lines[0] += f"; {shown(memory.host)} of host memory{each}"
    host = here * (memory.host + (0.0 if gpu else memory.peak))  # one memory for all ranks of this machine
    wanted = [(host, machine.available_bytes(), "")]
    if gpu:
        wanted.append((memory.peak, torch.cuda.mem_get_info()[0], " on the GPU"))
    for needed, free, where in wanted:
        if needed > free:
            lines.append(
                f"warning: {shown(needed)} are needed{where}, and {shown(free)} are free here; lower --rows-per-batch "
                "or --row-tokens, add --gradient-checkpointing, or take a larger machine"
            )
    return lines
