"""Scale the inputs of linear layers, and undo it in whatever makes them: no change to what the model computes.

For a group of linear layers that read one tensor x, ``W x = (W diag(s)) (x / s)``. The division goes into the module
that makes x, where that is linear in its own weight:

- a norm (attention and MLP inputs): its weight is divided by s;
- a linear layer to whose output x is proportional, as the model's adapter says: values for the output projection of
  attention, ``up`` for ``down`` of a gated MLP. Its rows are divided by s.

The norm is found by looking: the module whose output *is* the tensor that the group reads, and that nothing else reads.
A group without either is left alone; so are fused experts, whose input the router reads. AWQ and SmoothQuant choose s;
here it is folded, and :func:`unchanged` holds each block to what it computed before.

Shapes: K inputs of the group.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from reqat.config.errors import ReqatError
from reqat.methods.layerwise import Step, hooked
from reqat.models import carried, quant_linears
from reqat.models.adapters import Site

# Two parameters of a norm that multiply its output: `weight` (Llama), or `1 + weight` (Gemma).
_PROBES = (0.0, 1.0)


@dataclass(frozen=True)
class FoldableGroup:
    """Linear layers that read one tensor, and how to divide that tensor by s [K]; None where nothing can.

    ``after_norm``: a norm makes that tensor.
    """

    sites: tuple[Site, ...]
    divide: Callable[[Tensor], None] | None
    after_norm: bool

    @property
    def name(self) -> str:
        """Of its first layer."""
        return self.sites[0].name

    @property
    def linears(self) -> list[nn.Linear]:
        """The layers."""
        return [site.module for site in self.sites]

    @torch.no_grad()
    def fold(self, s_K: Tensor) -> None:
        """Multiply the weights' columns by s, and divide their input by it. Raises ReqatError unless s is positive and
        finite."""
        if not bool((torch.isfinite(s_K) & (s_K > 0)).all()):
            raise ReqatError(f"{self.name}: its input scales are not all positive and finite: the model has diverged")
        assert self.divide is not None
        for linear in self.linears:
            linear.weight.copy_(linear.weight.double() * s_K.double().to(linear.weight.device))
        self.divide(s_K)


def check_full_precision(model: nn.Module, what: str) -> None:
    """Raise ReqatError if ``model`` is quantized: a transform rewrites the model as loaded."""
    for name, linear in quant_linears(model).items():
        if linear.frozen or linear.weight_quantizer.format is not None or linear.input_quantizer.format is not None:
            raise ReqatError(f"{what} rewrites the full-precision model, but {name} is quantized: load the model again")
    check_unmeasured(model, what)


def check_unmeasured(model: Any, what: str, *kinds: str) -> None:
    """Raise ReqatError if ``model`` keeps bases or clips (or ``kinds`` of these): they were measured for weights,
    inputs and keys as they are, and ``what`` changes those."""
    if names := carried(model, *(kinds or ("bases", "clips"))):
        raise ReqatError(
            f"{what} changes what is quantized, and the model keeps {names[0]} ({len(names)} such tensors), which an "
            f"earlier method (QuaRot, FlatQuant) measured for it as it is: apply {what} to the model that this method "
            "started from, or choose codes alone (rtn, gptq, gptaq)"
        )


def groups_of(step: Step) -> list[FoldableGroup]:
    """The groups of a block in forward order; runs the block on its first batch to see what makes their inputs."""
    made = _makers(step)
    found = []
    for group in step.block.groups():
        first = group.sites[0].module
        divide: Callable[[Tensor], None] | None = None
        if (norm := made.get(id(first))) is not None:
            divide = _dividing_norm(norm, first.in_features)
        elif group.maker is not None:
            divide = _dividing_rows(group.maker.module)
        found.append(FoldableGroup(group.sites, divide, norm is not None))
    return found


@contextmanager
def unchanged(step: Step, what: str) -> Iterator[None]:
    """Raise ReqatError if the block changes what the layer computes, beyond the rounding of its dtype."""
    before = _first_output(step)
    yield
    after = _first_output(step)
    moved = float((after - before).norm() / (before - step.hidden[0][:1].double()).norm().clamp(min=1e-30))
    if not moved <= 16 * torch.finfo(step.hidden[0].dtype).eps ** 0.5:
        raise ReqatError(
            f"{what}: {step.block.name} does not compute the same after its inputs were scaled (off by {moved:.2g}): "
            "something else reads them, so this architecture is not supported; load the model again"
        )


@torch.no_grad()
def _first_output(step: Step) -> Tensor:
    """The layer's output [1, T, E] for its first sequence, in float64."""
    out = step.block.module(step.hidden[0][:1], **_first_rows(step.kwargs[0], len(step.hidden[0])))
    return (out[0] if isinstance(out, tuple) else out).double()


def _makers(step: Step) -> dict[int, nn.Module]:
    """id of a linear layer -> the module whose output tensor it reads, as the layer's first batch shows.

    Left out are tensors that a module outside the layer's group reads, too, such as the router of a mixture of experts.
    """
    outputs: list[tuple[Tensor, nn.Module]] = []  # tensors are kept: an id is only one's own while it lives
    makers: dict[int, nn.Module] = {}
    readers: dict[int, set[int]] = {}

    def after(module: nn.Module, _args: Any, output: Any) -> None:
        if isinstance(output, Tensor):
            outputs.append((output, module))

    def before(module: nn.Module, args: tuple[Any, ...]) -> None:
        maker = next((m for tensor, m in reversed(outputs) if args and tensor is args[0]), None)
        if maker is not None:
            makers[id(module)] = maker
            readers.setdefault(id(maker), set()).add(id(module))

    handles: list[Any] = []
    for module in step.block.module.modules():
        if not list(module.children()):
            handles.append(module.register_forward_pre_hook(before))
            if not isinstance(module, nn.Linear):
                handles.append(module.register_forward_hook(after))
    with hooked(handles):
        _first_output(step)
    groups = [{id(site.module) for site in group.sites} for group in step.block.groups()]
    alone = {maker for maker, who in readers.items() if any(who <= group for group in groups)}
    return {linear: maker for linear, maker in makers.items() if id(maker) in alone}


def _first_rows(kwargs: dict[str, Any], rows: int) -> dict[str, Any]:
    """The call's other arguments for its first row alone."""
    return {
        key: value[:1] if isinstance(value, Tensor) and value.ndim > 1 and len(value) == rows else value
        for key, value in kwargs.items()
    }


def _dividing_norm(norm: nn.Module, size: int) -> Callable[[Tensor], None] | None:
    """Division of a norm's output by s, if its weight [K] multiplies it, plain or with 1 added."""
    weight = getattr(norm, "weight", None)
    if not isinstance(weight, nn.Parameter) or weight.shape != (size,) or getattr(norm, "bias", None) is not None:
        return None
    added = norm_offset(norm)
    if added is None:
        return None

    def divide(s_K: Tensor) -> None:
        scaled = (weight.double() + added) / s_K.double().to(weight.device) - added
        weight.copy_(scaled)

    return divide


@torch.no_grad()
def norm_offset(norm: Any) -> float | None:
    """What the norm adds to its weight [K] before it multiplies: 0 or 1; None if it does something else with it."""
    weight = norm.weight
    x = torch.linspace(-1, 1, weight.numel(), device=weight.device, dtype=weight.dtype)[None] + 0.1
    kept = weight.clone()
    try:
        weight.fill_(0.0)
        at_zero = norm(x).double()
        weight.fill_(1.0)
        at_one = norm(x).double()
        weight.fill_(3.0)
        at_three = norm(x).double()
    finally:
        weight.copy_(kept)
    step = at_one - at_zero  # x^ where the weight is linear
    tolerance = 0.02 * float(step.abs().max())
    if float((at_three - at_one - 2 * step).abs().max()) > tolerance or tolerance == 0:
        return None
    return next((c for c in _PROBES if float((at_zero - c * step).abs().max()) <= tolerance), None)


def _dividing_rows(linear: nn.Linear) -> Callable[[Tensor], None]:
    """Division of a linear layer's output by s."""

    def divide(s_K: Tensor) -> None:
        s = s_K.double().to(linear.weight.device)
        linear.weight.copy_(linear.weight.double() / s[:, None])
        if linear.bias is not None:
            linear.bias.copy_(linear.bias.double() / s)

    return divide


@dataclass
class Magnitudes:
    """Sizes of a group's input channels [K] over the calibration tokens, float64: largest and mean of ``|x|``."""

    largest_K: Tensor
    sum_K: Tensor
    tokens: int

    @property
    def mean_K(self) -> Tensor:
        """Mean of ``|x|``."""
        return self.sum_K / self.tokens


@torch.no_grad()
def magnitudes(step: Step, groups: list[FoldableGroup]) -> list[Magnitudes]:
    """What each group reads on the step's batches, summed up as it flows by: nothing of it is kept.

    The step has run then: :attr:`Step.outputs` holds what it gave.
    """
    found: list[Magnitudes] = []
    for group in groups:
        zeros = torch.zeros(group.linears[0].in_features, dtype=torch.float64, device=group.linears[0].weight.device)
        found.append(Magnitudes(zeros, zeros.clone(), 0))

    def adding(to: Magnitudes) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def look(_module: nn.Module, args: tuple[Any, ...]) -> None:
            x_MK = args[0].detach().abs().flatten(0, -2)
            to.largest_K = torch.maximum(to.largest_K, x_MK.amax(0).double())
            to.sum_K += x_MK.sum(0, dtype=torch.float64)
            to.tokens += len(x_MK)

        return look

    hooks = [g.linears[0].register_forward_pre_hook(adding(to)) for g, to in zip(groups, found, strict=True)]
    with hooked(hooks):
        step.outputs = step.run()
    return found
