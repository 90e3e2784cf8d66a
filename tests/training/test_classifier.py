"""Classifiers of images: batches, the loop against one written out by hand, and bad input."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from reqat.config.channels import ImageTraining
from reqat.config.errors import ReqatError
from reqat.data.images import digits, halved, images_of
from reqat.evaluation.layers import layer_errors
from reqat.formats import quantize_dequantize
from reqat.methods.pact_sawb import put_in_bits, start_ranges
from reqat.models import prepare
from reqat.models.resnet import ResNet, ResNetConfig
from reqat.training.classifier import correct, epoch_batches, train_classifier


def network() -> ResNet:
    torch.manual_seed(0)
    return ResNet(ResNetConfig(8, (4,), side=8))


def test_a_run_is_sgd_with_nesterovs_momentum_on_cross_entropy() -> None:
    images = digits().take(torch.arange(96))
    settings = ImageTraining(epochs=2, batch=32, lr=0.1, warmup=0.5, weight_decay=0.01, augment=False)
    model, twin = network(), network()
    losses = train_classifier(model, images, settings, seed=7)
    assert losses[1] < losses[0]
    velocity = {}
    rates = [0.1 / 3, 0.2 / 3, 0.1, 0.1, 0.05, 0.0]  # three steps up, a cosine to zero
    twin.train()
    steps = [batch for epoch in (0, 1) for batch in epoch_batches(torch.arange(96), 32, 7, epoch)]
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
    assert torch.equal(correct(model, images), expected)


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


def test_too_few_images_and_a_diverging_run_are_named() -> None:
    images = digits().take(torch.arange(40))
    with pytest.raises(ReqatError, match="40.*64"):
        train_classifier(network(), images, ImageTraining(epochs=1, batch=64), seed=0)
    model = network()
    with torch.no_grad():
        model.head.bias.fill_(torch.inf)
    with pytest.raises(ReqatError, match="not finite.*lr=0.3"):
        train_classifier(model, images, ImageTraining(epochs=1, batch=32, lr=0.3), seed=0)


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
