"""NCE: one arm of one seed: widths, full-precision training, two-bit training, and what rounding does to each layer."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pandas as pd

from reqat.config.companions.nce import FASHION, Settings, of_part
from reqat.config.files import write_file

if TYPE_CHECKING:
    from torch import Tensor

    from reqat.config.channels import ImageTraining
    from reqat.data.images import Images
    from reqat.methods.channels.search import Found
    from reqat.models.resnet import ResNetConfig
    from reqat.pipeline.companions import Given


def run(settings: Settings, part: str, given: Given) -> pd.DataFrame:
    """A row a layer that has a width, with the part's results (accuracies, cost) in each.

    Columns: `arm`, `seed`, `macs`, `parameters`, `full` and `two_bit` (test accuracy), `images` (tested), `layer`,
    `original` and `width` (channels), and of two-bit layers of the network trained in full precision and then rounded
    `weight_error`, `input_error`, `output_error` (squared error over the square, of weight, input and output).
    """
    import torch

    from reqat.data.images import ImageRows
    from reqat.evaluation.classification import correct_images
    from reqat.evaluation.layers import layer_errors
    from reqat.methods.pact_sawb import put_in_bits, start_ranges
    from reqat.models.resnet import ResNet, ResNetConfig, cost, layer_names
    from reqat.training import Objective, RunSettings, train

    seed, arm = of_part(part)
    images, test = _images(settings, given)
    original = ResNetConfig(settings.depth, [settings.width], num_labels=images.classes, side=images.side)
    widths, found = _widths(settings, original, arm, seed, images, given)
    config = ResNetConfig(settings.depth, widths, num_labels=images.classes, side=images.side)
    torch.manual_seed(seed)
    model = ResNet(config)

    def trained(training: ImageTraining, what: str) -> Tensor:
        """Train the model; whether it is right about each test image."""
        run = RunSettings.of(training, epochs=training.epochs, seed=seed)
        rows = ImageRows(images, training.augment)
        train(model, rows, Objective(), run, given.checkpoints / what, label=f"{part}, {what}", progress=False)
        return correct_images(model, test)

    full = trained(settings.full, "full")
    put_in_bits(model, settings.precision)
    sample = images.batch(torch.arange(min(len(images), 2 * settings.qat.rows_per_batch)))[0]
    start_ranges(model, sample)
    errors = layer_errors(model, sample)
    two_bit = trained(settings.qat, "qat")
    given.say(
        f"{part}: widths {widths}, {100 * full.float().mean():.2f}%, {100 * two_bit.float().mean():.2f}% in 2 bits"
    )
    spent = cost(config)
    shared = {
        "arm": arm,
        "seed": seed,
        "macs": spent.macs,
        "parameters": spent.parameters,
        "full": float(full.float().mean()),
        "two_bit": float(two_bit.float().mean()),
        "images": len(test),
        "expansions": sum(len(entry["grown"]) for entry in found.history) if found is not None else 0,
    }
    names = layer_names(settings.depth)
    return pd.DataFrame(
        [
            {**shared, "layer": name, "original": old, "width": new, **errors.get(name, {})}
            for name, old, new in zip(names, original.widths, widths, strict=True)
        ]
    )


def _images(settings: Settings, given: Given) -> tuple[Images, Images]:
    """Training and test images, the latter normalized as the former."""
    import torch

    from reqat.data.images import digits, halved, images_of
    from reqat.data.packaged import fashion_mnist

    def shuffled(images: Images) -> Images:
        generator = torch.Generator().manual_seed(settings.data_seed)
        return images.take(torch.randperm(len(images), generator=generator))

    if settings.data == FASHION:
        folder = given.source(FASHION)
        train, test = (
            images_of(*fashion_mnist.load(folder, split), fashion_mnist.CLASSES, f"{FASHION} ({split})")
            for split in ("train", "test")
        )
        train = shuffled(train)
    else:
        mixed = shuffled(digits())
        test, train = mixed.take(torch.arange(len(mixed) // 5)), mixed.take(torch.arange(len(mixed) // 5, len(mixed)))
    if settings.halved:
        train, test = halved(train), halved(test)
    train, test = (
        images.take(torch.arange(min(most, len(images))))
        for images, most in ((train, settings.train_images), (test, settings.test_images))
    )
    return train, test.like(train)


def _widths(
    settings: Settings, original: ResNetConfig, arm: str, seed: int, train: Images, given: Given
) -> tuple[list[int], Found | None]:
    """The widths of an arm, and what a search found on the way."""
    from reqat.methods.channels.search import search_channels
    from reqat.methods.channels.widths import budget_of, random_widths, scaled, uniform_widths
    from reqat.methods.pact_sawb import put_in_bits

    search = settings.search
    budget = budget_of(original, search.macs, search.parameters)
    if arm == "original":
        return list(original.widths), None
    if arm == "widened":
        return scaled(original.widths, settings.widening), None
    if arm == "uniform":
        return uniform_widths(original, budget), None
    if arm == "random":
        return random_widths(original, budget, seed, search.tolerance), None
    asked = search if arm == "nce" else search.model_copy(update={"threshold": None})
    found = search_channels(
        original, train, asked, lambda model: put_in_bits(model, settings.precision), seed, given.say
    )
    written = {"preferred": found.preferred, "options": found.options, "probabilities": found.probabilities}
    write_file(given.out / "search.json", json.dumps({**written, "epochs": found.history}, indent=1) + "\n")
    return found.widths, found
