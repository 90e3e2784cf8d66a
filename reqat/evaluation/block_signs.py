"""How one-sided the blocks of a model's tensors are, and what one scale or two scales a block cost there.

AMXFP4 argues that in a block of few numbers the largest positive and the largest negative number often lie far apart,
although the whole tensor is symmetric, so that one scale for both signs leaves codes unused. Here every tensor that a
prepared model rounds is looked at where it would be rounded, in the basis that it would be rounded in, and passed on as
it is: what is measured is the unquantized model's.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from reqat.config.errors import ReqatError
from reqat.formats import Format, quantize_dequantize
from reqat.models.modes import evaluating
from reqat.quant import Quantizer
from reqat.quant.gradients import GradientRule, Rounding

_ROLES = {"weight": "weights", "input": "inputs"}
_LAYER = re.compile(r"layers\.(\d+)\.")


@dataclass
class BlockSigns:
    """What was seen of one tensor: of blocks that are not all zero, how many, and how many are one-sided; sums over all
    numbers of x^2 and of (x^ - x)^2, by label of the format."""

    name: str
    role: str
    """weights, inputs, queries, keys, probabilities or values."""
    layer: int
    blocks: int = 0
    one_sided: int = 0
    square: float = 0.0
    errors: dict[str, float] = field(default_factory=dict)

    def add(self, x: Tensor, block: int, ratio: float, formats: Mapping[str, Format]) -> None:
        """Count ``x``, whose last axis is a multiple of ``block``."""
        blocks = x.detach().float().reshape(-1, block)
        seen, one_sided = one_sided_blocks(blocks, ratio)
        self.blocks += seen
        self.one_sided += one_sided
        self.square += float(blocks.double().square().sum())
        for label, fmt in formats.items():
            error = (quantize_dequantize(blocks, fmt) - blocks).double().square().sum()
            self.errors[label] = self.errors.get(label, 0.0) + float(error)


def one_sided_blocks(blocks_NB: Tensor, ratio: float = 2.0) -> tuple[int, int]:
    """Of N blocks of B numbers: how many are not all zero, and in how many of these the larger of max(x, 0) and
    max(-x, 0) exceeds ``ratio`` times the other (always where all numbers have one sign)."""
    positive, negative = blocks_NB.amax(-1).clamp(min=0), (-blocks_NB).amax(-1).clamp(min=0)
    larger, smaller = torch.maximum(positive, negative), torch.minimum(positive, negative)
    return int((larger > 0).sum()), int((larger > ratio * smaller).sum())


class _Watch(GradientRule):
    """Counts what comes to be rounded, and passes it on, rotated and not rounded."""

    name = "watch"

    def __init__(self, seen: BlockSigns, block: int, ratio: float, formats: Mapping[str, Format]) -> None:
        super().__init__()
        self.seen, self.block, self.ratio, self.formats = seen, block, ratio, formats

    def forward(self, x: Tensor, at: Rounding) -> Tensor:
        rotated = at.rotate(x)
        self.seen.add(rotated, self.block, self.ratio, self.formats)
        return rotated


@torch.no_grad()
def block_signs(
    model: PreTrainedModel,
    input_ids: Tensor,
    formats: Mapping[str, Format],
    *,
    block: int = 32,
    ratio: float = 2.0,
) -> list[BlockSigns]:
    """Blocks of every tensor that ``model`` rounds, as it reads ``input_ids`` ``[n, T]`` int64.

    The model is prepared for a precision that rounds what is to be seen, and is of no use for anything else afterwards.
    ``formats``: label -> format of this block size, whose error is summed. Raises ReqatError for a model that rounds
    nothing.
    """
    found: list[BlockSigns] = []
    for module in model.modules():
        if isinstance(module, Quantizer) and module.format is not None:
            name = str(module.name)
            layer = _LAYER.search(name)
            role = re.split(r"[ .]", name)[-1]
            seen = BlockSigns(name, _ROLES.get(role, role), int(layer[1]) if layer else -1)
            module.gradient = _Watch(seen, block, ratio, formats)
            found.append(seen)
    if not found:
        raise ReqatError("the model rounds nothing: prepare it for a precision such as MXFP4-W4A4Q4KV4P4")
    with evaluating(model):
        base: Any = model.base_model
        base(input_ids=input_ids.to(model.device), use_cache=False)
    return found
