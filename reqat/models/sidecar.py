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

:mod:`reqat.models.stored` says what is checked when they are read.

The weights in ``model.safetensors`` stay ordinary and loadable by anyone; of a frozen model they are the dequantized
ones (in the basis of an ordinary layer, not rotated). Codes are restored from here, never by quantizing a second time.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from reqat.config.errors import ReqatError
from reqat.formats import QuantizedTensor
from reqat.models.adapters import blocks_of, cached_attentions
from reqat.models.kv import kv_quantizers
from reqat.models.linear import QuantLinear, quant_linears, stands_for
from reqat.models.peft import plain_name
from reqat.models.stored import FACTORS, JSON, SCHEMA, TENSORS, check_dense, kind_of, part_of, read_stored, sealed
from reqat.quant import Basis, Precision, Quantizer


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
        """The sidecar of ``model`` as it stands; of a model that was not prepared, what it was loaded with."""
        report = getattr(model, "_reqat_report", None)
        if report is None:
            kept: Sidecar = getattr(model, "_reqat_sidecar", None) or cls()
            kept.check_weights(model)
            return kept
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
            module.check_unchanged()
            if any(True for _ in module.weight_quantizer.gradient.parameters()):
                raise ReqatError(
                    f"{name}: its scales were learned, and its dense weight would lose them: freeze(model), then save"
                )
            if module.weight_quantizer.global_scale is not None:
                raise ReqatError(
                    f"{name}: its weight shares a global scale (share_global_scales), and its dense weight would lose "
                    "that: freeze(model), then save"
                )
            if module.quantized is not None:
                sidecar.weights[name] = module.quantized
        loaded: Sidecar | None = getattr(model, "_reqat_sidecar", None)
        for name, tensor in [] if loaded is None else loaded.tensors.items():
            if part_of(name) in FACTORS:  # of layers that this precision leaves as they are
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
        kinds = {kind_of(name) for name in self.tensors}
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
        (:func:`reqat.models.stored.read_stored`)."""
        stored = read_stored(folder)
        if stored is None:
            return None
        return cls(stored.precision, stored.tensors, stored.weights, stored.skip, stored.dense)

    def attach(self, model: PreTrainedModel, folder: Path) -> None:
        """Keep the sidecar with a model loaded from ``folder``, for ``prepare``. Raises ReqatError if it is of another
        model, or if weights were changed after freezing."""
        heads = [attention.heads for _, attention in cached_attentions(model)]
        linears = _weights(model)
        for name, tensor in self.tensors.items():
            prefix, _, rest = name.partition(".")
            if prefix == "layers" and int(rest.split(".")[0]) >= len(heads):
                raise ReqatError(f"{JSON} is of another model: it has {name}, the model has {len(heads)} layers")
            if name.endswith(".kv_shift"):
                own = heads[int(rest.split(".")[0])]
                if tuple(tensor.shape) != (own.kv_heads, own.head_dim):
                    raise ReqatError(
                        f"{JSON} is of another model: {name} has shape {tuple(tensor.shape)}, the model has "
                        f"{own.kv_heads} key/value heads of {own.head_dim}"
                    )
            layer = name.rpartition(".")[0]
            if prefix != "layers" and layer not in linears:
                raise ReqatError(f"{JSON} is of another model: it has {name}, the model has no such layer")
            if part_of(name) in FACTORS:
                own_size = heads[int(rest.split(".")[0])].head_dim if prefix == "layers" else linears[layer].shape[-1]
                Basis(own_size, f"{JSON} is of another model, or damaged: {name}").checked(part_of(name), tensor)
        for name, q in self.weights.items():
            if name not in linears or tuple(linears[name].shape) != tuple(q.shape):
                have = tuple(linears[name].shape) if name in linears else "no such layer"
                raise ReqatError(f"{JSON} is of another model: codes of shape {tuple(q.shape)} for {name} ({have})")
        check_dense(folder, self.dense)
        model._reqat_sidecar = self  # type: ignore[assignment]

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

    def restore(self, model: PreTrainedModel, now: Precision) -> list[str]:
        """Put shift, static scales and weights into a model prepared for ``now``; returns what was restored.

        Static scales and clips come back only where the precision still asks for the same format; or if the model was
        never quantized, where a transform left them. A basis comes back wherever something is quantized in it.
        """
        shifts = scales = bases = clips = 0
        then, fresh = self.precision, self.precision == Precision()
        device = next(model.parameters()).device
        for index, kv in enumerate(kv_quantizers(model)):
            shift = self.tensors.get(f"layers.{index}.kv_shift")
            if shift is not None and kv.shift is None:
                kv.set_shift(shift.to(device))
                shifts += 1
            for role, quantizer, same in (
                ("keys", kv.key, _basis(now) == _basis(then)),
                ("values", kv.value, now.values == then.values),
            ):
                scales += _restore_scale(quantizer, self.tensors.get(f"layers.{index}.{role}_global_scale"), same)
                clips += _restore_clip(quantizer, self.tensors.get(f"layers.{index}.{role}_clip"), same or fresh)
            bases += self._restore_basis(kv.basis, f"layers.{index}.keys")
        linears = _by_plain_name(model)
        same_inputs = (now.inputs, now.rotation) == (then.inputs, then.rotation)
        for name, module in linears.items():
            scales += _restore_scale(
                module.input_quantizer, self.tensors.get(f"{name}.input_global_scale"), same_inputs
            )
            bases += self._restore_basis(module.basis, f"{name}.input")
            clips += _restore_clip(module.input_quantizer, self.tensors.get(f"{name}.input_clip"), same_inputs or fresh)
            same = fresh or (now.weights, now.rotation) == (then.weights, then.rotation)
            clips += _restore_clip(module.weight_quantizer, self.tensors.get(f"{name}.weight_clip"), same)
            if name in self.weights:
                module.set_quantized(self.weights[name])
        parts = [(shifts, "KV shifts"), (scales, "static scales"), (len(self.weights), "quantized weights")]
        parts += [(bases, "bases"), (clips, "clips")]
        return [f"{n} {what}" for n, what in parts if n]

    def _restore_basis(self, basis: Basis, place: str) -> int:
        factors = [self.tensors.get(f"{place}_{factor}") for factor in FACTORS]
        if basis.changes or factors == [None, None]:
            return 0  # also for the second layer that shares it
        basis.set(*factors)
        return 1


def leave(model: PreTrainedModel, tensors: Mapping[str, Tensor]) -> None:
    """Keep ``tensors`` (by the names of the table above) with a model that is not prepared, as if it had been loaded
    with them: ``prepare`` puts them where they belong, and saving writes them."""
    sidecar: Sidecar = getattr(model, "_reqat_sidecar", None) or Sidecar()
    model._reqat_sidecar = replace(sidecar, tensors=sidecar.tensors | dict(tensors))  # type: ignore[assignment]


def _weights(model: PreTrainedModel) -> dict[str, Tensor]:
    """Plain name -> weight of each linear layer in the model's blocks, experts that are fused included."""
    return {name: weight for block in blocks_of(model) for name, weight in block.weights().items()}


def _basis(precision: Precision) -> tuple[object, ...]:
    return precision.keys, precision.kv_rotation, precision.kv_signs


def _by_plain_name(model: PreTrainedModel) -> dict[str, QuantLinear]:
    return {plain_name(name): module for name, module in quant_linears(model).items()}


def _restore_clip(quantizer: Quantizer, clip: Tensor | None, same_format: bool) -> int:
    if clip is None or not same_format or quantizer.format is None or quantizer.clip is not None:
        return 0
    quantizer.set_clip(clip)
    return 1


def _restore_scale(quantizer: Quantizer, scale: Tensor | None, same_format: bool) -> int:
    if scale is None or not same_format or not quantizer.needs_calibration:
        return 0  # also for the second layer that shares this quantizer
    quantizer.global_scale = scale.reshape(()).to(quantizer.device)
    return 1
