"""A step of decoding in buffers that stay where they are: recorded once as a CUDA graph, and then replayed.

A step of a packed model is some hundreds of small kernels, and to launch them takes the host longer than the GPU needs
to run them. A CUDA graph is launched as one. What it records are addresses and numbers, so nothing may be in a number
that changes from step to step: tokens, positions, and the places of the cache live in tensors that are written to in
place (:class:`~reqat.inference.backend.Places`), the cache has a fixed capacity, and attention reads from the device
how many of its tokens there are. The step is the same code whether it is recorded or not; the first one runs as it is,
which compiles the kernels, the second one is recorded, and from then on it is replayed.

:func:`reason_against` says what keeps a model from it.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from reqat.inference.backend import Backend, Places
from reqat.inference.packed_cache import PackedCache
from reqat.inference.packed_linear import PackedInput
from reqat.models.experts import Experts
from reqat.models.kv import KVQuantizer
from reqat.models.linear import QuantLinear


class DecodeStep:
    """One token a row after the tokens that a packed cache holds. Shapes: B rows, S capacity, V vocabulary.

    Used while one block of ``checked_at_end`` lasts, which is where what its kernels noted is looked at.
    """

    def __init__(
        self,
        model: Any,
        cache: PackedCache,
        position_B1: Tensor,
        mask_B11S: Tensor | None = None,
        *,
        records: bool,
        autocast: Callable[[], AbstractContextManager[Any]] = contextlib.nullcontext,
    ) -> None:
        """
        Args:
            model: packed, and :func:`reason_against` says None.
            cache: of fixed capacity, filled with prompts; it counts the tokens of each step.
            position_B1: int64, the next token's; copied, and one more after each step.
            mask_B11S: which keys a row may see, for the whole capacity; None: all. Not copied.
            records: make a CUDA graph of the second step (needs a GPU); or run each step as the first.
            autocast: makes the context that the model runs in.
        """
        self.model, self.cache, self.records, self.autocast = model, cache, records, autocast
        self.position_B1, self.mask_B11S = position_B1.clone(), mask_B11S
        self.token_B1 = torch.zeros_like(self.position_B1)
        next_B = torch.full_like(self.position_B1[:, 0], cache.get_seq_length())
        self.places = Places(next_B, next_B + 1)
        self.logits_BV: Tensor | None = None
        self._graph: torch.cuda.CUDAGraph | None = None
        self._steps = 0

    @property
    def recorded(self) -> bool:
        """Whether steps are replayed from a graph by now."""
        return self._graph is not None

    @torch.no_grad()
    def __call__(self, token_B: Tensor) -> Tensor:
        """Feed one token a row; the float32 logits that follow it, [B, V], a tensor of their own.

        Raises ReqatError when the cache is full. NaN and infinity are noted, not raised.
        """
        self.cache.reserve(1)
        self.token_B1.copy_(token_B[:, None])
        if self.records and self._steps == 1:
            self._record()
        if self._graph is None:
            self._compute()
        else:
            self._graph.replay()
        self.cache.advance(1)
        self._steps += 1
        assert self.logits_BV is not None
        return self.logits_BV.to(torch.float32, copy=True)

    def _record(self) -> None:
        """Record a step; nothing is computed. Where torch cannot, say so and go on as before."""
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                self._compute()
        except RuntimeError as error:
            self.records = False
            warn_of(str(error).partition("\n")[0])
        else:
            self._graph = graph

    def _compute(self) -> None:
        """The step itself. It returns nothing and takes nothing: all of it is in the object's tensors."""
        with self.cache.at(self.places), self.autocast():
            out = self.model(
                input_ids=self.token_B1,
                attention_mask=self.mask_B11S,
                position_ids=self.position_B1,
                past_key_values=self.cache,
                use_cache=True,
                logits_to_keep=1,
            )
        self.logits_BV = out.logits[:, -1]
        self.position_B1.add_(1)
        self.places.next_B.add_(1)
        self.places.lengths_B.add_(1)


def warn_of(reason: str) -> None:
    """Say why steps are not replayed from a CUDA graph."""
    warnings.warn(f"decoding launches each kernel of each step, without a CUDA graph: {reason}", stacklevel=3)


def reason_against(model: Any, cache: Any) -> str | None:
    """Why steps of ``model`` over ``cache`` cannot be recorded and replayed; None: they can, on a CUDA device.

    Looks at what is known to make the host wait, or to be decided by it anew at each step.
    """
    backend: Backend | None = getattr(model, "_reqat_backend", None)
    if backend is None or not isinstance(cache, PackedCache):
        return "the model is not packed, or its cache is not"
    if any(layer.get_max_length() < 0 for layer in cache.layers):
        return "the cache grows: give it a capacity"
    if model.dtype == torch.float64:
        return "attention in float64 reads the cache dequantized"
    return next((reason for module in model.modules() if (reason := _against(module, backend))), None)


def _against(module: nn.Module, backend: Backend) -> str | None:
    if isinstance(module, PackedInput):
        return backend.waits(module.format, None, None)
    if isinstance(module, QuantLinear) and module.input_quantizer.format is not None:
        return f"{module.name} has no kernel: its input is quantized in PyTorch"
    if isinstance(module, KVQuantizer):
        other = next((q for q in (module.queries, module.probabilities) if q.format is not None), None)
        if other is not None:
            return f"{other.name} are quantized in PyTorch"
        return backend.waits(None, module.key.format, module.value.format)
    if isinstance(module, Experts):
        return "the host looks up which experts a token goes to"
    if "dynamic" in str(getattr(module, "rope_type", "")):
        return "dynamic RoPE asks at each step how long the sequence is"
    return None
