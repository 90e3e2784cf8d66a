"""How the next token is chosen: greedily, or sampled from a tempered and truncated distribution.

The policy is one frozen value with one spelling, ``greedy`` or ``sample(temperature=0.6, top_p=0.95)``: configuration,
records and captions all hold that string, and :meth:`Decoding.parse` reads it back. The default is the paper's (ReQAT,
section 8). Everything that bends the distribution in other ways (noise, routing) is a logits processor of
:func:`reqat.evaluation.generation.generate`, applied before this policy.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, get_args

Kind = Literal["greedy", "sample"]

_TEXT = re.compile(r"\s*(?P<kind>[A-Za-z_]+)\s*(?:\((?P<arguments>[^()]*)\))?\s*")
_EXAMPLES = "'greedy' or 'sample(temperature=0.6, top_p=0.95)'"


@dataclass(frozen=True)
class Decoding:
    """A decoding policy. ``temperature`` (> 0) and ``top_p`` (0 < top_p <= 1) are ignored where ``kind`` is greedy.

    Raises ``ValueError`` naming the value at fault.
    """

    kind: Kind = "sample"
    temperature: float = 0.6
    top_p: float = 0.95

    def __post_init__(self) -> None:
        """Check the values; greedy policies share one value, so that equal policies compare equal."""
        if self.kind not in get_args(Kind):
            raise ValueError(f"unknown decoding {self.kind!r}; write {_EXAMPLES}")
        if self.kind == "greedy":
            object.__setattr__(self, "temperature", 1.0)
            object.__setattr__(self, "top_p", 1.0)
            return
        if not (math.isfinite(self.temperature) and self.temperature > 0):
            raise ValueError(
                f"decoding temperature={self.temperature} must be a positive finite number; for 0, write 'greedy'"
            )
        if not 0 < self.top_p <= 1:
            raise ValueError(f"decoding top_p={self.top_p} must lie in (0, 1]; 1 keeps the whole distribution")

    @classmethod
    def greedy(cls) -> Decoding:
        """The most likely token at every step."""
        return cls("greedy")

    @classmethod
    def sample(cls, temperature: float = 0.6, top_p: float = 0.95) -> Decoding:
        """Sampling at ``temperature``, then from the smallest set of tokens that holds probability ``top_p``."""
        return cls("sample", temperature, top_p)

    @classmethod
    def parse(cls, text: str) -> Decoding:
        """Read a policy from its text; options left out take their defaults.

        Raises ``ValueError`` naming the text and what is wrong in it.
        """
        match = _TEXT.fullmatch(text)
        if match is None:
            raise ValueError(f"cannot read the decoding {text!r}; write {_EXAMPLES}")
        values: dict[str, float] = {}
        for part in (match["arguments"] or "").split(","):
            if not part.strip():
                continue
            name, _, number = (piece.strip() for piece in part.partition("="))
            if match["kind"] != "sample" or name not in ("temperature", "top_p") or name in values:
                raise ValueError(f"decoding {text!r}: unknown or repeated option {name!r}; write {_EXAMPLES}")
            try:
                values[name] = float(number)
            except ValueError:
                raise ValueError(f"decoding {text!r}: {name} is {number!r}, not a number; write {_EXAMPLES}") from None
        if match["kind"] not in get_args(Kind):
            raise ValueError(f"unknown decoding {text!r}; write {_EXAMPLES}")
        return cls.greedy() if match["kind"] == "greedy" else cls.sample(**values)

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
        return f"sample(temperature={self.temperature!r}, top_p={self.top_p!r})"
