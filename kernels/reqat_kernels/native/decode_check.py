"""The weights of a layer; what decode.cpp takes for granted of them and of a step is checked here, once each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from reqat.formats import Format
from reqat_kernels.native import check
from reqat_kernels.native.gemm import check_inputs
from reqat_kernels.native.states import PackedStates
from reqat_kernels.native.weights import PackedWeight

_NAMES = ("query", "key", "value", "out", "gate", "up", "down")


@dataclass(frozen=True)
class LayerWeights:
    """What a layer of the Llama kind consists of.

    ``linears``: query, key, value, out, gate, up, down, each with its bias or None. ``norms``: before attention, before
    the MLP ([hidden]), of queries and of keys a head at a time ([D], or None). ``heads``: query heads, key/value heads,
    head dimension. ``inputs`` says how inputs are rounded, ``global_scales`` gives the static ones (four, or None: of
    query/key/value, out, gate/up, down), ``rotation`` the size of blocks in which inputs are rotated before (0: not).
    """

    linears: Sequence[tuple[PackedWeight, Tensor | None]]
    norms: Sequence[Tensor | None]
    eps: float
    heads: tuple[int, int, int]
    inputs: Format | None
    global_scales: Sequence[Tensor | None]
    rotation: int
    shift: Tensor | None
    scaling: float


def check_layers(layers: Sequence[LayerWeights]) -> None:
    """Raise ValueError (TypeError) unless the weights of each layer fit together, and all have one hidden size."""
    if not layers:
        raise ValueError("there are no layers to decode with")
    for layer in layers:
        _check_parts(layer)
    for layer in layers:
        _check_layer(layer, layers[0].linears[0][0].columns)


def _check_parts(layer: LayerWeights) -> None:
    counts = (len(layer.linears), len(layer.norms), len(layer.global_scales), len(layer.heads))
    if counts != (7, 4, 4, 3):
        raise ValueError(f"a layer has 7 linears, 4 norms, 4 global scales and 3 sizes of heads, got {counts}")
    for name, (w, _) in zip(_NAMES, layer.linears, strict=True):
        if not isinstance(w, PackedWeight):
            raise TypeError(f"the weight of {name} is a {type(w).__name__}, not a PackedWeight")


def _check_layer(layer: LayerWeights, hidden: int) -> None:
    H, G, D = (check.size("size of heads", size, least=1) for size in layer.heads)
    if H % G or D % 2:
        raise ValueError(f"{H} query heads of {D} channels do not fit {G} key heads, or cannot be rotated in pairs")
    mlp = layer.linears[4][0].rows
    shapes = ((H * D, hidden), (G * D, hidden), (G * D, hidden), (hidden, H * D), (mlp, hidden), (mlp, hidden))
    for name, (w, bias), shape in zip(_NAMES, layer.linears, (*shapes, (hidden, mlp)), strict=True):
        block = w.format.block or 1
        if (w.rows, w.columns) != shape or w.columns % block:
            raise ValueError(
                f"{name} of shape [{w.rows}, {w.columns}] must be {list(shape)}, in whole blocks of {block}"
            )
        check.bias(bias, w.rows, torch.device("cpu"))
        if layer.inputs is not None:
            check_inputs(layer.inputs, block)
    for name, norm, size in zip(
        ("input norm", "attention norm", "query norm", "key norm"), layer.norms, (hidden, hidden, D, D), strict=True
    ):
        if norm is None and name in ("query norm", "key norm"):
            continue
        if check.floats(name, norm, ndim=1, device=torch.device("cpu")).shape[0] != size:
            raise ValueError(f"{name} of shape {list(norm.shape)} must be [{size}]")  # type: ignore[union-attr]
    given = [check.global_scale("global scale of an input", g) for g in layer.global_scales if g is not None]
    static = layer.inputs is not None and (given or layer.inputs.global_scale == "static")
    if static and len(given) != 4:
        raise ValueError(f"inputs with a static global scale need four of them, got {len(given)}")
    rotation = check.size("rotation", layer.rotation)
    if rotation and (rotation & (rotation - 1) or any(size % rotation for size in (hidden, H * D, mlp))):
        raise ValueError(f"rotation {rotation} must be a power of two that divides {hidden}, {H * D} and {mlp}")
    shift = layer.shift
    if shift is not None and check.floats("shift", shift, ndim=2, device=torch.device("cpu")).shape != (G, D):
        raise ValueError(f"shift of shape {list(shift.shape)} for {G} heads of {D} channels")
    check.finite("eps", layer.eps)
    check.finite("scaling", layer.scaling)


def check_cache(key: PackedStates, value: PackedStates, G: int, D: int) -> None:
    """Raise ValueError unless these are keys and values of one cache with ``G`` heads of ``D`` channels."""
    for kind, states in (("key", key), ("value", value)):
        if not isinstance(states, PackedStates) or states.kind != kind:
            raise TypeError(f"{kind}s must be PackedStates of kind {kind!r}")
        if (states.shape[1], states.shape[3]) != (G, D) or states.codes.device.type != "cpu":
            raise ValueError(
                f"{kind}s of shape {list(states.shape)} on {states.codes.device} for {G} heads of {D} channels"
            )
    if key.shape != value.shape:
        raise ValueError(f"keys of shape {list(key.shape)} and values of shape {list(value.shape)} differ")


def check_step(x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None, hidden: int, D: int, length: int) -> None:
    """Raise ValueError unless the arguments of a step lie as C will read them."""
    cpu = torch.device("cpu")
    if check.tensor("x", x).ndim != 3 or not x.shape[1]:
        raise ValueError(f"x of shape {list(x.shape)} must be [rows, tokens, {hidden}], a token or more")
    B, T = x.shape[:2]
    check.exactly("x", x, torch.float32, (B, T, hidden), cpu)
    rows = check.tensor("cos", cos).shape[0] if cos.ndim else 0
    if rows not in (1, B):
        raise ValueError(f"cos of shape {list(cos.shape)} must have 1 or {B} rows")
    check.exactly("cos", cos, torch.float32, (rows, T, D), cpu)
    check.exactly("sin", sin, torch.float32, (rows, T, D), cpu)
    if mask is not None:
        check.exactly("mask", mask, torch.bool, (B, length + T), cpu)
