"""What a quantized model needs beyond a Hugging Face checkpoint, in two files beside it.

``reqat.json`` (readable: precision, what is stored) and ``reqat.safetensors``:

| tensor | meaning |
|---|---|
| ``layers.{i}.kv_shift`` [G, D] | Q-FIT shift of layer i's keys |
| ``layers.{i}.keys_global_scale``, ``layers.{i}.values_global_scale`` [1] | calibrated (``static``) global scales |
| ``{linear}.input_global_scale`` [1] | the same for the input of a linear layer |
| ``{linear}.input_left`` [a, a], ``.input_right`` [b, b] | basis in which input and weight are quantized |
| ``layers.{i}.keys_right`` [D, D] | the same of layer i's keys |
| ``{linear}.input_clip``, ``layers.{i}.keys_clip``, ``layers.{i}.values_clip`` [2] | where they are cut off |
| ``{linear}.weight_clip`` [N, 2] | the same of a weight that was not quantized yet |
| ``{linear}.weight_packed``, ``.weight_scale``, ``.weight_global_scale`` | codes and scales of a frozen model |

:mod:`reqat.formats.stored` says what is checked when they are read.

The weights in ``model.safetensors`` stay ordinary and loadable by anyone; of a frozen model they are the dequantized
ones (in the basis of an ordinary layer, not rotated). Codes are restored from here, never by quantizing a second time.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from reqat.config.errors import ReqatError
from reqat.formats import Format, QuantizedTensor
from reqat.formats.stored import (
    JSON,
    SCHEMA,
    TENSORS,
    Place,
    check_dense,
    check_tensors,
    place_of,
    read_stored,
    sealed,
)
from reqat.models.adapters import adapter_of, cached_attentions
from reqat.models.kv import kv_quantizers
from reqat.models.linear import QuantLinear, quant_linears, stands_for
from reqat.models.peft import plain_name
from reqat.quant import FACTORS, Basis, Precision, Quantizer


@dataclass
class Sidecar:
    """The sidecar's content in memory; ``weights`` by linear layer, ``tensors`` by the names above."""

    precision: Precision = field(default_factory=Precision)
    tensors: dict[str, Tensor] = field(default_factory=dict)
    weights: dict[str, QuantizedTensor] = field(default_factory=dict)
    skip: tuple[str, ...] | None = None
    """Patterns of the linear layers that were left alone; None where a folder of an earlier version does not say."""
    dense: dict[str, str] = field(default_factory=dict)
    """Of a sidecar that was read: layer -> digest of the dense weight that its codes stand for."""

    def __bool__(self) -> bool:
        return bool(self.tensors or self.weights or self.precision != Precision())

    @classmethod
    def collect(cls, model: PreTrainedModel) -> Sidecar:
        """The sidecar to save ``model`` with, as it stands; of a model that was not prepared, what it was loaded with.

        Raises ReqatError, naming the layer, where its files would lose what the model computes: a weight that changed
        since it was quantized, scales that were learned or are shared without being frozen.
        """
        sidecar = cls.of(model)
        if getattr(model, "_reqat_report", None) is None:
            sidecar.check_weights(model)
            return sidecar
        for name, module in _by_plain_name(model).items():
            module.check_unchanged()
            if any(True for _ in module.weight_quantizer.gradient.parameters()):
                raise ReqatError(
                    f"{name}: its scales were learned, and its dense weight would lose them: freeze(model), then save"
                )
            if any(True for _ in module.input_quantizer.gradient.parameters()):
                raise ReqatError(
                    f"{name}: the range of its inputs was learned, and a checkpoint does not keep that: save "
                    "model.state_dict() instead, and load it into a model prepared with the same gradient rule"
                )
            if module.weight_quantizer.global_scale is not None:
                raise ReqatError(
                    f"{name}: its weight shares a global scale (share_global_scales), and its dense weight would lose "
                    "that: freeze(model), then save"
                )
        return sidecar

    @classmethod
    def of(cls, model: PreTrainedModel) -> Sidecar:
        """What ``model`` keeps beside its weights now, whether it could be saved like this or not."""
        report = getattr(model, "_reqat_report", None)
        if report is None:
            return getattr(model, "_reqat_sidecar", None) or cls()
        sidecar = cls(report.precision, skip=report.skip)
        for index, kv in enumerate(kv_quantizers(model)):
            prefix = f"layers.{index}"
            if kv.shift is not None:
                sidecar.tensors[f"{prefix}.kv_shift"] = kv.shift
            sidecar._note(prefix, "keys", kv.key, kv.basis)
            sidecar._note(prefix, "values", kv.value)
        for name, module in _by_plain_name(model).items():
            sidecar._note(name, "input", module.input_quantizer, module.basis)
            if module.weight_quantizer.clip is not None:
                sidecar.tensors[f"{name}.weight_clip"] = module.weight_quantizer.clip
            if module.quantized is not None:
                sidecar.weights[name] = module.quantized
        loaded: Sidecar | None = getattr(model, "_reqat_sidecar", None)
        quantizers = _quantizers(model)
        for name, tensor in [] if loaded is None else loaded.tensors.items():
            place = _place(name)
            # Of what this precision leaves as it is; a clip that was frozen into codes is spent.
            idle = place.prefix not in quantizers or quantizers[place.prefix].format is None
            if place.part in FACTORS or (place.part == "clip" and idle):
                sidecar.tensors.setdefault(name, tensor)
        return sidecar

    def _note(self, prefix: str, role: str, quantizer: Quantizer, basis: Basis | None = None) -> None:
        """Take along what was measured for the quantizer of a role, and its basis."""
        parts: dict[str, Tensor | None] = {"clip": quantizer.clip, "global_scale": quantizer.global_scale}
        if basis is not None:
            parts |= {"left": basis.left, "right": basis.right}
        for part, tensor in parts.items():
            if tensor is not None:
                self.tensors[f"{prefix}.{role}_{part}"] = tensor.reshape(1) if part == "global_scale" else tensor

    def write(self, folder: Path) -> None:
        """Write both files into ``folder``, where the model's weights are already (their digests go along)."""
        kinds = {_place(name).kind for name in self.tensors}
        stored = {name: t.detach().to("cpu", torch.float32).clone() for name, t in self.tensors.items()}
        shapes = {}
        for name, q in self.weights.items():
            packed = q.to("cpu").pack()
            stored[f"{name}.weight_packed"] = packed.packed.contiguous()
            stored[f"{name}.weight_scale"] = packed.scales.contiguous()
            if packed.global_scale is not None:
                stored[f"{name}.weight_global_scale"] = packed.global_scale.reshape(-1).clone()  # may be shared
            shapes[name] = {"shape": list(q.shape), "dtype": str(q.dtype).removeprefix("torch.")}
        about: dict[str, Any] = {
            "schema": SCHEMA,
            "precision": self.precision.to_dict(),
            "skip": list(self.skip) if self.skip is not None else None,
            "weights": "quantized" if self.weights else "dense",
            "kv_shift": "kv_shift" in kinds,
            "static_scales": "static_scales" in kinds,
            "quantized": shapes,
            **{kind: True for kind in ("bases", "clips") if kind in kinds},
        }
        if stored:
            save_file(stored, folder / TENSORS, metadata={"format": "pt"})
        (folder / JSON).write_text(json.dumps(sealed(about, folder), indent=1) + "\n")

    @classmethod
    def read(cls, folder: Path) -> Sidecar | None:
        """The sidecar of a model folder, or None where there is none. Raises ReqatError if it is damaged
        (:func:`reqat.formats.stored.read_stored`)."""
        stored = read_stored(folder)
        if stored is None:
            return None
        return cls(stored.precision, stored.tensors, stored.weights, stored.skip, stored.dense)

    def attach(self, model: PreTrainedModel, folder: Path) -> None:
        """Keep the sidecar with a model loaded from ``folder``, for ``prepare``. Raises ReqatError if it is of another
        model, or if weights were changed after freezing."""
        self.check_model(model, f"{JSON} is of another model, or damaged")
        linears = _weights(model)
        for name, q in self.weights.items():
            if name not in linears or tuple(linears[name].shape) != tuple(q.shape):
                have = tuple(linears[name].shape) if name in linears else "no such layer"
                raise ReqatError(f"{JSON} is of another model: codes of shape {tuple(q.shape)} for {name} ({have})")
        check_dense(folder, self.dense)
        model._reqat_sidecar = self  # type: ignore[assignment]

    def check_model(self, model: PreTrainedModel, where: str) -> None:
        """Raise ReqatError, naming the tensor after ``where``, unless every tensor is of a layer of ``model`` and has
        its shape. Nothing is changed."""
        heads = [attention.heads for _, attention in cached_attentions(model)]
        linears = {name: tuple(weight.shape) for name, weight in _weights(model).items()}
        factors: dict[str, tuple[int, dict[str, Tensor]]] = {}
        for name, tensor in self.tensors.items():
            place = _place(name)
            if place.layer is not None:
                if place.layer >= len(heads):
                    raise ReqatError(f"{where}: it has {name}, the model has {len(heads)} layers")
                own = heads[place.layer]
                size, rows = own.head_dim, 0
                of_model = f"{own.kv_heads} key/value heads of {own.head_dim}"
            else:
                if place.linear not in linears:
                    raise ReqatError(f"{where}: it has {name}, the model has no such layer")
                rows, size = linears[place.linear][-2:]
                of_model = f"a weight of {rows} x {size} there"
            if place.part in FACTORS:
                factors.setdefault(place.prefix, (size, {}))[1][place.part] = tensor
                continue
            if place.part == "shift":
                wanted: tuple[int, ...] = (own.kv_heads, own.head_dim)
            elif place.part == "global_scale":
                wanted = (1,)
            else:
                wanted = (rows, 2) if place.role == "weight" else (2,)
            if tuple(tensor.shape) != wanted:
                shape = tuple(tensor.shape)
                raise ReqatError(f"{where}: {name} has shape {shape}, not {wanted}: the model has {of_model}")
        for prefix, (size, parts) in factors.items():
            Basis(size, f"{where}: {prefix}").check(parts)

    def check(self, precision: Precision) -> None:
        """Raise ReqatError if stored quantized weights are not in the format that ``precision`` asks for."""
        if self.weights and (precision.weights, precision.rotation) != (
            self.precision.weights,
            self.precision.rotation,
        ):
            raise ReqatError(
                f"the checkpoint's weights were quantized for {self.precision}; preparing it for {precision} would "
                "need them in another format. Choose a precision with the same weights, or the dense checkpoint"
            )

    def check_weights(self, model: PreTrainedModel) -> None:
        """Raise ReqatError if a dense weight of ``model`` is no longer what its codes stand for, naming it.

        The codes would undo what was trained or merged since (a LoRA, say).
        """
        linears = _weights(model) if self.weights else {}
        for name, q in self.weights.items():
            weight = linears.get(name)
            if weight is None or not stands_for(
                weight.detach(), q, self.precision.rotation, self._basis(name, weight.shape[-1])
            ):
                raise ReqatError(
                    f"{name}.weight is no longer the one that the checkpoint's codes stand for, and they would undo "
                    f"what was merged or trained since: start from the dense checkpoint, or delete {JSON} and "
                    f"{TENSORS} from the folder to quantize its dense weights anew"
                )

    def _basis(self, layer: str, size: int) -> Basis:
        basis = Basis(size, layer)
        basis.set(*(self.tensors.get(f"{layer}.input_{factor}") for factor in FACTORS))
        return basis

    def restore(self, model: PreTrainedModel, now: Precision) -> tuple[list[str], list[str]]:
        """Put shift, static scales and weights into a model prepared for ``now``; returns what was restored, and what
        was not, though it was stored and ``now`` quantizes what it is of.

        Static scales come back only where the precision still asks for the same format. So do clips, whatever the
        global scale: they are shares of a block's extremes, which it does not move; also if the model was never
        quantized, where a transform left them. A basis comes back wherever something is quantized in it.
        """
        shifts = scales = bases = clips = lost = 0
        then, fresh = self.precision, self.precision == Precision()
        device = next(model.parameters()).device

        def clip(quantizer: Quantizer, name: str, same: bool) -> None:
            nonlocal clips, lost
            stored = self.tensors.get(name)
            if stored is None or quantizer.format is None or quantizer.clip is not None:
                return  # also for the second layer that shares this quantizer
            if same or fresh:
                quantizer.set_clip(stored)
                clips += 1
            else:
                lost += 1

        for index, kv in enumerate(kv_quantizers(model)):
            shift = self.tensors.get(f"layers.{index}.kv_shift")
            if shift is not None and kv.shift is None:
                kv.set_shift(shift.to(device))
                shifts += 1
            rotated = (now.kv_rotation, now.kv_signs) == (then.kv_rotation, then.kv_signs)
            for role, quantizer, here, there, turned in (
                ("keys", kv.key, now.keys, then.keys, rotated),
                ("values", kv.value, now.values, then.values, True),
            ):
                scale = self.tensors.get(f"layers.{index}.{role}_global_scale")
                scales += _restore_scale(quantizer, scale, here == there and turned)
                clip(quantizer, f"layers.{index}.{role}_clip", _same_blocks(here, there) and turned)
            bases += self._restore_basis(kv.basis, f"layers.{index}.keys")
        linears = _by_plain_name(model)
        turned = now.rotation == then.rotation
        for name, module in linears.items():
            scale = self.tensors.get(f"{name}.input_global_scale")
            scales += _restore_scale(module.input_quantizer, scale, turned and now.inputs == then.inputs)
            bases += self._restore_basis(module.basis, f"{name}.input")
            if name in self.weights:
                module.set_quantized(self.weights[name])
            clip(module.input_quantizer, f"{name}.input_clip", turned and _same_blocks(now.inputs, then.inputs))
            if not module.frozen:
                same = turned and _same_blocks(now.weights, then.weights)
                clip(module.weight_quantizer, f"{name}.weight_clip", same)
        parts = [(shifts, "KV shifts"), (scales, "static scales"), (len(self.weights), "quantized weights")]
        parts += [(bases, "bases"), (clips, "clips")]
        return [f"{n} {what}" for n, what in parts if n], [f"{lost} clips (of another format or rotation)"] * bool(lost)

    def _restore_basis(self, basis: Basis, place: str) -> int:
        factors = [self.tensors.get(f"{place}_{factor}") for factor in FACTORS]
        if basis.factored or factors == [None, None]:
            return 0  # also for the second layer that shares it
        basis.set(*factors)
        return 1


def leave(model: PreTrainedModel, tensors: Mapping[str, Tensor]) -> None:
    """Keep ``tensors`` (by the names of the table above) with a model that is not prepared, as if it had been loaded
    with them: ``prepare`` puts them where they belong, and saving writes them. Raises ReqatError, and keeps none of
    them, if one is not float32, has another shape than its layer's, or a name that the table does not have."""
    check_tensors(tensors, "tensors to keep with the model")
    sidecar: Sidecar = getattr(model, "_reqat_sidecar", None) or Sidecar()
    sidecar = dataclasses.replace(sidecar, tensors=sidecar.tensors | dict(tensors))
    sidecar.check_model(model, "tensors to keep with the model")
    model._reqat_sidecar = sidecar  # type: ignore[assignment]


def carried(model: PreTrainedModel, *kinds: str) -> list[str]:
    """Names of the tensors of these kinds (``bases``, ``clips``, ...) that ``model`` keeps, prepared or not."""
    return sorted(name for name in Sidecar.of(model).tensors if _place(name).kind in kinds)


def _place(name: str) -> Place:
    place = place_of(name)
    assert place is not None, name
    return place


def _quantizers(model: PreTrainedModel) -> dict[str, Quantizer]:
    """The quantizers of a prepared model by the prefix of their tensors' names."""
    found: dict[str, Quantizer] = {}
    for index, kv in enumerate(kv_quantizers(model)):
        found |= {f"layers.{index}.keys": kv.key, f"layers.{index}.values": kv.value}
    for name, module in _by_plain_name(model).items():
        found |= {f"{name}.input": module.input_quantizer, f"{name}.weight": module.weight_quantizer}
    return found


def _weights(model: PreTrainedModel) -> dict[str, Tensor]:
    """Plain name -> weight of each linear layer that a precision may quantize, experts that are fused included."""
    adapter = adapter_of(model)
    found = {name: weight for block in adapter.blocks(model) for name, weight in block.weights().items()}
    return found | {site.plain_name: site.module.weight for site in adapter.outside(model)}


def _same_blocks(now: Format | None, then: Format | None) -> bool:
    """Whether two formats round a block alike, given its scale: all but where a global scale comes from."""
    if now is None or then is None:
        return now is then
    return now == dataclasses.replace(then, global_scale=now.global_scale)


def _by_plain_name(model: PreTrainedModel) -> dict[str, QuantLinear]:
    return {plain_name(name): module for name, module in quant_linears(model).items()}


def _restore_scale(quantizer: Quantizer, scale: Tensor | None, same_format: bool) -> int:
    if scale is None or not same_format or not quantizer.needs_calibration:
        return 0  # also for the second layer that shares this quantizer
    quantizer.global_scale = scale.reshape(()).to(quantizer.device)
    return 1
