"""Lines of a table: entries that differ in their budget only, and the entries that each is compared with."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from analysis.report.cells import Entry
from analysis.report.document import tokens
from analysis.report.names import BF16
from reqat.config.errors import ReqatError

Reference = Callable[[Entry, Sequence[Entry]], Entry | None]


@dataclass
class Line:
    """Entries that differ in their budget only."""

    model: str
    precision: str
    method: str
    condition: str
    problems: str
    by: dict[int | None, Entry] = field(default_factory=dict)  # multiple of the QAT budget -> entry

    @property
    def quantized(self) -> bool:
        """Whether any part is in 4 bits."""
        return self.precision != BF16


def lines(entries: Iterable[Entry], method: Callable[[Entry], str] = lambda e: e.method) -> list[Line]:
    """Entries by line, in the plan's order; `method` may rename (so that "FT+GPTQ" continues "GPTQ")."""
    out: dict[tuple[str, ...], Line] = {}
    for e in entries:
        key = (e.model, e.precision, method(e), e.condition, e.problems)
        line = out.setdefault(key, Line(*key))
        if e.multiple in line.by:
            raise ReqatError(f"{e.artifact}: two entries for one cell: {line.by[e.multiple]} and {e}")
        line.by[e.multiple] = e
    return list(out.values())


def multiples(entries: Iterable[Entry]) -> list[int | None]:
    """Budgets that occur, "trains nothing" (None) first."""
    return sorted({e.multiple for e in entries}, key=lambda m: -1 if m is None else m)


def budget_names(entries: Sequence[Entry]) -> dict[int | None, str]:
    """Column heads: total tokens; "untrained" for None."""
    totals = {e.multiple: e.total_tokens for e in entries}
    return {m: "untrained" if m is None else tokens(totals[m]) for m in multiples(entries)}


def grouped(items: Sequence[Line], key: Callable[[Line], tuple[str, str]]) -> list[tuple[tuple[str, str], list[Line]]]:
    """Items by `key`, both in the order in which they come."""
    found: dict[tuple[str, str], list[Line]] = {}
    for item in items:
        found.setdefault(key(item), []).append(item)
    return list(found.items())


def bf16_at_budget(entry: Entry, entries: Sequence[Entry]) -> Entry | None:
    """BF16 with the same total budget and problems: fine-tuned, or the untouched base where nothing is trained."""
    if entry.precision == BF16:
        return None
    same = (entry.model, entry.multiple, entry.problems)
    found = [e for e in entries if e.precision == BF16 and (e.model, e.multiple, e.problems) == same]
    return found[0] if found else None


def where(condition: str) -> Reference:
    """The entry of the same precision and budget whose condition is this one."""

    def find(entry: Entry, entries: Sequence[Entry]) -> Entry | None:
        found = [
            e
            for e in entries
            if e.condition == condition
            and e.model == entry.model
            and e.precision == entry.precision
            and e.multiple == entry.multiple
            and e.problems == entry.problems
        ]
        return found[0] if found and found[0] is not entry else None

    return find
