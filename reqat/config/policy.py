"""How the next token is chosen: greedily, or sampled from a tempered and truncated distribution.

The policy is one frozen value with one spelling: ``greedy``, ``sample(temperature=0.6, top_p=0.95)``, or
``reset(t_low=0.1, tau0=0.55, ...)``, where the temperature follows the entropy of reasoning steps
(:mod:`reqat.decoding.reset`). Configuration, records and captions all hold that string, and :meth:`Decoding.parse`
reads it back. The default is the paper's (ReQAT, section 8). Everything that bends the distribution in other ways
(noise, routing) is a logits processor of :func:`reqat.generation.batches.generate`, applied before this policy.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal, get_args

from reqat.config.errors import ReqatError

Kind = Literal["greedy", "sample", "reset"]
StepName = Literal["paragraph", "line", "sentence"]

_TEXT = re.compile(r"\s*(?P<kind>[A-Za-z_]+)\s*(?:\((?P<arguments>[^()]*)\))?\s*")
_EXAMPLES = "'greedy', 'sample(temperature=0.6, top_p=0.95)' or 'reset(t_low=0.1, tau0=0.55)'"
# Options of each kind and how their text is read.
_OPTIONS: dict[str, dict[str, type]] = {
    "greedy": {},
    "sample": {"temperature": float, "top_p": float},
    "reset": {"t_low": float, "tau0": float, "t_high": float, "top_p": float, "window": int, "step": str},
}


@dataclass(frozen=True)
class ReSETRule:
    """The numbers of ReSET: two temperatures, the threshold ``tau0`` (nats), and what a step is.

    ``window`` is how many entropies stand for the current step while that is shorter; ``step`` names what ends a step
    (:data:`reqat.decoding.STEP_ENDS`). Raises ``ReqatError`` naming the value at fault.
    """

    t_low: float
    tau0: float
    t_high: float = 1.0
    window: int = 32
    step: StepName = "paragraph"

    def __post_init__(self) -> None:
        """Check the values."""
        for name in ("t_low", "t_high"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) > 0):
                raise ReqatError(f"reset {name}={getattr(self, name)} must be a positive finite number")
        if not (math.isfinite(self.tau0) and self.tau0 >= 0):
            raise ReqatError(f"reset tau0={self.tau0} must be an entropy in nats, 0 or more; `reqat fit-reset` fits it")
        if self.window < 1:
            raise ReqatError(f"reset window={self.window} must be at least 1 token")
        if self.step not in get_args(StepName):
            raise ReqatError(f"reset step={self.step!r} is none of {', '.join(get_args(StepName))}")


@dataclass(frozen=True)
class Decoding:
    """A decoding policy. ``temperature`` (> 0) and ``top_p`` (0 < top_p <= 1) are ignored where ``kind`` is greedy.

    Where ``kind`` is reset, ``rule`` sets the temperature token by token, and ``temperature`` is 1.

    Raises ``ReqatError`` naming the value at fault.
    """

    kind: Kind = "sample"
    temperature: float = 0.6
    top_p: float = 0.95
    rule: ReSETRule | None = None

    def __post_init__(self) -> None:
        """Check the values; those that a kind ignores are set to one value, so that equal policies compare equal."""
        if self.kind not in get_args(Kind):
            raise ReqatError(f"unknown decoding {self.kind!r}; write {_EXAMPLES}")
        if (self.rule is not None) != (self.kind == "reset"):
            raise ReqatError(f"decoding {self.kind!r} with rule={self.rule}: 'reset' wants a ReSETRule, others none")
        if self.kind == "greedy":
            object.__setattr__(self, "temperature", 1.0)
            object.__setattr__(self, "top_p", 1.0)
            return
        if self.kind == "reset":
            object.__setattr__(self, "temperature", 1.0)
        if not (math.isfinite(self.temperature) and self.temperature > 0):
            raise ReqatError(
                f"decoding temperature={self.temperature} must be a positive finite number; for 0, write 'greedy'"
            )
        if not 0 < self.top_p <= 1:
            raise ReqatError(f"decoding top_p={self.top_p} must lie in (0, 1]; 1 keeps the whole distribution")

    @classmethod
    def greedy(cls) -> Decoding:
        """The most likely token at every step."""
        return cls("greedy")

    @classmethod
    def sample(cls, temperature: float = 0.6, top_p: float = 0.95) -> Decoding:
        """Sampling at ``temperature``, then from the smallest set of tokens that holds probability ``top_p``."""
        return cls("sample", temperature, top_p)

    @classmethod
    def reset(cls, t_low: float, tau0: float, *, top_p: float = 0.95, **rule: Any) -> Decoding:
        """ReSET; the options are those of :class:`ReSETRule`."""
        return cls("reset", 1.0, top_p, ReSETRule(t_low, tau0, **rule))

    @classmethod
    def parse(cls, text: str) -> Decoding:
        """Read a policy from its text; options left out take their defaults.

        Raises ``ReqatError`` naming the text and what is wrong in it.
        """
        match = _TEXT.fullmatch(text) if isinstance(text, str) else None
        if match is None:
            raise ReqatError(f"cannot read the decoding {text!r}; write {_EXAMPLES}")
        kind = match["kind"]
        values: dict[str, Any] = {}
        for part in (match["arguments"] or "").split(","):
            if not part.strip():
                continue
            name, _, value = (piece.strip() for piece in part.partition("="))
            if name not in _OPTIONS.get(kind, {}) or name in values:
                raise ReqatError(f"decoding {text!r}: unknown or repeated option {name!r}; write {_EXAMPLES}")
            try:
                values[name] = _OPTIONS[kind][name](value)
            except (ValueError, OverflowError):
                raise ReqatError(f"decoding {text!r}: {name} is {value!r}, not a number; write {_EXAMPLES}") from None
        if kind not in get_args(Kind):
            raise ReqatError(f"unknown decoding {text!r}; write {_EXAMPLES}")
        if kind == "reset":
            missing = [name for name in ("t_low", "tau0") if name not in values]
            if missing:
                raise ReqatError(f"decoding {text!r} lacks {' and '.join(missing)}; `reqat fit-reset` fits tau0")
            return cls.reset(**values)
        return cls.greedy() if kind == "greedy" else cls.sample(**values)

    @property
    def is_greedy(self) -> bool:
        """Whether the policy takes no random numbers."""
        return self.kind == "greedy"

    def effective_seeds(self, seeds: Iterable[int]) -> tuple[int, ...]:
        """The seeds that make different responses: all of them when sampling, the first one only when greedy."""
        found = tuple(seeds)
        return found[:1] if self.is_greedy else found

    def __str__(self) -> str:
        """The one spelling, read back by :meth:`parse`."""
        if self.is_greedy:
            return "greedy"
        if self.rule is not None:
            r = self.rule
            return (
                f"reset(t_low={r.t_low!r}, tau0={r.tau0!r}, t_high={r.t_high!r}, top_p={self.top_p!r}, "
                f"window={r.window}, step={r.step})"
            )
        return f"sample(temperature={self.temperature!r}, top_p={self.top_p!r})"
