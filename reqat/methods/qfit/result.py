"""What Q-FIT found: for folding, for the record, for a heat map; saved and read back."""

from __future__ import annotations

import json
import operator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from reqat.config.errors import MissingFileError, ReqatError
from reqat.config.files import explain, parse_json

Variant = Literal["paper", "released"]
QKNorm = Literal["shared", "widened"]

_REMEDY = "calibrate again"


@dataclass(frozen=True)
class QFitResult:
    """What :func:`calibrate` found, for :func:`fold`, for the record, and for a heat map.

    ``errors`` ``[L, A, B]`` float64: mean squared attention error at ``alphas[i], betas[j]``. ``choice`` ``[L]``: the
    best ``(i, j)``. ``scale``, ``shift`` ``[L, G, D]`` float32: s and m there. ``seconds`` ``[L]``: each grid's time.
    ``qk_norm``: where the scale goes, ``"none"`` for models without QK norm.
    """

    precision: str
    variant: Variant
    qk_norm: Literal["none", "shared", "widened"]
    alphas: tuple[float, ...]
    betas: tuple[float, ...]
    errors: Tensor
    choice: tuple[tuple[int, int], ...]
    scale: Tensor
    shift: Tensor
    seconds: tuple[float, ...]

    @property
    def alpha(self) -> tuple[float, ...]:
        """The chosen exponent of each layer."""
        return tuple(self.alphas[i] for i, _ in self.choice)

    @property
    def beta(self) -> tuple[float, ...]:
        """The chosen share of the mean of each layer."""
        return tuple(self.betas[j] for _, j in self.choice)

    @property
    def error_before(self) -> tuple[float, ...]:
        """Attention error of each layer without Q-FIT."""
        return tuple(self.errors[:, 0, 0].tolist())

    @property
    def error_after(self) -> tuple[float, ...]:
        """Attention error of each layer at the chosen point."""
        return tuple(float(self.errors[layer, i, j]) for layer, (i, j) in enumerate(self.choice))

    def metrics(self) -> dict[str, Any]:
        """JSON-ready values for the record: choices, errors before and after, and the error map ``[L][A][B]``."""
        before, after = sum(self.error_before), sum(self.error_after)
        return {
            "precision": self.precision,
            "variant": self.variant,
            "qk_norm": self.qk_norm,
            "alpha": list(self.alpha),
            "beta": list(self.beta),
            "error_before": list(self.error_before),
            "error_after": list(self.error_after),
            "error_reduction": 1 - after / before if before else 0.0,
            "alphas": list(self.alphas),
            "betas": list(self.betas),
            "error_map": [[[float(f"{e:.6g}") for e in row] for row in layer] for layer in self.errors.tolist()],
            "seconds_per_layer": list(self.seconds),
        }

    def save(self, path: str | Path) -> None:
        """Write to a safetensors file, everything included."""
        about = {
            "kind": "qfit",
            "precision": self.precision,
            "variant": self.variant,
            "qk_norm": self.qk_norm,
            "alphas": self.alphas,
            "betas": self.betas,
            "choice": self.choice,
            "seconds": self.seconds,
        }
        tensors = {"errors": self.errors, "scale": self.scale, "shift": self.shift}
        save_file({k: v.cpu().contiguous() for k, v in tensors.items()}, str(path), {"reqat": json.dumps(about)})

    @classmethod
    def load(cls, path: str | Path) -> QFitResult:
        """Read what :meth:`save` wrote. Raises ``ReqatError`` naming the file for any other, or a damaged one."""
        path = Path(path)
        if not path.is_file():
            raise MissingFileError(f"{path}: no such Q-FIT result; calibrate first, or check the path.")
        try:
            with safe_open(str(path), framework="pt") as file:
                text = (file.metadata() or {})["reqat"]
                tensors = {key: file.get_tensor(key) for key in ("errors", "scale", "shift")}
            about = parse_json(text, str(path), "Q-FIT result", _REMEDY)
            if about["kind"] != "qfit" or not all(isinstance(about[key], str) for key in ("precision", "variant")):
                raise ValueError(f"kind {about['kind']!r}")
            if about["variant"] not in ("paper", "released") or about["qk_norm"] not in ("none", "shared", "widened"):
                raise ValueError(f"variant {about['variant']!r}, QK norm {about['qk_norm']!r}")
            result = cls(
                precision=about["precision"],
                variant=about["variant"],
                qk_norm=about["qk_norm"],
                alphas=tuple(map(float, about["alphas"])),
                betas=tuple(map(float, about["betas"])),
                choice=tuple((operator.index(i), operator.index(j)) for i, j in about["choice"]),
                seconds=tuple(map(float, about["seconds"])),
                **tensors,
            )
            result._check()
        except ReqatError:
            raise
        except OSError as error:
            raise explain(error, path) from error
        except (SafetensorError, KeyError, TypeError, ValueError, AttributeError) as error:
            raise ReqatError(f"{path} is not a whole Q-FIT result ({error}); {_REMEDY}.") from error
        return result

    def _check(self) -> None:
        """Raise ValueError unless the parts belong together and hold numbers that calibration gives."""
        layers, grid = len(self.choice), (len(self.alphas), len(self.betas))
        if tuple(self.errors.shape) != (layers, *grid) or len(self.seconds) != layers:
            raise ValueError(f"errors of shape {tuple(self.errors.shape)} for {layers} layers and a grid of {grid}")
        if any(not (0 <= i < grid[0] and 0 <= j < grid[1]) for i, j in self.choice):
            raise ValueError(f"a choice outside the grid of {grid}")
        if self.scale.ndim != 3 or self.scale.shape != self.shift.shape or len(self.scale) != layers:
            raise ValueError(f"scale {tuple(self.scale.shape)} and shift {tuple(self.shift.shape)} of {layers} layers")
        for name, tensor, dtype in (
            ("errors", self.errors, torch.float64),
            ("scale", self.scale, torch.float32),
            ("shift", self.shift, torch.float32),
        ):
            if tensor.dtype != dtype or not bool(torch.isfinite(tensor).all()):
                raise ValueError(f"{name} is {tensor.dtype}, or not finite, where {dtype} is needed")
        if bool((self.scale <= 0).any()):
            raise ValueError("a scale that is not positive")
