"""The only training loop: fine-tuning, QAT and every ablation run through it.

What differs between methods is the model that comes in (plain or prepared for a precision), the rows, and the
objective's terms. AdamW or SGD with Nesterov's momentum, without decay of gradient rules' parameters, with a linear
warm-up and a cosine down to a floor, gradient accumulation with one divisor for the whole accumulated batch, clipping,
float32 master weights, products in bf16 or float32. The run is a pure function of its arguments: same seed, same
weights, bit for bit, also across a kill at any moment (:mod:`reqat.training.checkpoint`). Several processes share the
micro-batches of a step and divide the model among them (:mod:`reqat.training.distributed`); the result is then that of
one, up to rounding.

"Tokens" are what rows count: of images, images.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal, Protocol, TypeGuard

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from reqat.config.allocator import freed_memory_kept
from reqat.config.base import Count, Seed, digest
from reqat.config.errors import ReqatError
from reqat.config.progress import bar
from reqat.config.stage import Optimization
from reqat.data import AnyBatch, Rows, Sequences
from reqat.data.packing import IGNORE
from reqat.models import check_token_ids, embedding_rows, gradient_rules, precision_of, weights_quantized_once
from reqat.quant import GradientRule
from reqat.quant import autocast as autocast_region
from reqat.quant.autocast import resolve as resolve_autocast
from reqat.training import checkpoint, distributed
from reqat.training.distributed import Ranks
from reqat.training.forward import Outputs, head_of, run_model
from reqat.training.objective import LAYERWISE, OUTPUTS, Objective, TermContext
from reqat_kernels.sem_loss import CHUNK_BYTES, entropies_from_hidden, row_statistics

# A micro-batch whose logits take more than this in float32 has its loss computed from hidden states, where the
# objective allows; smaller ones keep the plain arithmetic of full logits. It saves memory, not time: on one AVX2 core a
# step with 76 MiB of logits took as long either way.
FUSE_ABOVE_BYTES = CHUNK_BYTES

# Steps after which a log hears how long the run will take, and not only after the first half minute.
FIRST_ESTIMATE = 3


class RunSettings(Optimization):
    """Hyper-parameters, and what else decides a run: how often the rows are seen, and in which order."""

    epochs: Count = 1
    seed: Seed = 0
    checkpoint_seconds: float = Field(default=60.0, ge=0)
    """How often the resumable state is written; decides nothing of the weights."""

    @classmethod
    def of(cls, optimization: Optimization, **more: Any) -> RunSettings:
        """The hyper-parameters of settings that have more besides, and what else decides the run."""
        return cls(**{name: getattr(optimization, name) for name in Optimization.model_fields}, **more)


@dataclass
class TrainResult:
    """What a run leaves: ``loss`` and each term are means over response tokens, in nats, per optimizer step."""

    steps: int
    tokens: int
    response_tokens: int
    seconds: float
    history: list[dict[str, float]] = field(repr=False, default_factory=list)
    autocast: str = "none"
    """``none`` or ``bf16``: what the run computed its products in, also where the settings said ``auto``."""

    @property
    def tokens_per_second(self) -> float:
        """Tokens without padding over the wall time of all steps, resumed runs included."""
        return self.tokens / self.seconds if self.seconds else math.nan

    @property
    def final_loss(self) -> float:
        """Mean loss over the last 5% of the steps, at least one (Table 5's "final loss")."""
        tail = self.history[-max(1, len(self.history) // 20) :]
        return sum(h["loss"] for h in tail) / len(tail)


class Observer(Protocol):
    """Looks at a training from inside, and must leave model, gradients and random state as it found them."""

    def __call__(self, model: PreTrainedModel, batch: AnyBatch, step: int, loss: Callable[[], Tensor]) -> object:
        """Called before each micro-batch. ``step`` counts from 0 and is not done yet; ``loss()`` runs the model on
        ``batch`` and gives what the loop is about to differentiate, summed over response tokens.
        """


class Schedule(Protocol):
    """What decides the learning rate."""

    lr: float
    warmup: float
    min_lr_ratio: float
    schedule: Literal["cosine", "linear"]


def learning_rate(step: int, total: int, settings: Schedule) -> float:
    """Linear warm-up over ``warmup`` of the steps, then by ``schedule`` from ``lr`` to ``min_lr_ratio * lr``. Steps
    count from 0.
    """
    warmup = round(settings.warmup * total)
    if step < warmup:
        return settings.lr * (step + 1) / warmup
    floor = settings.min_lr_ratio
    progress = min(1.0, (step - warmup) / max(1, total - 1 - warmup))
    left = 1 - progress if settings.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
    return settings.lr * (floor + (1 - floor) * left)


def batch_loss(
    model: PreTrainedModel, teacher: PreTrainedModel | None, objective: Objective, batch: AnyBatch, *, autocast: bool
) -> tuple[Tensor, dict[str, float]]:
    """The objective on one micro-batch: its sum over response tokens (differentiable), and each term's.

    Large logits are not held where they need not be (:data:`FUSE_ABOVE_BYTES`).
    """
    keep = batch.labels != IGNORE
    labels = batch.labels[keep]
    own = objective.needs & set(OUTPUTS)
    theirs = frozenset(need.removeprefix("teacher.") for need in objective.needs - own)
    with autocast_region(batch.labels.device.type, torch.bfloat16, enabled=autocast):
        outputs = run_model(model, batch, keep, own, "student")
        head = head_of(model)
        if objective.fusable and _is_plain(head) and 4 * len(labels) * len(head.weight) > FUSE_ABOVE_BYTES:
            return objective.from_hidden(outputs.hidden, head.weight, labels)
        logits = head(outputs.hidden)
        teacher_outputs = teacher_logits = None
        if teacher is not None and theirs:
            teach = partial(_teacher_outputs, teacher, batch, keep, theirs)
            teacher_outputs, teacher_logits = distributed.within(teacher, teach)
    layerwise = {name: getattr(outputs, name) for name in LAYERWISE}
    if teacher_outputs is not None:
        layerwise |= {f"teacher_{name}": getattr(teacher_outputs, name) for name in LAYERWISE}
    context = TermContext(
        logits,
        labels,
        teacher_logits,
        traces=batch.traces(keep),
        responses=keep,
        tokens=batch.tokens,
        **layerwise,
    )
    return objective(context)


@torch.no_grad()
def _teacher_outputs(
    teacher: PreTrainedModel, batch: AnyBatch, keep: Tensor, wanted: frozenset[str]
) -> tuple[Outputs, Tensor | None]:
    outputs = run_model(teacher, batch, keep, wanted, "teacher")
    return outputs, head_of(teacher)(outputs.hidden) if "logits" in wanted else None


@torch.no_grad()
def batch_entropies(model: PreTrainedModel, batch: AnyBatch, *, autocast: bool) -> Tensor:
    """Entropy in nats of the model's distribution at each of the N response positions, ``[N]`` float32."""
    keep = batch.labels != IGNORE
    with autocast_region(batch.labels.device.type, torch.bfloat16, enabled=autocast):
        hidden, head = run_model(model, batch, keep).hidden, head_of(model)
        if _is_plain(head):
            return entropies_from_hidden(hidden, head.weight)
        return row_statistics(head(hidden))[1]


def _within_minibatch(
    model: PreTrainedModel, objective: Objective, group: list[tuple[AnyBatch, bool]], autocast: bool, ranks: Ranks
) -> Objective:
    """The objective for the micro-batches of a step, of which ``group`` are this process's; a sweep over them, without
    gradients, where a term asks."""
    if not objective.needs_minibatch:
        return objective
    # The losses are to see the random numbers (dropout) that the entropies saw.
    device = group[0][0].labels.device
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        found = [
            distributed.within(model, partial(batch_entropies, model, batch, autocast=autocast))[
                : None if counts else 0
            ]
            for batch, counts in group
        ]
    return objective.within(ranks.gathered(torch.cat(found)))


def _loss(
    model: PreTrainedModel, teacher: PreTrainedModel | None, objective: Objective, batch: AnyBatch, autocast: bool
) -> Tensor:
    return _batch_loss(model, teacher, objective, batch, autocast)[0]


def _batch_loss(
    model: PreTrainedModel, teacher: PreTrainedModel | None, objective: Objective, batch: AnyBatch, autocast: bool
) -> tuple[Tensor, dict[str, float]]:
    compute = partial(batch_loss, model, teacher, objective, batch, autocast=autocast)
    found: tuple[Tensor, dict[str, float]] = distributed.within(model, compute)
    return found


def check_traces(
    model: PreTrainedModel, traces: Sequences, label: str, tokenizer: PreTrainedTokenizerBase | None = None
) -> None:
    """Raise ``ReqatError`` naming the first trace with a token id that ``model`` has no embedding row for."""
    low, high = traces.extremes()
    if low >= 0 and high < embedding_rows(model):
        return
    for number in range(len(traces)):
        ids = torch.from_numpy(np.array(traces.tokens(number)))
        check_token_ids(model, ids, f"{label}, trace {traces.id(number)}", tokenizer=tokenizer)


@dataclass(frozen=True)
class Reading:
    """What ``model`` can read, for rows (:class:`~reqat.data.rows.Reader`); errors begin with ``label``."""

    model: PreTrainedModel
    label: str

    def token_ids(self, ids: Sequence[int], what: str) -> None:
        """Raise ``ReqatError`` for a token id that the model has no embedding row for."""
        check_token_ids(self.model, ids, f"{self.label}, {what}")

    def sequences(self, sequences: Sequences) -> None:
        """The same of sequences, naming the first with such an id."""
        check_traces(self.model, sequences, self.label)

    def images(self, channels: int, classes: int) -> None:
        """Raise ``ReqatError`` for images of other channels than the model's, or of more classes."""
        config = self.model.config
        if config.num_channels != channels or (config.num_labels or 0) < classes:
            raise ReqatError(
                f"{self.label}: images of {channels} channels and {classes} classes are not for a model of "
                f"{config.num_channels} channels and {config.num_labels} classes"
            )


def _is_plain(head: Any) -> TypeGuard[nn.Linear]:
    """Whether the head is ``hidden @ weight.T`` and nothing else: no bias, no hook, no other class."""
    return type(head) is nn.Linear and head.bias is None and not (head._forward_hooks or head._forward_pre_hooks)


def parameter_groups(model: nn.Module, parameters: list[nn.Parameter]) -> list[dict[str, Any]]:
    """Of the optimizer: the parameters of most gradient rules are factors around 1, which decay would pull to 0."""
    rules = {id(p) for m in model.modules() if isinstance(m, GradientRule) and not m.decayed for p in m.parameters()}
    groups: list[dict[str, Any]] = [{"params": [p for p in parameters if id(p) not in rules]}]
    if rules:
        groups.append({"params": [p for p in parameters if id(p) in rules], "weight_decay": 0.0})
    return groups


def optimizer_of(
    model: nn.Module, parameters: list[nn.Parameter], settings: Optimization
) -> torch.optim.AdamW | torch.optim.SGD:
    """The optimizer of ``parameters``, which are some of ``model``."""
    groups = parameter_groups(model, parameters)
    common: dict[str, Any] = {"lr": settings.lr, "weight_decay": settings.weight_decay}
    if settings.optimizer == "sgd":
        return torch.optim.SGD(groups, momentum=settings.momentum, nesterov=True, **common)
    return torch.optim.AdamW(groups, betas=settings.betas, fused=True, **common)


def _description(
    model: PreTrainedModel,
    rows: Rows,
    objective: Objective,
    settings: RunSettings,
    teacher: PreTrainedModel | None,
    ranks: Ranks,
) -> dict[str, str]:
    """All that decides the weights that come out, by the words that an error may use; digests where it is long.

    How often a checkpoint is written decides nothing and is left out.
    """
    precision = precision_of(model)
    # Left out at its default, as in ids: a training that was begun before there was a choice goes on.
    defaults = {"attention": "rows", "schedule": "cosine", "optimizer": "adamw", "momentum": 0.9}
    unsaid = {name for name, value in defaults.items() if getattr(settings, name) == value}
    hyper = settings.model_dump(exclude={"checkpoint_seconds", *unsaid})
    run = {
        "set of traces (digest)": rows.digest,
        "model at the start (digest)": ranks.digest(model),
        "precision": "none" if precision is None else f"{precision} {digest(precision.to_dict(), 12)}",
        "objective": ", ".join(repr(term) for term in objective.terms),
    }
    if rules := gradient_rules(model):
        run["gradient rules (digest)"] = digest(rules, 12)
    if teacher is not None and objective.needs_teacher:
        run["teacher (digest)"] = ranks.digest(teacher)
    return run | {f"value of {key}": str(value) for key, value in hyper.items()}


def _result(file: Path, stored: Any, total: int) -> TrainResult:
    """The result so far from a checkpoint's position. Raises `ReqatError` naming what is missing or of no sense."""

    def valid(key: str, value: Any) -> bool:
        if key == "history":
            return isinstance(value, list) and all(
                isinstance(entry, dict) and all(isinstance(number, int | float) for number in entry.values())
                for entry in value
            )
        number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value >= 0
        return number and (key == "seconds" or isinstance(value, int))

    keys = ("steps", "tokens", "response_tokens", "seconds", "history")
    wrong = [key for key in keys if not isinstance(stored, dict) or not valid(key, stored.get(key))]
    if wrong or stored["steps"] > total or len(stored["history"]) != stored["steps"]:
        what = ", ".join(wrong) or f"{stored['steps']} steps of {total}, {len(stored['history'])} in its history"
        raise ReqatError(
            f"checkpoint {file} has no valid position ({what}); delete that folder to start the stage anew"
        )
    return TrainResult(**{key: stored[key] for key in keys})


@freed_memory_kept()
def train(
    model: PreTrainedModel,
    rows: Rows,
    objective: Objective,
    settings: RunSettings,
    checkpoints: Path,
    *,
    teacher: PreTrainedModel | None = None,
    observer: Observer | None = None,
    label: str = "train",
    progress: bool = True,
) -> TrainResult:
    """Train ``model`` in place on ``rows`` for ``settings.epochs`` and return the run's history.

    ``checkpoints`` is a folder for the resumable state; a run that finds one there goes on from it, and the folder is
    left for the caller to delete. ``observer`` sees every micro-batch and changes nothing; after a kill it sees again
    the steps since the last checkpoint. Raises ``ReqatError`` where the objective wants a teacher and has none, a trace
    holds a token id without an embedding row (naming both), a checkpoint is damaged or of another run (naming in what
    they differ) or cannot be written, or the loss is not finite (naming the step).

    Within :func:`reqat.training.distributed.joined` every process calls it with the same arguments. Several divide the
    model, whose parameters are DTensors afterwards (:meth:`~reqat.training.distributed.Ranks.fill` copies them into a
    plain one); they raise ``ReqatError`` where they differ in model, rows or settings, where one of them is gone, for
    an ``observer``, and for steps that cannot be divided (:func:`~reqat.training.distributed.check_division`).
    """
    ranks = distributed.current()
    if objective.needs_teacher and teacher is None:
        raise ReqatError("the objective has a term that needs a teacher; give the stage one")
    if teacher is not None:
        teacher.eval()
    torch.manual_seed(settings.seed)
    device = ranks.device or next(model.parameters()).device
    # Resolved once, and part of what a checkpoint belongs to: a run never goes on in other numbers.
    settings = settings.model_copy(update={"autocast": resolve_autocast(settings.autocast, device.type)})
    autocast, apart = settings.autocast == "bf16", settings.attention == "traces"
    micro = list(rows.batches(settings.rows_per_batch, settings.epochs, settings.seed))
    steps = [micro[i : i + settings.accumulation] for i in range(0, len(micro), settings.accumulation)]
    if ranks.size > 1 and observer is not None:
        raise ReqatError(f"{label}: an observer looks at a training of one process, not of {ranks.size}")
    distributed.check_division(ranks, settings, precision_of(model), objective.needs_micro_batch, model)
    run = _description(model, rows, objective, settings, teacher, ranks)
    ranks.agree(run)
    for one in (model, teacher):
        if one is not None:
            ranks.place(one, trained=one is model)

    model.train()
    if settings.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    parameters = [p for p in model.parameters() if p.requires_grad]
    if not parameters:
        raise ReqatError(
            f"{label}: no parameter of the model takes a gradient, as after freeze(); load the model again and prepare "
            "it without freezing"
        )
    optimizer = optimizer_of(model, parameters, settings)
    result = TrainResult(0, 0, 0, 0.0)
    position = checkpoint.load(checkpoints, model, optimizer, run)
    if position is not None:
        result = _result(checkpoints / checkpoint.FILE, position.get("result"), len(steps))
    result.autocast = settings.autocast
    rows.check(Reading(model, label))

    def state() -> dict[str, Any]:
        return {
            "run": run,
            "result": {k: getattr(result, k) for k in ("steps", "tokens", "response_tokens", "seconds", "history")},
        }

    total_tokens = rows.n_tokens * settings.epochs
    saved = time.monotonic()
    lost = ranks.contact(f"in {label}", "the same command goes on from the last checkpoint")
    with lost, bar(label, total_tokens, rows.unit, done=result.tokens, enabled=progress and ranks.first) as shown:
        first = result.steps
        for step in range(first, len(steps)):
            began = time.monotonic()
            lr = learning_rate(step, len(steps), settings)
            for group in optimizer.param_groups:
                group["lr"] = lr
            ranks.seed(settings.seed, step)
            share = ranks.share(steps[step], settings.accumulation)
            group_batches = [(rows.batch(indices).to(device, apart=apart), counts) for indices, counts in share]
            counted = [batch for batch, counts in group_batches if counts]
            own = (sum(b.n_response_tokens for b in counted), sum(b.n_tokens for b in counted), len(counted))
            divisor, tokens, parts_of_step = (int(n) for n in ranks.totals(own))
            sums = dict.fromkeys((term.name for term in objective.terms), 0.0)
            total = 0.0
            # A divided model's weights come anew with each gathering: keeping what was made of them would keep them.
            reused = not ranks.sharded and (len(group_batches) > 1 or settings.gradient_checkpointing)
            with weights_quantized_once(model, enabled=reused):
                try:
                    within = objective
                    if parts_of_step > 1:
                        within = _within_minibatch(model, objective, group_batches, autocast, ranks)
                    for batch, counts in group_batches:
                        if observer is not None:
                            observer(model, batch, step, partial(_loss, model, teacher, within, batch, autocast))
                        loss, parts = _batch_loss(model, teacher, within, batch, autocast)
                        if not counts:
                            (loss * 0).backward()
                            continue
                        (loss / divisor).backward()
                        total += float(loss.detach()) / divisor
                        for name, value in parts.items():
                            sums[name] += value / divisor
                except ValueError as error:
                    raise ReqatError(f"{label}: at step {step + 1} of {len(steps)}: {error}") from error
            late = ranks.first and time.monotonic() - saved > settings.checkpoint_seconds
            total, due, *parts_all = ranks.totals((total, late, *sums.values()))
            sums = dict(zip(sums, parts_all, strict=True))
            norm = ranks.clip(parameters, math.inf if settings.clip is None else settings.clip)
            if not math.isfinite(total) or not bool(torch.isfinite(norm)):
                raise ReqatError(
                    f"{label}: loss {total} with gradient norm {float(norm)} at step {step + 1} of {len(steps)}; "
                    f"lower lr={settings.lr}"
                )
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            result.steps, result.tokens = step + 1, result.tokens + tokens
            result.response_tokens += divisor
            result.seconds += time.monotonic() - began
            result.history.append(
                {"step": step + 1, "tokens": result.tokens, "lr": lr, "loss": total, "grad_norm": float(norm), **sums}
            )
            shown.set_postfix_str(f"loss {total:.4f}", refresh=False)
            shown.update(tokens)
            if step == first + FIRST_ESTIMATE - 1:
                shown.refresh()
            if due:
                checkpoint.save(checkpoints, model, optimizer, state())
                saved = time.monotonic()
        checkpoint.save(checkpoints, model, optimizer, state())
    model.eval()
    return result
