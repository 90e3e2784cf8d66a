"""NCE, neural channel expansion (arXiv 2212.10878): channels for a network whose layers all have two bits.

Each arm is a way to give a small ResNet its numbers of channels; it is then trained in full precision and, from there,
with two-bit weights (SAWB) and activations (PACT). Arms other than `original` and `widened` keep to a budget, a share
of the original's multiplications and parameters:

- `original`, and `widened`, every layer by the factor `widening`: more, for more cost;
- `uniform`: every layer by the factor that the budget allows;
- `random`: layers by factors of their own, drawn blindly and scaled to the budget;
- `tas`: searched with options up to the original widths; `nce`: searched with expansion beyond them.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from reqat.config.base import Count, Seed, Seeds, Size, distinct
from reqat.config.channels import ChannelSearch, ImageTraining
from reqat.config.companions import Companion
from reqat.config.errors import ReqatError

Arm = Literal["original", "widened", "uniform", "random", "tas", "nce"]
ARMS: tuple[Arm, ...] = ("original", "widened", "uniform", "random", "tas", "nce")
FASHION = "fashion-mnist"


class Settings(Companion):
    """Two-bit accuracy against cost, by how channels are given to layers."""

    kind: Literal["nce"] = "nce"
    data: Literal["fashion-mnist", "digits"] = "fashion-mnist"
    """`digits`: 8 x 8, of scikit-learn, for a check that everything runs."""
    halved: bool = False
    """Images of half the height and width, at a quarter of the cost."""
    train_images: Count = 12_000
    test_images: Count = 10_000
    data_seed: Seed = 0
    """Which images are taken, for all seeds of training."""
    depth: int = 8
    """Layers: 8, 14, 20, ..."""
    width: Size = 16
    """Channels of the original's first stage."""
    arms: Annotated[tuple[Arm, ...], Field(min_length=1), AfterValidator(distinct)] = ARMS
    seeds: Seeds = [42, 52, 62]
    """Of weights, order of images, search, and random widths."""
    precision: str = "SAWB2-tensor-W2+AINT2-tensor-A2"
    widening: float = Field(default=1.25, gt=1, le=8)
    search: ChannelSearch
    """It says the budget, too. `tas` is the same without a threshold."""
    full: ImageTraining
    """Training in full precision."""
    qat: ImageTraining
    """Training in two bits, from the weights of `full`."""

    @model_validator(mode="after")
    def _sound(self) -> Settings:
        if self.search.threshold is None and "nce" in self.arms:
            raise ReqatError("search.threshold is null, which is TAS: give one for arm nce, or leave nce out of arms.")
        return self

    def parts(self) -> tuple[str, ...]:
        """An arm of a seed each."""
        return tuple(f"seed{seed}-{arm}" for seed in self.seeds for arm in self.arms)

    def sources(self) -> tuple[str, ...]:
        """Fashion-MNIST, unless scikit-learn's digits do."""
        return (FASHION,) if self.data == FASHION else ()


def of_part(part: str) -> tuple[int, Arm]:
    """Seed and arm of a part's name."""
    seed, _, arm = part.removeprefix("seed").partition("-")
    return int(seed), arm  # type: ignore[return-value]
