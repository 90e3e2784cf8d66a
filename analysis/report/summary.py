"""The claims over all models: a row a claim, a column a model (and its task), from the pinned runs that claims rest on.

A claim stands here as it was tested where it counts most: as a primary claim of the run, else at NVFP4-W4A4KV4, else at
the first precision that the run has it at (then named in the cell). The primary claims stand here twice, on accuracy
and on held-out likelihood, as the protocol has them. `build` makes the whole table, `block` the part that README opens
with.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pandas as pd

from analysis.report import likelihood_claims, paper, printed
from analysis.report.cells import Results
from analysis.report.claims import CLAIMS, Claim
from analysis.report.document import Column, Table, Text, number
from analysis.report.findings import AGREES, DISAGREES, INCONCLUSIVE, TESTED, Finding
from analysis.report.likelihood_claims import TestedLikelihood
from analysis.report.names import BF16, REFERENCE_PRECISION
from analysis.report.studies import Study
from analysis.report.verdicts import PRIMARY, Tested, tested
from reqat.config.errors import ReqatError

NAME = "verdicts"
PLACES: dict[str, tuple[tuple[str, ...], ...]] = {
    "testbed": (("claims",), ("overnight-formats",), ("overnight",)),
    "converged": (("converged", "converged-seeds"), ("converged-more",)),
    "real weights, sums": (("smollm-sums",),),
    "real weights, word problems": (("smollm-claims", "smollm-claims-seeds"),),
}
"""Column -> the tiers whose newest pinned runs fill it, claim by claim: the first ones that test it, those at the
reference precision before others. Tiers after the
first of a group have further training seeds of it and are read as one run with it."""
NOT_RUN = "not run yet"
SHOWN = (
    "ReQAT-TQ above QAT",
    "PTQ below the BF16 base",
    "BF16 FT above the base",
    "FT+PTQ below BF16 FT",
    "QAT above FT+PTQ",
)
"""The claims that README shows besides the primary ones."""
LIKELIHOOD = "on held-out likelihood: "
BEGIN, END = "<!-- verdicts: written by `reqat report --verdicts` -->", "<!-- verdicts: end -->"
"""What the table of README stands between."""


@dataclass(frozen=True)
class Tests:
    """The claims of one model of a run, or of several (`merged`); of a run that is not there, none."""

    heading: str
    model: str = ""
    """Its label in the tier."""
    folders: tuple[str, ...] = ()
    """Where the runs are kept, and the likelihood studies that stand beside them."""
    notes: tuple[str, ...] = ()
    by_claim: Mapping[str, Tested] = field(default_factory=dict)
    """On accuracy."""
    by_likelihood: Mapping[str, TestedLikelihood] = field(default_factory=dict)
    run: bool = True
    """Whether there is a run."""

    @property
    def where(self) -> str:
        """The runs by their folders, as a note."""
        return f"{self.heading}: {', '.join(self.folders) or 'no pinned run yet'}."


@dataclass(frozen=True)
class _Line:
    """A claim over all models; `cells` are those of the models, None where a run does not have it."""

    claim: Claim
    name: str
    cells: tuple[Finding | None, ...]

    @property
    def verdict(self) -> str:
        return verdict_over_models([cell.verdict for cell in self.cells if cell is not None])


def not_run(heading: str) -> Tests:
    """The column of a model that no pinned run has tested."""
    return Tests(heading, run=False)


def merged(runs: Sequence[Sequence[Tests]]) -> list[Tests]:
    """The models of several runs of one column: of each claim, the test of the first run that has it at the reference
    precision, else of the first that has it."""
    out: dict[str, Tests] = {}
    for tests in (tests for run in runs for tests in run):
        first = out.setdefault(tests.model, tests)
        by_claim = {**tests.by_claim, **first.by_claim}
        by_claim |= {
            name: found
            for name, found in tests.by_claim.items()
            if found.precision == REFERENCE_PRECISION != by_claim[name].precision
        }
        by_likelihood = {**tests.by_likelihood, **first.by_likelihood}
        if first is not tests and (by_claim, by_likelihood) != (first.by_claim, first.by_likelihood):
            out[tests.model] = replace(
                first,
                folders=tuple(dict.fromkeys((*first.folders, *tests.folders))),
                notes=tuple(dict.fromkeys((*first.notes, *tests.notes))),
                by_claim=by_claim,
                by_likelihood=by_likelihood,
            )
    return list(out.values())


def tests_of(
    results: Results,
    folders: Sequence[str],
    heading: str,
    studies: Sequence[Study] = (),
    studies_folders: Sequence[str] = (),
) -> list[Tests]:
    """The tested claims of each model of a run: `folders` are where it is kept, `studies` are its likelihood studies
    (of the first model; those after the first have further training seeds), kept in `studies_folders`."""
    found = tested(results)
    out: list[Tests] = []
    for label in results.plan.tier.models:
        mine = [t for t in found if t.model == label]  # primary ones first, then those at the reference precision
        if not mine:
            continue
        name = f"{heading}, {label}" if out else heading
        made = results.provenance([e for t in mine for e in (*t.a, *t.b)])
        read = likelihood_claims.tested(*studies)[0] if studies and not out else []
        likelihood = {t.claim.name: t for t in read}
        where = dict.fromkeys([*folders, *(studies_folders if likelihood else ())])
        by_claim = {t.claim.name: t for t in reversed(mine)}
        out.append(Tests(name, label, tuple(where), tuple(made.notes()), by_claim, likelihood))
    return out


def verdict_over_models(verdicts: Sequence[str]) -> str:
    """What the verdicts of several models come to. Those that are inconclusive decide nothing, and those that test
    nothing do not count."""
    counted = [verdict for verdict in verdicts if verdict in TESTED]
    agrees, disagrees = counted.count(AGREES), counted.count(DISAGREES)
    if agrees and disagrees:
        return "depends on the model"
    if disagrees:
        return "not reproduced" if disagrees == len(counted) else f"not reproduced ({disagrees} of {len(counted)})"
    if agrees:
        return "reproduced" if agrees == len(counted) else f"reproduced ({agrees} of {len(counted)})"
    return INCONCLUSIVE if counted else "not tested"


def build(runs: Sequence[Tests]) -> Table:
    """The table of verdicts. Raises `ReqatError` where no run tests a claim."""
    lines = _lines(runs)
    main = [line for line in lines if line.claim.main]
    others = [line for line in lines if not line.claim.main]
    rows = [_row(run, line, t) for line in lines for run, t in zip(runs, line.cells, strict=True) if t is not None]
    return Table(
        NAME,
        "What of the paper was reproduced",
        "Differences with 95% intervals over problems and training seeds, in points of accuracy, and in nats per token "
        "of held-out likelihood (less is better), and whether they agree with the paper's direction (Holm's adjusted p "
        "below 0.05); in parentheses, where inconclusive, the smallest difference that would have been found with 80% "
        "probability. Bold: the claims that the paper rests on, adjusted among themselves alone, once on each measure. "
        f"At {REFERENCE_PRECISION} unless a cell says otherwise.",
        (*(note for run in runs for note in (run.where, *run.notes)), f"Numbers of the paper: {paper.CITATION}."),
        (
            Column("Claim", align="l"),
            Column("Paper"),
            *(Column(run.heading, align="l") for run in runs),
            Column("Verdict", align="l"),
        ),
        tuple(tuple(_texts(runs, line, bold=line.claim.main) for line in part) for part in (main, others) if part),
        pd.DataFrame(rows),
    )


def block(runs: Sequence[Tests]) -> str:
    """The Markdown of the table in README: the primary claims on both measures, and the most important others."""
    heads = ["claim", "paper", *(run.heading for run in runs), "verdict"]
    out = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for line in _lines(runs):
        if line.claim.main or line.name in SHOWN:
            cells = _texts(runs, line, bold=False)
            texts = [f"{cell.text} {cell.detail}".strip() for cell in cells]
            texts[0] = f"**{texts[0]}**" if line.claim.main else texts[0]
            out.append("| " + " | ".join(texts) + " |")
    return "\n".join(["", *out, "", "Runs: " + " ".join(run.where for run in runs), ""])


def filled(text: str, inside: str, first: str = BEGIN, last: str = END) -> str | None:
    """A document with `inside` between the two markers `first` and `last`; None if it has none. Raises `ReqatError` for
    one marker without the other."""
    if first not in text and last not in text:
        return None
    before, begin, rest = text.partition(first)
    _, end, after = rest.partition(last)
    if not begin or not end:
        raise ReqatError(f"README.md has one of the lines {first!r} and {last!r}; write both, in this order.")
    return f"{before}{first}\n{inside}{last}{after}"


def _lines(runs: Sequence[Tests]) -> list[_Line]:
    """Every claim that some run tests or that is primary: the primary ones on accuracy, then on likelihood, then the
    others. Raises `ReqatError` where no run tests any."""
    if not any(run.by_claim for run in runs):
        tiers = ", ".join(tier for groups in PLACES.values() for tiers in groups for tier in tiers)
        raise ReqatError(f"no pinned run of {tiers} tests a claim; `reqat pin` promotes a finished one.")
    others = [c for c in CLAIMS if not c.main and any(c.name in run.by_claim for run in runs)]
    return [
        *(_Line(c, c.name, tuple(run.by_claim.get(c.name) for run in runs)) for c in PRIMARY),
        *(_Line(c, LIKELIHOOD + c.name, tuple(run.by_likelihood.get(c.name) for run in runs)) for c in PRIMARY),
        *(_Line(c, c.name, tuple(run.by_claim.get(c.name) for run in runs)) for c in others),
    ]


def _texts(runs: Sequence[Tests], line: _Line, *, bold: bool) -> tuple[Text, ...]:
    return (
        Text(line.name, bold=bold),
        _paper(line),
        *(_cell(t) if run.run else Text(NOT_RUN) for run, t in zip(runs, line.cells, strict=True)),
        Text(line.verdict, bold=bold),
    )


def _paper(line: _Line) -> Text:
    """The paper's number at the reference precision; where it has it at another one alone, that precision."""
    if line.name.startswith(LIKELIHOOD):
        return Text()
    claim = line.claim
    sides = (claim.a.precision or REFERENCE_PRECISION, claim.b.precision or claim.a.precision or REFERENCE_PRECISION)
    found = printed.differences(claim, REFERENCE_PRECISION)
    if not found:
        return Text()
    if other := printed.source(claim, REFERENCE_PRECISION, "", sides):
        return Text(f"({other} alone)")
    limit = printed.noise(claim, REFERENCE_PRECISION)
    mean = sum(found) / len(found)
    below = claim.kind == "direction" and abs(mean) < limit
    return Text(number(mean, sign=True), detail=f"(within its noise of {number(limit)})" if below else "")


def _cell(t: Finding | None) -> Text:
    if t is None:
        return Text()
    digits, where = 4, ""
    if isinstance(t, Tested):
        digits = 1
        where = "" if t.precision in (REFERENCE_PRECISION, BF16) else f" at {t.precision}"
    power = f" ({number(t.detectable, digits)})" if t.verdict == INCONCLUSIVE else ""
    ends = f"[{number(t.lo, digits, sign=True)}, {number(t.hi, digits, sign=True)}]"
    return Text(f"{number(t.value, digits, sign=True)} {ends}", detail=f"{t.verdict}{power}{where}")


def _row(run: Tests, line: _Line, t: Finding) -> dict[str, Any]:
    on_accuracy = isinstance(t, Tested)
    return {
        "claim": line.claim.name,
        "measure": "accuracy" if on_accuracy else "likelihood",
        "primary": t.primary if isinstance(t, Tested) else True,
        "paper": t.paper_mean if isinstance(t, Tested) else None,
        "model": run.heading,
        "precision": t.precision if isinstance(t, Tested) else REFERENCE_PRECISION,
        "difference": t.value,
        "lo": t.lo,
        "hi": t.hi,
        "margin": t.margin,
        "p": t.p,
        "p_holm": t.holm,
        "comparisons": t.comparisons,
        "detectable": t.detectable,
        "training_seeds": t.seeds,
        "verdict": t.verdict,
        "verdict_over_models": line.verdict,
    }
