"""Teacher forcing: one forward pass over tokens that are given, in batches of like length.

Rows are padded on the right. Under causal attention nothing looks at what follows it, so there is no mask.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from reqat.models import forget_lengths
from reqat.quant import autocast as autocast_region

# Logits of a forward pass are computed for as many positions at a time as fit in this.
_LOGITS_BYTES = 64 * 2**20

Row = tuple[Sequence[int], Sequence[int]]
"""Token ids that are read, one or more, and token ids whose distributions are wanted."""


def batches_by_length(sizes: Sequence[int], batch_tokens: int) -> Iterator[list[int]]:
    """Indices of rows of like length whose padded tokens fit in a batch; one long row may exceed it."""
    batch: list[int] = []
    for i in sorted(range(len(sizes)), key=lambda i: (sizes[i], i)):  # ascending: the last one is the longest
        if batch and (len(batch) + 1) * sizes[i] > batch_tokens:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


def forced_logits(
    model: PreTrainedModel, rows: Sequence[Row], autocast: torch.dtype | None
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Logits of every given token, row after row, in chunks: (index of the first, float32 [N, V], tokens [N])."""
    yield from logits_of(model, forced_hidden(model, rows, autocast), rows, autocast)


def forced_hidden(model: PreTrainedModel, rows: Sequence[Row], autocast: torch.dtype | None) -> Tensor:
    """What the output head reads before every given token, row after row: [N, H], in the dtype of the model, or of
    ``autocast``."""
    device = model.device
    forget_lengths(model)
    # The last token is read by nobody.
    ids = [[*prompt, *response][:-1] for prompt, response in rows]
    longest = max(map(len, ids))
    ids_BT = torch.tensor([row + [row[-1]] * (longest - len(row)) for row in ids], device=device)
    row_N = [b for b, (_, response) in enumerate(rows) for _ in response]
    at_N = [len(prompt) - 1 + i for prompt, response in rows for i in range(len(response))]
    with autocast_region(device.type, autocast):
        base: Any = model.base_model
        hidden_NH: Tensor = base(input_ids=ids_BT, use_cache=False).last_hidden_state[row_N, at_N]
    return hidden_NH


def logits_of(
    model: PreTrainedModel, hidden_NH: Tensor, rows: Sequence[Row], autocast: torch.dtype | None
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """As `forced_logits`, from what `forced_hidden` gave for the same rows."""
    tokens_N = torch.tensor([token for _, response in rows for token in response], device=hidden_NH.device)
    head = model.get_output_embeddings()
    chunk = max(1, _LOGITS_BYTES // (4 * model.config.vocab_size))
    with autocast_region(hidden_NH.device.type, autocast):
        for low in range(0, len(hidden_NH), chunk):
            yield low, head(hidden_NH[low : low + chunk]).float(), tokens_N[low : low + chunk]
