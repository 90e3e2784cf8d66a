"""Residual networks of the CIFAR kind (arXiv 1512.03385, section 4.2) whose layers each have a width of their own.

A 3 x 3 convolution (the stem), three stages of n residual blocks, each half as high and wide and twice as deep in
channels as the stage before, the mean over pixels, and a linear classifier: 6n + 2 layers. ResNet-20 has n = 3,
ResNet-8 n = 1. A block is ``relu(norm2(conv2(relu(norm1(conv1(x))))) + shortcut(x))``.

``widths`` lists the output channels of the stem and of conv1 and conv2 of every block, so that a search may choose
each. Where a block halves the resolution its shortcut is a 1 x 1 convolution with a norm; elsewhere it is the identity,
and two tensors of a and b channels are added where both have one: the sum has max(a, b) channels, as in TAS (arXiv
1905.09717), whose parameter-free rule leaves every width free. With the usual widths that is the plain residual.

Costs follow from :func:`products`: each convolution multiplies kernel, output pixels, input and output channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import ImageClassifierOutputWithNoAttention

from reqat.config.errors import ReqatError

STAGES = 3
ONEDNN_CHANNELS = 8
"""Input channels of a shortcut from which on oneDNN's AVX2 code is known to compute it."""


class ResNetConfig(PreTrainedConfig):
    """Of a :class:`ResNet`. ``depth``: 6n + 2. ``widths``: 1 + 6n channel counts, or one for the usual ones (w, 2w, 4w
    by stage). ``side``: height and width of the images. Raises ReqatError for a depth or a list that is of no such
    network."""

    model_type = "reqat_resnet"

    def __init__(
        self,
        depth: int = 8,
        widths: Sequence[int] = (16,),
        num_labels: int = 10,
        num_channels: int = 1,
        side: int = 28,
        **kwargs: Any,
    ) -> None:
        if depth < 8 or (depth - 2) % (2 * STAGES):
            raise ReqatError(f"depth {depth}: a network of this kind has 6n + 2 layers: 8, 14, 20, 26, 32, ...")
        self.depth, self.num_channels, self.side = depth, num_channels, side
        widths = list(widths)
        self.widths = usual_widths(depth, widths[0]) if len(widths) == 1 else widths
        if len(self.widths) != depth - 1 or min(self.widths) < 1:
            raise ReqatError(
                f"widths {self.widths}: a ResNet-{depth} has {depth - 1} of them, each one channel or more"
            )
        self.classes = num_labels
        super().__init__(**{"num_labels": num_labels, **kwargs})


def usual_widths(depth: int, width: int) -> list[int]:
    """Of a network whose first stage is ``width`` wide."""
    blocks = (depth - 2) // (2 * STAGES)
    return [width] + [width * 2**stage for stage in range(STAGES) for _ in range(2 * blocks)]


def layer_names(depth: int) -> list[str]:
    """Names of the layers that ``widths`` are of, in order."""
    blocks = (depth - 2) // 2
    return ["stem"] + [f"blocks.{index}.{name}" for index in range(blocks) for name in ("conv1", "conv2")]


def _leave_out_onednn() -> None:
    """On a CPU without AVX-512, let PyTorch compute by itself in this process from now on.

    There the backward pass of a 1 x 1 convolution of stride 2 with few channels crashes in oneDNN 3.12 (PyTorch 2.13),
    which damages memory ("corrupted double-linked list"; AMD Zen 3: with 3 and 4 input channels, not with 8 and more).
    A block around the model's call would not do: the backward pass asks for the flag again.
    """
    if torch.backends.cpu.get_cpu_capability() == "AVX2":
        torch.backends.mkldnn.set_flags(False)


class ResidualBlock(nn.Module):
    """Two 3 x 3 convolutions and what they are added to."""

    def __init__(self, channels: int, inner: int, outer: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, inner, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(inner)
        self.conv2 = nn.Conv2d(inner, outer, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(outer)
        self.activation = nn.ReLU()
        self.shortcut = nn.Conv2d(channels, outer, 1, stride, bias=False) if stride > 1 else None
        self.shortcut_norm = nn.BatchNorm2d(outer) if stride > 1 else None
        if self.shortcut is not None and channels < ONEDNN_CHANNELS:
            _leave_out_onednn()

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] to [B, max(C, outer), H, W], or, with a stride of 2, [B, outer, H / 2, W / 2]."""
        y = self.norm2(self.conv2(self.activation(self.norm1(self.conv1(x)))))
        if self.shortcut is not None and self.shortcut_norm is not None:
            x = self.shortcut_norm(self.shortcut(x))
        return self.activation(added(x, y))


class ResNet(PreTrainedModel):
    """A classifier of images [B, C, side, side], float32; ``model(images).logits`` is [B, num_labels]."""

    config_class = ResNetConfig
    config: ResNetConfig
    base_model_prefix = ""
    main_input_name = "pixel_values"

    def __init__(self, config: ResNetConfig) -> None:
        super().__init__(config)
        widths = config.widths
        self.stem = nn.Conv2d(config.num_channels, widths[0], 3, 1, 1, bias=False)
        self.norm = nn.BatchNorm2d(widths[0])
        self.activation = nn.ReLU()
        channels, blocks = widths[0], []
        for index, (inner, outer) in enumerate(_pairs(widths)):
            stride = _stride(config.depth, index)
            blocks.append(ResidualBlock(channels, inner, outer, stride))
            channels = outer if stride > 1 else max(channels, outer)
        self.blocks = nn.ModuleList(blocks)
        self.head = nn.Linear(channels, config.classes)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, 0, module.in_features**-0.5)
            nn.init.zeros_(module.bias)

    def features(self, pixel_values: Tensor) -> Tensor:
        """What the classifier sees, [B, channels of the last block]: means over pixels."""
        # Channels last in memory is what the quantizers along channels want, and no slower elsewhere.
        x = pixel_values.contiguous(memory_format=torch.channels_last)
        x = self.activation(self.norm(self.stem(x)))
        for block in self.blocks:
            x = block(x)
        return x.mean((2, 3))

    def forward(self, pixel_values: Tensor, **_: Any) -> ImageClassifierOutputWithNoAttention:
        """Logits."""
        return ImageClassifierOutputWithNoAttention(logits=self.head(self.features(pixel_values)))


def added(x: Tensor, y: Tensor) -> Tensor:
    """The sum of two tensors [B, a, H, W] and [B, b, H, W] over the channels that both have, max(a, b) of them."""
    missing = y.shape[1] - x.shape[1]
    if missing > 0:
        return F.pad(x, (0, 0, 0, 0, 0, missing)) + y
    return x + (F.pad(y, (0, 0, 0, 0, 0, -missing)) if missing else y)


# What it costs.


@dataclass(frozen=True)
class Product:
    """A convolution or linear layer, by what its cost is made of.

    ``inputs``, ``outputs``: layers (indices into ``widths``) whose channels it reads and writes; of several, as many as
    the widest has. A number of channels that no width decides stands in ``fixed`` (inputs, outputs), else 1.
    ``kernel``: weights for each pair of channels; ``pixels``: of its output. ``vectors``: numbers for each output
    channel (two of a norm, a bias).
    """

    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    kernel: int
    pixels: int
    vectors: int
    fixed: tuple[int, int] = (1, 1)


def products(config: ResNetConfig) -> list[Product]:
    """The convolutions and the classifier of a network, in order; they depend on everything but its widths."""
    side = config.side
    found = [Product((), (0,), 9, side**2, 2, (config.num_channels, 1))]
    stream: tuple[int, ...] = (0,)
    for index in range((config.depth - 2) // 2):
        first, second = 2 * index + 1, 2 * index + 2
        stride = _stride(config.depth, index)
        side = -(-side // stride)
        found.append(Product(stream, (first,), 9, side**2, 2))
        found.append(Product((first,), (second,), 9, side**2, 2))
        if stride > 1:
            found.append(Product(stream, (second,), 1, side**2, 2))
            stream = (second,)
        else:
            stream = (*stream, second)
    found.append(Product(stream, (), 1, 1, 1, (1, config.classes)))
    return found


@dataclass(frozen=True)
class Cost:
    """``macs``: multiplications of convolutions and classifier for one image; ``parameters``: all that is trained,
    norms included. Floats where they are expectations."""

    macs: Any
    parameters: Any


def cost(config: ResNetConfig, widths: Sequence[int] | None = None) -> Cost:
    """What a network with these widths (default: its own) costs."""
    own = config.widths if widths is None else widths
    return total(products(config), lambda layers: max(own[layer] for layer in layers))


def total(parts: Sequence[Product], channels: Any) -> Cost:
    """The cost of products, with ``channels(layers)`` of the widest of several layers."""
    macs: Any = 0
    parameters: Any = 0
    for part in parts:
        read = channels(part.inputs) if part.inputs else part.fixed[0]
        written = channels(part.outputs) if part.outputs else part.fixed[1]
        pairs = part.kernel * read * written
        macs, parameters = macs + part.pixels * pairs, parameters + pairs + part.vectors * written
    return Cost(macs, parameters)


def _pairs(widths: Sequence[int]) -> list[tuple[int, int]]:
    """Widths of conv1 and conv2 of each block."""
    return list(pairwise(widths[1:]))[::2]


def _stride(depth: int, block: int) -> int:
    """2 where a stage begins, but for the first."""
    each = (depth - 2) // (2 * STAGES)
    return 2 if block and block % each == 0 else 1
