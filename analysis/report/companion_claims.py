"""The claims of all companions of a pinned run in one table, and the lines of it that README shows.

A companion's table says its claims in rows of its data that have a `claim`; those are read here and nothing is computed
anew. Which of them README shows is said by the companion's module of `analysis.tables`, as `HEADLINE`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pandas as pd

from analysis.report.document import Column, Table, Text, number
from reqat.config.errors import ReqatError

NAME = "companion-verdicts"
BEGIN, END = "<!-- companions: written by `reqat report --verdicts` -->", "<!-- companions: end -->"
NATS, SHARE, POINTS, MEASUREMENTS, CORRELATION = "nats a token", "share", "points", "measurements", "rank correlation"
# Unit -> what its numbers are multiplied by, the digits that are shown, and the words behind them.
_SHOWN = {
    NATS: (1.0, 3, " nats a token"),
    SHARE: (100.0, 2, " points"),
    POINTS: (1.0, 2, " points"),
    MEASUREMENTS: (1.0, 1, " measurements"),
    CORRELATION: (1.0, 2, ""),
}
TITLES = {
    "amxfp4": "AMXFP4",
    "tsld": "TSLD",
    "encoders": "KD for encoders",
    "nnlut": "NN-LUT",
    "nce": "NCE",
    "schedules": "MMA schedules",
}


@dataclass(frozen=True)
class CompanionClaim:
    """A difference that a companion tests, and what was found."""

    companion: str
    """Its kind."""
    where: str
    """Model, task or settings; empty where there is one."""
    claim: str
    value: float
    lo: float
    hi: float
    unit: str
    verdict: str
    headline: bool

    @property
    def measured(self) -> str:
        """The difference with its interval, in words."""
        scale, digits, words = _SHOWN[self.unit]
        value, lo, hi = (number(scale * x, digits, sign=True) for x in (self.value, self.lo, self.hi))
        return f"{value} [{lo}, {hi}]{words}" if pd.notna(self.lo) else f"{value}{words}"


def claims_of(companion: str, table: Table, headline: Sequence[str]) -> list[CompanionClaim]:
    """Those that the data of a companion's table hold, in order. `headline`: how the claims that README shows begin.

    Raises `ReqatError` for a unit that is not known here."""
    if "claim" not in table.data:
        return []
    out = []
    for row in table.data[table.data["claim"].notna()].to_dict("records"):
        if row["unit"] not in _SHOWN:
            raise ReqatError(f"{table.name}: claims in {row['unit']!r}; the known units are {', '.join(_SHOWN)}.")
        value, lo, hi = (float(row[f"difference{end}"]) for end in ("", "_lo", "_hi"))
        where, claim, unit, verdict = (str(row[name]) for name in ("where", "claim", "unit", "verdict"))
        where = "" if where == companion else where  # settings that have no name of their own
        first = claim.startswith(tuple(headline))
        out.append(CompanionClaim(companion, where, claim, value, lo, hi, unit, verdict, first))
    return out


def build(found: Sequence[CompanionClaim], folders: Mapping[str, str]) -> Table:
    """All claims, a section a companion. `folders`: kind -> where it is pinned."""
    sections: dict[str, list[tuple[Text, ...]]] = {}
    for one in found:
        cells = (_title(one.companion), one.where, one.claim, one.measured, one.verdict)
        sections.setdefault(one.companion, []).append(tuple(Text(cell) for cell in cells))
    return Table(
        NAME,
        "What of the sister systems was reproduced",
        "Differences with 95% intervals, less being better for nats and measurements and more for points; a verdict "
        "goes by the p-value that is adjusted (Holm) over the claims of a table. In parentheses, where nothing can be "
        "told, the difference that 80% power would have found.",
        (_where(folders),),
        tuple(Column(name, align="l") for name in ("System", "Where", "Claim", "Here", "Verdict")),
        tuple(tuple(rows) for rows in sections.values()),
        pd.DataFrame([vars(one) for one in found]),
    )


def block(found: Sequence[CompanionClaim], folders: Mapping[str, str], documents: Mapping[str, str]) -> str:
    """The Markdown of README: the claims of `HEADLINE`. `folders`: kind -> where it is pinned; `documents`: kind -> the
    page about it."""
    out = ["| system | claim | here | verdict |", "|---|---|---|---|"]
    for one in found:
        if one.headline:
            where = f" ({one.where})" if one.where else ""
            name = _title(one.companion)
            name = f"[{name}]({documents[one.companion]})" if one.companion in documents else name
            out.append(f"| {name} | {one.claim}{where} | {one.measured} | {one.verdict} |")
    return "\n".join(["", *out, "", _where(folders), ""])


def _where(folders: Mapping[str, str]) -> str:
    """A sentence that says which companion is pinned where."""
    of_folder: dict[str, list[str]] = {}
    for kind, folder in folders.items():
        of_folder.setdefault(folder, []).append(_title(kind))
    if len(of_folder) == 1:
        return f"Run: {next(iter(of_folder))}."
    said = [f"{folder} ({', '.join(names)})" for folder, names in of_folder.items()]
    return f"Runs: {'; '.join(said)}."


def _title(kind: str) -> str:
    return TITLES.get(kind, kind)
