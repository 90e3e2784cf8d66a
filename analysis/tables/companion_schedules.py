"""Companion schedules: what each method of search needs to come near the best schedule, and whether distinctive
candidates need less."""

from __future__ import annotations

import math

import pandas as pd

from analysis.report import searches
from analysis.report.companion_claims import MEASUREMENTS
from analysis.report.companions import Found
from analysis.report.document import Column, Table, Text, number, p_value
from analysis.report.findings import INCONCLUSIVE, Finding
from reqat.config.files import read_json
from reqat.evaluation.means import Mean

NAME = "companion-schedules"
COMPANION = "schedules"
HEADLINE = ("fewer measurements",)
"""How the claims begin that README shows."""

META = "table.json"  # as `reqat.pipeline.companions.schedules` writes it
CITATION = "arXiv 2202.06819"
CLAIM = "shortened search time at equal or better schedules (its abstract; its numbers were not at hand)"


def build(found: Found) -> Table:
    """A block for each table, and one for the mean over the tables of a unit; a row a method."""
    rows, sections, verdicts = found.rows, [], []
    data: list[dict[str, object]] = []
    for unit, of_unit in searches.groups(rows).items():
        parts = list(of_unit.groupby(["companion", "part"], sort=False))
        for (companion, part), of_part in parts:
            label = part if companion == COMPANION else f"{part} ({companion})"
            sections.append(_section(label, of_part, data))
        for settings, of_settings in of_unit.groupby("companion", sort=False):
            tables = of_settings["part"].nunique()
            label = f"mean of {tables} tables" if settings == COMPANION else f"mean of {tables} tables ({settings})"
            if tables > 1:
                sections.append(_section(label, of_settings, data))
            data += _claims(unit, label, of_settings)
            verdicts += _verdicts(unit, f"{settings}, {tables} table{'s' if tables > 1 else ''}", of_settings)
    caption = (
        "Searches replayed from tables in which every schedule was measured, or modelled, once. To target: "
        f"measurements until the share of the optimum that the settings name was reached ({_targets(found)}), a search "
        "that did not reach it with its whole budget; brackets are 95% intervals of the mean over seeds. Difference: "
        "the row's method minus AutoTVM, seed by seed. Best: the best speed at half the budget and at its end, as a "
        "share of the optimum. Correlation: Spearman's, of the last model's scores with the points that were not "
        "measured."
    )
    columns = (
        Column("Table", align="l"),
        Column("Method", align="l"),
        Column("To target"),
        Column("Reached (%)"),
        Column("Difference"),
        Column("at half (%)", "Best"),
        Column("at the end (%)", "Best"),
        Column("Correlation"),
    )
    claim = f"The paper ({CITATION}) claims {CLAIM}."
    footer = (*_tables(found), *verdicts, claim, *found.noted(arithmetic=False))
    return Table(
        NAME, "Searching for schedules by distinctive candidates", caption, footer, columns, tuple(sections),
        pd.DataFrame(data),
    )  # fmt: skip


def _section(label: str, rows: pd.DataFrame, data: list[dict[str, object]]) -> tuple[tuple[Text, ...], ...]:
    lines: list[tuple[Text, ...]] = []
    methods = searches.methods_in(rows)
    curve = rows[rows["measure"] == "best"]
    ends = curve["measurements"].max()
    half = curve.loc[curve["measurements"] <= ends / 2, "measurements"].max()
    for method in methods:
        reached = rows[(rows["measure"] == "to_target") & (rows["method"] == method)]["value"].notna().mean()
        values = searches.to_target(rows, method)
        against = None
        if "autotvm" in methods and method != "autotvm":
            against = searches.mean_of(values - searches.to_target(rows, "autotvm"))
        shown = {
            "to_target": searches.mean_of(values),
            "best_at_half": searches.mean_of(searches.by_seed(rows, "best", method, half)),
            "best_at_end": searches.mean_of(searches.by_seed(rows, "best", method, ends)),
        }
        correlation = searches.by_seed(rows, "rank_correlation", method)
        shown["rank_correlation"] = searches.mean_of(correlation) if correlation.size else math.nan
        lines.append(
            (
                Text(label if not lines else ""),
                Text(searches.title_of(method)),
                _cell(shown["to_target"], 1),
                Text(number(100 * float(reached), 0)),
                Text() if against is None else _cell(against, 1, sign=True),
                _cell(shown["best_at_half"], 1, scale=100),
                _cell(shown["best_at_end"], 1, scale=100),
                _cell(shown["rank_correlation"], 2),
            )
        )
        base = {"table": label, "unit": rows["unit"].iloc[0], "method": method, "seeds": values.shape[1]}
        found = {**shown, **({} if against is None else {"minus_autotvm": against})}
        data += [{**base, "measure": name, **_columns(value)} for name, value in found.items()]
        data.append({**base, "measure": "reached", **_columns(float(reached))})
    return tuple(lines)


def _cell(mean: Mean | float, digits: int, *, scale: float = 1, sign: bool = False) -> Text:
    if not isinstance(mean, Mean):
        return Text(number(scale * mean, digits, sign=sign))
    ends = (number(scale * end, digits, sign=sign) for end in (mean.lo, mean.hi))
    text = number(scale * mean.value, digits, sign=sign)
    return Text(text, detail="" if math.isnan(mean.value) else f"[{', '.join(ends)}]")


def _columns(mean: Mean | float) -> dict[str, float]:
    if not isinstance(mean, Mean):
        return {"value": mean, "lo": math.nan, "hi": math.nan}
    return {"value": mean.value, "lo": mean.lo, "hi": mean.hi}


def _claims(unit: str, where: str, rows: pd.DataFrame) -> list[dict[str, object]]:
    """A row of data for each rival."""
    how = where if unit == searches.MEASURED else f"{where}, {unit}"
    return [
        {
            "where": how,
            "claim": f"fewer measurements to the target than {searches.title_of(rival)}",
            "unit": MEASUREMENTS,
            "difference": found.value,
            "difference_lo": found.lo,
            "difference_hi": found.hi,
            "holm": found.holm,
            "verdict": _said(found),
        }
        for rival, found in searches.findings(rows).items()
    ]


def _said(found: Finding) -> str:
    """The verdict as the other companions say it."""
    if found.verdict != INCONCLUSIVE:
        return found.verdict
    return f"cannot tell at this scale ({number(found.detectable, 1)})"


def _verdicts(unit: str, where: str, rows: pd.DataFrame) -> list[str]:
    """A sentence for each rival: whether distinctive candidates need fewer measurements than it."""
    what = "measured on this CPU" if unit == searches.MEASURED else f"not measured: {unit}"
    return [_verdict(f"{where} ({what})", rival, finding) for rival, finding in searches.findings(rows).items()]


def _verdict(where: str, rival: str, found: Finding) -> str:
    ends = f"[{number(found.lo, 1, sign=True)}, {number(found.hi, 1, sign=True)}]"
    p = p_value(found.holm)
    power = f"; {number(found.detectable, 1)} would have been seen" if found.verdict == INCONCLUSIVE else ""
    return (
        f"Fewer measurements to the target than {searches.title_of(rival)}, {where}: {found.verdict}, "
        f"{number(found.value, 1, sign=True)} {ends}, p{p if p.startswith('<') else f'={p}'} (Holm){power}."
    )


def _tables(found: Found) -> list[str]:
    """What the tables are, in a sentence each."""
    lines = []
    for part, of_part in found.rows.groupby("part", sort=False):
        facts = of_part[of_part["method"].isna()].drop_duplicates("measure").set_index("measure")["value"]
        lines.append(
            f"{part}: {facts['points']:,.0f} schedules, {100 * facts['failed']:.0f}% fail, {100 * facts['near']:.1f}% "
            f"come to the target; optimum {facts['optimum']:.4g} {of_part['unit'].iloc[0]}"
            f"{_where(found, of_part['companion'].iloc[0], str(part))}."
        )
    return lines


def _where(found: Found, companion: str, part: str) -> str:
    """Where a table was measured, as it says itself; nothing of one in closed form."""
    folder = found.folders.get((companion, part))
    if folder is None or not (folder / META).is_file():
        return ""
    meta = read_json(folder / META, "table of schedules", "run the part again")
    if "capability" in meta:
        return f", compiled for sm_{meta['capability']} by triton {meta['triton']}, not timed"
    return f", measured on one core of {meta['cpu']} ({meta['instruction_set']})"


def _targets(found: Found) -> str:
    shares = {float(settings["target"]) for settings in found.settings.values()}
    return ", ".join(f"{100 * share:g}%" for share in sorted(shares))
