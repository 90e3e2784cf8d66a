"""Training a classifier of images: cross-entropy, SGD with Nesterov's momentum, a linear warm-up and a cosine.

Apart from :func:`reqat.training.train`, whose rows are tokens and whose optimizer is AdamW: convolutional networks are
trained with momentum (as in TAS, arXiv 1905.09717), and a run of a minute wants neither checkpoints nor several
processes. Schedule and groups of parameters are the same functions, and a run is as much a pure function of its
arguments.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from reqat.config.channels import ImageTraining
from reqat.config.errors import ReqatError
from reqat.data.images import Images
from reqat.models.modes import evaluating
from reqat.training.loop import learning_rate, parameter_groups

_EVALUATED_AT_ONCE = 500


def train_classifier(
    model: PreTrainedModel,
    images: Images,
    settings: ImageTraining,
    seed: int,
    say: Callable[[str], object] = lambda _: None,
    label: str = "train",
) -> list[float]:
    """Train ``model``, plain or prepared, in place; returns the mean loss of each epoch, in nats.

    Batches are whole; the images left over differ from epoch to epoch. Raises ReqatError for fewer images than a batch,
    and for a loss that is not finite.
    """
    if len(images) < settings.batch:
        raise ReqatError(f"{label}: {len(images)} images are fewer than a batch of {settings.batch}; lower batch.")
    optimizer = descent(model, settings)
    generator = torch.Generator().manual_seed(seed)
    each, losses = len(images) // settings.batch, []
    model.train()
    for epoch in range(settings.epochs):
        total = 0.0
        for step, indices in enumerate(epoch_batches(torch.arange(len(images)), settings.batch, seed, epoch)):
            set_rate(optimizer, epoch * each + step, settings.epochs * each, settings)
            pixels, labels = images.batch(indices, generator if settings.augment else None)
            loss = F.cross_entropy(model(pixels).logits, labels)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            total += loss.item() / each
        if not math.isfinite(total):
            raise ReqatError(f"{label}: the loss is not finite in epoch {epoch + 1}; lower lr={settings.lr}.")
        losses.append(total)
        say(f"{label}: epoch {epoch + 1} of {settings.epochs}, loss {total:.3f}")
    model.eval()
    return losses


@torch.no_grad()
def correct(model: PreTrainedModel, images: Images) -> Tensor:
    """Whether each image is classified as labelled, [N] bool."""
    with evaluating(model):
        found = [
            model(images.batch(some)[0]).logits.argmax(-1) == images.labels[some]
            for some in torch.arange(len(images)).split(_EVALUATED_AT_ONCE)
        ]
    return torch.cat(found)


def descent(model: nn.Module, settings: ImageTraining) -> torch.optim.SGD:
    """The optimizer of all that takes a gradient in ``model``."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.SGD(
        parameter_groups(model, parameters),
        lr=settings.lr,
        momentum=settings.momentum,
        weight_decay=settings.weight_decay,
        nesterov=True,
    )


def set_rate(optimizer: torch.optim.Optimizer, step: int, steps: int, settings: ImageTraining) -> None:
    """The learning rate of a step, counted from 0."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(step, steps, settings)


def epoch_batches(indices: Tensor, batch: int, seed: int, epoch: int) -> Iterator[Tensor]:
    """Whole batches of ``indices`` [n] in an order that seed and epoch decide."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    order = indices[torch.randperm(len(indices), generator=generator)]
    yield from order[: len(order) // batch * batch].split(batch)
