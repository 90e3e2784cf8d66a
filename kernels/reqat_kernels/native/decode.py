"""All decoder layers for one or a few new tokens a row, in a single native call (decode.cpp).

With one token at hand a layer's work is some tens of microseconds, and the thirty Python calls that transformers makes
of it cost several times as much. :class:`NativeStack` holds everything that stays the same from token to token as plain
pointers; :meth:`NativeStack.step` does the rest of the layers' forward pass. Several threads may step one stack, each
over a cache of its own. It needs the native library; callers that
find :func:`available` false go the ordinary way, through the modules.
"""

from __future__ import annotations

import ctypes
import threading
import weakref
from collections.abc import Sequence
from functools import cache
from typing import Any

from torch import Tensor

from reqat_kernels.native.attention import AppendArgs, AttentionArgs, PackedStates, states_struct
from reqat_kernels.native.decode_check import LayerWeights, check_cache, check_layers, check_step
from reqat_kernels.native.gemm import Weight, weight_of
from reqat_kernels.native.library import NO_MEMORY, library, threads
from reqat_kernels.native.quantize import Spec, spec_of

#: Up to so many tokens at once, of all rows together; beyond, the calls that are saved no longer count.
MOST_ROWS = 64
_WORK_PER_THREAD, _ATTENTION_PER_THREAD = 1 << 19, 1 << 17
# What reqat_decode says is not finite, from 3 on, and 16 more for each layer.
_PARTS = ("input", "keys", "values", "o_proj input", "gate_proj input", "down_proj input")

_i64, _pointer = ctypes.c_int64, ctypes.c_void_p


class _Linear(ctypes.Structure):
    """``reqat::Linear`` of decode.h."""

    _fields_ = [("weight", Weight), ("bias", _pointer)]


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


class _States(ctypes.Structure):
    """``reqat::DecodeStates``."""

    _fields_ = [
        ("key", ctypes.POINTER(AppendArgs)),
        ("value", ctypes.POINTER(AppendArgs)),
        ("attention", ctypes.POINTER(AttentionArgs)),
    ]


class _Step(ctypes.Structure):
    """``reqat::DecodeStep``."""

    _fields_ = [
        *((name, _pointer) for name in ("x", "cos", "sin")),
        *((name, _i64) for name in ("stride", "B", "T", "length")),
        ("mask", _pointer),
        *((name, _i64) for name in ("half", "threads")),
    ]


@cache
def available() -> bool:
    """Whether the native library is there."""
    lib = library()
    if lib is not None:
        lib.reqat_decode.argtypes = [ctypes.POINTER(_Layer), ctypes.POINTER(_States), _i64, ctypes.POINTER(_Step)]
    return lib is not None


class NativeStack:
    """Layers ready to be stepped; see the module's docstring.

    Raises ValueError if the native library is missing, or where weights of a layer do not fit together.
    """

    def __init__(self, layers: Sequence[LayerWeights]) -> None:
        if not available():
            raise ValueError("no native library: install a C++ compiler, then reinstall the package")
        lib = library()
        assert lib is not None
        check_layers(layers)
        self._call = lib.reqat_decode
        self.hidden = layers[0].linears[0][0].columns
        made = [_structure(layer) for layer in layers]
        self._layers = (_Layer * len(layers))(*(structure for structure, _ in made))
        self._alive = [alive for _, alive in made]  # the structures hold bare addresses
        self._shifts = [None if layer.shift is None else layer.shift.float().contiguous() for layer in layers]
        self._work = sum(w.rows * w.columns for w, _ in layers[0].linears)
        self._heads = [(layer.heads, layer.scaling) for layer in layers]
        self._bound = _Bound()

    def __len__(self) -> int:
        return len(self._layers)

    def step(
        self,
        x_BTC: Tensor,
        cos_BTD: Tensor,
        sin_BTD: Tensor,
        states: Sequence[tuple[PackedStates, PackedStates]],
        length: int,
        mask_BS: Tensor | None = None,
        *,
        half: bool = False,
    ) -> tuple[int, str] | None:
        """Run the layers on ``x_BTC`` (float32, contiguous), in place, and append their T tokens a row to ``states``.

        ``cos_BTD``, ``sin_BTD``: float32 [B or 1, T, D], contiguous, the rotary embedding of the new tokens.
        ``states``: keys and values of each layer; ``length``: tokens stored before, with room for T more. ``mask_BS``:
        boolean [B, length + T], contiguous, or None: every token may be seen, by those that do not come before it.
        ``half``: round to bfloat16 after each layer. Returns None, or the first layer that met something not finite,
        and what (``x_BTC`` is then undefined). Raises ValueError for arguments of another type, shape or device,
        MemoryError.
        """
        check_step(x_BTC, cos_BTD, sin_BTD, mask_BS, self.hidden, self._layers[0].D, length)
        B, T = x_BTC.shape[:2]
        bound = self._bound.cache
        if bound is None:
            bound = self._bound.cache = _BoundCache([_LayerStates(*of_layer) for of_layer in self._heads])
        for own, shift, (key, value) in zip(bound.layers, self._shifts, states, strict=True):
            if not own.holds(key, value):
                own.bind(key, value, shift)
            own.check_room(B, T, length)
        step, first = _Step(), self._layers[0]
        step.x, step.cos, step.sin = x_BTC.data_ptr(), cos_BTD.data_ptr(), sin_BTD.data_ptr()
        step.stride = 0 if len(cos_BTD) == 1 else cos_BTD.stride(0)
        step.B, step.T, step.length, step.half = B, T, length, half
        step.mask = None if mask_BS is None else mask_BS.data_ptr()
        attention = 2 * B * T * first.G * (length + T) * first.D
        step.threads = max(threads(self._work * B * T, _WORK_PER_THREAD), threads(attention, _ATTENTION_PER_THREAD))
        status = self._call(self._layers, bound.pointers, len(self._layers), step)
        if status == NO_MEMORY:
            raise MemoryError(f"no memory for one decoding step of {B} rows over {length} tokens")
        return None if status == 0 else (status // 16, _PARTS[status % 16 - 3])


def _structure(weights: LayerWeights) -> tuple[_Layer, Any]:
    """A layer as C reads it, and what must stay alive beside it."""
    norms = [None if norm is None else norm.detach().float().contiguous() for norm in weights.norms]
    biases = [None if bias is None else bias.detach().float().contiguous() for _, bias in weights.linears]
    linears = [_Linear(weight_of(w), _address(bias)) for (w, _), bias in zip(weights.linears, biases, strict=True)]
    spec = None
    if weights.inputs is not None:
        static = any(g is not None for g in weights.global_scales)
        spec = spec_of(weights.inputs.replace(global_scale="static") if static else weights.inputs)
    layer = _Layer(
        weights.linears[0][0].columns,
        weights.linears[4][0].rows,
        *weights.heads,
        weights.rotation,
        weights.eps,
        *(_address(norm) for norm in norms),
        *(ctypes.pointer(linear) for linear in linears),
        ctypes.pointer(spec) if spec is not None else None,
        (ctypes.c_float * 4)(*(0.0 if g is None else float(g) for g in weights.global_scales)),
    )
    return layer, (weights, norms, biases, linears, spec)


class _LayerStates:
    """The cache of one layer, as C reads it; bound anew when it has moved."""

    def __init__(self, heads: tuple[int, int, int], scaling: float) -> None:
        H, G, D = heads
        # Weak: a cache's memory is freed when its owner lets go of it, and the next one is then bound.
        self._bound: tuple[weakref.ref[PackedStates], weakref.ref[PackedStates]] | None = None
        self._append = (AppendArgs(), AppendArgs())
        self._attention = AttentionArgs(scaling=scaling, T=1, causal=0, H=H, G=G, D=D)
        self.pointers = _States(*(ctypes.pointer(part) for part in (*self._append, self._attention)))

    def holds(self, key: PackedStates, value: PackedStates) -> bool:
        """Whether these are bound."""
        return self._bound is not None and self._bound[0]() is key and self._bound[1]() is value

    def bind(self, key: PackedStates, value: PackedStates, shift: Tensor | None) -> None:
        """Take over where ``key`` and ``value`` lie."""
        check_cache(key, value, self._attention.G, self._attention.D)
        for append, states in zip(self._append, (key, value), strict=True):
            B, G, room, D = states.shape
            append.states = states_struct(states.codes, states.scales, states.global_scale, states.format.element)
            append.is_value = states.kind == "value"
            append.shift = _address(shift) if states is key else None
            append.B, append.G, append.D, append.tiles, append.threads = B, G, D, room // 16, 1
            append.spec = spec_of(states.format)
        self._attention.key, self._attention.value = self._append[0].states, self._append[1].states
        self._attention.B, self._attention.tiles = self._append[0].B, self._append[0].tiles
        self._rows, self._room = key.shape[0], key.shape[2]
        self._bound = (weakref.ref(key), weakref.ref(value))

    def check_room(self, rows: int, tokens: int, length: int) -> None:
        """Raise ValueError unless the cache has ``rows`` rows, with room for ``tokens`` behind ``length``."""
        if rows != self._rows or not 0 <= length <= self._room - tokens:
            raise ValueError(
                f"{tokens} tokens of {rows} rows behind {length} others does not fit a cache of {self._rows} rows and "
                f"{self._room} tokens"
            )


class _BoundCache:
    """Where the layers of a cache lie: an array for C, and what stands behind it."""

    def __init__(self, layers: list[_LayerStates]) -> None:
        self.layers = layers
        self.pointers = (_States * len(layers))(*(layer.pointers for layer in layers))


class _Bound(threading.local):
    """The cache that a thread decoded with last; every thread has its own, or one would write into another's."""

    cache: _BoundCache | None = None


def _address(t: Tensor | None) -> int | None:
    return None if t is None else t.data_ptr()
