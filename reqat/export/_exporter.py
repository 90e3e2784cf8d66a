"""What a format for engines is, and what every one of them refuses.

An engine computes with the codes that it reads, in its own arithmetic. What changes codes and has no place in a format
(a rotation, a basis, clipped inputs, another element) is therefore refused, with the remedy. What only the key/value
cache needs (its format, Q-FIT's shift) leaves the weights as they are: without it the engine computes the same with an
unquantized cache. It goes into the sidecar, and a note names it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from reqat.config.errors import ReqatError
from reqat.formats import QuantizedTensor
from reqat.models import QuantLinear, kv_quantizers, quant_linears
from reqat.models.adapters import Block, blocks_of, cached_attentions
from reqat.models.experts import Experts
from reqat.models.peft import peft_modules
from reqat.quant import Precision

OURS = "--format reqat keeps it"


@dataclass(frozen=True)
class Layer:
    """A quantized linear layer: its weight [N, K], and the static global scale of its inputs (float32 scalar, a
    divisor; None where inputs have none)."""

    quantized: QuantizedTensor
    input_global_scale: Tensor | None


@dataclass
class Frozen:
    """What an exporter writes: a frozen ``model``, and what of it is quantized, by the layer's name in a checkpoint.

    ``notes`` collect what the format leaves out, one sentence each.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None
    precision: Precision
    layers: dict[str, Layer]
    notes: list[str] = field(default_factory=list)

    @property
    def dense(self) -> list[str]:
        """Names of the linear layers that are not quantized, ``lm_head`` among them."""
        linears = (name for name, module in self.model.named_modules() if isinstance(module, nn.Linear))
        return [name for name in linears if name not in self.layers]


@dataclass(frozen=True)
class Exporter:
    """A format. ``write(frozen, folder)`` writes it into an empty folder.

    ``families`` are the formats of weights that it holds; None: whatever the model has, as it is, and nothing below
    applies. ``fuses``: its engines join q, k and v, and gate and up, and take one global scale for each; else each
    layer keeps its own. ``static_inputs``: quantized inputs of a format with a global scale need a calibrated one.
    ``input_rule``: the rule by which its engines scale the inputs of a format without one. ``check(model, precision)``
    raises ReqatError for what it cannot hold besides.
    """

    write: Callable[[Frozen, Path], None]
    families: tuple[str, ...] | None
    fuses: bool = True
    static_inputs: bool = True
    input_rule: str | None = None
    check: Callable[[PreTrainedModel, Precision], None] = lambda model, precision: None


def check_precision(precision: Precision, name: str, exporter: Exporter) -> None:
    """Raise ReqatError, naming the remedy, for a precision that the format ``name`` cannot say."""
    weights, inputs = precision.weights, precision.inputs
    if weights is None:
        raise ReqatError(
            f"{precision} quantizes no weights, so there is nothing to export: give one such as NVFP4-W4A16."
        )
    if exporter.families is None:
        return
    precision.check_packable(f"an engine that reads {name}")
    if weights.name not in exporter.families:
        raise ReqatError(
            f"{precision}: {name} holds weights in {' or '.join(exporter.families)}, not in {weights.name}; {OURS}."
        )
    for role, fmt in (("weights", weights), ("inputs", inputs)):
        if fmt is not None and fmt.element != "E2M1":
            raise ReqatError(f"{precision}: the elements of {name}'s {role} are E2M1, not {fmt.element}; {OURS}.")
    if weights.global_scale not in ("none", "dynamic"):
        raise ReqatError(
            f"{precision}: {name} holds one global scale of a whole weight, and weights.global_scale is "
            f"{weights.global_scale}: leave it out."
        )
    if inputs is not None and _base(inputs.name) != _base(weights.name):
        raise ReqatError(
            f"{precision}: {name} has one format for weights and inputs, these are {weights.name} and {inputs.name}; "
            f"take the same for both, or W4A16."
        )
    if precision.rotation is not None:
        raise ReqatError(
            f"{precision}: its weights are rotated in Hadamard blocks of {precision.rotation}, and {name} cannot tell "
            "an engine to rotate the inputs too. Quantize without rotation (from the dense model), or keep it with "
            "--format reqat; engines that rotate read layouts of their own (transformers' fp_quant, the "
            "transform_config of compressed-tensors), which reqat does not write."
        )


def _base(family: str) -> str:
    return family.removesuffix("-4/6")


def check_model(model: PreTrainedModel, name: str) -> None:
    """Raise ReqatError, naming the remedy, for a model that no format for engines holds here."""
    blocks = blocks_of(model)
    if not cached_attentions(model):
        raise ReqatError(
            f"model type {model.config.model_type!r} is no decoder; {name} is written for decoders alone. {OURS}."
        )
    held = [block.name for block in blocks if peft_modules(block.module)]
    if held:
        raise ReqatError(f"{held[0]} holds adapters (LoRA), which {name} has no place for: merge them first "
                         "(merge_and_unload), then export.")  # fmt: skip
    moe = [experts.name for block in blocks for experts in block.fused()]
    moe += [name for name, module in model.named_modules() if isinstance(module, Experts)]
    if moe:
        raise ReqatError(
            f"{moe[0]}: engines have a layout of their own for mixtures of experts, which {name} is not written in "
            f"here; {OURS}."
        )
    for block in blocks:
        attention = block.attention
        norm = None if attention is None else attention.key_norm
        if norm is not None and norm.weight.ndim > 1:
            raise ReqatError(
                f"{block.name}: Q-FIT widened its QK norm to one row a head, which no engine loads; fit with "
                f"qk_norm='shared', or {OURS}."
            )


def check_prepared(model: PreTrainedModel, precision: Precision, name: str, exporter: Exporter) -> None:
    """Raise ReqatError, naming the remedy, for what a prepared model computes beyond its precision."""
    for layer_name, layer in quant_linears(model).items():
        inputs, what = layer.input_quantizer, None
        if layer.basis.changes:
            what = "input and weight are quantized in a basis of their own (QuaRot, FlatQuant)"
        elif inputs.format is not None and inputs.clip is not None:
            what = "inputs are clipped before they are quantized (QuaRot, FlatQuant)"
        elif inputs.format is not None and any(True for _ in inputs.gradient.parameters()):
            what = "the scales of its inputs were learned"
        if what:
            raise ReqatError(
                f"{layer_name}: its {what}, which {name} cannot say: quantize by rtn, gptq, awq or smoothquant, or "
                f"{OURS}."
            )
    if exporter.fuses:
        for block in blocks_of(model):
            _check_fused(block, name)
    exporter.check(model, precision)


def _check_fused(block: Block, name: str) -> None:
    """Layers that engines join are quantized all or none, and frozen ones have one global scale."""
    quantized = quant_linears(block.module)
    inside = {id(layer) for layer in quantized.values()}
    for group in block.groups():
        here = [site for site in group.sites if id(site.module) in inside]
        if here and len(here) < len(group.sites):
            left = next(site for site in group.sites if id(site.module) not in inside)
            raise ReqatError(
                f"{left.name} is skipped, and {here[0].name} is not: engines that read {name} join them into one "
                "layer; skip all of them, or none."
            )
        frozen = [layer.quantized for site in here if isinstance(layer := site.module, QuantLinear)]
        scales = {float(q.global_scale) for q in frozen if q is not None and q.global_scale is not None}
        if len(scales) > 1:
            names = ", ".join(site.name.rpartition(".")[2] for site in here)
            raise ReqatError(
                f"{block.name}: {names} were frozen with global scales of their own ({min(scales):.6g} to "
                f"{max(scales):.6g}), and engines that read {name} join them and take one. Their codes cannot change: "
                "begin from the dense model (export it, or `reqat quantize --share-global-scale`), train again without "
                "--no-share-global-scale, or take --format gguf or reqat, which keep a scale a layer."
            )


def left_out(model: PreTrainedModel, precision: Precision, name: str, exporter: Exporter, *, cache: bool) -> list[str]:
    """What engines that read ``name`` do otherwise than the model, one sentence each. ``cache``: the format says how
    keys and values are quantized."""
    notes = []
    inputs, rule = precision.inputs, exporter.input_rule
    if inputs is not None:
        if inputs.adaptive:
            notes.append(f"inputs: {inputs.name} chooses a scale a block, engines round to plain {_base(inputs.name)}")
        if inputs.rounding != "even":
            notes.append(f"inputs: rounding={inputs.rounding} here, to even in engines")
        if not inputs.has_global_scale and rule is not None and inputs.scale_rule != rule:
            notes.append(f"inputs: scale_rule={inputs.scale_rule} here, {rule} in engines")
    if precision.quantizes_cache and not cache:
        kvs = kv_quantizers(model)
        formats = {"keys": precision.keys, "values": precision.values}
        parts = [f"{role} in {fmt.name} ({fmt.element})" for role, fmt in formats.items() if fmt is not None]
        extra = {
            "Q-FIT's key shift": any(kv.shift is not None for kv in kvs),
            f"kv_rotation={precision.kv_rotation}": precision.kv_rotation is not None,
            "a basis of keys": any(kv.basis.changes for kv in kvs),
        }
        parts += [what for what, there in extra.items() if there]
        notes.append(
            f"KV cache: {', '.join(parts)}: {name} cannot say it, so engines keep their own cache (unquantized unless "
            "told otherwise), which is closer to the unquantized model; the sidecar has it"
        )
    return notes
