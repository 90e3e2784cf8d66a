"""Put another gradient rule into the quantizers of a prepared model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from reqat.config.errors import ReqatError, unknown
from reqat.config.precision import ROLES
from reqat.models.embedding import QuantEmbedding
from reqat.models.kv import KVQuantizer
from reqat.models.linear import QuantLinear
from reqat.quant import RULES, GradientRule, Quantizer


def set_gradient(model: nn.Module, rule: str, *, roles: Sequence[str] = ROLES, **settings: Any) -> int:
    """Let gradients pass through the rounding of ``roles`` (weights, inputs, keys, ...) by ``rule`` from now on.

    Args:
        model: prepared, not frozen; its quantizers are changed in place. Move it to its device first: a rule's
            parameters follow the weights that are there.
        rule: a key of :data:`reqat.quant.RULES`.
        settings: arguments of the rule's class.

    Returns how many quantizers have the rule now. Raises ReqatError for an unknown rule, role or setting, a format that
    the rule does not take, frozen weights, and a precision that quantizes none of ``roles``.
    """
    if rule not in RULES:
        raise unknown("gradient rule", rule, RULES)
    for role in roles:
        if role not in ROLES:
            raise unknown("role", role, ROLES)
    found: dict[Quantizer, tuple[str, int | None]] = {}  # of shared ones, one entry
    for name, module in model.named_modules():
        if isinstance(module, QuantLinear):
            if module.frozen and "weights" in roles and module.weight_quantizer.format is not None:
                raise ReqatError(f"{name} is frozen, and no gradient reaches its weight: set the rule before freeze()")
            found[module.weight_quantizer] = ("weights", module.out_features)
            found[module.input_quantizer] = ("inputs", None)
        elif isinstance(module, KVQuantizer):
            found |= {module.key: ("keys", None), module.value: ("values", None)}
            found |= {module.queries: ("queries", None), module.probabilities: ("probabilities", None)}
        elif isinstance(module, QuantEmbedding):
            found[module.quantizer] = ("embeddings", module.num_embeddings)
    chosen = [(q, q.format, *at) for q, at in found.items() if q.format is not None and at[0] in roles]
    if not chosen:
        what = ", ".join(roles)
        raise ReqatError(f"gradient rule {rule}: the model quantizes no {what}; prepare it for a precision that does")
    made = []
    for quantizer, fmt, role, rows in chosen:  # all of them before any is changed
        try:
            made.append(RULES[rule](**settings))
        except TypeError as error:
            raise ReqatError(f"gradient rule {rule}: {error}; its settings are its class's arguments.") from error
        made[-1].prepare(fmt, role, rows, quantizer.name or role)
    for (quantizer, *_), new in zip(chosen, made, strict=True):
        quantizer.gradient = new.to(quantizer.device)
    return len(chosen)


def has_learned_scales(model: nn.Module) -> bool:
    """Whether a gradient rule trains parameters of its own in ``model``: it must be frozen before it is saved."""
    return any(isinstance(m, GradientRule) and list(m.parameters()) for m in model.modules())


def gradient_rules(model: nn.Module) -> list[str]:
    """The rules of ``model`` other than straight through, with their settings, for the description of a run."""
    return sorted(
        f"{name}: {m.name} {m.extra_repr()}"
        for name, m in model.named_modules()
        if isinstance(m, GradientRule) and not m.straight
    )
