"""FlatQuant (arXiv 2410.09426): learn, layer by layer, the bases in which weights, inputs and cache are quantized.

Where QuaRot takes Hadamard matrices, FlatQuant learns invertible ones that make the layer's own output least wrong:

- the input of q, k and v, of gate and up, of down: ``x P`` with P = P1 (x) P2 (:func:`kronecker_sizes`), online;
- values: ``v P_v`` for each head, folded into v's rows; o's input: P_v's inverse in o's columns, and a matrix across
  heads online; keys: ``k P_k`` and ``q P_k^-T``, online after RoPE;
- a scale for each channel of the inputs of q, k and v, gate and up, down, which begins as
  ``max|W|^(1-a) / max|x|^a`` (a = 0.3) and folds into the norm or into up's rows;
- where the extremes are cut off: of each row of a weight, and of inputs, keys and values, sigmoid(p) from p = 4.

A layer is trained on the inputs and outputs of the full-precision model: mean squared error of its output divided by
its own value (so that steps have one size), AdamW with weight decay 0.01, cosine decay to a thousandth, 15 epochs of
batches of 4 sequences. Rounding passes gradients straight through; its error grows with the range that the scale comes
from, which is how a clip learns. Matrices begin as random orthogonal ones; their inverses are computed in float64. Keys
are shifted as the model says (Q-FIT) and have the precision's signs.

Afterwards scales and P_v are folded, bases and clips kept for :func:`reqat.models.prepare`, and weights rounded to
nearest. Rows of v are cut off in the basis of their output, where they are rounded (the reference does so before it).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from reqat.config.errors import ReqatError
from reqat.config.progress import bar
from reqat.config.ptq import FlatQuantOptions
from reqat.formats import Format
from reqat.methods.gated import gated_parts, turn_values
from reqat.methods.layerwise import Step, walk
from reqat.methods.ptq._method import Method
from reqat.methods.ptq.rtn import rtn
from reqat.methods.scaling import FoldableGroup, Magnitudes, check_full_precision, groups_of, magnitudes
from reqat.methods.transform import Transform
from reqat.models import leave, precision_of, prepare
from reqat.models.adapters import OUT, VALUE, HeadShape
from reqat.quant import (
    Precision,
    Quantizer,
    block_hadamard,
    bounds,
    clipped,
    dynamic,
    fake_quantize,
    inverse_transposed,
    kronecker,
    with_signs,
)

DEFAULTS = FlatQuantOptions()
_LR, _CLIP_LR, _DECAYED = 5e-3, 5e-2, 1e-3
# The reference names no weight decay, so it trains with AdamW's own (ruikangliu/FlatQuant, flatquant/train_utils.py:
# `torch.optim.AdamW(trained_params)`; 0.01 since torch 1.2). It shrinks clips before the sigmoid towards one half, and
# the logarithms of scales, which the reference does not take, towards 0. A matrix and its inverse transposed cancel, so
# the size of a matrix is free.
_WEIGHT_DECAY = 0.01
_ALPHA = 0.3
_CLIP = 4.0
_FLOOR = 1e-5


def kronecker_sizes(n: int) -> tuple[int, int]:
    """(a, b) with a b = n, as close as can be: (m - j, m + j) for the smallest m >= sqrt(n) with m^2 - n = j^2.

    Where there is no such m (n is 2 modulo 4), the factors of n closest to each other.
    """
    for a in range(math.isqrt(n), 0, -1):
        if n % a == 0 and (n // a - a) % 2 == 0:
            return a, n // a
    return next((a, n // a) for a in range(math.isqrt(n), 0, -1) if n % a == 0)


def train(
    model: PreTrainedModel,
    precision: Precision,
    input_ids: Tensor,
    *,
    epochs: int = DEFAULTS.epochs,
    batch: int = DEFAULTS.batch,
    seed: int = DEFAULTS.seed,
    progress: bool = True,
) -> dict[str, Any]:
    """Learn and fold the transforms of a full-precision ``model``, in place; bases and clips take effect when it is
    prepared for ``precision``.

    Args:
        model: a decoder built like Llama, Qwen2 or Qwen3, as loaded.
        precision: what weights, inputs, keys and values will be quantized to.
        input_ids: ``[n, T]`` int64 calibration sequences without padding, at least ``batch`` of them.
        epochs: over the sequences, for each layer.
        batch: sequences of a step.
        seed: of the matrices that training begins with.
        progress: show a bar.

    Returns the relative error of each layer's output in the first and in the last epoch.

    Raises ReqatError for a precision that keeps weights, a model that is quantized or of other parts, or fewer
    sequences than a batch.
    """
    if precision.weights is None:
        raise ReqatError(f"FlatQuant transforms weights to be quantized, but {precision} keeps them: take one with W4")
    if epochs < 1 or batch < 1:
        raise ReqatError(f"FlatQuant trains for {epochs} epochs of batches of {batch}: both must be positive")
    if len(input_ids) < batch:
        raise ReqatError(
            f"FlatQuant trains on batches of {batch} sequences, and {len(input_ids)} are given: give at least {batch} "
            "calibration sequences (128 are usual), or a smaller batch"
        )
    check_full_precision(model, "FlatQuant")
    gated_parts(model, "FlatQuant")
    if precision_of(model) is None:
        prepare(model, "BF16")  # its attention function passes keys and values through `reqat_kv`
    parts = gated_parts(model, "FlatQuant")
    generator = torch.Generator().manual_seed(seed)
    steps = epochs * (len(input_ids) // batch)
    layers: list[dict[str, Any]] = []
    with bar("FlatQuant", steps * len(parts.blocks), "steps", enabled=progress) as shown:
        for step in walk(model, input_ids, batch_rows=batch):
            with torch.no_grad():
                groups = groups_of(step)
                sizes = magnitudes(step, groups)
            flat = _Layer(step, groups, sizes, precision, parts.blocks[step.block.index].attention.heads, generator)
            with torch.enable_grad():
                layers.append({"layer": step.block.name, **flat.train(step, epochs, shown.update)})
            with torch.no_grad():
                leave(model, flat.fold(step, groups))
    return {
        "epochs": epochs,
        "steps_per_layer": steps,
        "transforms": layers,
        "layer_error_first": sum(layer["error_first"] for layer in layers) / len(layers),
        "layer_error_last": sum(layer["error_last"] for layer in layers) / len(layers),
    }


def soft_quantize(x: Tensor, fmt: Format, clip: Tensor, rotation: int | None = None) -> Tensor:
    """``x`` rotated, cut off at shares ``clip`` of its extremes and rounded to ``fmt``, as a quantizer does, with
    gradients: straight through the rounding, whose error is proportional to the range of its block."""
    if rotation is not None:
        x = block_hadamard(x, rotation)
    cut = clipped(x, clip, fmt)
    low, high = bounds(x, clip, fmt)
    reach = (high - low).expand(*low.shape[:-1], fmt.block or x.shape[-1]).flatten(-2)
    with torch.no_grad():
        relative = (fake_quantize(cut, fmt) - cut) / reach.clamp(min=torch.finfo(reach.dtype).tiny)
    return cut + relative * reach


def _orthogonal(n: int, generator: torch.Generator, like: Tensor) -> nn.Parameter:
    q, r = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64))
    return nn.Parameter((q * r.diagonal().sign()).to(like))


def _inverse_transposed(P: Tensor | None) -> Tensor | None:
    return None if P is None else inverse_transposed(P).to(P.dtype)


@dataclass
class _Group:
    """What is learned of the layers that read one tensor: factors and the logarithm of the channel scale (None where
    there is none), clips before the sigmoid."""

    left: nn.Parameter | None
    right: nn.Parameter | None
    log_scale: nn.Parameter | None
    input_clip: nn.Parameter
    weight_clips: list[nn.Parameter]


class _Linear(nn.Module):
    """A linear layer while its transform is learned."""

    def __init__(self, linear: nn.Linear, group: _Group, at: int, layer: _Layer, attribute: str) -> None:
        super().__init__()
        self.weight, self.bias = linear.weight.detach(), None if linear.bias is None else linear.bias.detach()
        self.in_features = linear.in_features
        self.held = (group, at, layer, attribute)  # in a tuple: no child modules

    def forward(self, x: Tensor) -> Tensor:
        group, at, layer, attribute = self.held
        precision, W, bias = layer.precision, self.weight, self.bias
        if group.log_scale is not None:
            x, W = x * group.log_scale.exp(), W / group.log_scale.exp()
        left, right = _inverse_transposed(group.left), _inverse_transposed(group.right)
        if attribute == OUT:  # the input's heads came in the basis of the values
            right = _inverse_transposed(layer.values)
        W, x = kronecker(W, left, right), kronecker(x, group.left, group.right)
        if attribute == VALUE:
            W = kronecker(W.T, None, layer.values).T
            bias = None if bias is None else kronecker(bias, None, layer.values)
        if precision.inputs is not None:
            x = soft_quantize(x, precision.inputs, group.input_clip.sigmoid(), precision.rotation)
        elif precision.rotation is not None:
            x = block_hadamard(x, precision.rotation)
        assert precision.weights is not None
        W = soft_quantize(W, precision.weights, group.weight_clips[at].sigmoid(), precision.rotation)
        return F.linear(x, W, bias)


class _Cache(nn.Module):
    """A layer's key/value quantizer while its transform is learned: what :class:`reqat.models.kv.KVQuantizer` computes
    of keys and queries, the model's own shift and the precision's signs included. Probabilities are not rounded while
    it is learned."""

    scales_over_tokens = False

    def __init__(self, layer: _Layer) -> None:
        super().__init__()
        self.held = (layer,)
        self.probabilities = Quantizer(None, name="probabilities")

    def query(self, query: Tensor) -> Tensor:
        layer = self.held[0]
        if layer.keys is None:
            return query
        query = with_signs(kronecker(query, None, _inverse_transposed(layer.keys)), layer.precision.kv_signs)
        rotation = layer.precision.kv_rotation
        return query if rotation is None else block_hadamard(query, rotation)

    def forward(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        layer = self.held[0]
        precision = layer.precision
        if precision.keys is not None:
            key = key if layer.shift is None else key - layer.shift[:, None, :].to(key)
            key = with_signs(kronecker(key, None, layer.keys), precision.kv_signs)
            key = soft_quantize(key, precision.keys, layer.key_clip.sigmoid(), precision.kv_rotation)
        if precision.values is not None:
            value = soft_quantize(value, precision.values, layer.value_clip.sigmoid())
        return key, value


class _Layer:
    """The transforms of one decoder layer, and a float32 copy of it (float64 of float64) that computes with them."""

    def __init__(
        self,
        step: Step,
        groups: list[FoldableGroup],
        sizes: list[Magnitudes],
        precision: Precision,
        heads: HeadShape,
        generator: torch.Generator,
    ) -> None:
        block = step.block
        weight = groups[0].linears[0].weight
        self.dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
        like = weight.new_empty(0, dtype=self.dtype)
        self.precision = precision.replace(
            **{role: dynamic(getattr(precision, role)) for role in ("inputs", "keys", "values")}
        )
        self.module = copy.deepcopy(block.module).to(self.dtype).requires_grad_(False)

        def clip(*rows: int) -> nn.Parameter:
            return nn.Parameter(torch.full((*rows, 2), _CLIP, dtype=self.dtype, device=weight.device))

        self.values = _orthogonal(heads.head_dim, generator, like)
        self.keys = _orthogonal(heads.head_dim, generator, like) if precision.keys is not None else None
        self.key_clip, self.value_clip = clip(), clip()
        self.groups: list[_Group] = []
        for group, size in zip(groups, sizes, strict=True):
            out = group.sites[0].attribute == OUT
            a, b = (heads.query_heads, heads.head_dim) if out else kronecker_sizes(group.linears[0].in_features)
            scale = None
            if group.divide is not None and not out:
                largest = torch.stack([linear.weight.abs().amax(0).double() for linear in group.linears]).amax(0)
                start = largest.clamp(min=_FLOOR) ** (1 - _ALPHA) / size.largest_K.clamp(min=_FLOOR) ** _ALPHA
                scale = nn.Parameter(start.log().to(like))
            learned = _Group(
                _orthogonal(a, generator, like),
                None if out else _orthogonal(b, generator, like),
                scale,
                clip(),
                [clip(linear.out_features) for linear in group.linears],
            )
            self.groups.append(learned)
            for at, site in enumerate(group.sites):
                parent = self.module.get_submodule(site.name.removeprefix(f"{block.name}.").rpartition(".")[0])
                setattr(
                    parent, site.attribute, _Linear(getattr(parent, site.attribute), learned, at, self, site.attribute)
                )
        assert block.attention is not None
        attention = self.module.get_submodule(block.attention.name.removeprefix(f"{block.name}."))
        cache: Any = attention.reqat_kv
        self.shift: Tensor | None = cache.shift  # of Q-FIT, which the model keeps
        attention.reqat_kv = _Cache(self)

    def _parameters(self) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
        """Matrices and scales; clips."""
        slow = [self.values, self.keys, *(p for g in self.groups for p in (g.left, g.right, g.log_scale))]
        fast = [self.key_clip, self.value_clip, *(p for g in self.groups for p in (g.input_clip, *g.weight_clips))]
        return [p for p in slow if p is not None], fast

    def train(self, step: Step, epochs: int, count: Callable[[], Any]) -> dict[str, float]:
        """Train on the batches of ``step``; returns the relative error of the first and of the last epoch."""
        assert step.outputs is not None
        slow, fast = self._parameters()
        optimizer = torch.optim.AdamW(
            [{"params": slow, "lr": _LR}, {"params": fast, "lr": _CLIP_LR}], weight_decay=_WEIGHT_DECAY
        )
        hidden = [x.detach().to(self.dtype) for x in step.hidden]
        outputs = [y.detach().to(self.dtype) for y in step.outputs]
        calls = [{key: _cast(value, self.dtype) for key, value in kwargs.items()} for kwargs in step.kwargs]
        whole = [i for i, x in enumerate(hidden) if len(x) == len(hidden[0])]
        rates = [group["lr"] for group in optimizer.param_groups]
        total, done, errors = epochs * len(whole), 0, []
        for _ in range(epochs):
            error = size = 0.0
            for i in whole:
                for group, rate in zip(optimizer.param_groups, rates, strict=True):
                    cosine = (1 + math.cos(math.pi * done / total)) / 2
                    group["lr"] = rate * (_DECAYED + (1 - _DECAYED) * cosine)
                out = self.module(hidden[i], **calls[i])
                out = out[0] if isinstance(out, tuple) else out
                loss = (out - outputs[i]).square().mean()
                error += float(loss.detach())
                size += float(outputs[i].square().mean())
                (loss / loss.detach().clamp(min=1e-30)).backward()
                optimizer.step()
                optimizer.zero_grad()
                done += 1
                count()
            errors.append(error / max(size, 1e-30))
        if not math.isfinite(errors[-1]):
            raise ReqatError(
                f"FlatQuant: training the transforms of {step.block.name} diverged: calibrate on other text"
            )
        return {"error_first": errors[0], "error_last": errors[-1]}

    def fold(self, step: Step, groups: list[FoldableGroup]) -> dict[str, Tensor]:
        """Fold what is offline into the model's own layer; returns the rest by its names in the sidecar."""
        precision, index = self.precision, step.block.index
        found: dict[str, Tensor] = {}
        P = self.values.detach().float().double()
        linears = {site.attribute: site.module for group in groups for site in group.sites}
        for learned, group in zip(self.groups, groups, strict=True):
            if learned.log_scale is not None:
                group.fold((-learned.log_scale.detach().double()).exp())
            for site, clip in zip(group.sites, learned.weight_clips, strict=True):
                for name, factor in (("left", learned.left), ("right", learned.right)):
                    if factor is not None:
                        found[f"{site.plain_name}.input_{name}"] = factor
                found[f"{site.plain_name}.weight_clip"] = clip.sigmoid()
                if precision.inputs is not None:
                    found[f"{site.plain_name}.input_clip"] = learned.input_clip.sigmoid()
        turn_values(linears[VALUE], linears[OUT], P, torch.linalg.inv(P).T)
        if self.keys is not None:
            found |= {f"layers.{index}.keys_right": self.keys, f"layers.{index}.keys_clip": self.key_clip.sigmoid()}
        if precision.values is not None:
            found[f"layers.{index}.values_clip"] = self.value_clip.sigmoid()
        return {name: tensor.detach().float().contiguous() for name, tensor in found.items()}


def _cast(value: Any, dtype: torch.dtype) -> Any:
    """Floating-point tensors of an argument in ``dtype``."""
    if isinstance(value, tuple):
        return tuple(_cast(part, dtype) for part in value)
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value


METHOD = Method(
    rtn,
    transforms=(Transform(train, online="learned bases of inputs, of o across heads, and of queries and keys"),),
    settings=FlatQuantOptions,
)
