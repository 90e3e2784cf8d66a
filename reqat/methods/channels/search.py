"""Neural channel expansion (arXiv 2212.10878): how many channels each layer of a two-bit network should have.

With all layers at the same few bits some lose more than others; NCE gives these more channels and takes them from
others, at a given cost. It searches as TAS does (arXiv 1905.09717). Each layer has *options*, numbers of channels, and
a preference ``alpha`` for each. A *supernet* as wide as the widest options, in the target precision, samples two
options a layer by Gumbel-softmax; the layer's output is their weighted sum, the narrower one stretched to the channels
of the wider. Weights are trained on one half of the data, preferences on the other, in alternation::

    min over alpha of   L_CE + l_macs L_macs + l_par L_par
    L_macs = log E[macs] if the preferred network has more than the budget, -log E[macs] if it has clearly less, else 0

What NCE adds is expansion: when the preference for a layer's widest option exceeds a threshold at the end of an epoch,
the layer gets a wider one. Without a threshold the search is TAS.

From the paper: objective, sampling, interpolation, expansion, both constraints. From TAS's released code: one batch
norm an option, the average pooling that stretches, that the cost of the preferred network decides the sign, two options
drawn without replacement. Inferred: the threshold and the step of an expansion, that a new option starts with the
preference of the old widest one, SAWB's range from the weights that take part, and how the preferred options are
brought to the budget at the end (:func:`reqat.methods.channels.widths.preferred`).

The alternation is no run of the training loop: a step of the weights is followed by a step of other parameters, by
another optimizer, on other data and with a loss that also has the network's cost, and what is trained grows between
epochs. Optimizer, schedule and batches are the loop's functions.

Weights of channels that no option reaches yet have felt weight decay alone, so that a new option's channels are as good
as freshly initialized.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reqat.config.channels import ChannelSearch
from reqat.config.errors import ReqatError
from reqat.data.images import ImageRows, Images
from reqat.methods.channels.widths import budget_of, check_reachable, expected_cost, preferred
from reqat.models.conv import QuantConv2d
from reqat.models.resnet import Cost, ResNet, ResNetConfig, added, cost, layer_names
from reqat.quant.gradients.pact import measuring
from reqat.training.loop import learning_rate, optimizer_of

_FIRST_SPREAD = 0.01  # of the preferences at the start, as in TAS


def options_of(width: int, shares: Sequence[float]) -> list[int]:
    """Ascending numbers of channels that are these shares of a width, rounded down as in TAS, one at least, each
    once."""
    return sorted({max(1, int(width * share + 1e-9)) for share in shares})


def select_two(logits: Tensor, temperature: float, generator: torch.Generator) -> tuple[list[int], Tensor]:
    """Two different options (one, if there is one) drawn by Gumbel-softmax from unnormalized log-probabilities [n], and
    their weights, which sum to 1 and carry the gradient."""
    gumbel = -torch.empty_like(logits).exponential_(generator=generator).clamp_(min=1e-20).log()
    noisy = (torch.log_softmax(logits, -1) + gumbel) / temperature
    drawn = torch.multinomial(torch.softmax(noisy.detach(), -1) + 1e-7, min(2, len(logits)), generator=generator)
    return drawn.tolist(), torch.softmax(noisy[drawn], -1)


def stretch(x: Tensor, channels: int) -> Tensor:
    """``x`` [B, C, H, W] as [B, channels, H, W], channels >= C: one-dimensional adaptive average pooling along
    channels, by which each new channel is an old one or the mean of two neighbours."""
    if x.shape[1] == channels:
        return x
    return F.conv2d(x, _stretching(x.shape[1], channels).to(x))


@cache
def _stretching(old: int, new: int) -> Tensor:
    out = torch.zeros(new, old, 1, 1)
    for channel in range(new):
        first, last = channel * old // new, -(-(channel + 1) * old // new)
        out[channel, first:last] = 1 / (last - first)
    return out


class Layer(nn.Module):
    """A convolution of the supernet, with a batch norm for each option. ``conv`` is as wide as any option may get."""

    def __init__(self, conv: nn.Conv2d | QuantConv2d, options: Sequence[int]) -> None:
        super().__init__()
        self.conv = conv
        self.options = list(options)
        self.norms = nn.ModuleList(nn.BatchNorm2d(width) for width in options)

    def forward(self, x: Tensor, drawn: Sequence[int], weights: Tensor) -> Tensor:
        """The normalized output of the options ``drawn``, weighted: [B, widest of them, H, W]."""
        most = max(self.options[i] for i in drawn)
        y = self._convolved(x, most)
        out: Any = 0
        for i, weight in zip(drawn, weights, strict=True):
            out = out + stretch(self.norms[i](y[:, : self.options[i]]), most) * weight
        return out  # type: ignore[no-any-return]

    def _convolved(self, x: Tensor, channels: int) -> Tensor:
        """The first output channels of the convolution of as many input channels as there are."""
        conv = self.conv
        if isinstance(conv, QuantConv2d):
            kernels = conv.as_kernels(conv.weight)[:channels, : x.shape[1]]
            return conv.with_weight(x, conv.as_rows(kernels))
        return F.conv2d(x, conv.weight[:channels, : x.shape[1]], None, conv.stride, conv.padding)


class SuperNet(nn.Module):
    """All networks that the options allow, in one.

    ``config`` is of the original network. ``quantize`` puts the supernet's network into the precision of the search
    (:func:`reqat.models.prepare` and gradient rules). ``alphas``: preferences of each layer, [options] float32, of
    which the first ``open[layer]`` take part.
    """

    def __init__(
        self, config: ResNetConfig, settings: ChannelSearch, quantize: Callable[[ResNet], object], seed: int
    ) -> None:
        super().__init__()
        self.config, self.settings = config, settings
        growth = round((settings.most - max(settings.shares)) / settings.step) if settings.threshold else 0
        wider = [max(settings.shares) + settings.step * (i + 1) for i in range(growth)]
        self.options = [options_of(width, (*settings.shares, *wider)) for width in config.widths]
        self.open = [len(options_of(width, settings.shares)) for width in config.widths]
        widest = ResNetConfig(
            config.depth,
            [widths[-1] for widths in self.options],
            num_labels=config.classes,
            num_channels=config.num_channels,
            side=config.side,
        )
        torch.manual_seed(seed)
        net = ResNet(widest)
        quantize(net)
        self.head = net.head
        blocks: list[Any] = list(net.blocks)
        convs = [net.stem, *(conv for block in blocks for conv in (block.conv1, block.conv2))]
        self.layers = nn.ModuleList(Layer(c, widths) for c, widths in zip(convs, self.options, strict=True))
        self.shortcuts = nn.ModuleList(
            Layer(block.shortcut, self.options[2 * i + 2]) if block.shortcut is not None else nn.Identity()
            for i, block in enumerate(blocks)
        )
        self.alphas = [(torch.randn(len(widths)) * _FIRST_SPREAD).requires_grad_() for widths in self.options]
        self.generator = torch.Generator().manual_seed(seed)

    def forward(self, images: Tensor, temperature: float) -> Tensor:
        """Logits [B, classes] of a network sampled anew."""
        drawn = [
            select_two(alpha[:n], temperature, self.generator) for alpha, n in zip(self.alphas, self.open, strict=True)
        ]
        x = torch.relu(self.layers[0](images.contiguous(memory_format=torch.channels_last), *drawn[0]))
        for i, shortcut in enumerate(self.shortcuts):
            first, second = 2 * i + 1, 2 * i + 2
            y = torch.relu(self.layers[first](x, *drawn[first]))
            y = self.layers[second](y, *drawn[second])
            residual = shortcut(x, *drawn[second]) if isinstance(shortcut, Layer) else x
            x = torch.relu(added(residual, y))
        features = x.mean((2, 3))
        return F.linear(features, self.head.weight[:, : features.shape[1]], self.head.bias)

    def probabilities(self) -> list[Tensor]:
        """Of the open options of each layer."""
        return [torch.softmax(alpha[:n], -1) for alpha, n in zip(self.alphas, self.open, strict=True)]

    def open_options(self) -> list[list[int]]:
        """Numbers of channels that each layer may choose now."""
        return [widths[:n] for widths, n in zip(self.options, self.open, strict=True)]

    def expected(self) -> Cost:
        """Mean cost of the networks by the probabilities; differentiable by the preferences."""
        options = [torch.tensor(widths, dtype=torch.float32) for widths in self.open_options()]
        return expected_cost(self.config, options, self.probabilities())

    def widths(self) -> list[int]:
        """The preferred option of each layer."""
        return [widths[int(p.argmax())] for widths, p in zip(self.options, self.probabilities(), strict=True)]

    @torch.no_grad()
    def expand(self, threshold: float) -> list[int]:
        """Give the layers whose widest open option is preferred by more than ``threshold`` a wider one; their
        indices."""
        grown = []
        for layer, p in enumerate(self.probabilities()):
            n = self.open[layer]
            if float(p[-1]) > threshold and n < len(self.options[layer]):
                self.alphas[layer][n] = self.alphas[layer][n - 1]
                self.open[layer] = n + 1
                grown.append(layer)
        return grown

    def weights(self) -> list[nn.Parameter]:
        """What is trained beside the preferences."""
        return [p for p in self.parameters() if p.requires_grad]


def cost_loss(net: SuperNet, budget: Cost) -> Tensor:
    """``l_macs L_macs + l_par L_par`` of the docstring above, differentiable by the preferences."""
    settings, now, mean = net.settings, cost(net.config, net.widths()), net.expected()
    out = torch.zeros(())
    for weight, own, expected, allowed in (
        (settings.macs_weight, now.macs, mean.macs, budget.macs),
        (settings.parameters_weight, now.parameters, mean.parameters, budget.parameters),
    ):
        if own > allowed:
            out = out + weight * torch.log(expected)
        elif own < (1 - settings.tolerance) * allowed:
            out = out - weight * torch.log(expected)
    return out


@dataclass
class Found:
    """What a search found: ``widths`` of each layer, within the budget; ``preferred`` before that was seen to; and of
    each epoch losses, expected and preferred cost, and the layers that grew."""

    widths: list[int]
    preferred: list[int]
    options: list[list[int]]
    probabilities: list[list[float]]
    history: list[dict[str, Any]] = field(default_factory=list)


def search_channels(
    config: ResNetConfig,
    images: Images,
    settings: ChannelSearch,
    quantize: Callable[[ResNet], object],
    seed: int,
    say: Callable[[str], object] = lambda _: None,
) -> Found:
    """Search the widths of the network ``config`` on ``images``.

    ``quantize(model)`` prepares the supernet's network and sets its gradient rules. Raises ReqatError if no option
    meets the budget, if there are too few images for a batch of each half, or if a loss is not finite.
    """
    budget = budget_of(config, settings.macs, settings.parameters)
    net = SuperNet(config, settings, quantize, seed)
    check_reachable(config, [widths[0] for widths in net.options], budget)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    halves = [images.take(half) for half in order[: len(order) // 2 * 2].chunk(2)]
    train = settings.weights
    size = train.rows_per_batch
    if len(halves[0]) < size:
        raise ReqatError(
            f"{len(images)} images are too few for two halves of a batch of {size}; lower weights.rows_per_batch."
        )
    optimizer = optimizer_of(net, net.weights(), train)
    adam = torch.optim.Adam(net.alphas, lr=settings.alpha_lr, weight_decay=settings.alpha_weight_decay)
    each = len(halves[0]) // size
    steps, history = train.epochs * each, []
    net.train()
    augment = net.generator if train.augment else None
    with measuring(net), torch.no_grad():
        net(halves[0].batch(torch.arange(size))[0], settings.temperature[0])
    orders = [ImageRows(half).batches(size, train.epochs, seed) for half in halves]
    for epoch in range(train.epochs):
        temperature = _between(*settings.temperature, epoch / max(1, train.epochs))
        sums = {"loss": 0.0, "alpha_loss": 0.0}
        for step in range(epoch * each, (epoch + 1) * each):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, steps, train)
            x, y = halves[0].batch(torch.tensor(next(orders[0])), augment)
            loss = F.cross_entropy(net(x, temperature), y)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()

            x, y = halves[1].batch(torch.tensor(next(orders[1])), augment)
            alpha_loss = F.cross_entropy(net(x, temperature), y)
            gradients = torch.autograd.grad(alpha_loss + cost_loss(net, budget), net.alphas)
            for alpha, gradient in zip(net.alphas, gradients, strict=True):
                alpha.grad = gradient
            adam.step()
            sums["loss"] += loss.item() / each
            sums["alpha_loss"] += alpha_loss.item() / each
        if not math.isfinite(sum(sums.values())):
            raise ReqatError(f"channel search: the loss is not finite in epoch {epoch + 1}; lower lr={train.lr}.")
        history.append(_noted(net, epoch, sums))
        if settings.threshold is not None and epoch + 1 < train.epochs:
            history[-1]["grown"] = net.expand(settings.threshold)
        say(
            f"search: epoch {epoch + 1} of {train.epochs}, losses {sums['loss']:.3f} and {sums['alpha_loss']:.3f}, "
            f"widths {net.widths()}"
        )
    probabilities = [p.detach() for p in net.probabilities()]
    log_p = [p.log().double().numpy() for p in probabilities]
    chosen = preferred(config, net.open_options(), log_p, budget, settings.tolerance)
    return Found(chosen, net.widths(), net.open_options(), [p.tolist() for p in probabilities], history)


def _noted(net: SuperNet, epoch: int, sums: dict[str, float]) -> dict[str, Any]:
    now, mean = cost(net.config, net.widths()), net.expected()
    return {
        "epoch": epoch + 1,
        **sums,
        "expected_macs": float(mean.macs.detach()),
        "expected_parameters": float(mean.parameters.detach()),
        "macs": now.macs,
        "parameters": now.parameters,
        "grown": [],
    }


def grown_layers(found: Found, config: ResNetConfig) -> list[str]:
    """Names of the layers that are wider than in ``config``."""
    names = layer_names(config.depth)
    return [name for name, new, old in zip(names, found.widths, config.widths, strict=True) if new > old]


def _between(first: float, last: float, share: float) -> float:
    """A cosine from first to last."""
    return last + (first - last) * (1 + math.cos(math.pi * share)) / 2
