"""A model that one process loads and several train: the others get it without weights, then these piece by piece.

A model of 14B parameters takes 55 GiB in float32, and a process keeps its share alone. So the first process alone loads
and prepares it. What the others are sent is the model with its parameters and buffers on torch's meta device, which
have shapes and no memory (:func:`outline`); everything else of it, Python values and small tensors, is as the first
has it. When the model is divided (:meth:`reqat.training.distributed.Ranks.place`), the first sends each block's
numbers, bit for bit, and every process keeps its share of it before the next block comes (:func:`fill_from_first`).
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import PreTrainedModel

# Sent at once: a large embedding has more bytes than a 32-bit count.
_PIECE_BYTES = 2**28


class _Pickler(pickle.Pickler):
    """Writes tensors of ``held`` (by identity, so that tied ones stay tied) as what they look like."""

    def __init__(self, file: io.BytesIO, held: set[int]) -> None:
        super().__init__(file)
        self.held = held

    def reducer_override(self, value: Any) -> Any:
        if id(value) not in self.held:
            return NotImplemented
        about = (tuple(value.shape), value.stride(), value.dtype, value.requires_grad, isinstance(value, nn.Parameter))
        return _without_numbers, about


def _without_numbers(
    shape: tuple[int, ...], stride: tuple[int, ...], dtype: torch.dtype, requires_grad: bool, is_parameter: bool
) -> Tensor:
    made = torch.empty_strided(shape, stride, dtype=dtype, device="meta")
    return nn.Parameter(made, requires_grad=requires_grad) if is_parameter else made


def outline(model: PreTrainedModel) -> bytes:
    """The model without the numbers of its parameters and buffers; for :func:`from_outline` in a process of the same
    code."""
    file = io.BytesIO()
    _Pickler(file, {id(tensor) for tensor in (*model.parameters(), *model.buffers())}).dump(model)
    return file.getvalue()


def from_outline(data: bytes) -> PreTrainedModel:
    """The model of :func:`outline`, its parameters and buffers on the meta device."""
    made: PreTrainedModel = pickle.loads(data)
    return made


def is_outline(model: nn.Module) -> bool:
    """Whether a model has parameters without numbers."""
    return any(parameter.is_meta for parameter in model.parameters())


@torch.no_grad()
def fill_from_first(modules: Iterable[nn.Module], device: torch.device, filled: set[int]) -> None:
    """Give parameters and buffers of the modules themselves, not of those inside, the numbers that the first process
    has, on ``device``; every process calls it with the same modules.

    ``filled`` holds the identities of the tensors that were given theirs, which a tied one is once. Tensors that are
    not on the meta device, as all of the first, are moved where they are elsewhere.
    """
    for module in modules:
        for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
            if id(tensor) in filled:
                continue
            filled.add(id(tensor))
            if tensor.is_meta:
                there: Tensor = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)
                if isinstance(tensor, nn.Parameter):
                    there = nn.Parameter(there, requires_grad=tensor.requires_grad)
                torch.utils.swap_tensors(tensor, there)
            elif tensor.device != device:
                tensor.data = tensor.data.to(device)
            _send(tensor)


def _send(tensor: Tensor) -> None:
    """Overwrite ``tensor`` with the first process's, whatever its type."""
    whole = tensor.detach().contiguous()
    for piece in whole.reshape(-1).view(torch.uint8).split(_PIECE_BYTES):
        dist.broadcast(piece, src=0)
    if whole.data_ptr() != tensor.data_ptr():
        tensor.copy_(whole)
