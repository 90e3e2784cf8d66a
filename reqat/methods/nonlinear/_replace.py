"""Put tables in place of a model's nonlinear functions, wherever its adapter says that there are any."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from reqat.config.errors import ReqatError, unknown
from reqat.methods.nonlinear._function import FUNCTIONS, Evaluate, Function
from reqat.methods.nonlinear._layers import Lookup, TableNorm, TableSoftmax, function_of
from reqat.models.adapters import Nonlinearity, UnsupportedModelError, nonlinearities_of
from reqat.models.attention import ATTENTION, SOFTMAX
from reqat.models.modes import evaluating


@dataclass
class Replacement:
    """What :func:`replace` did. ``lookups``: name of the operation and its function (``...mlp.act_fn: silu``) -> where
    it is computed now; ``kept``: name of an operation -> why it is as it was."""

    lookups: dict[str, Lookup] = field(default_factory=dict)
    kept: dict[str, str] = field(default_factory=dict)
    undoing: list[Callable[[], Any]] = field(default_factory=list)

    def set(self, evaluate: Mapping[str, Evaluate]) -> None:
        """Compute by these from now on: by name of a lookup, or of a function for all of its lookups."""
        for name, lookup in self.lookups.items():
            lookup.evaluate = evaluate.get(name, evaluate.get(lookup.function, lookup.evaluate))

    def undo(self) -> None:
        """Give the model back its own operations."""
        while self.undoing:
            self.undoing.pop()()


def replace(model: PreTrainedModel, evaluate: Mapping[str, Evaluate], *, scaling: str = "full") -> Replacement:
    """Let ``model`` compute the functions named in ``evaluate`` by these, in place: GELU or SiLU, ``exp`` and
    ``reciprocal`` in the softmax of attention, ``rsqrt`` in norms.

    Any model that an adapter knows, prepared for a precision or not; linear layers stay as they are. Functions that are
    not named stay exact. ``FUNCTIONS[name].exact`` in place of a table leaves the model's function unchanged.
    ``scaling``: of inputs of ``rsqrt``, ``full`` or ``below`` (:mod:`._layers`).

    Raises ReqatError for a function or scaling that is not known, a model that no adapter knows or that has none of
    these functions, an attention that is not called through transformers' interface, and a model whose functions were
    replaced already. The model is then unchanged.
    """
    for name in evaluate:
        if name not in FUNCTIONS:
            raise unknown("function", name, FUNCTIONS)
    found = nonlinearities_of(model)
    if any(isinstance(module, Lookup) for module in model.modules()):
        raise ReqatError("the model's functions were replaced already: undo() that, or set() others in its place")
    done = Replacement()
    try:
        for entry in found:
            _replace_one(model, entry, evaluate, scaling, done)
        if not done.lookups:
            raise ReqatError(
                f"{type(model).__name__} has no operation that {', '.join(evaluate) or 'no function'} would be part of"
            )
    except Exception:
        done.undo()
        raise
    return done


def _replace_one(
    model: PreTrainedModel, entry: Nonlinearity, evaluate: Mapping[str, Evaluate], scaling: str, done: Replacement
) -> None:
    def lookup(function: str) -> Lookup:
        made = done.lookups[f"{entry.name}: {function}"] = Lookup(function, evaluate[function])
        return made

    if entry.kind == "activation":
        function = function_of(entry.module)
        if function is not None and function in evaluate:
            _put(model, entry.name, lookup(function), done)
        else:
            done.kept[entry.name] = f"no table of {function}" if function else "none of the functions that have tables"
    elif entry.kind == "norm":
        if "rsqrt" in evaluate:
            _put(model, entry.name, TableNorm(entry.module, lookup("rsqrt"), scaling), done)
        else:
            done.kept[entry.name] = "no table of rsqrt"
    elif "exp" in evaluate:
        if not getattr(type(model), "_supports_attention_backend", False):
            raise UnsupportedModelError(f"{type(model).__name__} does not call transformers' AttentionInterface")
        setattr(
            entry.module,
            SOFTMAX,
            TableSoftmax(lookup("exp"), lookup("reciprocal") if "reciprocal" in evaluate else None),
        )
        done.undoing.append(lambda: delattr(entry.module, SOFTMAX))
        before = model.config._attn_implementation
        if before != ATTENTION:
            model.set_attn_implementation(ATTENTION)
            done.undoing.append(lambda: model.set_attn_implementation(before))
    else:
        done.kept[entry.name] = "no table of exp"


def _put(model: nn.Module, name: str, module: nn.Module, done: Replacement) -> None:
    where, _, attribute = name.rpartition(".")
    parent = model.get_submodule(where)
    before = getattr(parent, attribute)
    setattr(parent, attribute, module.train(before.training))
    done.undoing.append(lambda: setattr(parent, attribute, before))


@dataclass
class Seen:
    """Inputs of one lookup: ``samples`` [S] float32, a random choice; all in all ``count`` finite ones from ``low`` to
    ``high``, ``outside`` of them beyond the range of its function."""

    function: Function
    samples: Tensor
    count: int = 0
    low: float = torch.inf
    high: float = -torch.inf
    outside: int = 0

    def look(self, x: Tensor, most: int, generator: torch.Generator) -> None:
        """Take account of inputs; each that was ever seen is as likely to be among the ``most`` samples that stay."""
        x = x.detach().float().flatten()
        x = x[x.isfinite()]
        if not len(x):
            return
        self.low, self.high = min(self.low, float(x.min())), max(self.high, float(x.max()))
        self.outside += int(((x < self.function.low) | (x > self.function.high)).sum())
        # Of a choice of all numbers so far, each place is one of the new numbers by their share.
        self.count += len(x)
        picked = x[torch.randint(len(x), (most,), generator=generator)]
        new = torch.rand(most, generator=generator) < len(x) / self.count
        self.samples = picked if not len(self.samples) else torch.where(new, picked, self.samples)


@torch.no_grad()
def observe(
    model: PreTrainedModel,
    replacement: Replacement,
    run: Callable[[], Any],
    *,
    samples: int = 2048,
    seed: int = 0,
) -> dict[str, Seen]:
    """What each lookup reads while ``run()`` calls the model, by its name, with exact functions in all of them.

    Raises ReqatError if ``run`` called none of them.
    """
    generator = torch.Generator().manual_seed(seed)
    seen = {name: Seen(FUNCTIONS[it.function], torch.empty(0)) for name, it in replacement.lookups.items()}
    before = {name: it.evaluate for name, it in replacement.lookups.items()}

    def watch(to: Seen) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        return lambda _module, args: to.look(args[0], samples, generator)

    handles = [it.register_forward_pre_hook(watch(seen[name])) for name, it in replacement.lookups.items()]
    replacement.set({name: function.exact for name, function in FUNCTIONS.items()})
    try:
        with evaluating(model):
            run()
    finally:
        for handle in handles:
            handle.remove()
        replacement.set(before)
    if not any(at.count for at in seen.values()):
        raise ReqatError("calibration looks at what flows through the model, and nothing did: give it data")
    return seen
