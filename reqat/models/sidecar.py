"""What a quantized model needs beyond a Hugging Face checkpoint, in two files beside it.

``reqat.json`` (readable: precision, what is stored) and ``reqat.safetensors``:

| tensor | meaning |
|---|---|
| ``layers.{i}.kv_shift`` [G, D] | Q-FIT shift of layer i's keys |
| ``layers.{i}.keys_global_scale``, ``layers.{i}.values_global_scale`` [1] | calibrated (``static``) global scales |
| ``{linear}.input_global_scale`` [1] | the same for the input of a linear layer |
| ``{linear}.weight_packed``, ``.weight_scale``, ``.weight_global_scale`` | codes and scales of a frozen model |

The weights in ``model.safetensors`` stay ordinary and loadable by anyone; of a frozen model they are the dequantized
ones (rotated back, where the precision rotates). Codes are restored from here, never by quantizing a second time.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from reqat.config.errors import ReqatError
from reqat.formats import PackedTensor, QuantizedTensor
from reqat.models.architecture import decoder_layers, plain_name
from reqat.models.kv import kv_quantizers
from reqat.models.linear import QuantLinear, quant_linears, stands_for
from reqat.quant import Precision, Quantizer

JSON = "reqat.json"
TENSORS = "reqat.safetensors"
SCHEMA = 1


@dataclass
class Sidecar:
    """The sidecar's content in memory; ``weights`` by linear layer, ``tensors`` by the names above."""

    precision: Precision = field(default_factory=Precision)
    tensors: dict[str, Tensor] = field(default_factory=dict)
    weights: dict[str, QuantizedTensor] = field(default_factory=dict)
    skip: tuple[str, ...] | None = None
    """Patterns of the linear layers that were left alone; None where a folder of an earlier version does not say."""

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
            for role, quantizer in (("keys", kv.key), ("values", kv.value)):
                if quantizer.global_scale is not None:
                    sidecar.tensors[f"{prefix}.{role}_global_scale"] = quantizer.global_scale.reshape(1)
        for name, module in _by_plain_name(model).items():
            if module.input_quantizer.global_scale is not None:
                sidecar.tensors[f"{name}.input_global_scale"] = module.input_quantizer.global_scale.reshape(1)
            module.check_unchanged()
            if module.quantized is not None:
                sidecar.weights[name] = module.quantized
        return sidecar

    def write(self, folder: Path) -> None:
        """Write both files into ``folder``."""
        stored = {name: t.detach().to("cpu", torch.float32).clone() for name, t in self.tensors.items()}
        shapes = {}
        for name, q in self.weights.items():
            packed = q.to("cpu").pack()
            stored[f"{name}.weight_packed"] = packed.packed.contiguous()
            stored[f"{name}.weight_scale"] = packed.scales.contiguous()
            if packed.global_scale is not None:
                stored[f"{name}.weight_global_scale"] = packed.global_scale.reshape(-1).contiguous()
            shapes[name] = {"shape": list(q.shape), "dtype": str(q.dtype).removeprefix("torch.")}
        about = {
            "schema": SCHEMA,
            "precision": self.precision.to_dict(),
            "skip": list(self.skip) if self.skip is not None else None,
            "weights": "quantized" if self.weights else "dense",
            "kv_shift": any(name.endswith(".kv_shift") for name in self.tensors),
            "static_scales": any(name.endswith("_global_scale") for name in self.tensors),
            "quantized": shapes,
        }
        (folder / JSON).write_text(json.dumps(about, indent=1) + "\n")
        if stored:
            save_file(stored, folder / TENSORS, metadata={"format": "pt"})

    @classmethod
    def read(cls, folder: Path) -> Sidecar | None:
        """The sidecar of a model folder, or None where there is none. Raises ReqatError if it is damaged."""
        file = folder / JSON
        if not file.is_file():
            return None
        try:
            about = json.loads(file.read_text())
            if about.get("schema") != SCHEMA:
                raise ReqatError(
                    f"{file} has schema {about.get('schema')!r}, this version of reqat reads {SCHEMA}: update reqat, "
                    "or make the checkpoint again"
                )
            precision = Precision.from_dict(about["precision"])
            has_tensors = about["weights"] == "quantized" or about["kv_shift"] or about["static_scales"]
            stored = load_file(folder / TENSORS) if has_tensors else {}
            weights = {name: _quantized(name, stored, precision, info) for name, info in about["quantized"].items()}
        except ReqatError:
            raise
        except FileNotFoundError as error:
            raise ReqatError(
                f"{file} needs {TENSORS} beside it, which is missing; copy the checkpoint again"
            ) from error
        except (SafetensorError, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ReqatError(
                f"the sidecar {file} (or {TENSORS}) is damaged: {error!r}; copy or make the checkpoint again"
            ) from error
        skip = about.get("skip")
        return cls(precision, stored, weights, tuple(skip) if skip is not None else None)

    def attach(self, model: PreTrainedModel) -> None:
        """Keep the sidecar with a loaded model, for ``prepare``. Raises ReqatError if it is of another model."""
        layers = len(decoder_layers(model))
        linears = {name: m for name, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
        for name in self.tensors:
            prefix, _, rest = name.partition(".")
            if prefix == "layers" and int(rest.split(".")[0]) >= layers:
                raise ReqatError(f"{JSON} is of another model: it has {name}, the model has {layers} layers")
        for name, q in self.weights.items():
            if name not in linears or tuple(linears[name].weight.shape) != tuple(q.shape):
                have = tuple(linears[name].weight.shape) if name in linears else "no such layer"
                raise ReqatError(f"{JSON} is of another model: codes of shape {tuple(q.shape)} for {name} ({have})")
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
        linears = {name: m for name, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
        for name, q in self.weights.items():
            linear = linears.get(name, linears.get(f"{name}.base_layer"))
            if linear is None or not stands_for(linear.weight.detach(), q, self.precision.rotation):
                raise ReqatError(
                    f"{name}.weight is no longer the one that the checkpoint's codes stand for, and they would undo "
                    f"what was merged or trained since: start from the dense checkpoint, or delete {JSON} and "
                    f"{TENSORS} from the folder to quantize its dense weights anew"
                )

    def restore(self, model: PreTrainedModel, now: Precision) -> list[str]:
        """Put shift, static scales and weights into a model prepared for ``now``; returns what was restored.

        Static scales come back only where the precision still asks for them in the same format.
        """
        shifts = scales = 0
        then = self.precision
        device = next(model.parameters()).device
        for index, kv in enumerate(kv_quantizers(model)):
            shift = self.tensors.get(f"layers.{index}.kv_shift")
            if shift is not None and kv.shift is None:
                kv.set_shift(shift.to(device))
                shifts += 1
            for role, quantizer, same in (
                ("keys", kv.key, (now.keys, now.kv_rotation) == (then.keys, then.kv_rotation)),
                ("values", kv.value, now.values == then.values),
            ):
                scales += _restore_scale(quantizer, self.tensors.get(f"layers.{index}.{role}_global_scale"), same)
        linears = _by_plain_name(model)
        same_inputs = (now.inputs, now.rotation) == (then.inputs, then.rotation)
        for name, module in linears.items():
            scales += _restore_scale(
                module.input_quantizer, self.tensors.get(f"{name}.input_global_scale"), same_inputs
            )
            if name in self.weights:
                module.set_quantized(self.weights[name])
        parts = [(shifts, "KV shifts"), (scales, "static scales"), (len(self.weights), "quantized weights")]
        return [f"{n} {what}" for n, what in parts if n]


def _by_plain_name(model: PreTrainedModel) -> dict[str, QuantLinear]:
    return {plain_name(name): module for name, module in quant_linears(model).items()}


def _restore_scale(quantizer: Quantizer, scale: Tensor | None, same_format: bool) -> int:
    if scale is None or not same_format or not quantizer.needs_calibration:
        return 0  # also for the second layer that shares this quantizer
    quantizer.global_scale = scale.reshape(()).to(quantizer.device)
    return 1


def _quantized(name: str, stored: dict[str, Tensor], precision: Precision, info: dict[str, Any]) -> QuantizedTensor:
    """Take a layer's codes and scales out of ``stored``."""
    assert precision.weights is not None
    packed, scales = stored.pop(f"{name}.weight_packed"), stored.pop(f"{name}.weight_scale")
    g = stored.pop(f"{name}.weight_global_scale", None)
    shape = torch.Size(info["shape"])
    if tuple(packed.shape[:-1]) != tuple(shape[:-1]):
        raise ReqatError(f"{TENSORS}: {name}.weight_packed of shape {tuple(packed.shape)} for a weight {tuple(shape)}")
    dtype = getattr(torch, info["dtype"])
    packed_tensor = PackedTensor(
        packed, scales, g.reshape(()) if g is not None else None, precision.weights, len(shape) - 1, shape, dtype
    )
    return packed_tensor.unpack()
