"""Classification by an encoder, which labels it gets right, sequence by sequence; and of images, image by image."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from reqat.data import Batch, Images, LabelledRows
from reqat.data.packing import IGNORE
from reqat.models.modes import evaluating
from reqat.training import response_logits

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def ordered(rows: LabelledRows, rows_per_batch: int) -> Iterator[tuple[list[int], Batch]]:
    """All rows in batches of similar length, always the same ones: scales of a whole tensor, as those of 8-bit
    activations are, depend on what is in a batch."""
    order = sorted(range(len(rows)), key=lambda i: (len(rows.ids[i]), i))
    for start in range(0, len(order), rows_per_batch):
        indices = order[start : start + rows_per_batch]
        yield indices, rows.batch(indices)


@torch.no_grad()
def correct_labels(
    model: PreTrainedModel, rows: LabelledRows, *, rows_per_batch: int = 32
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Of each sequence, [rows]: how many labels the model gets right, and how many there are."""
    right, count = np.zeros(len(rows), np.int64), np.zeros(len(rows), np.int64)
    with evaluating(model):
        for indices, batch in ordered(rows, rows_per_batch):
            keep = batch.labels != IGNORE
            found = response_logits(model, batch, keep).argmax(-1) == batch.labels[keep]
            row = keep.nonzero()[:, 0]
            right[indices] = torch.bincount(row, found.double(), minlength=len(indices)).long().numpy()
            count[indices] = torch.bincount(row, minlength=len(indices)).numpy()
    return right, count


@torch.no_grad()
def correct_images(model: PreTrainedModel, images: Images, *, rows_per_batch: int = 500) -> Tensor:
    """Whether each image is classified as labelled, [N] bool; the images in order, so many at once."""
    with evaluating(model):
        found = [
            model(images.batch(some)[0]).logits.argmax(-1) == images.labels[some]
            for some in torch.arange(len(images)).split(rows_per_batch)
        ]
    return torch.cat(found)
