"""Put a model into a precision, in place: quantized linear layers, the attention function, the KV quantizers.

No model code is copied. An adapter (:mod:`reqat.models.adapters`) finds the model's blocks by what they are; each
``nn.Linear`` in them is replaced by a :class:`~reqat.models.linear.QuantLinear` that holds the same parameters, experts
in fused parameters are opened first (:mod:`reqat.models.experts`), and every attention module that keeps keys and
values gets a :class:`~reqat.models.kv.KVQuantizer` as ``reqat_kv``, which the attention function ``"reqat"`` uses.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from reqat.config.errors import ReqatError, unknown
from reqat.formats import global_scale_for
from reqat.models.adapters import PEFT_ADDED, Block, Group, ModelAdapter, Site, adapter_of, blocks_of
from reqat.models.asked import Asked, settle
from reqat.models.attention import ATTENTION, check_call
from reqat.models.embedding import QuantEmbedding
from reqat.models.kv import KVQuantizer
from reqat.models.limits import check_token_ids, forget_lengths
from reqat.models.linear import InputQuantizer, QuantLinear, quant_linears
from reqat.models.padding import unpadded
from reqat.models.pretrained import hook_saving
from reqat.models.report import UNTOUCHED, Entry, Report
from reqat.models.sidecar import Sidecar
from reqat.quant import Precision, Quantizer, calibrating


def prepare(
    model: PreTrainedModel,
    precision: str | Precision,
    *,
    skip: Iterable[str] | None = None,
    override: bool = False,
    **options: Any,
) -> Report:
    """Put ``model`` into ``precision``, in place, and say what was done.

    Every linear layer of the model's blocks is quantized, experts too, and an encoder's pooler; ``lm_head``, routers
    and adapters (LoRA) never (ReQAT section 1), embeddings where the precision names them. More than 1% of the blocks'
    weights left as they are is a warning. ``BF16`` installs the attention function alone. What the model's checkpoint
    keeps in its sidecar takes effect here: Q-FIT shift, static global scales, and quantized weights, which come back
    exactly as they were stored; and, asked for by the name that the checkpoint was saved with, its options
    (:mod:`reqat.models.asked`).

    From here on ``model.save_pretrained`` writes what :func:`reqat.models.save_model` does, and the state dict has the
    calibrated scales, the shift, and a frozen model's codes beside the plain model's tensors.

    Args:
        model: one that an adapter knows (:mod:`reqat.models.adapters`).
        precision: a name such as ``NVFP4-W4A4KV4``, or a :class:`~reqat.quant.Precision`.
        skip: patterns (``model.layers.0.*``) of linear layers to leave alone; None for the checkpoint's.
        override: compute as asked, whatever the checkpoint was saved with.
        options: of :meth:`Precision.parse`.

    Raises:
        ReqatError: unknown precision or option, one that differs from the checkpoint's, a model that no adapter knows,
            an attention whose operands cannot be quantized, a block that does not divide a head or a layer, NaN or
            infinite weights, weights that are not those of the stored codes, or a model that was prepared for another
            precision or packed. The model is then unchanged.
    """
    sidecar: Sidecar | None = getattr(model, "_reqat_sidecar", None)
    asked = _asked(precision, skip, options, sidecar, override)
    precision = asked.precision
    previous = report_of(model)
    if previous is not None:
        if previous.precision == precision and (not asked.skip_given or previous.skip == asked.skip):
            return previous
        if previous.precision != Precision():
            raise ReqatError(
                f"the model was prepared for {previous.precision} already and cannot be prepared for {precision} (or "
                "for the same name with other options) on top: load it again"
            )
        if getattr(model, "_reqat_packed", False):
            raise ReqatError(f"the model was packed at {previous.precision}: load it again to prepare for {precision}")
    adapter = adapter_of(model)
    blocks, outside = adapter.blocks(model), adapter.outside(model)
    _check_finite(model)
    patterns = list(asked.skip)
    check_geometry(model, precision, patterns)
    if sidecar is not None:
        sidecar.check(precision)
        sidecar.check_weights(model)
    if asked.differs and not override and precision != Precision():
        warnings.warn(
            f"the checkpoint was saved at {sidecar.precision if sidecar else ''} and is prepared for {precision}: "
            f"{'; '.join(asked.differs)} (override=True says that this is meant)",
            stacklevel=2,
        )
    rounded = precision.quantizes_cache or precision.quantizes_attention
    attentions = [attention for block in blocks if (attention := block.attention) is not None]
    cached = [attention for attention in attentions if attention.cached]
    ours = attentions if getattr(type(model), "_supports_attention_backend", False) else cached
    shifts = [kv.shift if (kv := getattr(attention.module, "reqat_kv", None)) else None for attention in ours]

    if precision.quantizes_linear:
        for experts in [experts for block in blocks for experts in block.fused()]:
            experts.open()
    quantized, skipped = _swap([*(block.groups() for block in blocks), _alone(outside)], precision, patterns)
    if precision.embeddings is not None:
        quantized.append(_swap_embedding(model, precision))
    for attention, shift in zip(ours, shifts, strict=True):
        kv = KVQuantizer(precision, attention.heads.kv_heads, attention.heads.head_dim, attention.name)
        kv.to(attention.key.weight.device)
        kv.set_shift(shift)
        attention.module.reqat_kv = kv
    kept = _never_quantized(model, adapter, blocks, precision)
    if ours:
        model.set_attn_implementation(ATTENTION)
        if previous is None:
            adapter.body(model).register_forward_pre_hook(check_call, with_kwargs=True)
    hook_saving(model)
    restored, dropped = sidecar.restore(model, precision) if sidecar is not None else ([], [])
    report = Report(
        type(model).__name__,
        precision,
        quantized,
        skipped + kept,
        kv_layers=len(ours) if rounded else 0,
        restored=restored,
        dropped=dropped,
        skip=asked.skip,
        differs=asked.differs,
        block_weights=_numbers([*quantized, *skipped, *(entry for entry in kept if entry.in_block)]),
        left=_numbers(entry for entry in kept if entry.in_block),
    )
    model._reqat_report = report  # type: ignore[assignment]
    if report.warning is not None:
        warnings.warn(report.warning, stacklevel=2)
    return report


def _alone(sites: list[Site]) -> list[Group]:
    return [Group((site,), site.name) for site in sites]


def _swap_embedding(model: PreTrainedModel, precision: Precision) -> Entry:
    """Put a quantized embedding of tokens into the model's place for it."""
    embedding = model.get_input_embeddings()
    name = next(name for name, module in model.named_modules() if module is embedding)
    if type(embedding) is not nn.Embedding or embedding.max_norm is not None:
        raise ReqatError(f"{name} is no plain nn.Embedding, and {precision} quantizes embeddings: leave them out of it")
    model.set_input_embeddings(QuantEmbedding(embedding, precision, name))
    return Entry(name, tuple(embedding.weight.shape))


def _swap(parts: list[list[Group]], precision: Precision, patterns: list[str]) -> tuple[list[Entry], list[Entry]]:
    """Put a quantized layer into every site that is not skipped; returns the sites that are quantized, and others.
    ``parts``: the groups of each block, and of what is outside."""
    quantized: list[Entry] = []
    skipped: list[Entry] = []
    for groups in parts:
        inputs: dict[str, InputQuantizer] = {}
        for group in groups:
            wanted = [site for site in group.sites if not _skipped(site.names, precision, patterns)]
            for site in group.sites:
                if site not in wanted:
                    reason = "skipped on request" if precision.quantizes_linear else UNTOUCHED
                    skipped.append(Entry(site.name, tuple(site.module.weight.shape), reason))
            if not wanted:
                continue
            if group.scale not in inputs:
                inputs[group.scale] = wanted[0].reader(
                    precision, len(wanted), wanted[0].size, f"{wanted[0].name} input"
                )
                inputs[group.scale].to(wanted[0].module.weight.device)
            shared = inputs[group.scale]
            shared.consumers = max(shared.consumers, len(wanted))
            for site in wanted:
                quantized.append(Entry(site.name, tuple(site.module.weight.shape)))
                setattr(site.parent, site.attribute, site.twin(site.module, precision, shared, site.name))
    return quantized, skipped


def _numbers(entries: Iterable[Entry]) -> int:
    return sum(math.prod(entry.shape) for entry in entries)


def _asked(
    precision: str | Precision,
    skip: Iterable[str] | None,
    options: dict[str, Any],
    sidecar: Sidecar | None,
    override: bool,
) -> Asked:
    saved, saved_skip = (sidecar.precision, sidecar.skip) if sidecar is not None else (Precision(), None)
    return settle(precision, skip, options, saved, saved_skip, override=override)


def report_of(model: PreTrainedModel) -> Report | None:
    """What ``prepare`` did to ``model``, or None."""
    return getattr(model, "_reqat_report", None)


def precision_of(model: PreTrainedModel) -> Precision | None:
    """The precision that ``model`` was prepared for, or None."""
    report = report_of(model)
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
        share_global_scales(model)
    for linear in quant_linears(model).values():
        linear.freeze()
    return model.requires_grad_(False).eval()


def share_global_scales(model: PreTrainedModel) -> None:
    """Give weights that read the same input (q, k and v; gate and up) of a prepared model one global scale each group,
    that of the largest weight as it is now.

    Raises ReqatError where such weights were frozen with scales of their own: their codes cannot take another.
    """
    for block in blocks_of(model):
        _share_in(block)


@torch.no_grad()
def _share_in(block: Block) -> None:
    for group in block.groups():
        _share_global_scale([site.module for site in group.sites if isinstance(site.module, QuantLinear)])


@contextmanager
def sharing_global_scales(model: PreTrainedModel) -> Iterator[None]:
    """Within this block the forward pass of every block of a prepared ``model`` begins with what
    :func:`share_global_scales` does to it, so that a training computes with the scales that
    ``freeze(model, share_global_scale=True)`` will give its weights. At the end each unfrozen layer has its own scale
    again. Block by block, because a model that is divided among processes has the weights of one at a time."""
    blocks = blocks_of(model)
    handles = [block.module.register_forward_pre_hook(lambda *_, b=block: _share_in(b)) for block in blocks]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for layer in quant_linears(model).values():
            layer.weight_quantizer.global_scale = None


def _share_global_scale(layers: list[QuantLinear]) -> None:
    own = [q.global_scale for layer in layers if (q := layer.quantized) is not None and q.global_scale is not None]
    if len({float(scale) for scale in own}) > 1:
        names = ", ".join(layer.name for layer in layers)
        raise ReqatError(
            f"{names} were frozen with global scales of their own, which their codes cannot change: begin from the "
            "dense model"
        )
    layers = [layer for layer in layers if not layer.frozen]
    fmt = layers[0].weight_quantizer.format if layers else None
    if fmt is None or not fmt.has_global_scale:
        return
    scales = [global_scale_for(layer.weight_quantizer.cut(layer.rotated_weight()), fmt) for layer in layers]
    smallest = torch.stack([scale.reshape(()) for scale in scales]).amin()  # the largest weight decides
    for layer in layers:
        held = layer.weight_quantizer.global_scale
        if held is None or not torch.equal(held, smallest):  # a quantized weight is kept for as long as its scale is
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
    device: torch.device = model.get_input_embeddings().weight.device  # type: ignore[assignment]
    model.eval()
    try:
        with calibrating(static):
            for batch in batches:
                for inputs in unpadded(_inputs(batch)):
                    if isinstance(inputs.get("input_ids"), Tensor):
                        check_token_ids(model, inputs["input_ids"], "calibration")
                    forget_lengths(model)
                    here = {name: x.to(device) if isinstance(x, Tensor) else x for name, x in inputs.items()}
                    model(**{**here, "use_cache": False})
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


def _skipped(names: Iterable[str], precision: Precision, patterns: list[str]) -> bool:
    return not precision.quantizes_linear or any(fnmatchcase(name, pattern) for name in names for pattern in patterns)


def _check_finite(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if not torch.isfinite(parameter).all():
            raise ReqatError(
                f"parameter {name} holds NaN or infinity; the checkpoint is damaged or its training diverged"
            )


def check_geometry(model: PreTrainedModel, precision: Precision, patterns: list[str]) -> None:
    """Raise ReqatError, naming layer and remedy, where the model has no cache that ``precision`` could quantize, or a
    block or a rotation of it does not divide a head or the inputs of a layer that none of ``patterns`` leaves alone."""
    if precision.quantizes_cache or precision.quantizes_attention:
        _check_attention(model, precision)
    if precision.quantizes_linear:
        _check_patterns(model, patterns)
    blocks = [
        (f"the block {f.block} of {f.name}", f.block) for f in (precision.weights, precision.inputs) if f and f.block
    ]
    if precision.rotation:
        blocks.append((f"the rotation block {precision.rotation}", precision.rotation))
    for names, size in _inputs_of(model):
        for what, block in blocks:
            if size % block and not _skipped(names, precision, patterns):
                raise ReqatError(
                    f"{names[0]}: in_features {size} is not divisible by {what}; leave the layer out with "
                    f"skip=[{names[0]!r}]"
                )


def _check_patterns(model: PreTrainedModel, patterns: list[str]) -> None:
    """Raise ReqatError for a pattern that no layer's name matches: it would quantize what was to be left alone."""
    names = [name for names, _ in _inputs_of(model) for name in names]
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise unknown("layer", pattern, names, where="skip", remedy=f"Layers have names such as {names[-1]!r}.")


def _inputs_of(model: PreTrainedModel) -> Iterable[tuple[tuple[str, ...], int]]:
    """Names and input size of each linear layer that a precision may quantize, fused experts included."""
    adapter = adapter_of(model)
    blocks = adapter.blocks(model)
    for site in [*(site for block in blocks for site in block.sites()), *adapter.outside(model)]:
        yield site.names, site.size
    for experts in [experts for block in blocks for experts in block.fused()]:
        yield from (((name,), weight.shape[1]) for name, weight in experts.weights().items())


def _check_attention(model: PreTrainedModel, precision: Precision) -> None:
    found = [attention for block in blocks_of(model) if (attention := block.attention) is not None]
    if not found or not getattr(type(model), "_supports_attention_backend", False):
        without = precision.replace(
            queries=None, keys=None, values=None, probabilities=None, kv_rotation=None, kv_signs=None
        )
        raise ReqatError(
            f"model type {model.config.model_type!r} has no attention whose operands {precision} could quantize: take "
            f"{without}"
        )
    static = next((f for f in (precision.keys, precision.values) if f is not None and f.global_scale == "static"), None)
    if static is not None and not all(attention.cached for attention in found):
        raise ReqatError(
            f"model type {model.config.model_type!r} keeps no keys and values, and a checkpoint has no place for their "
            "calibrated scales: say global_scale=row"
        )
    for head_dim in {attention.heads.head_dim for attention in found}:
        for role, fmt in (("keys", precision.keys), ("values", precision.values), ("queries", precision.queries)):
            if fmt is not None and fmt.block is not None and head_dim % fmt.block:
                raise ReqatError(
                    f"head_dim {head_dim} is not divisible by the block {fmt.block} of {fmt.name} {role}; leave them "
                    "unquantized, or take a format with another block"
                )
        if precision.keys is not None and precision.kv_rotation and head_dim % precision.kv_rotation:
            raise ReqatError(f"head_dim {head_dim} is not divisible by kv_rotation {precision.kv_rotation}")


def _never_quantized(
    model: PreTrainedModel, adapter: ModelAdapter, blocks: list[Block], precision: Precision
) -> list[Entry]:
    """Weight matrices that are no site, with the reason why they stay as they are."""
    entries = []
    inside = {id(parameter) for block in blocks for parameter in block.module.parameters()}
    sites = {id(site.module.weight) for block in blocks for site in block.sites()}
    sites |= {id(site.module.weight) for site in adapter.outside(model)}
    reasons = {parameter: reason for block in blocks for parameter, reason in block.kept().items()}
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    sites |= {id(module.weight) for module in model.modules() if isinstance(module, QuantEmbedding)}
    head = model.get_output_embeddings()
    head_name = next((f"{name}.weight" for name, module in model.named_modules() if module is head), "")
    counted: set[int] = set()
    for name, parameter in model.named_parameters(remove_duplicate=False):
        this = id(parameter)
        if parameter.ndim < 2 or (this in sites and name != head_name):
            continue
        if name == head_name:
            reason = "the output head is never quantized"
        elif this in embeddings:
            reason = "embeddings are never quantized"
        elif this in inside:
            unknown = (
                "not the weight of an nn.Linear" if precision.quantizes_linear else "the precision leaves it as it is"
            )
            reason = reasons.get(this, unknown)
        else:
            reason = f"outside the {adapter.kind} layers"
        in_block = this in inside and this not in counted and reasons.get(this) != PEFT_ADDED
        counted.add(this)
        entries.append(Entry(name.removesuffix(".weight"), tuple(parameter.shape), reason, in_block))
    return entries
