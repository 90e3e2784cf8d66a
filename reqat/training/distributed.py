"""Where a training computes: its device, and the processes that share it. Decided here and nowhere else.

torchrun starts several processes and numbers them. They train one model: each keeps a part of every weight, gradient
and moment (FSDP2, one unit a decoder layer) and gathers a layer's weights while it computes with them. Each computes
micro-batches of its own of the same optimizer step. Losses are divided by the tokens of the whole step, gradients are
summed, and the norm that clips them is that of all parts: however many processes there are, the numbers are those of
one, up to the order of sums.

One process without offloading is the plain model on its device; none of this code runs then.
"""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import math
import types
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from reqat.config.errors import ReqatError
from reqat.config.launch import launched
from reqat.formats.digests import tensors_digest
from reqat.models.adapters import blocks_of
from reqat.training.handed import fill_from_first, from_outline, is_outline, outline

Device = Literal["auto", "cpu", "cuda"]
#: Longest time that processes wait for each other within a step. NCCL does not notice a dead process sooner.
TIMEOUT_S = 600.0
# Between trainings the others wait for the first process, which may be reading data for hours.
_PATIENCE = datetime.timedelta(days=30)
# What gloo, NCCL and torch's own store say when another process is gone or does not answer.
_LOST = ("gloo", "nccl", "connection closed", "connection reset", "broken pipe", "timed out", "timeout", "tcpstore")
_METHOD = "reqat_within"


@dataclass
class Ranks:
    """The processes of a training, as one of them sees them; alone by default.

    ``device`` None: the model computes where it is. ``waiting`` is a group of all processes whose operations may take
    as long as they like. ``busy``: all of them are at the same training, so none listens to the first.
    """

    rank: int = 0
    size: int = 1
    device: torch.device | None = None
    offload: bool = False
    waiting: Any = None
    busy: bool = False

    @property
    def first(self) -> bool:
        """Whether this process writes, prints and holds locks."""
        return self.rank == 0

    @property
    def sharded(self) -> bool:
        """Whether weights, gradients and moments are divided among the processes, or kept in host memory."""
        return self.size > 1 or self.offload

    # Models

    def made(self, make: Callable[[], PreTrainedModel]) -> PreTrainedModel:
        """What ``make`` gives. Of several processes the first alone calls it; the others get the model without its
        numbers, which :meth:`place` hands to them (:mod:`reqat.training.handed`). An error of the first is raised on
        all."""
        if self.size == 1:
            return make()
        model: PreTrainedModel | None = None
        with self.alike():
            if self.first:
                model = make()
        said = [outline(model) if model is not None else None]
        dist.broadcast_object_list(said, src=0, group=self.waiting)
        return from_outline(said[0] or b"") if model is None else model

    def place(self, model: PreTrainedModel, *, trained: bool = True) -> None:
        """Put ``model`` where it computes, in place: on the device, divided among the processes if there are several.

        A divided model's parameters are DTensors, and computing with them is for :func:`within` alone. One that is not
        ``trained`` (a teacher) keeps no weights between forward passes. Where a process has it without numbers
        (:meth:`made`), all take the first's, block by block. Raises ReqatError for a model whose parameters
        cannot be divided.
        """
        if not self.sharded:
            if self.device is not None:
                nn.Module.to(model, self.device)
            return
        # Imported where it is used: most jobs train in one process.
        from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy, fully_shard, register_fsdp_forward_method

        device = self.device or torch.device("cpu")
        mesh = init_device_mesh(device.type, (self.size,))
        policy = CPUOffloadPolicy(pin_memory=device.type == "cuda") if self.offload else OffloadPolicy()
        blocks = [block.module for block in blocks_of(model)]
        inside = {id(module) for block in blocks for module in block.modules()}
        handed, filled = any(self.everyone(is_outline(model))), set[int]()
        try:
            for block in blocks:  # one at a time on the device in full
                if handed:
                    fill_from_first(block.modules(), device, filled)
                fully_shard(block.to(device), mesh=mesh, offload_policy=policy)
            others = [module for module in model.modules() if id(module) not in inside]
            if handed:
                fill_from_first(others, device, filled)
            for module in others:
                module._apply(lambda tensor: tensor.to(device), recurse=False)
            # Embeddings, last norm and head (which may be tied) are gathered from the forward to the backward pass.
            fully_shard(model, mesh=mesh, offload_policy=policy, reshard_after_forward=None if trained else True)
        except ValueError as error:
            raise ReqatError(f"the model cannot be divided among processes ({error}); train it in one") from error
        whole: Any = model
        for module in (*blocks, whole):
            module.set_force_sum_reduction_for_comms(True)
            module.set_gradient_divide_factor(1.0)  # the losses are divided already
        whole.set_reduce_scatter_unused_params(True)  # of experts that no token of this process chose
        setattr(whole, _METHOD, types.MethodType(lambda _, function: function(), whole))
        register_fsdp_forward_method(whole, _METHOD)

    @torch.no_grad()
    def fill(self, plain: PreTrainedModel | None, trained: PreTrainedModel) -> None:
        """Copy the weights of a divided model into ``plain``, one of the same architecture that is not; every process
        calls it, and the first gives ``plain``."""
        targets = dict(plain.named_parameters()) if plain is not None else {}
        self.wait()
        for name, parameter in trained.named_parameters():
            full = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
            if targets:
                targets[name].copy_(full)

    # Work

    def share(self, step: Sequence[Sequence[int]], accumulation: int) -> list[tuple[Sequence[int], bool]]:
        """What this process computes of an optimizer step: rows of each micro-batch, and whether it counts.

        ``step`` are the step's micro-batches. They stay whole where a full step has one for every process; else its
        rows are divided evenly. Every process computes as many, because all take part in each gathering of weights: one
        that lacks a micro-batch of its own computes another's, and its loss does not count.
        """
        if self.size == 1:
            return [(rows, True) for rows in step]
        if accumulation < self.size:
            flat = [row for rows in step for row in rows]
            step = [part for rank in range(self.size) if (part := flat[rank :: self.size])]
        own: list[tuple[Sequence[int], bool]] = [(rows, True) for rows in step[self.rank :: self.size]]
        rounds = math.ceil(len(step) / self.size)
        return own + [(step[0], False)] * (rounds - len(own))

    def seed(self, seed: int, step: int) -> None:
        """Several processes: draw the random numbers of step ``step`` anew, each its own; a resumed run needs no
        state then."""
        if self.sharded:
            text = hashlib.sha256(f"{seed} {step} {self.rank}".encode()).digest()
            torch.manual_seed(int.from_bytes(text[:7], "big"))

    def clip(self, parameters: list[nn.Parameter], limit: float) -> Tensor:
        """Clip gradients to the norm ``limit`` of all of them together; returns the norm before."""
        norm = torch.nn.utils.clip_grad_norm_(parameters, limit)
        return norm.full_tensor() if isinstance(norm, DTensor) else norm

    def totals(self, values: Sequence[float]) -> list[float]:
        """Each of ``values`` summed over the processes, in float64."""
        if self.size == 1:
            return list(values)
        summed = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(summed)
        return summed.tolist()

    def gathered(self, values_N: Tensor) -> Tensor:
        """The values of all processes, one after the other; their numbers may differ."""
        if self.size == 1:
            return values_N
        lengths = [int(n) for n in self._lists(torch.tensor([len(values_N)]))]
        padded = values_N.new_zeros(max(lengths), device="cpu")
        padded[: len(values_N)] = values_N.cpu()
        found = [part[:n] for part, n in zip(self._lists(padded), lengths, strict=True)]
        return torch.cat(found).to(values_N.device)

    def _lists(self, tensor: Tensor) -> list[Tensor]:
        out = [torch.empty_like(tensor) for _ in range(self.size)]
        dist.all_gather(out, tensor)
        return out

    # Agreement

    def wait(self) -> None:
        """Until all processes are here."""
        if self.size > 1:
            dist.barrier(group=self.waiting)

    def everyone(self, value: Any) -> list[Any]:
        """What each process gives here, in their order."""
        if self.size == 1:
            return [value]
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, value, group=self.waiting)
        return found

    def digest(self, model: PreTrainedModel) -> str:
        """sha256 of a model's weights; of one without numbers, that of the first process's. Every process calls it."""
        own = None if is_outline(model) else tensors_digest(model.state_dict())
        first, *_ = self.everyone(own)
        return str(first if own is None else own)

    def agree(self, said: Mapping[str, str]) -> None:
        """Raise ReqatError, on every process, where two do not say the same, naming the first difference."""
        first, *others = self.everyone(dict(said))
        for rank, other in enumerate(others, start=1):
            for name in {**first, **other}:
                values = [str(each.get(name)) for each in (first, other)]
                if values[0] != values[1]:
                    shown = "" if max(map(len, values)) > 60 else f" ({values[1]} against {values[0]})"
                    raise ReqatError(
                        f"process {rank} of {self.size} has another {name}{shown} than process 0: start all of them "
                        "with one command, on the same code, data and models"
                    )

    @contextlib.contextmanager
    def alike(self) -> Iterator[None]:
        """A ReqatError that one process meets in this block, or a refusal of its system, is raised on all of them at
        its end. No process may wait for another within the block."""
        error: ReqatError | OSError | None = None
        try:
            yield
        except (ReqatError, OSError) as own:
            error = own
        found = self.everyone(None if error is None else str(error))
        if error is not None:
            raise error
        for rank, text in enumerate(found):
            if text is not None:
                raise ReqatError(f"{text} (of process {rank})")

    # The first process and the others

    @contextlib.contextmanager
    def work(self, asked: Mapping[str, Any]) -> Iterator[None]:
        """Of the first process: let the others do what is ``asked`` (plain values) while the block does it, too."""
        self._tell(asked)
        self.busy = True
        yield
        self.busy = False  # not after an error: the others are not listening

    def end(self) -> None:
        """Of the first process: nothing more is to be done. The others hear of it unless they are at a training that
        failed, where they find out by themselves."""
        if not self.busy:
            with contextlib.suppress(RuntimeError, dist.DistError):
                self._tell(None)

    def asked(self) -> dict[str, Any] | None:
        """Of the others: what the first asks for next; None at the end. Raises ReqatError where it is gone."""
        with self.contact("while waiting for process 0"):
            return self._tell(None)

    def _tell(self, asked: Mapping[str, Any] | None) -> dict[str, Any] | None:
        if self.size == 1:
            return None
        said = [dict(asked) if asked is not None else None]
        dist.broadcast_object_list(said, src=0, group=self.waiting)
        return said[0]

    @contextlib.contextmanager
    def contact(self, when: str, remedy: str = "start the same command again") -> Iterator[None]:
        """Within this block the failures that another process's end causes are a ReqatError that says so."""
        try:
            yield
        except ReqatError:
            raise
        except (RuntimeError, dist.DistError) as error:
            if self.size == 1 or not (isinstance(error, dist.DistError) or _is_lost(str(error))):
                raise
            raise ReqatError(
                f"process {self.rank} of {self.size} lost another process {when}; that one's own message, or its "
                f"machine's log, says why. When it is mended, {remedy}. ({' '.join(str(error).split())[:160]})"
            ) from error


def _is_lost(text: str) -> bool:
    return any(words in text.lower() for words in _LOST)


_ranks = Ranks()


def current() -> Ranks:
    """The processes that :func:`joined` joined; a single one, which moves no model, outside of it.

    Raises ReqatError where other code has started a process group, which would be several trainings that know nothing
    of each other.
    """
    if _ranks.size == 1 and not _ranks.sharded and dist.is_initialized() and dist.get_world_size() > 1:
        raise ReqatError(
            "several processes were started, and this training knows of none: train within "
            "reqat.training.distributed.joined()"
        )
    return _ranks


def device_of(device: Device, local: int) -> torch.device:
    """The device that ``auto``, ``cpu`` or ``cuda`` means for the ``local``-th process of a machine.

    Raises ReqatError where there is no such GPU.
    """
    there = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device == "cpu" or (device == "auto" and not there):
        return torch.device("cpu")
    if local >= there:
        raise ReqatError(
            f"process {local} of this machine has no GPU, torch sees {there}: start one process a GPU "
            "(--nproc-per-node), or compute on the CPU (--device cpu)"
        )
    return torch.device("cuda", local)


@contextlib.contextmanager
def joined(device: Device = "auto", *, offload: bool = False, timeout_s: float = TIMEOUT_S) -> Iterator[Ranks]:
    """Join the processes that torchrun started with this one, and train on ``device``; without torchrun, alone.

    Args:
        device: ``cpu``, ``cuda``, or ``auto``: GPUs where there are some. Processes on CPUs talk by gloo, on GPUs by
            NCCL.
        offload: keep weights, gradients and moments in host memory, and on the GPU what a layer needs.
        timeout_s: longest wait for another process within a step.

    Raises ReqatError where the other processes do not come, or there are fewer GPUs than processes.
    """
    global _ranks
    rank, size, local = launched()
    chosen = device_of(device, local)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    before, _ranks = _ranks, Ranks(rank, size, chosen, offload)
    try:
        if not _ranks.sharded:
            yield _ranks
            return
        _join(_ranks, timeout_s)
        yield _ranks
        dist.destroy_process_group()  # after an error it might wait for a process that is gone
    finally:
        _ranks = before


def _join(ranks: Ranks, timeout_s: float) -> None:
    how: dict[str, Any] = {"timeout": datetime.timedelta(seconds=timeout_s)}
    if ranks.size == 1:  # for offloading
        how |= {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    assert ranks.device is not None
    backend = "cpu:gloo,cuda:nccl" if ranks.device.type == "cuda" else "gloo"
    with ranks.contact("at the start", "start all processes again (torchrun starts them together)"):
        dist.init_process_group(backend, **how)
        ranks.waiting = dist.new_group(backend="gloo", timeout=_PATIENCE)
        ranks.wait()


def within(model: PreTrainedModel, function: Callable[[], Any]) -> Any:
    """``function()``, which computes with ``model``; a divided model has its weights meanwhile."""
    method = getattr(model, _METHOD, None)
    return function() if method is None else method(function)


def local(tensor: Tensor) -> Tensor:
    """The part of a tensor that this process holds; all of one that is not divided."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def check_division(ranks: Ranks, settings: Any, precision: Any, of_micro_batch: bool, model: nn.Module) -> None:
    """Refuse a division of steps among processes whose result would depend on how many there are.

    ``settings`` has ``rows_per_batch`` and ``accumulation``; ``of_micro_batch``: a term of the objective takes
    constants from one micro-batch. Warns where dropout draws other numbers than in one process.
    """
    if ranks.size == 1:
        return
    if any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules()):
        raise ReqatError(
            f"the model has batch norms, whose statistics would be those of the micro-batches of each of {ranks.size} "
            "processes: train it in one process"
        )
    size, rows = ranks.size, settings.rows_per_batch * settings.accumulation
    if rows < size:
        raise ReqatError(
            f"a step has {rows} rows (rows_per_batch {settings.rows_per_batch}, accumulation {settings.accumulation}) "
            f"for {size} processes: raise accumulation, or start fewer processes"
        )
    if settings.accumulation < size:  # micro-batches are divided
        formats = [] if precision is None else [precision.inputs, precision.keys, precision.values]
        dynamic = any(f is not None and (f.global_scale == "dynamic" or f.per_tensor) for f in formats)
        if dynamic or of_micro_batch:
            what = "dynamic (per-tensor) scales of inputs, keys or values" if dynamic else "SEM's released tau"
            raise ReqatError(
                f"accumulation {settings.accumulation} is less than the {size} processes, so micro-batches would be "
                f"divided, and {what} would change with the number of processes. Give each process micro-batches of "
                f"its own (accumulation {size} or more, rows_per_batch lower)"
                + (", or take global_scale='row' or 'static'" if dynamic else ", or tau 'minibatch'")
            )
    dropout = any(isinstance(m, nn.Dropout) and m.p > 0 or (getattr(m, "attention_dropout", 0.0) or 0.0) > 0
                  for m in model.modules())  # fmt: skip
    if dropout and ranks.first:
        warnings.warn(
            "the model has dropout, whose random numbers differ with the number of processes: so will the result",
            stacklevel=3,
        )


def divided_like(full: Tensor, parameter: Tensor) -> Tensor:
    """``full``, which every process has, as ``parameter`` is: divided in the same way, on the same device."""
    if not isinstance(parameter, DTensor):
        return full.to(parameter.device)
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(full, parameter.device_mesh, parameter.placements, src_data_rank=None)


def environment() -> dict[str, str]:
    """What of this process the others are to have, too."""
    return {"version of torch": torch.__version__, "number of threads": str(torch.get_num_threads())}
