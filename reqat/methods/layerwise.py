"""Walk a model one block at a time over calibration sequences.

Post-training methods look at what flows into each layer, and some change the layer before the next one sees its output.
Holding one hidden state per sequence and running one block at a time costs a single forward pass over the model and the
memory of one block's activations, whatever the depth::

    for step in walk(model, input_ids):
        with hooks_on(step.block):      # look
            step.run()
        change(step.block)              # the next step's inputs come through the changed block

Post-training quantization of weights is such a walk: :func:`solve_weights` hands each linear layer, with the second
moments of its inputs, to a *solver* that chooses its codes.

Shapes: n sequences, T tokens, E hidden size; N outputs and K inputs of a linear layer, M tokens of a batch.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from reqat.config.errors import ReqatError
from reqat.config.progress import bar
from reqat.formats import QuantizedTensor
from reqat.models import (
    QuantLinear,
    attention_window,
    check_length,
    check_token_ids,
    end_ids,
    freeze,
    precision_of,
    quant_linears,
)
from reqat.models.adapters import Block, adapter_of, blocks_of
from reqat.quant import Quantizer, without_rounding

# Tokens that go through a layer at once, unless the caller says otherwise: 4096 tokens of a 14B model's MLP are 0.2 GB.
BATCH_TOKENS = 4096


class _Reached(Exception):
    """The first block was called; nothing after it is wanted."""


@dataclass
class Step:
    """One block and what flows into it: ``hidden[i]`` is [rows, T, E], ``kwargs[i]`` the rest of the call."""

    block: Block
    hidden: list[Tensor]
    kwargs: list[dict[str, Any]]
    #: What :meth:`run` gave, set by whoever ran the block and did not change it since: the walk need not run it again.
    outputs: list[Tensor] | None = None

    @torch.no_grad()
    def run(self) -> list[Tensor]:
        """The block's outputs with its present weights, batch by batch."""
        outputs = []
        for hidden, kwargs in zip(self.hidden, self.kwargs, strict=True):
            out = self.block.module(hidden, **kwargs)
            outputs.append(out[0] if isinstance(out, tuple) else out)
        return outputs


def on_device(model: PreTrainedModel, input_ids: Tensor) -> Tensor:
    """``input_ids`` where the model reads them: on the device of its embeddings."""
    device: torch.device = model.get_input_embeddings().weight.device  # type: ignore[assignment]
    return input_ids.to(device)


def check_input_ids(model: PreTrainedModel, input_ids: Tensor) -> None:
    """Raise ``ReqatError`` unless ``input_ids`` is [n, T] integers within the model's vocabulary, n and T positive, T
    within its positions and its sliding window, and no sequence begins or ends with padding.
    """
    if not isinstance(input_ids, Tensor):
        raise ReqatError(
            f"calibration needs token ids [sequences, tokens], got a {type(input_ids).__name__}: give whole sequences "
            "of one length, without padding or mask"
        )
    if input_ids.dim() != 2 or input_ids.numel() == 0 or input_ids.is_floating_point():
        raise ReqatError(
            f"calibration needs token ids [sequences, tokens], got {input_ids.dtype} of shape {tuple(input_ids.shape)}"
        )
    check_token_ids(model, input_ids, "calibration")
    check_length(model.config, input_ids.shape[1], "calibration sequences")
    window = attention_window(model.config)
    if window is not None and input_ids.shape[1] > window:
        raise ReqatError(
            f"calibration sequences of {input_ids.shape[1]} tokens, but the model has a sliding window of {window}: "
            "calibrate on shorter ones"
        )
    padding = _padding_id(model)
    if padding is not None and bool((input_ids[:, [0, -1]] == padding).any()):
        raise ReqatError(
            f"a calibration sequence begins or ends with padding (token id {padding}), which would count as text: give "
            "whole sequences of one length, strung together and cut"
        )


def _padding_id(model: PreTrainedModel) -> int | None:
    """The id that means padding and nothing else; None where it also ends or opens a sequence."""
    config = model.config
    pad = getattr(config, "pad_token_id", None)
    used = {getattr(config, "bos_token_id", None), *end_ids(model, None)}
    return None if pad is None or pad in used else int(pad)


def walk(model: PreTrainedModel, input_ids: Tensor, *, batch_rows: int | None = None) -> Iterator[Step]:
    """Yield a :class:`Step` for each block in order; it sees what the blocks before it, as they then are, give.

    ``input_ids`` ``[n, T]`` int64 are whole sequences without padding, at positions 0 to T-1. ``batch_rows`` of them go
    through a block at once (default: about 4096 tokens). The model is in evaluation mode meanwhile and put back after.

    Raises:
        ValueError: ``input_ids`` of another shape or with unknown tokens; a model that no adapter knows.
    """
    check_input_ids(model, input_ids)
    blocks = blocks_of(model)
    rows = batch_rows or max(1, BATCH_TOKENS // input_ids.shape[1])
    training = model.training
    model.eval()
    try:
        hidden: list[Tensor] = []
        kwargs: list[dict[str, Any]] = []
        for batch in input_ids.split(rows):
            args, kw = _first_call(model, blocks[0].module, on_device(model, batch))
            hidden.append(args[0])
            kwargs.append(kw)
        for block in blocks:
            step = Step(block, hidden, kwargs)
            yield step
            if block is not blocks[-1]:
                hidden = step.outputs if step.outputs is not None else step.run()
    finally:
        model.train(training)


@torch.no_grad()
def _first_call(model: PreTrainedModel, first: nn.Module, batch: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What the first block is called with on ``batch``: its hidden state, and everything else by name."""
    seen: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    names = list(inspect.signature(first.forward).parameters)

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append((args[:1], dict(zip(names[1:], args[1:], strict=False)) | kwargs))
        raise _Reached

    with hooked([first.register_forward_pre_hook(note, with_kwargs=True)]):
        try:
            adapter_of(model).body(model)(input_ids=batch, use_cache=False)
        except _Reached:
            return seen[0]
    raise AssertionError("the model never called its first block")


@contextmanager
def hooked(handles: list[Any]) -> Iterator[None]:
    """Remove these hooks when the block ends."""
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def on_output(module: nn.Module, look: Callable[[Tensor], None]) -> Any:
    """Hook: call ``look`` with each output of ``module``."""
    return module.register_forward_hook(lambda _module, _args, output: look(output))


@dataclass(frozen=True)
class WeightProblem:
    """What a weight solver works on: one linear layer y = W x with quantized inputs x.

    ``weight`` [N, K] float32, in the basis in which it is quantized (rotated, if the precision rotates); ``hessian``
    [K, K] float64, the mean of x x^T over the calibration tokens; ``nearest``, the weight rounded to nearest: its
    scales, and the codes to improve on. ``drift`` [K, K] float64, where it was asked for: the mean of (x~ - x) x^T with
    x~ the input that the full-precision model has in x's place. ``tokens`` were seen.
    """

    name: str
    weight: Tensor
    hessian: Tensor
    nearest: QuantizedTensor
    drift: Tensor | None = None
    tokens: int = 0

    def with_scales(self, nearest: QuantizedTensor) -> WeightProblem:
        """The same with other scales, those of ``nearest``."""
        return replace(self, nearest=nearest)

    def error(self, quantized: QuantizedTensor | None) -> float:
        """Mean squared output error of a token, summed over outputs: tr(dW H dW^T). None: of the zero weight."""
        delta = self.weight.double()
        if quantized is not None:
            delta = delta - quantized.dequantize(torch.float32).double()
        return float(((delta @ self.hessian) * delta).sum())


Solver = Callable[[WeightProblem], QuantizedTensor]


def solve_weights(
    model: PreTrainedModel, input_ids: Tensor, solver: Solver, *, label: str, drift: bool = False, progress: bool = True
) -> list[dict[str, Any]]:
    """Choose the codes of every quantized linear layer with ``solver``, in forward order, and freeze ``model``.

    Each layer's inputs come through the layers before it as they were just solved (within a block too: o after q, k and
    v), rotated and fake-quantized as the precision says; keys and values as well. An expert is solved for the tokens
    that chose it. With ``drift`` the full-precision model runs alongside, one more block at a time.

    Returns for each linear layer its name and its relative output error ``tr(dW H dW^T) / tr(W H W^T)``, rounded to
    nearest and solved; ``tokens`` where it saw fewer than it has inputs, 0 for an expert that no token chose (H is zero
    then).

    Raises:
        ValueError: a model that was not prepared, whose precision leaves weights as they are, or that is frozen
            already; bad ``input_ids``; inputs that are not finite.
    """
    precision = precision_of(model)
    if precision is None or precision.weights is None:
        state = "was not prepared" if precision is None else f"was prepared for {precision}, which keeps its weights"
        raise ReqatError(
            f"{label} quantizes weights, but the model {state}: prepare it for quantized weights (NVFP4-W4A16) first"
        )
    if done := [name for name, layer in quant_linears(model).items() if layer.frozen]:
        raise ReqatError(f"{label} starts from dense weights, but {done[0]} is frozen already: load the model again")
    pools = {block.index: _pools(block) for block in blocks_of(model)}
    solved: list[dict[str, Any]] = []
    total = sum(len(pool) for of_block in pools.values() for pool in of_block)
    with bar(label, total, "groups of layers", enabled=progress) as shown:
        dense: list[Tensor] | None = None
        for step in walk(model, input_ids):
            full: dict[int, list[Tensor]] = {}
            if drift:
                dense, full = _full_precision(step, pools[step.block.index], dense)
            for pool in pools[step.block.index]:
                for group, moments in zip(pool, _moments(step, pool, full), strict=True):
                    hessian, tokens = moments.hessian, moments.tokens
                    for linear in group:
                        problem = WeightProblem(
                            linear.name,
                            linear.rotated_weight().float(),
                            hessian,
                            linear.quantize_weight(),
                            moments.drift,
                            tokens,
                        )
                        quantized = solver(problem)
                        linear.set_quantized(quantized)
                        size = problem.error(None) or 1.0
                        nearest, now = problem.error(problem.nearest) / size, problem.error(quantized) / size
                        solved.append({"layer": linear.name, "error_nearest": nearest, "error": now})
                        if tokens < linear.in_features:
                            solved[-1]["tokens"] = tokens
                    shown.update()
    freeze(model)
    return solved


def _pools(block: Block) -> list[list[list[QuantLinear]]]:
    """The block's quantized linear layers in forward order: pools of groups of layers that share one input.

    Inputs of a pool's groups do not depend on the pool's weights (experts side by side), so one run shows all.
    """
    pools: dict[str, list[list[QuantLinear]]] = {}
    for group in block.groups():
        linears = [site.module for site in group.sites if isinstance(site.module, QuantLinear)]
        if linears:
            pools.setdefault(group.scale, []).append(linears)
    return list(pools.values())


@dataclass
class _Moments:
    """Means over the ``tokens`` that a group saw: of x x^T, and of (x~ - x) x^T; [K, K] float64."""

    hessian: Tensor
    drift: Tensor | None
    tokens: int


def _full_precision(
    step: Step, pools: list[list[list[QuantLinear]]], hidden: list[Tensor] | None
) -> tuple[list[Tensor], dict[int, list[Tensor]]]:
    """Run the block as the full-precision model does, on what that has in place of ``step.hidden`` (None: the same).

    Returns its outputs, and by id of each group's first layer the inputs [M, K] of its matrix products, batch by batch.
    Nothing of the block may be solved yet.
    """
    firsts = [group[0] for pool in pools for group in pool]
    seen: dict[int, list[Tensor]] = {id(linear): [] for linear in firsts}

    def look(_quantizer: nn.Module, args: tuple[Any, ...], x: Tensor) -> None:
        if id(args[1]) in seen:
            seen[id(args[1])].append(x.reshape(-1, x.shape[-1]).float())

    alongside = Step(step.block, step.hidden if hidden is None else hidden, step.kwargs)
    inputs = {id(linear.input_quantizer): linear.input_quantizer for linear in firsts}
    quantizers = [module for module in step.block.module.modules() if isinstance(module, Quantizer)]
    with without_rounding(quantizers), hooked([q.register_forward_hook(look) for q in inputs.values()]):
        return alongside.run(), seen


def _moments(step: Step, pool: list[list[QuantLinear]], full: dict[int, list[Tensor]]) -> list[_Moments]:
    """Moments of the inputs that the matrix products of each group see; with drift where ``full`` has what the
    full-precision model sees.

    An expert that no token chose has zeros; one that other tokens chose in the full-precision model has no drift.
    """
    firsts = [group[0] for group in pool]

    def zeros(linear: QuantLinear) -> Tensor:
        K = linear.in_features
        return torch.zeros(K, K, dtype=torch.float64, device=linear.weight.device)

    found = {id(linear): _Moments(zeros(linear), zeros(linear) if full else None, 0) for linear in firsts}
    batches = dict.fromkeys(found, 0)

    def look(_quantizer: nn.Module, args: tuple[Any, ...], x: Tensor) -> None:
        reader = id(args[1])
        if reader in found:  # the first of each group; the others read the same tensor
            moments = found[reader]
            x_MK = x.reshape(-1, x.shape[-1]).float()
            moments.hessian.add_(x_MK.T @ x_MK)
            moments.tokens += len(x_MK)
            if moments.drift is not None:
                theirs = full[reader][batches[reader] :][:1]
                if theirs and theirs[0].shape == x_MK.shape:
                    moments.drift.add_((theirs[0] - x_MK).T @ x_MK)
            batches[reader] += 1

    quantizers = {id(linear.input_quantizer): linear.input_quantizer for linear in firsts}
    with hooked([quantizer.register_forward_hook(look) for quantizer in quantizers.values()]):
        step.run()
    for linear in firsts:
        moments = found[id(linear)]
        if not torch.isfinite(moments.hessian).all():
            raise ReqatError(f"the calibration inputs of {linear.name} hold NaN or infinity: the model has diverged")
        moments.hessian /= max(1, moments.tokens)
        if moments.drift is not None:
            moments.drift /= max(1, moments.tokens)
    return list(found.values())


def few_tokens(solved: list[dict[str, Any]]) -> dict[str, str]:
    """A metric that says, where it is so, that layers saw fewer tokens than they have inputs: their second moments then
    say nothing of some directions, and what is solved there is left to the damping."""
    few = [layer for layer in solved if "tokens" in layer]
    if not few:
        return {}
    return {
        "warning": f"{len(few)} of {len(solved)} layers saw fewer calibration tokens than they have inputs (the first: "
        f"{few[0]['layer']}, {few[0]['tokens']} tokens); give at least as many tokens as the widest layer has inputs"
    }
