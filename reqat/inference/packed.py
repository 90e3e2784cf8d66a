"""Packed models: weights and KV cache stored in four bits, inputs rounded to codes, products computed by kernels.

``pack`` takes a prepared model and replaces each quantized linear layer by a
:class:`~reqat.inference.packed_linear.PackedLinear`, which holds the
codes and scales in the order in which the kernel streams them, and the dense weight no more. Everything else stays:
transformers' model code, its ``generate()``, the attention function; only single tokens on a CPU take a shorter way
through the decoder (:mod:`reqat.inference.packed_decoder`). A cache that ``generate()`` makes is exchanged for
a :class:`~reqat.inference.packed_cache.PackedCache` at the first forward pass.

The numbers are those of the frozen fake-quantized model up to the order of float32 summation (and, in a bfloat16
model, up to where it rounds to bfloat16): inputs are rounded by the same functions, weights are the same codes. Where
that order moves an activation across a rounding threshold its code changes, so logits agree closely, not bit for bit.

The packed model only runs: it cannot be trained or saved. Save the frozen model, and pack it again after loading.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel, StaticCache

from reqat.config.errors import ReqatError
from reqat.inference.backends import Choice, backend_for
from reqat.inference.packed_cache import PackedCache
from reqat.inference.packed_decoder import native_decoder
from reqat.inference.packed_linear import PackedInput, PackedLinear, PackedModule
from reqat.inference.vocabulary import check_choice, pack_vocabulary
from reqat.models.adapters import blocks_of, cached_attentions
from reqat.models.linear import InputQuantizer, quant_linears
from reqat.models.prepare import freeze, precision_of
from reqat.quant import Basis, Quantizer
from reqat_kernels.native.attention import unsupported


@dataclass(frozen=True)
class Memory:
    """Bytes as allocated: packed weights of linear layers, all other parameters and buffers, and a cache if given."""

    linear_bytes: int
    other_bytes: int
    cache_bytes: int

    @property
    def total_bytes(self) -> int:
        """The sum."""
        return self.linear_bytes + self.other_bytes + self.cache_bytes


@torch.no_grad()
def pack(
    model: PreTrainedModel, backend: Choice = "auto", *, head: str | None = None, embeddings: str | None = None
) -> PreTrainedModel:
    """Turn a prepared ``model`` into one whose weights and cache take four bits, in place; returns it. Idempotent.

    Freezes it first, if need be. Linear layers whose format has no kernel (INT4, AMXFP4; weights left at 16 bits) stay
    as they are, frozen.

    Args:
        model: prepared; static scales must be calibrated before.
        backend: ``native`` kernels on a CPU, ``triton`` ones on a CUDA device, or by the model's device (``auto``).
        head: how the output head is stored: ``BF16``, ``INT8`` (a scale a row), ``NVFP4`` or ``MXFP4``, its input not
            rounded; with ``-A8`` behind the last three, the input is rounded to int8 a token at a time. None: as the
            model has it (float32 or bfloat16).
        embeddings: the same of the embeddings, without ``-A8``; of a row the numbers that are looked up are those that
            the head multiplies. None: as the model has them.

    Where head and embeddings are one matrix (tied), a choice for one holds for both, and the matrix is stored once; two
    different choices store it twice, with a warning. Raises ReqatError for a model that was not prepared, that lies on
    a device without kernels or on several, for an unknown choice or one that does not fit the model or the backend, and
    for a choice for a model that is packed already.
    """
    precision = precision_of(model)
    if precision is None:
        raise ReqatError("pack needs a prepared model: call prepare(model, precision) first")
    precision.check_packable("a packed model")
    if is_packed(model):
        if (head, embeddings) != (None, None):
            raise ReqatError(
                f"head={head!r}, embeddings={embeddings!r}: the model is packed already and stays as it is: load the "
                "frozen model and choose when it is packed"
            )
        return model
    check_choice(model, head, embeddings)
    devices = {parameter.device for parameter in model.parameters()}
    if len(devices) != 1:
        names = ", ".join(sorted(map(str, devices)))
        raise ReqatError(f"pack runs a model on one device, and this one is on {names}: move it with model.to(device)")
    kernels = backend_for(devices.pop(), backend)
    uncalibrated = [m.name for m in model.modules() if isinstance(m, InputQuantizer) and m.needs_calibration]
    if uncalibrated:
        raise ReqatError(f"{uncalibrated[0]}: its static scale is not calibrated; run calibrate_static(model, batches)")
    _check_served(model)
    for chosen in (head, embeddings):
        if chosen is not None:
            kernels.check_table(chosen)
    freeze(model)
    fmt = precision.weights
    linears = {} if fmt is None else quant_linears(model)
    if fmt is not None:
        linears = {k: v for k, v in linears.items() if kernels.supports(fmt, precision.inputs, v.in_features)}
    if fmt is not None and linears:
        buffers = kernels.allocate_weight_buffers(
            [(linear.out_features, linear.in_features) for linear in linears.values()], fmt
        )
        shared: dict[int, PackedInput] = {}
        for (name, linear), buffer in zip(linears.items(), buffers, strict=True):
            source = linear.input_quantizer
            inputs = shared.setdefault(id(source), PackedInput(source, precision, fmt.block or 1, kernels))
            parent, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(parent), attribute, PackedLinear(linear, inputs, buffer))
        packed = [module.packed for module in model.modules() if isinstance(module, PackedLinear)]
        kernels.tune(packed, precision.inputs)
    model._reqat_backend = kernels  # type: ignore[assignment]
    # A call of the model looks for NaN once, not once a kernel.
    model.register_forward_pre_hook(_defer, prepend=True)
    model.register_forward_hook(_tell, always_call=True)
    if packs_cache(model):
        model.register_forward_pre_hook(_use_packed_cache, with_kwargs=True)
        if kernels.name == "native":
            native_decoder(model)
    pack_vocabulary(model, kernels, head, embeddings)
    model._reqat_packed = True  # type: ignore[assignment]
    # Before any part is moved: a refusal in the middle would leave half of the model elsewhere.
    model._apply = partial(_checked_apply, model)  # type: ignore[method-assign]
    model.tie_weights = _stays_tied  # type: ignore[method-assign]
    return model


def _check_served(model: PreTrainedModel) -> None:
    """Raise ReqatError for what no kernel computes: a basis of a layer's inputs or keys, clipped inputs or cache."""
    for module in model.modules():
        if isinstance(module, Basis) and module.factored:
            what = "its tensors are quantized in a basis of their own (QuaRot, FlatQuant)"
        elif isinstance(module, Quantizer) and module.clip is not None:
            what = "its tensors are clipped before they are quantized"
        else:
            continue
        raise ReqatError(
            f"{module.name}: {what}, which packed models do not compute: run the prepared model as it is, or quantize "
            "by a method that needs nothing of the kind (reqat quantize --method rtn, gptq, awq, smoothquant)"
        )


def _defer(model: Any, args: tuple[Any, ...]) -> None:
    model._reqat_backend.defer()


def _tell(model: Any, args: tuple[Any, ...], out: Any) -> None:
    model._reqat_backend.tell()


def _checked_apply(model: nn.Module, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
    for module in model.modules():
        if isinstance(module, PackedModule):
            module.check_conversion(fn)
    return type(model)._apply(model, fn, recurse)


def _stays_tied(*args: Any, **kwargs: Any) -> None:
    """In place of ``tie_weights``, which would look for the dense matrices: head and embeddings share what they read
    since they were packed, or were stored apart by choice."""


def is_packed(model: nn.Module) -> bool:
    """Whether :func:`pack` was called on ``model``."""
    return bool(getattr(model, "_reqat_packed", False))


def packs_cache(model: PreTrainedModel) -> bool:
    """Whether a prepared model's keys and values fit a :class:`~reqat.inference.packed_cache.PackedCache`."""
    precision, attentions = precision_of(model), [attention for _, attention in cached_attentions(model)]
    if precision is None or not attentions:
        return False
    sizes, formats = {attention.heads.head_dim for attention in attentions}, (precision.keys, precision.values)
    return not any(unsupported(fmt, head_dim) for fmt in formats for head_dim in sizes)


def memory(model: nn.Module, cache: PackedCache | None = None) -> Memory:
    """What ``model`` (packed or not) and a cache take, each storage counted once."""
    layers = [block.module for block in blocks_of(model)]
    linear = {id(m): m for layer in layers for m in layer.modules() if isinstance(m, PackedLinear | nn.Linear)}
    storages: dict[int, int] = {}
    inside = 0
    for module in linear.values():
        for tensor in [*module.parameters(recurse=False), *module.buffers(recurse=False)]:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in storages:
                storages[storage.data_ptr()] = storage.nbytes()
                inside += storage.nbytes()
    for tensor in [*model.parameters(), *model.buffers()]:
        storages.setdefault(tensor.untyped_storage().data_ptr(), tensor.untyped_storage().nbytes())
    return Memory(inside, sum(storages.values()) - inside, 0 if cache is None else cache.nbytes)


def _use_packed_cache(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Exchange an empty cache of transformers' own for a packed one; the model hands it back with its output."""
    cache = kwargs.get("past_key_values")
    if cache is None:
        if kwargs.get("use_cache"):
            kwargs["past_key_values"] = PackedCache(model)
    elif type(cache) in (DynamicCache, StaticCache) and cache.get_seq_length() == 0:
        if getattr(cache, "_reqat_replaced", False):
            raise ReqatError(
                "this cache is empty: a packed model filled one of its own in its place, which it handed back as "
                "output.past_key_values. Pass that one on, or start with PackedCache(model)"
            )
        cache._reqat_replaced = True
        mask = kwargs.get("attention_mask")
        if isinstance(mask, Tensor) and mask.ndim == 4:  # made by generate() for all that a static cache will hold
            given: Any = (*args[:1], kwargs.get("input_ids"), kwargs.get("inputs_embeds"))
            tokens = next(tensor for tensor in given if tensor is not None)
            kwargs["attention_mask"] = mask[..., : tokens.shape[1]]
        kwargs["past_key_values"] = PackedCache(model)
    return args, kwargs
