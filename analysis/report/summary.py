"""The claims over all models: a row a claim, a column a model, from the pinned runs that claims rest on.

What README opens with. A claim stands here as it was tested where it counts most: as a primary claim of the tier, else
at NVFP4-W4A4KV4, else at the first precision that the tier has it at (then named in the cell).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from analysis.report import paper
from analysis.report.cells import Results
from analysis.report.claims import CLAIMS
from analysis.report.document import Column, Table, Text, number
from analysis.report.names import BF16, REFERENCE_PRECISION
from analysis.report.verdicts import Tested, tested
from reqat.config.errors import ReqatError

NAME = "verdicts"
TIERS = ("overnight", "converged", "smollm-claims")
"""Whose newest pinned runs are read, where they are there."""


@dataclass(frozen=True)
class Tests:
    """The claims of one model of a tier."""

    heading: str
    notes: tuple[str, ...]
    by_claim: Mapping[str, Tested]


def tests_of(results: Results, folder: str) -> list[Tests]:
    """The tested claims of each model of a run, `folder` being where it is kept."""
    found = tested(results)
    out = []
    for label, model in results.plan.tier.models.items():
        mine = [t for t in found if t.model == label]  # primary ones first, then those at the reference precision
        if not mine:
            continue
        heading = label if model.source in ("pinned", "scratch") else f"real weights: {label}"
        made = results.provenance([e for t in mine for e in (t.a, t.b)])
        notes = (f"{heading}: {folder}.", *made.notes())
        out.append(Tests(heading, notes, {t.claim.name: t for t in reversed(mine)}))
    return out


def overall(verdicts: Sequence[str]) -> str:
    """One word for the verdicts of several models; those that are inconclusive decide nothing."""
    agrees, disagrees = verdicts.count("agrees"), verdicts.count("disagrees")
    if agrees and disagrees:
        return "depends on the model"
    if disagrees:
        return "not reproduced"
    if agrees:
        return "reproduced" if agrees == len(verdicts) else f"reproduced ({agrees} of {len(verdicts)})"
    return "no direction" if set(verdicts) == {"no direction"} else "inconclusive"


def build(runs: Sequence[Tests]) -> Table:
    """The table of verdicts. Raises `ReqatError` where no run tests a claim."""
    names = [claim.name for claim in CLAIMS if any(claim.name in run.by_claim for run in runs)]
    if not names:
        raise ReqatError(f"no pinned run of {', '.join(TIERS)} tests a claim; `reqat pin` promotes a finished one.")
    lines, rows = [], []
    for name in names:
        here = [run.by_claim.get(name) for run in runs]
        there = [t for t in here if t is not None]
        verdict = overall([t.verdict for t in there])
        bold = there[0].claim.main
        cells = [Text(name, bold=bold), Text(number(there[0].paper_mean, sign=True))]
        lines.append((*cells, *(_cell(t) for t in here), Text(verdict, bold=bold)))
        rows += [_row(run, t, verdict) for run, t in zip(runs, here, strict=True) if t is not None]
    main = sum(claim.name in names for claim in CLAIMS if claim.main)
    return Table(
        NAME,
        "What of the paper was reproduced",
        "Differences in points with 95% intervals over problems and training seeds, and whether they agree with the "
        "paper's direction (Holm's adjusted p below 0.05); in parentheses, where inconclusive, the smallest difference "
        "that would have been found with 80% probability. Bold: the claims that the paper rests on, the only ones "
        f"adjusted among themselves alone. At {REFERENCE_PRECISION} unless a cell says otherwise.",
        (*(note for run in runs for note in run.notes), f"Numbers of the paper: {paper.CITATION}."),
        (
            Column("Claim", align="l"),
            Column("Paper"),
            *(Column(run.heading, align="l") for run in runs),
            Column("Verdict", align="l"),
        ),
        tuple(part for part in (tuple(lines[:main]), tuple(lines[main:])) if part),
        pd.DataFrame(rows),
    )


def _cell(t: Tested | None) -> Text:
    if t is None:
        return Text()
    where = "" if t.precision in (REFERENCE_PRECISION, BF16) else f" at {t.precision}"
    power = f" (detectable {number(t.detectable)})" if t.verdict == "inconclusive" else ""
    ends = f"[{number(t.lo, sign=True)}, {number(t.hi, sign=True)}]"
    return Text(f"{number(t.value, sign=True)}, {t.verdict}", detail=f"{ends}{power}{where}")


def _row(run: Tests, t: Tested, verdict: str) -> dict[str, Any]:
    return {
        "claim": t.claim.name,
        "primary": t.primary,
        "paper": t.paper_mean,
        "model": run.heading,
        "precision": t.precision,
        "difference": t.value,
        "lo": t.lo,
        "hi": t.hi,
        "p": t.p,
        "p_holm": t.holm,
        "detectable": t.detectable,
        "training_seeds": len(Results.common(t.a, t.b)[0].cells),
        "verdict": t.verdict,
        "overall": verdict,
    }
