"""Table 15: sampled and greedy decoding of the same models, by epochs of fine-tuning and at the claim budget."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from analysis.report import paper
from analysis.report.cells import Entry, Results
from analysis.report.document import Column, Table, Text, best, number, percent, tokens
from analysis.report.lines import bf16_at_budget
from analysis.report.names import BF16
from analysis.report.rows import footer, measured_row, paper_row, tidy
from analysis.report.texts import difference_text, measured_text
from analysis.tables._columns import BOLD, METHOD, PRECISION
from analysis.tables._epochs import epochs_of
from reqat.config.errors import ReqatError
from reqat.evaluation.statistics import clustered_means

if TYPE_CHECKING:
    from reqat.evaluation.outcomes import Outcomes

NAME = "table15"

SUBSET = "subset"
"""In the condition of lines that repeat one subset of traces."""


def build(results: Results, artifact: str = NAME) -> Table:
    """Paper Table 15: the same models under sampling and under greedy decoding.

    Sampled and greedy responses of one model to one problem are compared, the sampled ones by their mean over seeds:
    greedy decoding has one response, so the pairing by seed of the other tables has nothing to pair.
    """
    entries = results.of(artifact)
    many = len(results.models(artifact)) > 1
    sampled = [e for e in entries if e.conditions["decoding"] == "sampled"]
    greedy = {_line(e): e for e in entries if e.conditions["decoding"] == "greedy"}
    repeated = any(SUBSET in e.conditions for e in entries)
    epochs = sorted({int(r.condition["epochs"]) for r in paper.select(artifact)})
    theirs = f"Paper: R1-Llama-8B, AIME-120 (%), after {epochs[0]} to {epochs[-1]} epochs"
    columns = [
        *([Column("Model", align="l")] if many else []),
        PRECISION,
        METHOD,
        *([Column("Epochs")] if repeated else []),
        Column("Tokens"),
        Column("sampled", "Accuracy (%)"),
        Column("greedy", "Accuracy (%)"),
        Column("greedy \u2212 sampled (points)"),
        Column("sampled", f"Difference to {BF16} (points)"),
        Column("greedy", f"Difference to {BF16} (points)"),
        Column("sampled", theirs, "c"),
        Column("greedy", theirs, "c"),
    ]

    def beside(e: Entry) -> Entry | None:
        return bf16_at_budget(e, [other for other in entries if other.condition == e.condition])

    def of_paper(e: Entry, flag: dict[str, str]) -> Text:
        # Beside the line of its epochs, where there are such lines; else all of them beside the one budget.
        asked = epochs if not repeated else [epochs_of(results, e)] if SUBSET in e.conditions else []
        found = [
            paper.value(artifact, precision=e.precision, method=e.method, epochs=str(epoch), **flag) for epoch in asked
        ]
        return Text(", ".join(number(v, 1) for v in found if v is not None)) if any(found) else Text()

    sections, rows = [], []
    pairs = [(e, greedy[_line(e)]) for e in sampled]
    for model, precision in dict.fromkeys((e.model, e.precision) for e in sampled):
        group = [pair for pair in pairs if (pair[0].model, pair[0].precision) == (model, precision)]
        bolds = [
            best([100 * results.estimate(pair[side]).value if precision != BF16 else None for pair in group])
            for side in (0, 1)
        ]
        section = []
        for i, pair in enumerate(group):
            e = pair[0]
            value, lo, hi = greedy_minus_sampled(results, pair[1], e)
            cells = [Text(model)] if many else []
            cells += [Text(precision), Text(e.method)]
            if repeated:
                cells.append(Text(str(epochs_of(results, e))) if SUBSET in e.conditions else Text())
            cells.append(Text(tokens(e.total_tokens)))
            cells += [measured_text(results.estimate(pair[side]), bolds[side][i]) for side in (0, 1)]
            cells.append(
                Text(percent(value, sign=True), detail=f"[{percent(lo, sign=True)}, {percent(hi, sign=True)}]")
            )
            for one in pair:
                other = beside(one)
                cells.append(difference_text(results.paired(one, other) if other else None))
            cells += [of_paper(e, {"T": "0.6"}), of_paper(e, {"greedy": "1"})]
            section.append(tuple(cells))
            rows += [
                measured_row(results, pair[side], reference=beside(pair[side])) | {"best": bolds[side][i]}
                for side in (0, 1)
            ]
            shared = ("source", "tier", "model", "precision", "method", "recipe", "total_tokens", "multiple")
            made = ("n_problems", "training_seeds", "arithmetic", "commit")
            rows.append(
                {name: rows[-1][name] for name in (*shared, *made)}
                | {"metric": "greedy minus sampled", "family": "all"}
                | {"value": 100 * value, "lo": 100 * lo, "hi": 100 * hi}
            )
        sections.append(tuple(section))
    rows += [paper_row(r) for r in paper.select(artifact)]
    return Table(
        artifact,
        results.title(artifact),
        "One model, two ways to decode: sampled as in every other table, and greedy (one response a problem). "
        "Differences to BF16 are at equal budget (untrained: to the BF16 base) and within one way of decoding."
        + (
            " Lines with a number of epochs went over one subset of traces so many times, as the paper's; the others "
            "saw other traces for every token."
            if repeated
            else ""
        ),
        footer(
            results,
            entries,
            BOLD,
            "Greedy \u2212 sampled: mean over seeds on the same problems and training runs, 95% interval clustered by "
            "problem; it says nothing about other training runs.",
            *(["Tables 9, 13 and 15 are of the same runs."] if repeated else []),
            f"Numbers of the paper, an epoch each: {paper.CITATION}.",
        ),
        tuple(columns),
        tuple(sections),
        tidy(rows),
    )


def _line(e: Entry) -> tuple[str, str, str, int | None, bool]:
    return e.model, e.precision, e.method, e.multiple, SUBSET in e.conditions


def greedy_minus_sampled(results: Results, greedy: Entry, sampled: Entry) -> tuple[float, float, float]:
    """Accuracy (a fraction) of greedy decoding minus the mean over sampling seeds, with its 95% interval clustered by
    problem.

    A problem's value is the mean over the training runs that both have; the problems must be the same. Raises
    `ReqatError` where they are not.
    """

    def by_problem(run: Outcomes) -> pd.Series:
        return pd.Series(run.correct, dtype=float).groupby(list(run.problem_id)).mean()

    differences = []
    for a, b in zip(*(results.outcomes(e) for e in results.common(greedy, sampled)), strict=True):
        greedy_P, sampled_P = by_problem(a), by_problem(b)
        if set(greedy_P.index) != set(sampled_P.index):
            raise ReqatError(f"{greedy} and {sampled} were graded on different problems; evaluate both again.")
        differences.append(greedy_P - sampled_P)
    mean_P = pd.concat(differences, axis=1).mean(axis=1)
    found = clustered_means(mean_P.to_numpy(), np.zeros(len(mean_P)), np.arange(len(mean_P)), 1)
    return float(found.value_G[0]), float(found.lo_G[0]), float(found.hi_G[0])
