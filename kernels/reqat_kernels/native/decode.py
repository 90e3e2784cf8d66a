"""One decoder layer for one new token a row, in a single native call (decode.cpp).

With one token at hand a layer's work is some tens of microseconds, and the thirty Python calls that transformers makes
of it cost several times as much. :class:`NativeLayer` holds everything that stays the same from token to token as plain
pointers; :meth:`NativeLayer.step` does the rest of the layer's forward pass. It needs the native library; callers that
find :func:`available` false go the ordinary way, through the modules.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from reqat.formats import Format
from reqat_kernels.native.attention import PackedStates, _AppendArgs, _AttentionArgs, _states
from reqat_kernels.native.gemm import PackedWeight, _struct, _Weight
from reqat_kernels.native.library import library, threads
from reqat_kernels.native.quantize import Spec, spec_of

#: Up to so many rows at once; beyond, the calls that are saved no longer count.
MOST_ROWS = 64
_WORK_PER_THREAD = 1 << 19
# What reqat_decode_layer says is not finite, from 3 on.
_PARTS = ("input", "keys", "values", "o_proj input", "gate_proj input", "down_proj input")

_i64, _pointer = ctypes.c_int64, ctypes.c_void_p


class _Linear(ctypes.Structure):
    """``reqat::Linear`` of decode.h."""

    _fields_ = [("weight", _Weight), ("bias", _pointer)]


class _Layer(ctypes.Structure):
    """``reqat::DecodeLayer``."""

    _fields_ = [
        *((name, _i64) for name in ("hidden", "mlp", "H", "G", "D", "rotation")),
        ("eps", ctypes.c_double),
        *((name, _pointer) for name in ("input_norm", "attention_norm", "query_norm", "key_norm")),
        *((name, ctypes.POINTER(_Linear)) for name in ("query", "key", "value", "out", "gate", "up", "down")),
        ("inputs", ctypes.POINTER(Spec)),
        ("global_scale", ctypes.c_float * 4),
    ]


class _Step(ctypes.Structure):
    """``reqat::DecodeStep``."""

    _fields_ = [
        *((name, _pointer) for name in ("x", "cos", "sin")),
        ("stride", _i64),
        ("B", _i64),
        ("key", ctypes.POINTER(_AppendArgs)),
        ("value", ctypes.POINTER(_AppendArgs)),
        ("attention", ctypes.POINTER(_AttentionArgs)),
        ("threads", _i64),
    ]


@cache
def available() -> bool:
    """Whether the native library is there."""
    lib = library()
    if lib is not None:
        lib.reqat_decode_layer.argtypes = [ctypes.POINTER(_Layer), ctypes.POINTER(_Step)]
    return lib is not None


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


class NativeLayer:
    """A layer ready to be stepped; see the module's docstring. Raises ValueError if the native library is missing."""

    def __init__(self, weights: LayerWeights) -> None:
        if not available():
            raise ValueError("no native library: install a C++ compiler, then reinstall the package")
        lib = library()
        assert lib is not None
        self._call = lib.reqat_decode_layer
        norms = [None if norm is None else norm.detach().float().contiguous() for norm in weights.norms]
        biases = [None if bias is None else bias.detach().float().contiguous() for _, bias in weights.linears]
        linears = [
            _Linear(_struct(w.data.data_ptr(), *w.layout[:4], 0.5 / w.global_scale), _address(bias))
            for (w, _), bias in zip(weights.linears, biases, strict=True)
        ]
        self.shift = None if weights.shift is None else weights.shift.float().contiguous()
        self._alive = (weights, norms, biases, linears)  # the structures below hold bare addresses
        spec = None
        if weights.inputs is not None:
            static = any(g is not None for g in weights.global_scales)
            spec = spec_of(weights.inputs.replace(global_scale="static") if static else weights.inputs)
        H, G, D = weights.heads
        hidden, mlp = weights.linears[0][0].columns, weights.linears[4][0].rows
        self._layer = _Layer(
            hidden,
            mlp,
            H,
            G,
            D,
            weights.rotation,
            weights.eps,
            *(_address(norm) for norm in norms),
            *(ctypes.pointer(linear) for linear in linears),
            ctypes.pointer(spec) if spec is not None else None,
            (ctypes.c_float * 4)(*(0.0 if g is None else float(g) for g in weights.global_scales)),
        )
        self._work = sum(w.rows * w.columns for w, _ in weights.linears)
        self._append = (_AppendArgs(), _AppendArgs())
        self._attention = _AttentionArgs(scaling=weights.scaling, T=1, causal=0, H=H, G=G, D=D)
        self._step = _Step(key=ctypes.pointer(self._append[0]), value=ctypes.pointer(self._append[1]))
        self._step.attention = ctypes.pointer(self._attention)
        self._states: tuple[PackedStates, PackedStates] | None = None

    def step(
        self,
        x_BC: Tensor,
        cos_BD: Tensor,
        sin_BD: Tensor,
        key: PackedStates,
        value: PackedStates,
        length: int,
        mask_BHTS: Tensor | None = None,
    ) -> str | None:
        """Run the layer on ``x_BC`` (float32, contiguous), in place, and append its token to ``key`` and ``value``.

        ``cos_BD``, ``sin_BD``: float32 [B or 1, D], the rotary embedding of the new token. ``length``: tokens stored
        before; there must be room for one more. ``mask_BHTS``: [B or 1, H or 1, 1, length + 1], boolean or float32.
        Returns None, or the name of the part that was not finite (``x_BC`` is then undefined).
        """
        B = len(x_BC)
        if self._states is None or self._states[0] is not key or self._states[1] is not value:
            self._bind(key, value)
        for append in self._append:
            append.start = length
        attention, step = self._attention, self._step
        attention.S = length + 1
        if mask_BHTS is None:
            attention.mask, attention.mask_kind = None, 0
        else:
            attention.mask, attention.mask_kind = mask_BHTS.data_ptr(), 1 if mask_BHTS.dtype == torch.bool else 2
            strides = (
                stride if size > 1 else 0 for stride, size in zip(mask_BHTS.stride(), mask_BHTS.shape, strict=True)
            )
            attention.mask_b, attention.mask_h, attention.mask_t, attention.mask_s = strides
        step.x, step.cos, step.sin = x_BC.data_ptr(), cos_BD.data_ptr(), sin_BD.data_ptr()
        step.stride = 0 if len(cos_BD) == 1 else cos_BD.stride(0)
        step.B = B
        step.threads = threads(self._work * B, _WORK_PER_THREAD)
        attention.threads = threads(2 * B * self._layer.G * (length + 1) * self._layer.D, 1 << 17)
        status = self._call(self._layer, step)
        if status == 1:
            raise MemoryError(f"no memory for one decoding step of {B} rows over {length} tokens")
        return None if status == 0 else _PARTS[status - 3]

    def _bind(self, key: PackedStates, value: PackedStates) -> None:
        for append, states in zip(self._append, (key, value), strict=True):
            B, G, room, D = states.shape
            append.states = _states(states.codes, states.scales, states.global_scale, states.format.element)
            append.is_value = states.kind == "value"
            append.shift = _address(self.shift) if states is key else None
            append.B, append.G, append.D, append.tiles, append.threads = B, G, D, room // 16, 1
            append.spec = spec_of(states.format)
        self._attention.key, self._attention.value = self._append[0].states, self._append[1].states
        self._attention.B, self._attention.tiles = self._append[0].B, self._append[0].tiles
        self._states = (key, value)


def _address(t: Tensor | None) -> int | None:
    return None if t is None else t.data_ptr()
