"""Training on images: batches, the loop against one written out by hand, resumption, and bad input."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from reqat.config.channels import ImageTraining
from reqat.config.errors import ReqatError
from reqat.data.images import ImageRows, Images, digits, halved, images_of
from reqat.evaluation.classification import correct_images
from reqat.evaluation.layers import layer_errors
from reqat.formats import quantize_dequantize
from reqat.methods.pact_sawb import put_in_bits, start_ranges
from reqat.models import prepare
from reqat.models.resnet import ResNet, ResNetConfig
from reqat.training import Objective, RunSettings, TrainResult, checkpoint, distributed, loop, train
from reqat.training.distributed import Ranks


def network() -> ResNet:
    torch.manual_seed(0)
    return ResNet(ResNetConfig(8, (4,), side=8))


def trained(model: ResNet, images: Images, folder: Path, seed: int = 7, **settings: Any) -> TrainResult:
    training = ImageTraining(**settings)
    run = RunSettings.of(training, epochs=training.epochs, seed=seed, checkpoint_seconds=0)
    return train(model, ImageRows(images, training.augment), Objective(), run, folder, progress=False)


def test_a_run_is_sgd_with_nesterovs_momentum_on_cross_entropy(tmp_path: Path) -> None:
    images = digits().take(torch.arange(96))
    settings = {"epochs": 2, "rows_per_batch": 32, "lr": 0.1, "warmup": 0.5, "weight_decay": 0.01, "augment": False}
    model, twin = network(), network()
    # A ReLU's slope jumps at 0, where two sums in another order may come down on either side.
    for module in [*model.modules(), *twin.modules()]:
        if hasattr(module, "activation"):
            module.activation = nn.SiLU()
    losses = [entry["loss"] for entry in trained(model, images, tmp_path, **settings).history]
    assert sum(losses[3:]) < sum(losses[:3])
    velocity = {}
    rates = [0.1 / 3, 0.2 / 3, 0.1, 0.1, 0.05, 0.0]  # three steps up, a cosine to zero
    twin.train()
    steps = [torch.tensor(batch) for batch in ImageRows(images).batches(32, epochs=2, seed=7)]
    for rate, indices in zip(rates, steps, strict=True):
        pixels = (images.pixels[indices, None].float() - images.mean) / images.deviation
        twin.zero_grad()
        F.cross_entropy(twin(pixels).logits, images.labels[indices]).backward()
        with torch.no_grad():
            for name, p in twin.named_parameters():
                g = p.grad + 0.01 * p
                velocity[name] = g if name not in velocity else 0.9 * velocity[name] + g
                p -= rate * (g + 0.9 * velocity[name])
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)
    assert sorted(torch.cat(steps[:3]).tolist()) == list(range(96)) and steps[0].tolist() != steps[3].tolist()
    model.eval()
    expected = model(images.batch(torch.arange(96))[0]).logits.argmax(-1) == images.labels
    assert torch.equal(correct_images(model, images, rows_per_batch=40), expected)


def test_augmented_images_are_shifted_and_mirrored_ones() -> None:
    images = digits()
    x, y = images.batch(torch.arange(40), torch.Generator().manual_seed(0))
    plain = (images.pixels[:40].float() - images.mean) / images.deviation
    for image, original in zip(x[:, 0], plain, strict=True):
        padded = np.pad(original.numpy(), 2, mode="edge")
        crops = [padded[i : i + 8, j : j + 8] for i in range(5) for j in range(5)]
        assert any(np.array_equal(image.numpy(), c) or np.array_equal(image.numpy(), c[:, ::-1]) for c in crops)
    assert torch.equal(y, images.labels[:40])
    small = halved(images)
    assert torch.equal(
        small.pixels.float(), images.pixels.float().unflatten(1, (4, 2)).unflatten(3, (4, 2)).mean((2, 4)).round()
    )


def test_digits_without_scikit_learn_say_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ReqatError, match=r"digits.*pip install scikit-learn"):
        digits()


@pytest.mark.parametrize(
    ("pixels", "labels", "says"),
    [
        (np.zeros((3, 4, 4), np.uint8), np.array([0, 10, 1]), "image 1.*10"),
        (np.zeros((3, 4, 4), np.uint8), np.array([0, -1, 1]), "image 1.*-1"),
        (np.zeros((3, 4, 4), np.uint8), np.array([0, 1]), "3 images"),
        (np.zeros((3, 4, 5), np.uint8), np.zeros(3, int), r"\[3, 4, 5\]"),
        (np.zeros((3, 4, 4), np.float32), np.zeros(3, int), "float32"),
        (np.zeros((0, 4, 4), np.uint8), np.zeros(0, int), r"\[0, 4, 4\]"),
    ],
)
def test_damaged_images_are_refused(pixels: np.ndarray, labels: np.ndarray, says: str) -> None:
    with pytest.raises(ReqatError, match=f"cards.*{says}"):
        images_of(pixels, labels, 10, "cards")


def test_what_cannot_be_trained_is_named(tmp_path: Path) -> None:
    images = digits().take(torch.arange(40))
    with pytest.raises(ReqatError, match="40.*64"):
        trained(network(), images, tmp_path, epochs=1, rows_per_batch=64)
    with pytest.raises(ReqatError, match="11 classes.*10 classes"):
        trained(network(), dataclasses.replace(images, classes=11), tmp_path, epochs=1, rows_per_batch=32)
    model = network()
    with torch.no_grad():
        model.head.bias.fill_(torch.inf)
    with pytest.raises(ReqatError, match="lr=0.3"):
        trained(model, images, tmp_path, epochs=1, rows_per_batch=32, lr=0.3)
    with pytest.raises(ReqatError, match="batch norms.*2 processes"):
        distributed.check_division(Ranks(0, 2), RunSettings(accumulation=2), None, False, network())


class Killed(Exception):
    pass


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_killed_run_goes_on_to_the_same_weights_and_statistics(
    optimizer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Momentum, running means and variances of norms, and the random cuts of images are all part of a checkpoint."""
    images = digits().take(torch.arange(100))
    settings = {"epochs": 2, "rows_per_batch": 32, "optimizer": optimizer, "lr": 0.01}
    whole, resumed = network(), network()
    put_in_bits(whole)
    put_in_bits(resumed)
    trained(whole, images, tmp_path / "whole", **settings)
    save = checkpoint.save

    def killed(folder: Path, model: Any, optimizer: Any, position: Any) -> None:
        save(folder, model, optimizer, position)
        if position["result"]["steps"] == 4:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(loop.checkpoint, "save", killed)
        with pytest.raises(Killed):
            trained(resumed, images, tmp_path / "killed", **settings)
    again = network()
    put_in_bits(again)
    trained(again, images, tmp_path / "killed", **settings)
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name
    assert not torch.equal(whole.norm.running_mean, resumed.norm.running_mean)


def test_the_errors_of_a_layer_are_those_of_its_tensors() -> None:
    x = digits().batch(torch.arange(16))[0]
    model = network().eval()
    seen = {}
    model.blocks[0].conv2.register_forward_pre_hook(lambda _, args: seen.update(x=args[0]))
    model(x)
    weight = model.blocks[0].conv2.weight.detach().clone()
    prepare(model, "SAWB2-tensor-W2A16")
    found = layer_errors(model, x)["blocks.0.conv2"]
    rounded = quantize_dequantize(weight, "SAWB2-tensor")
    ratio = float((rounded - weight).square().sum() / weight.square().sum())
    exact, given = (F.conv2d(seen["x"], w, padding=1) for w in (weight, rounded))
    assert found["weight_error"] == pytest.approx(ratio, rel=1e-4) and found["input_error"] == 0
    assert found["output_error"] == pytest.approx(
        float((given - exact).square().sum() / exact.square().sum()), rel=1e-3
    )
    model = network().eval()
    put_in_bits(model)
    start_ranges(model, x)
    assert all(0 < value < 1 for errors in layer_errors(model, x).values() for value in errors.values())
