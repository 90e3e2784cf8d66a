"""What :func:`reqat.models.prepare` did with a model, for people."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field

from reqat.formats import Format
from reqat.quant import Precision

#: Share of the weights in a model's blocks that may stay as it is without a warning: routers are far below.
MOST_LEFT = 0.01

#: Why linear layers are not quantized where a precision quantizes neither weights nor inputs.
UNTOUCHED = "the precision leaves it as it is"


@dataclass(frozen=True)
class Entry:
    """One module of the report: its name, its shape; for a skipped one the reason, and whether it is in a block and
    nobody asked to skip it."""

    name: str
    shape: tuple[int, ...]
    reason: str = ""
    in_block: bool = False


@dataclass(frozen=True)
class Report:
    """What :func:`prepare` quantized and what it skipped; ``str(report)`` is a table for people."""

    model: str
    precision: Precision
    quantized: list[Entry] = field(default_factory=list)
    skipped: list[Entry] = field(default_factory=list)
    kv_layers: int = 0
    restored: list[str] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)
    """What the checkpoint keeps for this tensor or that, and does not fit the precision."""
    skip: tuple[str, ...] = ()
    differs: tuple[str, ...] = ()
    block_weights: int = 0
    """Numbers in the weight matrices of the model's blocks (embeddings and head are outside)."""
    left: int = 0
    """How many of them no layer quantizes, though nobody asked to skip them."""

    @property
    def share(self) -> float:
        """The share of the weights in the model's blocks that is quantized."""
        return sum(math.prod(entry.shape) for entry in self.quantized) / max(1, self.block_weights)

    @property
    def warning(self) -> str | None:
        """What to say where more than 1% of the weights stay as they are unasked, or None."""
        if not self.precision.quantizes_linear or self.left <= MOST_LEFT * self.block_weights:
            return None
        share = self.left / self.block_weights
        where = "; ".join(_collapsed([entry for entry in self.skipped if entry.in_block]))
        return f"{share:.1%} of the weights in the blocks of {self.model} stay as they are: {where}"

    def __str__(self) -> str:
        total = len(self.quantized) + sum(len(entry.shape) == 2 for entry in self.skipped)
        lines = [f"{self.precision} on {self.model}: {len(self.quantized)} of {total} weight matrices quantized"]
        if self.quantized:
            lines.append(f"  share     {self.share:.2%} of the weights in blocks")
        if self.warning is not None:
            lines.append(f"  WARNING   {self.warning}")
        precision = self.precision
        rotation = f", rotated in Hadamard blocks of {precision.rotation}" if precision.rotation else ""
        for role, fmt in (("weights", precision.weights), ("inputs", precision.inputs)):
            if self.quantized:
                lines.append(f"  {role:<9} {_describe(fmt)}{rotation}")
        for role, fmt in (("keys", precision.keys), ("values", precision.values)):
            if fmt is not None:
                lines.append(f"  {role:<9} {_describe(fmt)}, {self.kv_layers} layers")
        lines += [f"  restored  {what} from the checkpoint" for what in self.restored]
        lines += [f"  dropped   {what} of the checkpoint" for what in self.dropped]
        lines += [f"  differs   from the checkpoint in {what}" for what in self.differs]
        for title, entries in (("quantized", self.quantized), ("skipped", self.skipped)):
            lines += [f"  {title:<9} {line}" for line in _collapsed(entries)]
        return "\n".join(lines)


def _describe(fmt: Format | None) -> str:
    if fmt is None:
        return "not quantized"
    block = "whole rows" if fmt.block is None else f"blocks of {fmt.block}"
    scale = f", global scale {fmt.global_scale}" if fmt.global_scale != "none" else ""
    return f"{fmt.name}: {fmt.element} in {block}, {fmt.scale} scales{scale}"


def _collapsed(entries: list[Entry]) -> list[str]:
    """One line for all layers' modules of the same name, shape and reason."""
    counts: dict[tuple[str, tuple[int, ...], str], int] = {}
    for entry in entries:
        key = (re.sub(r"\.\d+\.", ".*.", entry.name), entry.shape, entry.reason)
        counts[key] = counts.get(key, 0) + 1
    width = max((len(name) for name, _, _ in counts), default=0)
    return [
        f"{name:<{width}} {list(shape)!s:<14} x{n}{f'  ({reason})' if reason else ''}"
        for (name, shape, reason), n in counts.items()
    ]
