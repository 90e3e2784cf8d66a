"""Settings of channel searches and of training classifiers of images, readable without torch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from reqat.config.base import Count, Size, Strict, distinct
from reqat.config.errors import ReqatError
from reqat.config.stage import Optimization

Share = Annotated[float, Field(gt=0, le=16)]


class ImageTraining(Optimization):
    """The training loop's hyper-parameters, by default as convolutional networks are trained: SGD with Nesterov's
    momentum in float32, a longer warm-up, and a cosine to zero."""

    epochs: Count
    optimizer: Literal["adamw", "sgd"] = "sgd"
    lr: float = Field(default=0.1, gt=0, le=1e3)
    rows_per_batch: Size = 128
    """Images in one micro-batch."""
    weight_decay: float = Field(default=5e-4, ge=0)
    warmup: float = Field(default=0.1, ge=0, lt=1)
    min_lr_ratio: float = Field(default=0.0, ge=0, le=1)
    clip: float | None = Field(default=None, gt=0)
    autocast: Literal["none", "bf16", "auto"] = "none"
    augment: bool = True
    """Cut out and mirror images at random."""


class ChannelSearch(Strict):
    """Neural channel expansion (arXiv 2212.10878) on the supernet of TAS (arXiv 1905.09717). Defaults are those of
    TAS's released settings where it has them."""

    weights: ImageTraining
    """How the supernet's weights are trained, on one half of the training set."""
    alpha_lr: float = Field(default=1e-3, gt=0)
    """Of Adam, on the other half. 1e-3 is meant for tens of thousands of steps; a short search needs more."""
    alpha_weight_decay: float = Field(default=1e-3, ge=0)
    shares: Annotated[tuple[Share, ...], Field(min_length=2), AfterValidator(distinct)] = (
        0.3,
        0.4,
        0.5,
        0.6,
        0.7,
        0.8,
        0.9,
        1.0,
    )
    """Options of each layer, as shares of its width in the original network."""
    temperature: tuple[Annotated[float, Field(gt=0)], Annotated[float, Field(gt=0)]] = (5.0, 0.1)
    """Of the Gumbel-softmax, first and last; a cosine between."""
    macs: Share = 1.0
    """Most multiplications, as a share of the original network's."""
    parameters: Share = 1.0
    """Most parameters, likewise."""
    tolerance: float = Field(default=0.05, ge=0, lt=1)
    """How far below these a network may be before its cost is pulled up."""
    macs_weight: float = Field(default=2.0, ge=0)
    parameters_weight: float = Field(default=2.0, ge=0)
    threshold: float | None = Field(default=0.3, gt=0, le=1)
    """A layer whose widest option is preferred by more than this gets a wider one; null: none ever does, which is TAS.
    Not in the paper's abstract: 0.3 for eight options is chosen here."""
    step: float = Field(default=0.1, gt=0, le=1)
    """By how much of the original width the new option is wider."""
    most: Share = 2.0
    """Widest option ever, as a share of the original width."""

    @model_validator(mode="after")
    def _sound(self) -> ChannelSearch:
        unused = {"accumulation": 1, "clip": None, "autocast": "none", "gradient_checkpointing": False}
        for name, value in unused.items():
            if getattr(self.weights, name) != value:
                raise ReqatError(
                    f"weights.{name} {getattr(self.weights, name)}: a search has none, its steps alternate between "
                    "weights and preferences; leave it out."
                )
        if max(self.shares) > self.most:
            raise ReqatError(f"shares up to {max(self.shares)} exceed most ({self.most}); raise it.")
        if self.temperature[1] > self.temperature[0]:
            raise ReqatError(f"temperature {list(self.temperature)}: it goes down, from the first to the last.")
        return self
