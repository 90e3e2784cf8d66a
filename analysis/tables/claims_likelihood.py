"""The primary claims on held-out likelihood: the second primary outcome of the protocol."""

from __future__ import annotations

from typing import Any

import pandas as pd

from analysis.report.document import Column, Table, Text, number, p_value
from analysis.report.findings import AGREES, ALPHA, DISAGREES, POWER
from analysis.report.likelihood_claims import PARITY_SHARE, TestedLikelihood, tested
from analysis.report.names import REFERENCE_PRECISION
from analysis.report.studies import ByKind, Study, several
from analysis.report.study_words import made_notes
from analysis.report.verdicts import PRIMARY

NAME = "claims-likelihood"
STUDIES = ("likelihood",)

DIGITS = 4


def build(studies: ByKind) -> Table:
    """The primary claims as differences in nats per low-entropy token; a section a study. Raises `ReqatError` without a
    study of this kind."""
    chosen = several(studies, "likelihood")
    sections, rows, notes = [], [], []
    for study in chosen:
        found, missing = tested(study)
        sections.append(tuple(_line(t) for t in found))
        rows += [_row(study, t) for t in found]
        seeds, reference = sorted({t.seeds for t in found}), study.settings["reference"]
        notes.append(
            f"{study.tier}: solutions of {study.metrics['traces']:,} "
            f"{study.record['config']['problems']['split']} problems, training seeds: "
            f"{', '.join(map(str, seeds)) or 'none'}. Low entropy: below percentile "
            f"{study.settings['percentile']:g} of recipe {reference['recipe']} at {reference['precision']}."
        )
        notes += [f"Not tested: {name} ({why}); it counts among the {len(PRIMARY)}." for name, why in missing.items()]
        notes += made_notes(study)
    return Table(
        NAME,
        "The primary claims on held-out likelihood",
        "Differences of the mean negative log-likelihood of the same verified solutions, in nats per token, at the "
        "tokens where a reference's entropy is low (whose and below what: in the notes); less is better. "
        f"{REFERENCE_PRECISION}, at the budget that claims rest on; 95% intervals over traces and training seeds. p: "
        f"of no difference, or, for being as good as BF16 fine-tuning, of {PARITY_SHARE:.0%} of what rounding costs "
        "the base on the same traces, whose own spread is in p. Holm: adjusted for all "
        f"{len(PRIMARY)}, apart from those on accuracy. Detectable: the smallest distance from that value that would "
        f"have been found with {POWER:.0%} probability at the level of Holm's first step. Verdict: agrees or disagrees "
        f"with the paper's direction if Holm's p is below {ALPHA}. The paper "
        "reports no likelihoods; its directions are those of its accuracies.",
        tuple(notes),
        (
            Column("Claim", align="l"),
            Column("Training seeds"),
            Column("Difference (nats)"),
            Column("is tested against"),
            Column("p"),
            Column("Holm"),
            Column("detectable"),
            Column("Verdict", align="l"),
        ),
        tuple(section for section in sections if section),
        pd.DataFrame(rows, columns=None if rows else ["tier", "study", "claim"]),
    )


def _line(t: TestedLikelihood) -> tuple[Text, ...]:
    ends = ", ".join(number(end, DIGITS, sign=True) for end in (t.lo, t.hi))
    return (
        Text(t.claim.name),
        Text(str(t.seeds)),
        Text(number(t.value, DIGITS, sign=True), detail=f"[{ends}]"),
        Text(number(t.margin, DIGITS, sign=True)),
        Text(p_value(t.p)),
        Text(p_value(t.holm)),
        Text(number(t.detectable, DIGITS)),
        Text(t.verdict, bold=t.verdict in (AGREES, DISAGREES)),
    )


def _row(study: Study, t: TestedLikelihood) -> dict[str, Any]:
    return {
        "tier": study.settings["tier"],
        "study": study.id,
        "claim": t.claim.name,
        "precision": REFERENCE_PRECISION,
        "a": t.a,
        "b": t.b,
        **t.columns(),
        "trained_seeds": t.seeds,
    }
