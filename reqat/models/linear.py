"""A linear layer whose weight and input are quantized.

``QuantLinear`` replaces ``nn.Linear`` in place: it holds the same ``weight`` and ``bias`` parameters under the same
names, so optimizers and tied weights go on working. Until frozen it fake-quantizes the weight in every forward pass
(QAT); frozen, it keeps the codes and multiplies with their dense dequantized values.

Its state dict has the weight as an ordinary linear layer would use it, also where a frozen weight is kept rotated, and
of a frozen layer the codes too (``weight_packed``, ``weight_scale``, ``weight_global_scale``, the sidecar's names).
Loaded into a prepared layer, the codes freeze it as it was.

A frozen weight must not change, because the codes would not follow: what is merged into it afterwards (a LoRA) would be
lost at the next save. :meth:`QuantLinear.check_unchanged` compares them; saving, packing and state dicts ask it, and
the forward pass of a prompt compares a sample.

Within :func:`weights_quantized_once` an unfrozen weight is quantized once, not once a forward pass: the micro-batches
of one optimizer step, and the second forward pass of gradient checkpointing, all see the same weight. What is kept is
the quantized weight in the type that the product reads: 2 bytes a parameter under autocast to bfloat16, which autograd
keeps for the backward pass anyway, and which stay through the step here.

Layers that read the same tensor (q, k and v; gate and up) share one :class:`InputQuantizer`, which quantizes that
tensor once a forward pass.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reqat.config.errors import ReqatError
from reqat.formats import PackedTensor, QuantizedTensor
from reqat.formats.stored import CODES
from reqat.quant import Basis, Precision, Quantizer, block_hadamard, straight_through
from reqat.quant.gradients import STE

_WEIGHT_TYPES = (torch.float32, torch.bfloat16, torch.float16)
_SAMPLE = 64  # elements of a frozen weight that each prompt compares


def quant_linears(model: nn.Module) -> dict[str, QuantLinear]:
    """The quantized linear layers of a prepared model, by name, in the order of the module tree."""
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantLinear)}


def same_values(weight: Tensor, dense: Tensor) -> bool:
    """Whether ``weight`` is ``dense`` (float32), perhaps rounded to a narrower type on the way."""
    return any(torch.equal(weight, dense.to(dtype).to(weight.dtype)) for dtype in _WEIGHT_TYPES)


def stands_for(weight: Tensor, quantized: QuantizedTensor, rotation: int | None, basis: Basis | None = None) -> bool:
    """Whether a plain (never rotated) ``weight`` [N, K] is what ``quantized``, kept rotated and in ``basis``,
    multiplies with.

    Exact without either. Rotating back is a sum in float32, whose order is the machine's: the result may then be
    off by rounding, which in a narrower type moves few elements, by one step. A merged LoRA moves nearly all.
    """
    dense = quantized.dequantize(torch.float32).to(weight.device)
    if rotation is None and (basis is None or not basis.changes):
        return same_values(weight, dense)
    for kept in _WEIGHT_TYPES:
        plain = _plain(dense.to(kept).float(), rotation, basis)
        largest = plain.abs().amax(-1, keepdim=True)
        for stored in _WEIGHT_TYPES:
            error = (weight.float() - plain.to(stored).float()).abs()
            moved = (error > largest * 2**-18).float().mean()
            if moved <= (0 if stored == torch.float32 else 0.01) and bool((error <= largest * 2**-7).all()):
                return True
    return False


def _plain(weight: Tensor, rotation: int | None, basis: Basis | None) -> Tensor:
    """A weight that is kept rotated and in a basis, as an ordinary linear layer would use it."""
    weight = weight if rotation is None else block_hadamard(weight, rotation)
    return weight if basis is None else basis.back(weight)


_KEEPING = threading.Lock()  # held while the number of blocks changes, never while anything computes


@contextmanager
def weights_quantized_once(model: nn.Module, enabled: bool = True) -> Iterator[None]:
    """Within this block the unfrozen layers of ``model`` keep their quantized weights; at its end they drop them.

    Values and gradients are those of quantizing in every forward pass, bit for bit: a kept weight is used only while
    parameter, memory, version, scale and type are what it was made of. Only a write that torch does not count as one
    (by its fused optimizers, or ``weight.data.add_()``) would be missed, so end the block before it.
    """
    layers = list(quant_linears(model).values()) if enabled else []
    layers = [layer for layer in layers if layer.weight_quantizer.format is not None]
    with _KEEPING:
        for layer in layers:
            layer.keeping += 1
    try:
        yield
    finally:
        with _KEEPING:
            for layer in layers:
                layer.keeping -= 1
                if not layer.keeping:  # the last block that keeps them, of whatever thread
                    layer._kept = None


class _Memo(threading.local):
    """An input and what became of it, with the layers that took it: a thread's own, or one would take another's."""

    held: tuple[Tensor, tuple[Any, ...], Any, set[int]] | None = None


class InputQuantizer(Quantizer):
    """A quantizer shared by ``consumers`` layers that read the same input tensor [..., K], in its ``basis``.

    The result for the tensor at hand is kept until its last consumer took it. It is found by the tensor's identity and
    version, and served once a consumer, so a layer called alone, again, or with another tensor, is never served a stale
    one; nor is a layer that another thread calls at the same time.
    """

    def __init__(self, precision: Precision, consumers: int, size: int, name: str) -> None:
        super().__init__(precision.inputs, rotation=precision.rotation, name=name, clamp=precision.clamp)
        self.basis = Basis(size, name)
        self.consumers = consumers
        self._memo = _Memo()

    def compute(self, x: Tensor) -> Any:
        """What consumers get: ``x`` in its basis, rotated and fake-quantized along its last axis."""
        return super().forward(self.basis(x))

    def forward(self, x: Tensor, consumer: nn.Module | None = None) -> Any:
        """:meth:`compute`, once for all consumers; a ``consumer`` that asks again is served anew."""
        if self.consumers == 1 or (self.format is None and self.rotation is None and not self.basis.changes):
            return self.compute(x)
        version = None if x.is_inference() else x._version
        key = (version, torch.is_grad_enabled(), self.calibrating)
        memo, asks = self._memo, id(consumer)
        held = memo.held
        if held is not None and held[0] is x and held[1] == key and asks not in held[3]:
            served = held[3]
            served.add(asks)
            if len(served) >= self.consumers:
                memo.held = None
            return held[2]
        out = self.compute(x)
        memo.held = (x, key, out, {asks})
        return out

    def __getstate__(self) -> dict[str, Any]:
        # The memo holds activations; copies and pickles of the module must not.
        return {name: value for name, value in self.__dict__.items() if name != "_memo"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._memo = _Memo()


class QuantLinear(nn.Linear):
    """``nn.Linear`` with quantized weight and input; weight [N, K], input [..., K]."""

    def __init__(self, linear: nn.Linear, precision: Precision, input_quantizer: InputQuantizer, name: str) -> None:
        nn.Module.__init__(self)  # not nn.Linear's: it would allocate and initialize a weight
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self.name = name
        self.rotation = precision.rotation
        self.weight_quantizer = Quantizer(
            precision.weights, rotation=precision.rotation, name=f"{name}.weight", clamp=precision.clamp
        )
        self.input_quantizer = input_quantizer
        self.quantized: QuantizedTensor | None = None
        self.frozen = False
        self._sample: Tensor | None = None  # of the weight as it was frozen
        self.keeping = 0  # blocks of weights_quantized_once that are at work
        self._kept: tuple[Tensor, Tensor | None, tuple[Any, ...], Tensor] | None = None
        self.train(linear.training)

    @property
    def basis(self) -> Basis:
        """The basis in which input and weight are quantized."""
        return self.input_quantizer.basis

    def forward(self, x: Tensor) -> Tensor:
        """y = Q(x) Q(W)^T + b; once frozen, Q(W) is the stored weight."""
        if self.frozen and x.ndim > 1 and x.shape[-2] > 1:  # a prompt: single tokens would wait for the comparison
            self._check_sample()
        x = self.input_quantizer(x, self)
        return self.multiply(x, self.weight if self.frozen else self._quantized_weight())

    def with_weight(self, x: Tensor, weight: Tensor) -> Tensor:
        """What the layer, not frozen, would compute of x with another ``weight`` [N, K] in place of its own."""
        x = self.input_quantizer(x, self)
        return self.multiply(x, self.weight_quantizer(self.basis.of_weight(weight)))

    def multiply(self, x: Tensor, weight: Tensor) -> Tensor:
        """The product of an input and a weight that were quantized already, and the bias."""
        return F.linear(x, weight, self.bias)

    def _quantized_weight(self) -> Tensor:
        """Q(W) with W's gradient, kept if :func:`weights_quantized_once` says so."""
        weight, quantizer = self.weight, self.weight_quantizer
        # Inference tensors have no version, and must not get into a graph.
        if self.basis.changes:
            return quantizer(self.basis.of_weight(weight))
        kept_for = self.keeping and quantizer.straight and quantizer.rounds and not quantizer.calibrating
        if not kept_for or torch.is_inference_mode_enabled() or weight.is_inference():
            return quantizer(weight)
        g = quantizer.global_scale
        scale_version = None if g is None or g.is_inference() else g._version
        dtype, device = weight.dtype, weight.device.type
        if dtype != torch.float64 and torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)  # what F.linear would make of it
        key = (weight._version, weight.data_ptr(), scale_version, quantizer.format, dtype)
        kept = self._kept
        if kept is None or kept[0] is not weight or kept[1] is not g or kept[2] != key:
            with torch.no_grad():
                kept = self._kept = (weight, g, key, quantizer(weight.detach()).to(dtype))
            if not self.keeping:  # another thread's block, which asked for it, ended meanwhile
                self._kept = None
        return straight_through(weight, kept[3], rotation=self.rotation)

    def __getstate__(self) -> dict[str, Any]:
        # Copies and pickles carry no quantized weight, and are no part of the block that keeps them.
        return {**self.__dict__, "keeping": 0, "_kept": None}

    def _sampled(self) -> Tensor:
        flat = self.weight.detach().reshape(-1)
        # An odd stride, so that columns differ where their number is a power of two.
        return flat[:: flat.numel() // _SAMPLE | 1][:_SAMPLE].clone()

    def _check_sample(self) -> None:
        if self._sample is None or self.weight.is_meta or torch.compiler.is_compiling():
            return
        if self.weight.is_cuda and torch.cuda.is_current_stream_capturing():
            return  # a capture must not wait for the device
        if not torch.equal(self._sampled(), self._sample):
            raise self._changed()

    def _changed(self) -> ReqatError:
        return ReqatError(
            f"{self.name}: its weight was changed after it was frozen (by a merged LoRA, or by training), and its "
            "codes were not: merge or train before freeze(), on the dense model, then prepare and freeze it again"
        )

    @torch.no_grad()
    def check_unchanged(self) -> None:
        """Raise ReqatError if the layer is frozen and its weight is no longer what was frozen.

        Conversions of the dtype are no change. A layer that freezing left as it was (no codes, not rotated) may change.
        """
        if not self.frozen or self.weight.is_meta:
            return
        self._check_sample()
        if self.quantized is not None and not same_values(self.weight, self.quantized.dequantize(torch.float32)):
            raise self._changed()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self._check_sample()
        super()._apply(fn, recurse)
        if self._sample is not None:
            self._sample = self._sampled()
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.frozen:
            self.check_unchanged()
            destination[f"{prefix}weight"] = self.plain_weight()
        if self.quantized is not None:
            packed = self.quantized.pack()
            for name, tensor in zip(CODES, (packed.packed, packed.scales, packed.global_scale), strict=True):
                if tensor is not None:
                    destination[f"{prefix}{name}"] = tensor

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        factors = f"{prefix}input_quantizer.basis."
        if any(key.startswith(factors) for key in state_dict):  # before the codes, which are in that basis
            self.basis._load_from_state_dict(state_dict, factors, *args)
        packed, scales, global_scale = (state_dict.pop(f"{prefix}{name}", None) for name in CODES)
        key = f"{prefix}weight"
        if packed is not None and scales is not None:
            self.set_quantized(self._unpacked(packed, scales, global_scale))
        if self.frozen and key in state_dict:
            given = state_dict[key].to(self.weight.device)
            if self.quantized is not None:
                same = stands_for(given, self.quantized, self.rotation, self.basis)
            else:
                same = same_values(given, self.plain_weight())
            if not same:
                raise ReqatError(
                    f"{key}: the layer is frozen, and the state dict has another weight than it was frozen with: load "
                    "it into the prepared model before freeze()"
                )
            state_dict[key] = self.weight.detach()  # as it is kept: rotated, and of its own dtype
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _unpacked(self, packed: Tensor, scales: Tensor, global_scale: Tensor | None) -> QuantizedTensor:
        fmt = self.weight_quantizer.format
        if fmt is None:
            raise ReqatError(
                f"{self.name}: the state dict has a quantized weight, and the model's precision does not quantize "
                "weights: prepare the model for the precision that the state dict was made at"
            )
        shape, device = self.weight.shape, self.weight.device
        g = global_scale.to(device).reshape(()) if global_scale is not None else None
        axis = len(shape) - 1
        return PackedTensor(packed.to(device), scales.to(device), g, fmt, axis, shape, self.weight.dtype).unpack()

    def as_rows(self, weight: Tensor) -> Tensor:
        """A weight as the layer's state dict has it, as the matrix [N, K]."""
        return weight

    @torch.no_grad()
    def rotated_weight(self) -> Tensor:
        """The dense weight [N, K] in the basis in which it is quantized (rotated, if the precision rotates)."""
        if self.frozen:
            return self.weight.detach()
        weight = self.basis.of_weight(self.weight.detach())
        return weight if self.rotation is None else block_hadamard(weight, self.rotation)

    @torch.no_grad()
    def plain_weight(self) -> Tensor:
        """The dense weight [N, K] as an ordinary linear layer would use it (never rotated, in no other basis)."""
        return _plain(self.weight.detach(), self.rotation, self.basis) if self.frozen else self.weight.detach()

    @torch.no_grad()
    def quantize_weight(self) -> QuantizedTensor:
        """The weight, rounded to the nearest; what :meth:`freeze` stores."""
        if self.quantized is not None:
            self.check_unchanged()
            return self.quantized
        quantizer = self.weight_quantizer
        if quantizer.format is None:
            raise ReqatError(f"{self.name}: the precision does not quantize weights")
        return quantizer.codes(self.rotated_weight())

    @torch.no_grad()
    def set_quantized(self, quantized: QuantizedTensor) -> None:
        """Freeze the layer with these codes (of the rotated weight, if the precision rotates).

        For solvers such as GPTQ, and for restoring checkpoints. Raises ValueError if shape or format is not the
        layer's.
        """
        if tuple(quantized.shape) != tuple(self.weight.shape):
            raise ReqatError(
                f"{self.name}: codes of shape {tuple(quantized.shape)} for a weight of shape {tuple(self.weight.shape)}"
            )
        if quantized.format != self.weight_quantizer.format:
            raise ReqatError(
                f"{self.name}: codes are in {quantized.format}, but the layer was prepared for "
                f"{self.weight_quantizer.format}"
            )
        self._freeze_with(quantized.dequantize(torch.float32))
        self.quantized = quantized

    @torch.no_grad()
    def freeze(self) -> None:
        """Quantize the weight once; without a weight format, only rotate it. Does nothing the second time."""
        if self.frozen:
            return
        if self.weight_quantizer.format is None:
            self._freeze_with(self.rotated_weight())
        else:
            self.set_quantized(self.quantize_weight())

    def _freeze_with(self, dense: Tensor) -> None:
        self.weight = nn.Parameter(dense.to(self.weight), requires_grad=False)
        self.frozen = True
        self.weight_quantizer.global_scale = None  # the codes have their own, and what a gradient rule learned
        self.weight_quantizer.clip = None
        self.weight_quantizer.gradient = STE()
        if self.weight_quantizer.format is not None or self.rotation is not None or self.basis.changes:
            self._sample = self._sampled()

    def extra_repr(self) -> str:
        """Shape and state, for ``print(model)``."""
        return f"{super().extra_repr()}, frozen={self.frozen}"
