"""Mixtures of experts: one linear layer an expert in place of parameters that hold all experts.

transformers keeps the weights of a layer's experts in parameters [E, N, K] and calls them by its experts interface
(``use_experts_implementation``). :func:`fused_experts` finds modules of that interface; :meth:`FusedExperts.open` puts
an :class:`Experts` in the place of one, whose experts are ordinary linear layers that read and write the same memory.
From then on they are quantized, frozen, solved, stored and packed like every other linear layer.

An expert's gate and up stay one matrix [2I, H], as the interface has them: they read the same input, and engines give
both one global scale. What is between the matrices (gating, clamps) is the model's own.

Shapes: E experts, k experts a token, M tokens, H hidden size, I intermediate size.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from reqat.models.peft import plain_name

_FIRST, _LAST = ("gate_up_proj", "up_proj"), "down_proj"


@dataclass(frozen=True)
class FusedExperts:
    """Experts in parameters [E, N, K] (or [E, K, N]): ``getattr(parent, attribute)``, called ``name`` in the model."""

    name: str
    parent: nn.Module
    attribute: str

    @property
    def module(self) -> Any:
        """The module that holds them."""
        return getattr(self.parent, self.attribute)

    def weights(self) -> dict[str, Tensor]:
        """Name of each expert's linear layer -> its weight [N, K], a view."""
        module = self.module
        return {
            plain_name(f"{self.name}.{expert}.{matrix}"): _slice(module, getattr(module, matrix), expert)
            for expert in range(module.num_experts)
            for matrix in (_first(module), _LAST)
        }

    def open(self) -> Experts:
        """Put an :class:`Experts` in the module's place and return it."""
        opened = Experts(self.module)
        setattr(self.parent, self.attribute, opened)
        return opened


def fused_experts(module: nn.Module, prefix: str) -> list[FusedExperts]:
    """The experts in ``module`` (called ``prefix`` in the model) that follow transformers' experts interface.

    Left out are those that normalize what an expert gives, or are spread over devices.
    """
    return [
        FusedExperts(".".join(filter(None, (prefix, name, attribute))), parent, attribute)
        for name, parent in module.named_modules()
        for attribute, child in parent.named_children()
        if _follows_interface(child)
    ]


def _follows_interface(module: Any) -> bool:
    return (
        hasattr(module, "_apply_gate")
        and not getattr(module, "has_post_expert_norm", True)
        and not module._is_expert_parallel
        and all(_is_stack(module, name) for name in (_first(module), _LAST))
    )


def _is_stack(module: Any, name: str) -> bool:
    parameter = getattr(module, name, None)
    return isinstance(parameter, nn.Parameter) and parameter.ndim == 3 and len(parameter) == module.num_experts


def _first(module: Any) -> str:
    return _FIRST[0] if module.has_gate else _FIRST[1]


def _slice(module: Any, stacked: Tensor, expert: int) -> Tensor:
    part = stacked.data[expert]  # not .detach(): versions of the experts' weights are counted one by one
    return part.T if module.is_transposed else part


class Experts(nn.Module):
    """E experts of two linear layers each, ``0.gate_up_proj`` (or ``up_proj``), ``0.down_proj``, ``1...``; called like
    the module that it was made of, which it leaves without parameters.

    Its state dict has one entry an expert and matrix. It loads that of the module that it was made of, too, and
    :meth:`fuse` gives that back.
    """

    def __init__(self, source: Any) -> None:
        super().__init__()
        self.num_experts = source.num_experts
        self.transposed = source.is_transposed
        self.first = _first(source)
        for expert in range(self.num_experts):
            self.add_module(
                str(expert), nn.ModuleDict({name: _linear(source, name, expert) for name in (self.first, _LAST)})
            )
        # The model's own code between the two matrices, without their parameters.
        self.gating: Any = copy.copy(source)
        self.gating._parameters = {}
        self.train(source.training)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Sum of each token's chosen experts, weighted: x [M, H], indices [M, k] int64, weights [M, k]; [M, H]."""
        chosen_S = top_k_index.reshape(-1)
        order_S = torch.argsort(chosen_S, stable=True)
        counts = torch.bincount(chosen_S, minlength=self.num_experts).tolist()
        tokens_S = order_S // top_k_index.shape[-1]
        # One product an expert, over the tokens that chose it.
        parts = hidden_states[tokens_S].split(counts)
        outputs = [self._expert(expert, x) for expert, x in enumerate(parts) if len(x)]
        if not outputs:
            return torch.zeros_like(hidden_states)
        weighted_SH = torch.cat(outputs) * top_k_weights.reshape(-1)[order_S, None]
        back_S = torch.empty_like(order_S)
        back_S[order_S] = torch.arange(len(order_S), device=order_S.device)
        summed = weighted_SH[back_S].view(*top_k_index.shape, -1).sum(1)
        return summed.to(hidden_states.dtype)

    def _expert(self, index: int, x: Tensor) -> Tensor:
        layers: Any = getattr(self, str(index))
        hidden = layers[self.first](x)
        hidden = self.gating._apply_gate(hidden) if self.first == _FIRST[0] else self.gating.act_fn(hidden)
        out: Tensor = layers[_LAST](hidden)
        return out

    def fuse(self, state: dict[str, Tensor], prefix: str) -> None:
        """Replace the experts' entries of ``state``, where it has them, by those of the module that this was made
        of."""
        for matrix in (self.first, _LAST):
            for kind, suffix in (("weight", ""), ("bias", "_bias")):
                names = [f"{prefix}{expert}.{matrix}.{kind}" for expert in range(self.num_experts)]
                if names[0] in state:
                    parts = [state.pop(name) for name in names]
                    turned = [part.T for part in parts] if self.transposed and kind == "weight" else parts
                    state[f"{prefix}{matrix}{suffix}"] = torch.stack(turned)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for matrix in (self.first, _LAST):
            for key, kind in ((f"{prefix}{matrix}", "weight"), (f"{prefix}{matrix}_bias", "bias")):
                for expert, part in enumerate(state_dict.pop(key, ())):
                    turned = part.T if self.transposed and kind == "weight" else part
                    state_dict[f"{prefix}{expert}.{matrix}.{kind}"] = turned
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        """How many, for ``print(model)``."""
        return f"experts={self.num_experts}"


def _linear(source: Any, name: str, expert: int) -> nn.Linear:
    """One expert's layer over the memory of ``source``'s parameters."""
    stacked = getattr(source, name)
    weight = _slice(source, stacked, expert)
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=source.has_bias, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=stacked.requires_grad)
    if source.has_bias:
        bias = getattr(source, f"{name}_bias")
        linear.bias = nn.Parameter(bias.detach()[expert], requires_grad=bias.requires_grad)
    return linear


def routers(module: nn.Module) -> Iterator[nn.Parameter]:
    """Weights of what decides between the experts in ``module``, or how much of a shared one is added.

    That is the only matrix of a module beside the experts, with one row an expert, or a single row.
    """
    for parent in module.modules():
        children = dict(parent.named_children())
        counts = {_count(child) for child in children.values()} - {None}
        for child in children.values() if counts else ():
            matrices = [p for p in child.parameters() if p.ndim == 2]
            if len(matrices) == 1 and _count(child) is None and len(matrices[0]) in {1, *counts}:
                yield matrices[0]


def _count(module: Any) -> int | None:
    """The number of experts that ``module`` is, or None."""
    if isinstance(module, Experts) or _follows_interface(module):
        return int(module.num_experts)
    return len(module) if isinstance(module, nn.ModuleList) else None
