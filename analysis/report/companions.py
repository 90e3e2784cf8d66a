"""Finished companions as tables and figures read them: the rows of all parts of a kind, and what is missing.

A module of `analysis.tables` or `analysis.figures` declares ``COMPANION = "<kind>"`` and a function ``build(found)``,
a pure function of the rows. Where no part of a kind is there, a placeholder says why; where some are, their rows are
drawn and the footer names the others.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pandas as pd

from analysis.report.cells import arithmetic_of, commit_of
from analysis.report.document import Column, Table, Text, number
from reqat.config.companions import Part
from reqat.config.companions import restored as restored_part
from reqat.config.errors import ReqatError
from reqat.evaluation.means import Mean, detectable
from reqat.records import record

ROWS = "rows.csv"
_ALPHA = 0.05


@dataclass(frozen=True)
class Found:
    """What was measured of a companion."""

    kind: str
    rows: pd.DataFrame
    """Those of all parts, behind the columns `companion` (the name of the settings) and `part`."""
    settings: Mapping[str, Mapping[str, Any]]
    """Name of the settings -> what they say."""
    folders: Mapping[tuple[str, str], Path] = field(default_factory=dict)
    """(Name of the settings, part) -> folder of what it left."""
    records: tuple[Mapping[str, Any], ...] = ()
    missing: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Reason -> parts that are not there for it."""
    tier: str = ""

    @property
    def notes(self) -> tuple[str, ...]:
        """Footer: tier, data, machine's arithmetic, commits, and what is missing."""
        return self.noted()

    def noted(self, *, arithmetic: bool = True) -> tuple[str, ...]:
        """The footer, without the arithmetic where nothing is fake-quantized."""
        tier = f"Tier {self.tier}."
        sources = sorted({name for made in self.records for name in made.get("inputs", {})})
        read = [f"Data and models: {', '.join(sources)}."] if sources else []
        how = sorted({arithmetic_of(dict(made)) for made in self.records}) if arithmetic else []
        commits = sorted({commit_of(dict(made)) for made in self.records})
        made = [f"Arithmetic: {'; '.join(how)}."] if how else []
        made += [f"Commit {', '.join(commits)}."] if commits else []
        return (tier, *read, *made, *self.absences)

    @property
    def absences(self) -> tuple[str, ...]:
        """A sentence for each reason why parts are missing."""
        return tuple(f"Missing: {', '.join(parts)}. {reason}" for reason, parts in self.missing.items())


def load_companions(
    planned: Iterable[Part], source: Path, missing: Mapping[str, str], *, tier: str = ""
) -> list[Found]:
    """What lies under `source` (one folder a part) of the planned parts, by kind, in order.

    `missing`: id -> why a part is not there, where that was noted. Raises `ReqatError` naming a part that is not there
    for no noted reason, and the command that makes it."""
    of_kind: dict[str, list[Part]] = {}
    for part in planned:
        of_kind.setdefault(part.kind, []).append(part)
    return [_found(kind, parts, Path(source), missing, tier) for kind, parts in of_kind.items()]


def _found(kind: str, parts: list[Part], source: Path, missing: Mapping[str, str], tier: str) -> Found:
    frames, records, reasons, folders = [], [], {}, {}  # type: ignore[var-annotated]
    for part in parts:
        folder = source / part.id
        if not (folder / record.FILE).is_file() and part.id in missing:
            reasons.setdefault(missing[part.id], []).append(part.label)
            continue
        if not (folder / record.FILE).is_file():
            raise ReqatError(f"{folder}: part {part.label} is not there; `reqat companion {part.id}` makes it.")
        records.append(record.read(folder))
        frame = read_rows(folder, part)
        frame.insert(0, "companion", part.settings.label)
        frame.insert(1, "part", part.part)
        frames.append(frame)
        folders[part.settings.label, part.part] = folder
    rows = pd.concat(frames, ignore_index=True) if frames else pd.DataFrame()
    settings = {part.settings.label: part.settings.model_dump(mode="json") for part in parts}
    reasons = {reason: tuple(labels) for reason, labels in reasons.items()}
    return Found(kind, rows, settings, folders, tuple(records), reasons, tier)


def read_rows(folder: Path, part: Part) -> pd.DataFrame:
    """The rows of a part. Raises `ReqatError` if there are none, or they are no table."""
    remedy = f"run the part again (reqat companion {part.id} --force)"
    try:
        return pd.read_csv(folder / ROWS, keep_default_na=False, na_values=[""])
    except (OSError, ValueError) as error:
        raise ReqatError(f"{folder / ROWS}: not a table ({error}); {remedy}.") from None


def verdict(found: Mean, sign: int, *, p: float | None = None, comparisons: int = 1, digits: int = 3) -> str:
    """What a mean difference says of a claim that it has this `sign` (-1, 1).

    `p`: the p-value that counts, adjusted for the claims beside it (:func:`reqat.evaluation.statistics.holm`); by
    default the mean's own. Where it decides nothing, the difference that 80% power would have found among as many
    `comparisons` stands in parentheses."""
    if (found.p if p is None else p) < _ALPHA:
        return "agrees" if found.value * sign > 0 else "disagrees"
    smallest = detectable(found.std_error, found.df, alpha=_ALPHA / comparisons)
    return f"cannot tell at this scale ({number(smallest, digits)})"


def pinned_parts(records: Mapping[str, Mapping[str, Any]]) -> list[Part]:
    """The parts that pinned records describe, in their order. Raises `ReqatError` for a companion that this version
    does not know, or that it would name otherwise."""
    parts = []
    for id, made in records.items():
        part = restored_part(made["config"], f"pinned record {id}")
        if part.id != id:
            raise ReqatError(f"{id} is {part.id} under this version's rules; use the version that wrote it.")
        parts.append(part)
    return parts


def with_absences(table: Table, found: Found) -> Table:
    """The table, whose footer names what is missing, too."""
    more = tuple(note for note in found.absences if note not in table.footer)
    return replace(table, footer=(*table.footer, *more)) if more else table


def missing_table(name: str, found: Found) -> Table:
    """In place of a table none of whose parts is there: why, and what to install."""
    rows = [{"not_measured": part, "reason": reason} for reason, parts in found.missing.items() for part in parts]
    return Table(
        name,
        "Not measured",
        f"No part of companion {found.kind} could run.",
        found.absences,
        (Column("part", align="l"),),
        (tuple((Text(row["not_measured"]),) for row in rows),),
        pd.DataFrame(rows),
    )
