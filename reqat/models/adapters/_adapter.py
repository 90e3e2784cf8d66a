"""The protocol of a model adapter, and what one hands out: blocks, their linear layers, and who reads what.

An adapter answers "is this model yours?" with the model's blocks, or with what is missing. A :class:`Block` says the
rest: its sites (linear layers), which sites read the same tensor, its attention, its nonlinearities and its experts.
``prepare``, checkpoints, freezing, post-training methods, Q-FIT and packing use blocks only, so a model whose sites are
``nn.Linear`` needs an adapter and nothing else.

Nothing here is about transformers' decoders: the adapter for convolutional networks makes sites of its ``nn.Conv2d``
layers, whose :attr:`Site.twin` convolves, and its blocks have no attention.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.activations import ACT2CLS

from reqat.config.errors import ReqatError
from reqat.models.experts import Experts, FusedExperts, fused_experts, routers
from reqat.models.linear import InputQuantizer, QuantLinear
from reqat.models.peft import peft_modules, plain_name

_ACTIVATIONS: Any = tuple({entry[0] if isinstance(entry, tuple) else entry for entry in ACT2CLS.values()})

#: Why :meth:`Block.kept` keeps what PEFT put beside layers; it is no weight of the model.
PEFT_ADDED = "adapters are never quantized"
# Attributes of the linear layers of a gated decoder that methods treat in a way of their own.
QUERY, KEY, VALUE, OUT, DOWN = "q_proj", "k_proj", "v_proj", "o_proj", "down_proj"


class UnsupportedModelError(ReqatError):
    """No adapter knows the model, or its layers are of a kind that this package does not quantize."""


@dataclass(frozen=True)
class HeadShape:
    """Attention geometry: query heads, key/value heads, channels of a head."""

    query_heads: int
    kv_heads: int
    head_dim: int


@dataclass(frozen=True)
class Attention:
    """The self-attention of a block, ``module``, called ``name`` in the model.

    ``projections`` are the attributes of ``module`` that make queries, keys and values; ``norms`` those that normalize
    queries and keys, if it has them. ``cached``: keys and values are kept for later tokens, so they can be quantized as
    a cache; else they live within one call. ``output``: the module that gives the output of the whole self-attention
    block after the residual and its norm, where the architecture has one (BERT).
    """

    name: str
    module: Any
    heads: HeadShape
    projections: tuple[str, str, str]
    norms: tuple[str, str] | None = None
    cached: bool = False
    output: nn.Module | None = None

    @property
    def query(self) -> Any:
        """The layer that makes queries, as it is now."""
        return getattr(self.module, self.projections[0])

    @property
    def key(self) -> Any:
        """The layer that makes keys, as it is now."""
        return getattr(self.module, self.projections[1])

    @property
    def value(self) -> Any:
        """The layer that makes values, as it is now."""
        return getattr(self.module, self.projections[2])

    @property
    def query_norm(self) -> Any:
        """The norm of queries, or None."""
        return None if self.norms is None else getattr(self.module, self.norms[0])

    @property
    def key_norm(self) -> Any:
        """The norm of keys, or None."""
        return None if self.norms is None else getattr(self.module, self.norms[1])

    @property
    def scaling(self) -> float:
        """Factor of the logits: the module's own, or 1/sqrt(head_dim)."""
        scaling = getattr(self.module, "scaling", None)
        return float(scaling) if scaling is not None else self.heads.head_dim**-0.5


@dataclass(frozen=True)
class Site:
    """Where a linear layer sits: ``getattr(parent, attribute)``, called ``name`` in the model.

    ``twin(layer, precision, input_quantizer, name)`` makes the quantized layer that takes its place, and
    ``reader(precision, consumers, size, name)`` the quantizer of its input.
    """

    name: str
    parent: nn.Module
    attribute: str
    twin: Callable[..., QuantLinear] = QuantLinear
    reader: Callable[..., InputQuantizer] = InputQuantizer

    @property
    def plain_name(self) -> str:
        """Its name without what PEFT adds to it, which is its name in a checkpoint."""
        return plain_name(self.name)

    @property
    def names(self) -> tuple[str, ...]:
        """The names that a pattern may match."""
        return tuple(dict.fromkeys((self.name, self.plain_name)))

    @property
    def module(self) -> nn.Linear:
        """The layer that sits there now."""
        layer = getattr(self.parent, self.attribute)
        assert isinstance(layer, nn.Linear)
        return layer

    @property
    def size(self) -> int:
        """Channels of its input, along which blocks run."""
        return self.module.in_features

    @property
    def weight(self) -> Tensor:
        """Its weight [N, K]."""
        return self.module.weight


@dataclass(frozen=True)
class Group:
    """Sites that read the same tensor, so that it is quantized once.

    Groups of equal ``scale`` share one input quantizer, whose static global scale covers the inputs of all.
    ``maker``: the input is, channel by channel, proportional to the output of this site (the values for the output
    projection, ``up`` for ``down`` of a gated MLP), so a factor moves from one to the other; None where it is not so.
    """

    sites: tuple[Site, ...]
    scale: str
    maker: Site | None = None


@dataclass(frozen=True)
class Nonlinearity:
    """``kind``: ``activation``, ``norm`` or ``softmax`` (of attention: ``module`` is the attention); name in the
    model."""

    name: str
    kind: str
    module: nn.Module


@dataclass(frozen=True)
class Block:
    """One of a model's parts that run one after the other: ``module``, called ``name`` in the model.

    ``same_input``: names of layers beside each other that read the same tensor. ``makers``: (reader, maker, needed),
    names beside each other as of :attr:`Group.maker`, valid where a layer called ``needed`` stands there as well.
    """

    index: int
    name: str
    module: nn.Module
    attention: Attention | None = None
    same_input: tuple[tuple[str, ...], ...] = ()
    makers: tuple[tuple[str, str, str], ...] = ()

    def sites(self) -> list[Site]:
        """Its linear layers in the order of the module tree; what PEFT added and routers of experts are left out."""
        beside, gates = peft_modules(self.module), {id(weight) for weight in routers(self.module)}
        return [
            Site(".".join(filter(None, (self.name, name, attribute))), parent, attribute)
            for name, parent in self.module.named_modules()
            for attribute, child in parent.named_children()
            if isinstance(child, nn.Linear) and child not in beside and id(child.weight) not in gates
        ]

    def groups(self) -> list[Group]:
        """Its sites, those that read the same tensor together, in the order of the module tree."""
        found: dict[tuple[str, str], list[Site]] = {}
        for site in self.sites():
            parent, _, attribute = site.plain_name.rpartition(".")
            shared = next((names[0] for names in self.same_input if attribute in names), attribute)
            found.setdefault((parent, shared), []).append(site)
        sites = {site.plain_name: site for group in found.values() for site in group}
        makers = {
            f"{parent}.{reader}": sites.get(f"{parent}.{maker}")
            for parent, _ in found
            for reader, maker, needed in self.makers
            if f"{parent}.{needed}" in sites
        }
        # Any expert may read any token, so one scale covers what all of them read.
        pools = {f"{self.name}.{name}" for name, m in self.module.named_modules() if isinstance(m, Experts)}
        return [
            Group(tuple(group), f"{_pool(parent, pools)}.{shared}", makers.get(f"{parent}.{shared}"))
            for (parent, shared), group in found.items()
        ]

    def fused(self) -> list[FusedExperts]:
        """Its experts that are parameters of one module still; ``open()`` makes sites of them."""
        return fused_experts(self.module, self.name)

    def weights(self) -> dict[str, Tensor]:
        """Weight [N, K] of each of its sites, and of those that :meth:`fused` experts will be, by plain name."""
        found = {site.plain_name: site.weight for site in self.sites()}
        for experts in self.fused():
            found |= experts.weights()
        return found

    def kept(self) -> dict[int, str]:
        """id of a parameter -> why it is never quantized."""
        beside = {id(p) for m in peft_modules(self.module) for p in m.parameters(recurse=False)}
        gates = {id(weight) for weight in routers(self.module)}
        return dict.fromkeys(beside, PEFT_ADDED) | dict.fromkeys(
            gates, "routers are never quantized: a rounding that chose other experts would change all that follows"
        )

    def nonlinearities(self) -> list[Nonlinearity]:
        """Its activations, norms and the softmax of its attention, in the order of the module tree."""
        attention = None if self.attention is None else self.attention.module
        return nonlinearities_in(self.module, self.name, attention)


def nonlinearities_in(
    root: nn.Module, prefix: str = "", attention: nn.Module | None = None, beside: Collection[nn.Module] = ()
) -> list[Nonlinearity]:
    """Activations, norms and the softmax of ``attention`` in a module called ``prefix`` in the model, in the order of
    the module tree; what lies in modules of ``beside`` is left out."""
    left_out = {id(inner) for module in beside for inner in module.modules()}
    found = []
    for name, module in root.named_modules():
        where = ".".join(filter(None, (prefix, name)))
        weight = getattr(module, "weight", None)
        vector = isinstance(weight, nn.Parameter) and (weight.ndim == 1 or where.endswith("norm"))
        if id(module) in left_out:
            continue
        if attention is not None and module is attention:
            found.append(Nonlinearity(where, "softmax", attention))
        elif isinstance(module, _ACTIVATIONS):
            found.append(Nonlinearity(where, "activation", module))
        elif vector and not list(module.children()):
            found.append(Nonlinearity(where, "norm", module))
    return found


def _pool(parent: str, pools: set[str]) -> str:
    """``...experts`` for ``...experts.3``."""
    above = parent.rpartition(".")[0]
    return above if above in pools else parent


class ModelAdapter(Protocol):
    """What knows a family of models. One file of this package defines ``ADAPTER``, an instance."""

    #: What its models are: ``decoder``.
    kind: str

    def blocks(self, model: PreTrainedModel) -> list[Block]:
        """The blocks of ``model``, in order. Raises UnsupportedModelError, saying what is missing, for a model that
        is not of its family: :func:`~reqat.models.adapters.adapter_of` then asks the next adapter."""

    def body(self, model: PreTrainedModel) -> nn.Module:
        """The module that, called with ``input_ids`` [B, T], embeds them and runs the blocks."""

    def head(self, model: PreTrainedModel) -> Callable[[Tensor], Tensor]:
        """What makes logits [N, classes] of the body's last hidden states [N, D]. Raises UnsupportedModelError where
        the model has no head of a kind that the adapter knows."""

    def outside(self, model: PreTrainedModel) -> list[Site]:
        """Linear layers outside the blocks that a precision quantizes as well."""

    def gated(self, model: PreTrainedModel) -> GatedDecoder | None:
        """The parts of a decoder that a fused kernel may take over, or None where it is none, or has other parts."""


@dataclass(frozen=True)
class GatedBlock:
    """The parts of a block that is a norm, attention, a norm and a gated MLP, and nothing else.

    ``linears``: q, k, v, o, gate, up, down. ``norms``: before attention, before the MLP, of queries, of keys (both None
    without QK norm).
    """

    name: str
    attention: Attention
    linears: list[Any]
    norms: list[Any]
    activation: Any


@dataclass(frozen=True)
class GatedDecoder:
    """A decoder (``module``) that embeds tokens, runs ``blocks`` and norms, with rotary embeddings, and nothing else.

    ``first_block_alone()``: within the block it has its first one only.
    """

    module: Any
    rotary: Any
    norm: Any
    blocks: list[GatedBlock]
    first_block_alone: Callable[[], AbstractContextManager[None]]


def head_shape(config: Any) -> HeadShape:
    """Heads and head_dim, from a configuration."""
    query_heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or query_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // query_heads
    return HeadShape(query_heads, kv_heads, head_dim)
