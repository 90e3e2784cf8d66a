"""A key/value cache stored as packed four-bit codes.

:class:`PackedCache` holds what :class:`~reqat.models.cache.Fp4Cache` holds, the same numbers bit for bit, as codes and
scales: 4.5 bits a number in NVFP4, 4.25 in MXFP4, and 32 for each row, or token, whose global scale is not static.

How the attention function gets at them: ``update`` returns stand-ins for keys and values, tensors of the right shape
that own a single number, which is NaN, so that an attention function that does not know them cannot go unnoticed. Ours
asks the layer behind them (:meth:`PackedCacheLayer.attend`). New tokens are attended to by the kernel that reads the
codes (:mod:`reqat.inference.backends` chooses it by device): on a CPU whole prompts too, on a GPU up to eight tokens.
Otherwise, and for float64, dropout or gradients, the cache is dequantized and attention goes the usual way.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from reqat.config.errors import ReqatError
from reqat.formats.subnormals import subnormals_kept
from reqat.inference.backend import Backend, Places, States
from reqat.inference.backends import backend_for
from reqat.models.attention import mark_packed, mark_quantized, softmax_attention
from reqat.models.cache import Fp4CacheLayer
from reqat.models.kv import KVQuantizer, kv_quantizers
from reqat.quant import Quantizer, block_hadamard
from reqat_kernels.native.attention import TILE, unsupported

_SPARE = 3 * TILE  # tokens that a cache grows by beyond what is needed: growing costs as much as some steps of a layer


class PackedCacheLayer(Fp4CacheLayer):
    """Packed keys and values of one layer, the first ``length`` tokens of them filled.

    While ``places`` are set they say where tokens go and how many there are, and ``length`` stays as it is: see
    :meth:`PackedCache.at`.
    """

    # What the backend allocates: PackedStates of the native kernels, KVSide of Triton's; ``States`` in common.
    packed_keys: Any = None
    packed_values: Any = None

    def __init__(self, quantizer: KVQuantizer, capacity: int | None, backend: Backend | None = None) -> None:
        """``backend``: None chooses by the device of the first tokens."""
        super().__init__(quantizer, capacity or 0)
        self.backend = backend
        self.places: Places | None = None
        self.grows = capacity is None
        self.dtype = torch.float32

    @property
    def nbytes(self) -> int:
        """Bytes allocated; 0 before the first token."""
        return sum(states.nbytes for states in (self.packed_keys, self.packed_values) if states is not None)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate, once the first tokens show batch size and device."""
        if self.grows:
            self.capacity = _grown(key_states.shape[2])
        if self.backend is None:
            self.backend = backend_for(key_states.device)
        self.packed_keys = self._allocated("key", self.quantizer.key, key_states)
        self.packed_values = self._allocated("value", self.quantizer.value, value_states)
        # What Fp4Cache would hold: on a CPU never less than float32 (see reqat.models.kv).
        narrow = key_states.device.type == "cpu" and key_states.dtype in (torch.bfloat16, torch.float16)
        self.dtype = torch.float32 if narrow else key_states.dtype
        self.is_initialized = True

    def _allocated(self, kind: Literal["key", "value"], quantizer: Quantizer, states: Tensor) -> States:
        if quantizer.needs_calibration:
            raise ReqatError(
                f"{quantizer.name}: the global scale is static and not calibrated; run calibrate_static(model, "
                "batches), or choose global_scale='row' or 'dynamic'"
            )
        assert self.backend is not None
        return self.backend.allocate(kind, quantizer, states, self.capacity)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Quantize and append [B, G, T, D]; returns placeholders, since the cache computes attention from packed codes.

        Raises ValueError when the cache is full, the batch is not the one it was filled with, or a gradient is wanted.
        """
        if torch.is_grad_enabled() and (key_states.requires_grad or value_states.requires_grad):
            raise ReqatError("a packed cache passes no gradient on: run the model under torch.no_grad(), or freeze it")
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.reserve(key_states.shape[2], key_states.shape[0])
        assert self.backend is not None
        shift, rotation = self.quantizer.shift, self.quantizer.key.rotation
        if rotation is not None or self.dtype != torch.float32:  # the kernel shifts, in float32, and no more
            key_states = key_states.to(self.dtype)
            if shift is not None:
                with subnormals_kept(key_states):
                    key_states, shift = key_states - shift[:, None].to(self.dtype), None
            if rotation is not None:
                key_states = block_hadamard(self.quantizer.basis(key_states), rotation)
        self.backend.append(
            self.packed_keys,
            self.packed_values,
            key_states,
            value_states,
            self.places or self.length,
            shift_GD=shift,
            names=(self.quantizer.key.name, self.quantizer.value.name),
        )
        if self.places is None:
            self.length += key_states.shape[2]
        return self._stand_in(self.packed_keys), self._stand_in(self.packed_values)

    def reserve(self, tokens: int, rows: int) -> None:
        """Make sure that ``tokens`` more tokens of ``rows`` rows fit.

        Raises ValueError when the cache is full and does not grow, or the batch is not the one it was filled with.
        """
        batch = len(self.packed_keys.codes)  # every step of every layer comes here
        if rows != batch:
            raise ReqatError(
                f"the cache was filled with {batch} rows, {rows} are to be appended: drop rows with select_rows, or "
                "start a new cache"
            )
        end = self.length + tokens
        if end <= self.capacity:
            return
        if not self.grows:
            raise ReqatError(
                f"the cache holds {self.capacity} tokens and {end} are needed: make it with "
                f"PackedCache(model, capacity={end}) or more, or with capacity=None to let it grow"
            )
        self.capacity = _grown(end + _SPARE)
        self.packed_keys = self.packed_keys.resized(self.capacity, self.length)
        self.packed_values = self.packed_values.resized(self.capacity, self.length)

    def _stand_in(self, states: States) -> Tensor:
        B, G, _, D = states.shape
        nan = torch.full((), torch.nan, dtype=self.dtype, device=states.codes.device)
        length = self.length if self.places is None else self.capacity
        return mark_packed(mark_quantized(nan.expand(B, G, length, D)), self)

    def attend(
        self,
        query_BHTD: Tensor,
        length: int,
        attention_mask: Tensor | None,
        *,
        scaling: float | None,
        dropout: float,
        is_causal: bool,
    ) -> Tensor:
        """Attention over the first ``length`` tokens; arguments and result are those of ``softmax_attention``."""
        assert self.backend is not None
        most = self.backend.most_new_tokens
        reads_codes = (
            query_BHTD.dtype != torch.float64
            and (most is None or query_BHTD.shape[2] <= most)
            and dropout == 0.0
            and not (torch.is_grad_enabled() and query_BHTD.requires_grad)
        )
        if reads_codes:
            return self.backend.attend(
                query_BHTD,
                self.packed_keys,
                self.packed_values,
                self.places or length,
                scaling=scaling,
                mask=attention_mask,
                is_causal=is_causal,
            )
        assert self.places is None
        key_BGSD, value_BGSD = self.dequantized(length)
        return softmax_attention(
            query_BHTD, key_BGSD, value_BGSD, attention_mask, scaling=scaling, dropout=dropout, is_causal=is_causal
        )

    def dequantized(self, length: int) -> tuple[Tensor, Tensor]:
        """The first ``length`` keys and values as numbers, [B, G, length, D]: what Fp4Cache holds."""
        return self.packed_keys.dequantize(length, self.dtype), self.packed_values.dequantize(length, self.dtype)

    def get_max_length(self) -> int:
        """Tokens that fit; -1 if it grows."""
        return -1 if self.grows else self.capacity

    def select_rows(self, rows: Tensor) -> None:
        """Keep these batch rows, in this order."""
        if self.packed_keys is not None:
            rows = rows.to(self.packed_keys.codes.device)
            self.packed_keys = self.packed_keys.select_rows(rows, self.length)
            self.packed_values = self.packed_values.select_rows(rows, self.length)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row ``repeats`` times."""
        if self.packed_keys is not None:
            rows = torch.arange(self.packed_keys.shape[0], dtype=torch.long, device="cpu")
            self.select_rows(rows.repeat_interleave(repeats))


class PackedCache(Cache):
    """The packed cache of a prepared model, for ``past_key_values=``.

    Args:
        model: prepared with NVFP4, NVFP4-4/6 or MXFP4 keys and values.
        capacity: tokens a row (the native kernels allocate tiles of 16), or None to grow as it fills.

    Raises ValueError if the model was not prepared, or its keys or values cannot be packed; :class:`Fp4Cache` takes
    those.
    """

    def __init__(self, model: PreTrainedModel, capacity: int | None = None) -> None:
        if capacity is not None and capacity < 1:
            raise ReqatError(f"cache capacity must be at least one token, not {capacity}; None lets it grow")
        quantizers = kv_quantizers(model)
        for kv in quantizers:
            for quantizer in (kv.key, kv.value):
                reason = unsupported(quantizer.format, kv.shape[1])
                if kv.basis.factored or quantizer.clip is not None:
                    reason = "they are quantized in a basis of their own, or clipped before (QuaRot, FlatQuant)"
                if reason:
                    raise ReqatError(f"{quantizer.name} cannot be packed: {reason}; use Fp4Cache(model, capacity)")
        backend = getattr(model, "_reqat_backend", None)  # the one it was packed for, if it was
        self._packed_layers = [PackedCacheLayer(kv, capacity, backend) for kv in quantizers]
        super().__init__(layers=[*self._packed_layers])

    @property
    def nbytes(self) -> int:
        """Bytes allocated for codes and scales, all layers together; 0 before the first token."""
        return sum(layer.nbytes for layer in self._packed_layers)

    @property
    def capacity(self) -> int:
        """Tokens a row that fit at present."""
        return self._packed_layers[0].capacity

    @contextmanager
    def at(self, places: Places) -> Iterator[None]:
        """Within this block appended tokens go where ``places`` say and attention reads as many as they say; the cache
        counts none of them (:meth:`advance` does), so that nothing in Python changes from step to step."""
        for layer in self._packed_layers:
            layer.places = places
        try:
            yield
        finally:
            for layer in self._packed_layers:
                layer.places = None

    def reserve(self, tokens: int) -> None:
        """Make sure that ``tokens`` more a row fit. Raises ReqatError if not."""
        for layer in self._packed_layers:
            layer.reserve(tokens, layer.packed_keys.shape[0])

    def advance(self, tokens: int) -> None:
        """Count ``tokens`` a row, which were appended under :meth:`at`."""
        for layer in self._packed_layers:
            layer.length += tokens

    def select_rows(self, rows: Tensor | list[int]) -> None:
        """Keep these batch rows, in this order, in every layer (drops finished rows while generating)."""
        index = torch.as_tensor(rows, dtype=torch.long, device="cpu")
        for layer in self._packed_layers:
            layer.select_rows(index)


def _grown(needed: int) -> int:
    """Room for ``needed`` tokens: whole tiles, and from a thousand tokens on a 64th more."""
    return -(-needed // TILE) * TILE + needed // 1024 * TILE
