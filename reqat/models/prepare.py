"""Put a model into a precision, in place: quantized linear layers, the attention function, the KV quantizers.

No model code is copied. The layers of a Hugging Face decoder are found by what they are
(:mod:`reqat.models.architecture`), each ``nn.Linear`` among them is replaced by a
:class:`~reqat.models.linear.QuantLinear` that holds the same parameters, and every attention module gets a
:class:`~reqat.models.kv.KVQuantizer` as ``reqat_kv``, which the attention function ``"reqat"`` uses.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from reqat.config.errors import ReqatError
from reqat.formats import Format, global_scale_for
from reqat.models.architecture import (
    DecoderLayer,
    LinearSite,
    adapters,
    decoder_layers,
    head_shape,
    sharing_groups,
)
from reqat.models.asked import Asked, settle
from reqat.models.attention import ATTENTION, check_call
from reqat.models.kv import KVQuantizer
from reqat.models.limits import check_token_ids, forget_lengths
from reqat.models.linear import InputQuantizer, QuantLinear, quant_linears
from reqat.models.padding import unpadded
from reqat.models.pretrained import hook_saving
from reqat.models.sidecar import Sidecar
from reqat.quant import Precision, Quantizer, calibrating


@dataclass(frozen=True)
class Entry:
    """One module of the report: its name, its shape, and for a skipped one the reason."""

    name: str
    shape: tuple[int, ...]
    reason: str = ""


@dataclass(frozen=True)
class Report:
    """What :func:`prepare` quantized and what it skipped; ``str(report)`` is a table for people."""

    model: str
    precision: Precision
    quantized: list[Entry] = field(default_factory=list)
    skipped: list[Entry] = field(default_factory=list)
    kv_layers: int = 0
    restored: list[str] = field(default_factory=list)
    skip: tuple[str, ...] = ()
    differs: tuple[str, ...] = ()

    def __str__(self) -> str:
        total = len(self.quantized) + sum(len(entry.shape) == 2 for entry in self.skipped)
        lines = [f"{self.precision} on {self.model}: {len(self.quantized)} of {total} weight matrices quantized"]
        precision = self.precision
        rotation = f", rotated in Hadamard blocks of {precision.rotation}" if precision.rotation else ""
        for role, fmt in (("weights", precision.weights), ("inputs", precision.inputs)):
            if self.quantized:
                lines.append(f"  {role:<9} {_describe(fmt)}{rotation}")
        for role, fmt in (("keys", precision.keys), ("values", precision.values)):
            if fmt is not None:
                lines.append(f"  {role:<9} {_describe(fmt)}, {self.kv_layers} layers")
        lines += [f"  restored  {what} from the checkpoint" for what in self.restored]
        lines += [f"  differs   from the checkpoint in {what}" for what in self.differs]
        for title, entries in (("quantized", self.quantized), ("skipped", self.skipped)):
            lines += [f"  {title:<9} {line}" for line in _collapsed(entries)]
        return "\n".join(lines)


def _describe(fmt: Format | None) -> str:
    if fmt is None:
        return "not quantized"
    block = "whole rows" if fmt.block is None else f"blocks of {fmt.block}"
    scale = f", global scale {fmt.global_scale}" if fmt.global_scale != "none" else ""
    return f"{fmt.name}: {fmt.element} in {block}, {fmt.scale} scales{scale}"


def _collapsed(entries: list[Entry]) -> list[str]:
    """One line for all layers' modules of the same name, shape and reason."""
    counts: dict[tuple[str, tuple[int, ...], str], int] = {}
    for entry in entries:
        key = (re.sub(r"\.\d+\.", ".*.", entry.name), entry.shape, entry.reason)
        counts[key] = counts.get(key, 0) + 1
    width = max((len(name) for name, _, _ in counts), default=0)
    return [
        f"{name:<{width}} {list(shape)!s:<14} x{n}{f'  ({reason})' if reason else ''}"
        for (name, shape, reason), n in counts.items()
    ]


def prepare(
    model: PreTrainedModel,
    precision: str | Precision,
    *,
    skip: Iterable[str] | None = None,
    override: bool = False,
    **options: Any,
) -> Report:
    """Put ``model`` into ``precision``, in place, and say what was done.

    Every linear layer of the decoder is quantized, ``lm_head``, embeddings and adapters (LoRA) never (ReQAT section 1).
    ``BF16`` installs the attention function alone. What the model's checkpoint keeps in its sidecar takes effect here:
    Q-FIT shift, static global scales, and quantized weights, which come back exactly as they were stored; and, asked
    for by the name that the checkpoint was saved with, its options (:mod:`reqat.models.asked`).

    From here on ``model.save_pretrained`` writes what :func:`reqat.models.save_model` does, and the state dict has the
    calibrated scales, the shift, and a frozen model's codes beside the plain model's tensors.

    Args:
        model: a causal decoder of the Llama, Qwen2 or Qwen3 kind.
        precision: a name such as ``NVFP4-W4A4KV4``, or a :class:`~reqat.quant.Precision`.
        skip: patterns (``model.layers.0.*``) of linear layers to leave alone; None for the checkpoint's.
        override: compute as asked, whatever the checkpoint was saved with.
        options: of :meth:`Precision.parse`.

    Raises:
        ReqatError: unknown precision or option, one that differs from the checkpoint's, unsupported attention, a block
            that does not divide a head or a layer, NaN or infinite weights, weights that are not those of the stored
            codes, or a model that was prepared for another precision or packed. The model is then unchanged.
    """
    sidecar: Sidecar | None = getattr(model, "_reqat_sidecar", None)
    asked = _asked(precision, skip, options, sidecar, override)
    precision = asked.precision
    previous: Report | None = getattr(model, "_reqat_report", None)
    if previous is not None:
        if previous.precision == precision and (skip is None or previous.skip == asked.skip):
            return previous
        if previous.precision != Precision():
            raise ReqatError(
                f"the model was prepared for {previous.precision} already and cannot be prepared for {precision} (or "
                "for the same name with other options) on top: load it again"
            )
        if getattr(model, "_reqat_packed", False):
            raise ReqatError(f"the model was packed at {previous.precision}: load it again to prepare for {precision}")
    layers = decoder_layers(model)
    _check_finite(model)
    patterns = list(asked.skip)
    check_geometry(model, layers, precision, patterns)
    if sidecar is not None:
        sidecar.check(precision)
        sidecar.check_weights(model)
    if asked.differs and not override and precision != Precision():
        warnings.warn(
            f"the checkpoint was saved at {sidecar.precision if sidecar else ''} and is prepared for {precision}: "
            f"{'; '.join(asked.differs)} (override=True says that this is meant)",
            stacklevel=2,
        )
    shifts = {layer.index: _shift(layer) for layer in layers}

    quantized: list[Entry] = []
    skipped: list[Entry] = []
    heads = head_shape(model)
    for layer in layers:
        for group in sharing_groups(layer):
            wanted = [site for site in group if not _skipped(site, precision, patterns)]
            for site in group:
                if site not in wanted:
                    reason = "skipped on request" if precision.quantizes_linear else "the precision leaves it as it is"
                    skipped.append(Entry(site.name, tuple(site.module.weight.shape), reason))
            if not wanted:
                continue
            shared = InputQuantizer(precision, len(wanted), f"{wanted[0].name} input")
            shared.to(wanted[0].module.weight.device)
            for site in wanted:
                quantized.append(Entry(site.name, tuple(site.module.weight.shape)))
                setattr(site.parent, site.attribute, QuantLinear(site.module, precision, shared, site.name))
        kv = KVQuantizer(precision, heads.kv_heads, heads.head_dim, f"{layer.name}.self_attn")
        attention: Any = layer.attention
        kv.to(attention.k_proj.weight.device)
        kv.set_shift(shifts[layer.index])
        attention.reqat_kv = kv
    skipped += _never_quantized(model, layers)
    model.set_attn_implementation(ATTENTION)
    if previous is None:
        model.get_decoder().register_forward_pre_hook(check_call, with_kwargs=True)
    hook_saving(model)
    restored = sidecar.restore(model, precision) if sidecar is not None else []
    kv_layers = len(layers) if precision.quantizes_cache else 0
    report = Report(type(model).__name__, precision, quantized, skipped, kv_layers, restored, asked.skip, asked.differs)
    model._reqat_report = report  # type: ignore[assignment]
    return report


def _asked(
    precision: str | Precision,
    skip: Iterable[str] | None,
    options: dict[str, Any],
    sidecar: Sidecar | None,
    override: bool,
) -> Asked:
    saved, saved_skip = (sidecar.precision, sidecar.skip) if sidecar is not None else (Precision(), None)
    return settle(precision, skip, options, saved, saved_skip, override=override)


def precision_of(model: PreTrainedModel) -> Precision | None:
    """The precision that ``model`` was prepared for, or None."""
    report: Report | None = getattr(model, "_reqat_report", None)
    return report.precision if report is not None else None


def freeze(model: PreTrainedModel, *, share_global_scale: bool = False) -> PreTrainedModel:
    """Quantize every weight once, keep its codes, and switch gradients off; returns ``model``. Idempotent.

    The frozen model computes bit for bit what the prepared one does in its forward pass, without quantizing weights
    each time. With ``share_global_scale`` q, k and v get one weight global scale, and gate and up one, as engines that
    fuse them expect; codes then differ slightly from training's.

    Raises ReqatError if the model was not prepared.
    """
    if precision_of(model) is None:
        raise ReqatError("freeze needs a prepared model: call prepare(model, precision) first")
    if share_global_scale:
        for layer in decoder_layers(model):
            for group in sharing_groups(layer):
                _share_global_scale([site.module for site in group if isinstance(site.module, QuantLinear)])
    for linear in quant_linears(model).values():
        linear.freeze()
    return model.requires_grad_(False).eval()


def _share_global_scale(layers: list[QuantLinear]) -> None:
    layers = [layer for layer in layers if not layer.frozen]
    fmt = layers[0].weight_quantizer.format if layers else None
    if fmt is None or not fmt.has_global_scale:
        return
    scales = [global_scale_for(layer.rotated_weight(), fmt) for layer in layers]
    smallest = torch.stack([scale.reshape(()) for scale in scales]).amin()  # the largest weight decides
    for layer in layers:
        layer.weight_quantizer.global_scale = smallest


@torch.no_grad()
def calibrate_static(model: PreTrainedModel, batches: Iterable[Tensor | Mapping[str, Tensor]]) -> int:
    """Set the static global scales of inputs, keys and values from what they hold on ``batches``.

    The model runs as prepared, with dynamic scales in place of the static ones; the largest magnitude that each
    quantizer sees becomes its range. Larger values later saturate.

    Args:
        model: prepared with ``global_scale="static"``.
        batches: input ids [B, T] without padding, or dictionaries of the model's arguments. Where an
            ``attention_mask`` [B, T] hides tokens, each row is run alone without them, so that scales are those of the
            unpadded rows.

    Returns the number of scales set; 0 if the precision has no static ones (the batches are not run then). Raises
    ReqatError if ``batches`` is empty, holds a token id without an embedding row or a mask that is not [B, T], and for
    a packed model, whose kernels hold the scales that it was packed with.
    """
    if not isinstance(model, nn.Module):
        raise ReqatError(f"calibrate_static needs a prepared model, not {type(model).__name__}.")
    if not isinstance(batches, Iterable):
        raise ReqatError(f"batches are tensors of ids [B, T] or dictionaries of them, not {type(batches).__name__}.")
    static = [
        module
        for module in model.modules()
        if isinstance(module, Quantizer) and module.format is not None and module.format.global_scale == "static"
    ]
    if not static:
        return 0
    if getattr(model, "_reqat_packed", False):
        raise ReqatError("a packed model keeps the scales that it was packed with: calibrate_static before pack()")
    training = model.training
    model.eval()
    try:
        with calibrating(static):
            for batch in batches:
                for inputs in unpadded(_inputs(batch)):
                    if isinstance(inputs.get("input_ids"), Tensor):
                        check_token_ids(model, inputs["input_ids"], "calibration")
                    forget_lengths(model)
                    model(**{**inputs, "use_cache": False})
    finally:
        model.train(training)
    for quantizer in static:
        quantizer.set_from_amax()
    return len(static)


def _inputs(batch: object) -> dict[str, Any]:
    """A batch of `calibrate_static` as the model's arguments. Raises `ReqatError` if it is none."""
    inputs = {"input_ids": batch} if isinstance(batch, Tensor) else dict(batch) if isinstance(batch, Mapping) else {}
    ids = inputs.get("input_ids", inputs.get("inputs_embeds"))
    wrong = isinstance(ids, Tensor) and "input_ids" in inputs and (ids.is_floating_point() or ids.ndim != 2)
    if not isinstance(ids, Tensor) or wrong:
        shown = f"{ids.dtype} of shape {tuple(ids.shape)}" if isinstance(ids, Tensor) else type(batch).__name__
        raise ReqatError(f"a batch to calibrate with is a tensor of whole ids [B, T], or a dictionary, not {shown}.")
    return inputs


def _skipped(site: LinearSite, precision: Precision, patterns: list[str]) -> bool:
    names = {site.name, site.plain_name}
    return not precision.quantizes_linear or any(fnmatchcase(n, pattern) for n in names for pattern in patterns)


def _shift(layer: DecoderLayer) -> Tensor | None:
    previous = getattr(layer.attention, "reqat_kv", None)
    return previous.shift if previous is not None else None


def _check_finite(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if not torch.isfinite(parameter).all():
            raise ReqatError(
                f"parameter {name} holds NaN or infinity; the checkpoint is damaged or its training diverged"
            )


def check_geometry(
    model: PreTrainedModel, layers: list[DecoderLayer], precision: Precision, patterns: list[str]
) -> None:
    """Raise ReqatError, naming layer and remedy, where a block or a rotation of ``precision`` does not divide a head or
    the inputs of a layer that none of ``patterns`` leaves alone."""
    head_dim = head_shape(model).head_dim
    for role, fmt in (("keys", precision.keys), ("values", precision.values)):
        if fmt is not None and fmt.block is not None and head_dim % fmt.block:
            raise ReqatError(
                f"head_dim {head_dim} is not divisible by the block {fmt.block} of {fmt.name} {role}; leave the KV "
                "cache unquantized, or take a format with another block"
            )
    if precision.keys is not None and precision.kv_rotation and head_dim % precision.kv_rotation:
        raise ReqatError(f"head_dim {head_dim} is not divisible by kv_rotation {precision.kv_rotation}")
    blocks = [
        (f"the block {f.block} of {f.name}", f.block) for f in (precision.weights, precision.inputs) if f and f.block
    ]
    if precision.rotation:
        blocks.append((f"the rotation block {precision.rotation}", precision.rotation))
    for layer in layers:
        for site in (site for group in sharing_groups(layer) for site in group):
            for what, block in blocks:
                if site.module.in_features % block and not _skipped(site, precision, patterns):
                    raise ReqatError(
                        f"{site.name}: in_features {site.module.in_features} is not divisible by {what}; "
                        f"leave the layer out with skip=[{site.name!r}]"
                    )


def _never_quantized(model: PreTrainedModel, layers: list[DecoderLayer]) -> list[Entry]:
    """Weight matrices that no rule covers, with the reason why they stay as they are."""
    entries = []
    inside = {id(parameter) for layer in layers for parameter in layer.module.parameters()}
    beside = {id(p) for layer in layers for m in adapters(layer.module) for p in m.parameters(recurse=False)}
    linears = {id(m.weight) for m in model.modules() if isinstance(m, nn.Linear)} - beside
    head = model.get_output_embeddings()
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if parameter.ndim < 2 or (id(parameter) in inside and id(parameter) in linears):
            continue
        if head is not None and parameter is head.weight and name == _name_of(model, head):
            reason = "the output head is never quantized"
        elif parameter is model.get_input_embeddings().weight:
            reason = "embeddings are never quantized"
        elif id(parameter) in beside:
            reason = "adapters are never quantized"
        elif id(parameter) in inside:
            reason = "not the weight of an nn.Linear"
        else:
            reason = "outside the decoder layers"
        entries.append(Entry(name.removesuffix(".weight"), tuple(parameter.shape), reason))
    return entries


def _name_of(model: nn.Module, wanted: nn.Module) -> str:
    return next((f"{name}.weight" for name, module in model.named_modules() if module is wanted), "")
