"""Convolutional networks of transformers' kind, ours (:mod:`reqat.models.resnet`) and transformers' own ResNet.

Blocks are the elements of the model's lists of modules that hold convolutions (stages, or residual blocks); the
convolution before them and the classifier behind them are outside, and stay as they are. Sites are convolutions without
groups and linear layers; there is no attention.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from torch import Tensor, nn
from transformers import PreTrainedModel

from reqat.models.adapters._adapter import Block, Site, UnsupportedModelError
from reqat.models.conv import ChannelQuantizer, QuantConv2d, rows_of

#: Names of layers beside each other that read the input of a residual block.
_SAME_INPUT = (("conv1", "shortcut"),)


@dataclass(frozen=True)
class ConvSite(Site):
    """Where a convolution sits."""

    @property
    def module(self) -> nn.Conv2d | QuantConv2d:  # type: ignore[override]
        """The layer that sits there now."""
        layer = getattr(self.parent, self.attribute)
        assert isinstance(layer, nn.Conv2d | QuantConv2d)
        return layer

    @property
    def size(self) -> int:
        """Channels of its input."""
        layer = self.module
        if isinstance(layer, nn.Conv2d):
            return layer.in_channels
        return layer.in_features // (layer.kernel[0] * layer.kernel[1])

    @property
    def weight(self) -> Tensor:
        """Its weight as a matrix [N, kh kw C]."""
        weight = self.module.weight
        return weight if weight.ndim == 2 else rows_of(weight)


@dataclass(frozen=True)
class ConvBlock(Block):
    """A block of convolutions."""

    def sites(self) -> list[Site]:
        """Its convolutions and linear layers in the order of the module tree."""
        found: list[Site] = []
        for name, parent in self.module.named_modules():
            for attribute, child in parent.named_children():
                where = ".".join(filter(None, (self.name, name, attribute)))
                if isinstance(child, nn.Conv2d | QuantConv2d):
                    found.append(ConvSite(where, parent, attribute, QuantConv2d, ChannelQuantizer))
                elif isinstance(child, nn.Linear):
                    found.append(Site(where, parent, attribute))
        return found


@dataclass(frozen=True)
class CNNAdapter:
    """Adapter of convolutional networks."""

    kind: str = "cnn"

    def blocks(self, model: PreTrainedModel) -> list[Block]:
        """Its residual blocks or stages; see the protocol."""
        if getattr(model.config, "num_attention_heads", None) is not None:
            raise UnsupportedModelError("it has attention")
        found = [
            ConvBlock(index, name, module, same_input=_SAME_INPUT)
            for index, (name, module) in enumerate(_elements(model, ""))
        ]
        if not found:
            raise UnsupportedModelError("it has no list of modules that hold convolutions (nn.Conv2d)")
        for block in found:
            for name, module in block.module.named_modules():
                if isinstance(module, nn.Conv2d) and (module.groups > 1 or module.padding_mode != "zeros"):
                    raise UnsupportedModelError(
                        f"{block.name}.{name} is a convolution with {module.groups} groups and padding "
                        f"{module.padding_mode!r}, where one group and zeros are needed"
                    )
        return list(found)

    def body(self, model: PreTrainedModel) -> nn.Module:
        """The model."""
        return model

    def head(self, model: PreTrainedModel) -> Callable[[Tensor], Tensor]:
        """The classifier of the features that the mean over pixels leaves."""
        head = getattr(model, "head", None) or getattr(model, "classifier", None)
        if not isinstance(head, nn.Module):
            raise UnsupportedModelError(f"{type(model).__name__} has no classifier")
        return head

    def outside(self, model: PreTrainedModel) -> list[Site]:
        """None: first and last layer stay as they are."""
        return []

    def gated(self, model: PreTrainedModel) -> None:
        """A convolutional network is no decoder."""


def _elements(module: nn.Module, prefix: str) -> Iterator[tuple[str, nn.Module]]:
    """Name and module of the elements of the outermost lists that hold convolutions; a list within a list is opened."""
    for name, child in module.named_children():
        where = f"{prefix}.{name}" if prefix else name
        if not any(isinstance(inner, nn.Conv2d | QuantConv2d) for inner in child.modules()):
            continue
        if isinstance(module, nn.ModuleList | nn.Sequential) and not isinstance(child, nn.ModuleList | nn.Sequential):
            yield where, child
        else:
            yield from _elements(child, where)


ADAPTER = CNNAdapter()
