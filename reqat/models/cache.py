"""A key/value cache that holds keys and values as an engine with a four-bit cache would: quantized when appended, once.

Each step quantizes only the new tokens, through the layer's :class:`~reqat.models.kv.KVQuantizer`, and writes them
into room allocated beforehand, so nothing grows by concatenation. The stored values are the dequantized ones (the
arithmetic is that of a packed cache, the memory is not).

With ``row`` and ``static`` global scales a token's codes depend on that token alone: decoding from this cache equals
recomputing everything, and a row does not depend on its batch. With ``dynamic`` the scale comes from the tokens
appended together; the paper's training code, which rescales the whole cache at each step, is what transformers'
``DynamicCache`` gives (the attention function then re-quantizes all keys and values in every step).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin

from reqat.config.errors import ReqatError
from reqat.models.attention import mark_quantized
from reqat.models.kv import KVQuantizer, kv_quantizers


class Fp4CacheLayer(CacheLayerMixin):
    """Keys and values [B, G, capacity, D] of one layer, the first ``length`` tokens of them filled."""

    is_sliding = False
    is_croppable = True
    supports_early_init = False

    def __init__(self, quantizer: KVQuantizer, capacity: int) -> None:
        super().__init__()
        self.quantizer = quantizer
        self.capacity = capacity
        self.length = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate, once the first tokens show batch size, dtype and device."""
        batch, heads, _, head_dim = key_states.shape
        self.keys = key_states.new_empty(batch, heads, self.capacity, head_dim)
        self.values = value_states.new_empty(batch, heads, self.capacity, head_dim)
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Quantize and append [B, G, T, D]; returns all keys and values so far, marked as quantized.

        Raises ValueError when the cache is full, or the batch is not the one it was filled with.
        """
        key_states, value_states = self.quantizer(key_states, value_states)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None and self.values is not None
        end = self.length + key_states.shape[2]
        if end > self.capacity:
            raise ReqatError(
                f"the cache holds {self.capacity} tokens and {end} are needed: make it with "
                f"Fp4Cache(model, capacity={end}) or more"
            )
        if key_states.shape[0] != self.keys.shape[0]:
            raise ReqatError(
                f"the cache was filled with {self.keys.shape[0]} rows, {key_states.shape[0]} are to be appended: drop "
                "rows with select_rows, or start a new cache"
            )
        self.keys[:, :, self.length : end] = key_states
        self.values[:, :, self.length : end] = value_states
        self.length = end
        return mark_quantized(self.keys[:, :, :end]), mark_quantized(self.values[:, :, :end])

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(number of keys that ``query_length`` more tokens will see, offset of the first)."""
        return self.length + query_length, 0

    def get_seq_length(self) -> int:
        """Tokens stored."""
        return self.length

    def get_max_length(self) -> int:
        """Tokens that fit."""
        return self.capacity

    def reset(self) -> None:
        """Forget the tokens, keep the room."""
        self.length = 0

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last ``-tokens_to_remove`` tokens (transformers' convention: a number <= 0)."""
        if not -self.length <= tokens_to_remove <= 0:
            raise ReqatError(f"crop takes a number from -{self.length} to 0, not {tokens_to_remove}")
        self.length += tokens_to_remove

    def select_rows(self, rows: Tensor) -> None:
        """Keep these batch rows, in this order."""
        if not self.is_initialized:
            return
        assert self.keys is not None and self.values is not None
        for name, old in (("keys", self.keys), ("values", self.values)):
            new = old.new_empty(len(rows), *old.shape[1:])
            new[:, :, : self.length] = old[:, :, : self.length].index_select(0, rows)
            setattr(self, name, new)

    def batch_select_indices(self, indices: Tensor) -> None:
        """transformers' name for :meth:`select_rows`."""
        self.select_rows(indices)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Beam search's name for :meth:`select_rows`."""
        self.select_rows(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row ``repeats`` times."""
        if self.is_initialized:
            assert self.keys is not None
            rows = torch.arange(self.keys.shape[0], dtype=torch.int64, device=self.keys.device)
            self.select_rows(rows.repeat_interleave(repeats))


class Fp4Cache(Cache):
    """The cache of a prepared model, for ``past_key_values=``; ``capacity`` tokens a row.

    Works at every precision: at BF16 it stores keys and values as they come. Raises ValueError if the model was not
    prepared.
    """

    def __init__(self, model: PreTrainedModel, capacity: int) -> None:
        if capacity < 1:
            raise ReqatError(f"cache capacity must be at least one token, not {capacity}")
        self._fp4_layers = [Fp4CacheLayer(quantizer, capacity) for quantizer in kv_quantizers(model)]
        super().__init__(layers=[*self._fp4_layers])
        self.capacity = capacity

    def select_rows(self, rows: Tensor | list[int]) -> None:
        """Keep these batch rows, in this order, in every layer (drops finished rows while generating)."""
        first = self._fp4_layers[0]
        if first.keys is None:
            return
        index = torch.as_tensor(rows, dtype=torch.long, device=first.keys.device)
        for layer in self._fp4_layers:
            layer.select_rows(index)
