"""Labelled images: arrays that were checked once, and batches of them as a network reads them.

Pixels are normalized with one mean and one standard deviation, those of the training images. Augmentation is what is
usual for small pictures: pad by two pixels, cut out at random, mirror at random.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from reqat.config.errors import ReqatError

if TYPE_CHECKING:
    from reqat.data.rows import Reader

_PAD = 2


@dataclass(frozen=True)
class Images:
    """``pixels`` uint8 [N, H, W], ``labels`` int64 [N] in 0 to ``classes`` - 1; ``mean`` and ``deviation`` of the
    pixels that a network was or is trained on. Make it with :func:`images_of`."""

    pixels: Tensor
    labels: Tensor
    classes: int
    mean: float
    deviation: float

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def side(self) -> int:
        """Height and width."""
        return self.pixels.shape[-1]

    def take(self, indices: Tensor) -> Images:
        """Some of them."""
        return dataclasses.replace(self, pixels=self.pixels[indices], labels=self.labels[indices])

    def like(self, other: Images) -> Images:
        """The same, normalized as ``other`` is."""
        return dataclasses.replace(self, mean=other.mean, deviation=other.deviation)

    def batch(self, indices: Tensor, augment: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """Normalized pixels [B, 1, H, W], float32, and labels [B]; cut out and mirrored at random with a generator."""
        x = (self.pixels[indices, None].float() - self.mean) / self.deviation
        if augment is not None:
            x = _augmented(x, augment)
        return x, self.labels[indices]


@dataclass(frozen=True)
class ImageBatch:
    """``pixels`` float32 [B, C, H, W], normalized; ``labels`` int64 [B]."""

    pixels: Tensor
    labels: Tensor

    @property
    def n_tokens(self) -> int:
        """Images."""
        return len(self.labels)

    @property
    def n_response_tokens(self) -> int:
        """Labels that the loss counts: one an image."""
        return len(self.labels)

    @property
    def tokens(self) -> Tensor:
        """[B] bool: all images."""
        return torch.ones_like(self.labels, dtype=torch.bool)

    def traces(self, keep: Tensor) -> Tensor:
        """[N] int64: each of the images where ``keep`` [B] holds is one of its own."""
        return torch.arange(int(keep.sum()), device=keep.device)

    def to(self, device: torch.device, *, apart: bool = False) -> ImageBatch:
        """The same on a device; ``apart`` is of traces, and images are apart anyway."""
        return ImageBatch(self.pixels.to(device), self.labels.to(device))


@dataclass(frozen=True)
class ImageRows:
    """One image a row of the training loop; ``augment``: cut out and mirrored at random, anew in each batch."""

    images: Images
    augment: bool = True
    unit: ClassVar[str] = "images"

    def __len__(self) -> int:
        return len(self.images)

    @property
    def n_tokens(self) -> int:
        """Images."""
        return len(self.images)

    @property
    def digest(self) -> str:
        """sha256 (hex) of all that the batches are made of."""
        images = self.images
        shape = list(images.pixels.shape)
        hasher = hashlib.sha256(
            f"images {shape} {images.classes} {images.mean!r} {images.deviation!r} {self.augment}".encode()
        )
        for part in (images.pixels, images.labels):
            hasher.update(part.contiguous().numpy().data)
        return hasher.hexdigest()

    def check(self, reader: Reader) -> None:
        """Raise ``ReqatError`` for a model of other images or of fewer classes."""
        reader.images(1, self.images.classes)

    def batches(self, rows_per_batch: int, epochs: int, seed: int) -> Iterator[list[int]]:
        """Indices batch by batch, in an order that seed and epoch decide. Batches are whole, for norms take statistics
        of them; the images left over differ from epoch to epoch. Raises ReqatError for fewer images than a batch."""
        if len(self) < rows_per_batch:
            raise ReqatError(f"{len(self)} images are fewer than a batch of {rows_per_batch}; lower rows_per_batch.")
        for epoch in range(epochs):
            order = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))
            whole = order[: len(order) // rows_per_batch * rows_per_batch]
            yield from (batch.tolist() for batch in whole.split(rows_per_batch))

    def batch(self, indices: Sequence[int]) -> ImageBatch:
        """The images at ``indices``. Random numbers come from torch's own generator, which a checkpoint keeps."""
        return ImageBatch(*self.images.batch(torch.tensor(indices), torch.default_generator if self.augment else None))


def images_of(pixels: np.ndarray, labels: np.ndarray, classes: int, what: str) -> Images:
    """Images from arrays [N, H, W] and [N]. Raises ReqatError, naming ``what``, for none, for other shapes or types,
    for images that are not square, and for a label outside the classes."""
    if pixels.ndim != 3 or pixels.dtype != np.uint8 or pixels.shape[1] != pixels.shape[2] or not len(pixels):
        raise ReqatError(f"{what}: images are uint8 of shape [N, side, side], not {pixels.dtype} {list(pixels.shape)}.")
    if labels.shape != pixels.shape[:1] or labels.dtype.kind not in "iu":
        raise ReqatError(f"{what}: {len(pixels)} images need as many whole labels, not {labels.dtype} {labels.shape}.")
    wrong = np.flatnonzero((labels < 0) | (labels >= classes))
    if len(wrong):
        raise ReqatError(
            f"{what}: image {wrong[0]} has the label {labels[wrong[0]]}, and there are {classes} classes (0 to "
            f"{classes - 1}); correct or remove {len(wrong)} such images."
        )
    x = torch.from_numpy(np.ascontiguousarray(pixels))
    deviation = float(x.double().std())
    return Images(x, torch.from_numpy(labels.astype(np.int64)), classes, float(x.double().mean()), deviation or 1.0)


def halved(images: Images) -> Images:
    """Half as high and wide: each pixel the rounded mean of four. Raises ReqatError for an odd side."""
    if images.side % 2:
        raise ReqatError(f"images of side {images.side} cannot be halved; take an even side.")
    small = F.avg_pool2d(images.pixels[:, None].float(), 2)[:, 0].round().to(torch.uint8)
    mean, deviation = float(small.double().mean()), float(small.double().std()) or 1.0
    return dataclasses.replace(images, pixels=small, mean=mean, deviation=deviation)


def digits() -> Images:
    """1,797 handwritten digits, 8 x 8, that scikit-learn ships (UCI); in place of a data set where none is
    installed. Raises ReqatError where scikit-learn is not."""
    try:
        from sklearn.datasets import load_digits  # slow to import, and of use to tests and smoke runs alone
    except ImportError as error:
        raise ReqatError(
            "data digits are those of scikit-learn, which is not installed: pip install scikit-learn, or take data "
            "fashion-mnist"
        ) from error
    found = load_digits()
    return images_of((found.images * 15).astype(np.uint8), found.target, 10, "digits of scikit-learn")


def _augmented(x: Tensor, generator: torch.Generator) -> Tensor:
    """Padded with the edge's numbers, cut out and mirrored, each image for itself."""
    n, _, side, _ = x.shape
    padded = F.pad(x, (_PAD, _PAD, _PAD, _PAD), mode="replicate")
    top, left = (torch.randint(0, 2 * _PAD + 1, (n,), generator=generator) for _ in range(2))
    mirrored = torch.rand(n, generator=generator) < 0.5
    steps = torch.arange(side)
    rows = top[:, None] + steps
    columns = left[:, None] + torch.where(mirrored[:, None], steps.flip(0), steps)
    return padded[torch.arange(n)[:, None, None], 0, rows[:, :, None], columns[:, None, :]][:, None]
