"""The tables: from entries of the plan and their estimates to `Table` values.

Every builder has one form, `builder(results, artifact) -> Table`. Accuracies are percent with 95% intervals clustered
by problem; differences are percentage points from paired comparisons on the same problems and sampling seeds; the
paper's numbers stand in a block of their own, never mixed with ours. Where the plan has no such cell (a dash), the
design asks for none; a cell that the plan has and nobody has made is an error.

    table1               precisions x methods x total budgets
    table2               task families in place of the paper's benchmarks
    table4               QAT on the traces of fine-tuning, or on others
    table5               parts of Q-FIT: final loss and accuracy
    table6               accuracy by response length (made of table2's cells)
    table15              sampled and greedy decoding of the same models
    ptq                  round-to-nearest and GPTQ, of the base model and after fine-tuning
    claims               the paper's comparisons, tested (made of table1's and table4's cells)
    anything else        one line a method or condition, columns by budget
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from analysis.registry import table_names
from analysis.report import paper
from analysis.report.cells import Entry, Results
from analysis.report.document import EMPTY, Column, Table, Text, best, interval, number, p_value, percent, tokens
from analysis.report.names import BF16, REFERENCE_PRECISION
from analysis.report.verdicts import ALPHA, PARITY_POINTS, tested
from reqat.config.errors import ReqatError

if TYPE_CHECKING:
    from reqat.evaluation.outcomes import Outcomes
    from reqat.evaluation.statistics import Difference, Estimate

Reference = Callable[[Entry, Sequence[Entry]], Entry | None]


# -- lines -----------------------------------------------------------------------------------------------------------
@dataclass
class Line:
    """Entries that differ in their budget only."""

    model: str
    precision: str
    method: str
    condition: str
    by: dict[int | None, Entry] = field(default_factory=dict)  # multiple of the QAT budget -> entry

    @property
    def quantized(self) -> bool:
        """Whether any part is in 4 bits."""
        return self.precision != BF16


def lines(entries: Iterable[Entry], method: Callable[[Entry], str] = lambda e: e.method) -> list[Line]:
    """Entries by line, in the plan's order; `method` may rename (so that "FT+GPTQ" continues "GPTQ")."""
    out: dict[tuple[str, str, str, str], Line] = {}
    for e in entries:
        line = out.setdefault(
            (e.model, e.precision, method(e), e.condition), Line(e.model, e.precision, method(e), e.condition)
        )
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


def bf16_at_budget(entry: Entry, entries: Sequence[Entry]) -> Entry | None:
    """BF16 with the same total budget: fine-tuned, or the untouched base where nothing is trained."""
    if entry.precision == BF16:
        return None
    found = [e for e in entries if e.precision == BF16 and e.model == entry.model and e.multiple == entry.multiple]
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
        ]
        return found[0] if found and found[0] is not entry else None

    return find


# -- numbers as text and as rows -------------------------------------------------------------------------------------
def measured_text(e: Estimate, bold: bool = False) -> Text:
    """`63.1` with `[60.2, 65.9]` under it."""
    return Text(percent(e.value), bold, interval(e.lo, e.hi))


def difference_text(d: Difference | None) -> Text:
    """`−2.1` with its p-value under it."""
    if d is None:
        return Text()
    p = p_value(d.p)
    return Text(percent(d.value, sign=True), detail=f"p{p}" if p.startswith("<") else f"p={p}")


def reported_text(value: float | None, bold: bool = False, digits: int = 1) -> Text:
    """A number of the paper."""
    return Text() if value is None else Text(number(value, digits), bold)


def measured_row(
    results: Results,
    entry: Entry,
    *,
    metric: str = "accuracy",
    family: str | None = None,
    reference: Entry | None = None,
) -> dict[str, Any]:
    """A row of the tidy CSV: what was measured, percent and percentage points, with everything needed to check it."""
    e = results.estimate(entry, family)
    made = results.provenance([entry])
    row: dict[str, Any] = {
        "source": "measured",
        "tier": made.tier,
        "model": entry.model,
        "precision": entry.precision,
        "method": entry.method,
        "condition": entry.condition,
        "recipe": entry.recipe,
        "total_tokens": entry.total_tokens,
        "multiple": entry.multiple,
        "metric": metric,
        "family": family or "all",
        "value": 100 * e.value,
        "lo": 100 * e.lo,
        "hi": 100 * e.hi,
        "unfinished": e.n_unfinished / e.n_responses,
    }
    if reference is not None:
        d = results.paired(entry, reference, family)
        row |= {
            "reference": f"{reference.precision} {reference.method} {reference.condition}".strip(),
            "difference": 100 * d.value,
            "difference_lo": 100 * d.lo,
            "difference_hi": 100 * d.hi,
            "p": d.p,
        }
    return row | _made(results, entry, e.n_problems)


def _made(results: Results, entry: Entry, n_problems: int) -> dict[str, Any]:
    made = results.provenance([entry])
    return {
        "n_problems": n_problems,
        "n_sampling_seeds": made.sampling_seeds[-1],
        "training_seeds": " ".join(map(str, entry.training_seeds)),
        "decoding": "; ".join(made.decoding),
        "arithmetic": "; ".join(made.arithmetic),
        "commit": " ".join(made.commits),
        "evaluations": " ".join(c.evaluation for c in entry.cells),
    }


def paper_row(r: paper.Reported) -> dict[str, Any]:
    """A row of the tidy CSV: a number of the paper."""
    condition = ";".join(f"{k}={v}" for k, v in r.condition.items() if k != "total_tokens")
    return {
        "source": "paper",
        "model": r.model,
        "precision": r.precision,
        "method": r.method,
        "condition": condition,
        "total_tokens": r.total_tokens,
        "multiple": paper.multiple(r.total_tokens),
        "metric": r.metric,
        "value": r.value,
    }


def tidy(rows: Sequence[dict[str, Any]]) -> pd.DataFrame:
    """Rows as a frame; integers stay integers beside missing values."""
    data = pd.DataFrame(list(rows))
    for column in ("total_tokens", "multiple", "n_problems", "n_sampling_seeds"):
        if column in data:
            data[column] = data[column].astype("Int64")
    return data


def footer(results: Results, entries: Sequence[Entry], *more: str) -> tuple[str, ...]:
    """Who made the numbers, how they were made, and what the intervals do and do not cover."""
    made = results.provenance(entries)
    one, several = made.training_seeds[0] == 1, made.training_seeds[-1] > 1
    seeds = "Intervals: 95%, clustered by problem"
    seeds += ", over problems and training runs" if several else ""
    seeds += "; of one training run they say nothing about another" if one else ""
    seeds += ". Differences use the training seeds that both sides have." if one and several else "."
    return (*made.notes(), seeds, *more)


# -- the grid that most tables are -----------------------------------------------------------------------------------
def grid(
    results: Results,
    artifact: str,
    *,
    caption: str,
    reference: Reference,
    reference_name: str,
    stub: Sequence[Column],
    labels: Callable[[Line], Sequence[str]],
    method: Callable[[Entry], str] = lambda e: e.method,
    reported: Callable[[Line, int | None], float | None] | None = None,
    reported_name: str = "",
    reported_columns: Sequence[tuple[int | None, str]] = (),
    reported_rows: Sequence[paper.Reported] = (),
    bold: bool = True,
    notes: Sequence[str] = (),
) -> Table:
    """Lines x budgets: accuracy with interval, difference to a reference with p, the paper's number.

    Bold is the best quantized line of a precision and budget. A section a model and precision.
    """
    entries = results.of(artifact)
    many = len(results.models(artifact)) > 1
    heads = budget_names(entries)
    all_lines = lines(entries, method)
    compared = [m for m in heads if any(reference(li.by[m], entries) for li in all_lines if m in li.by)]
    columns = [
        *([Column("Model", align="l")] if many else []),
        *stub,
        *(Column(h, "Accuracy (%)") for h in heads.values()),
        *(Column(heads[m], reference_name) for m in compared),
        *(Column(h, reported_name) for _, h in reported_columns),
    ]
    sections: list[tuple[tuple[Text, ...], ...]] = []
    rows: list[dict[str, Any]] = []
    for (model, _), group in _runs(all_lines, lambda li: (li.model, li.precision)):
        bolds = {
            m: _bold(group, [results.estimate(li.by[m]).value if m in li.by else None for li in group], bold)
            for m in heads
        }
        paper_bolds = {
            m: _bold(group, [_fraction(reported(li, m)) if reported else None for li in group], bold)
            for m, _ in reported_columns
        }
        section = []
        for i, li in enumerate(group):
            cells = [Text(model)] if many else []
            cells += [Text(label) for label in labels(li)]
            cells += [measured_text(results.estimate(li.by[m]), bolds[m][i]) if m in li.by else Text() for m in heads]
            for m in compared:
                other = reference(li.by[m], entries) if m in li.by else None
                cells.append(difference_text(results.paired(li.by[m], other)) if other else Text())
            cells += [
                reported_text(reported(li, m) if reported else None, paper_bolds[m][i]) for m, _ in reported_columns
            ]
            section.append(tuple(cells))
            rows += [
                measured_row(results, e, reference=reference(e, entries)) | {"best": bolds[m][i]}
                for m, e in li.by.items()
            ]
        sections.append(tuple(section))
    # Neighbouring one-line sections read better as one block.
    if all(len(s) == 1 for s in sections):
        sections = [tuple(s[0] for s in sections)]
    rows += [paper_row(r) for r in reported_rows]
    note = [f"Numbers of the paper: {paper.CITATION}."] if reported_columns else []
    return Table(
        artifact,
        results.title(artifact),
        caption,
        footer(results, entries, *notes, *note),
        tuple(columns),
        tuple(sections),
        tidy(rows),
    )


def _runs(items: Sequence[Line], key: Callable[[Line], tuple[str, str]]) -> list[tuple[tuple[str, str], list[Line]]]:
    grouped: dict[tuple[str, str], list[Line]] = {}
    for item in items:
        grouped.setdefault(key(item), []).append(item)
    return list(grouped.items())


def _bold(group: Sequence[Line], values: Sequence[float | None], wanted: bool) -> list[bool]:
    """Best as printed (one decimal of a percent) among a section's quantized lines."""
    if not wanted:
        return [False] * len(group)
    return best([None if v is None or not li.quantized else 100 * v for li, v in zip(group, values, strict=True)])


def _fraction(value: float | None) -> float | None:
    return None if value is None else value / 100


PRECISION, METHOD = Column("Precision", align="l"), Column("Method", align="l")
_BOLD = "Bold: best quantized method of a precision and budget, as printed."
_SAME_BUDGET = "Every method of a column spent the same total of training tokens."


def _paper_heads(artifact: str, *, untrained: bool) -> list[tuple[int | None, str]]:
    heads: list[tuple[int | None, str]] = [(paper.multiple(t), tokens(t)) for t in paper.budgets(artifact)]
    return [(None, "untrained"), *heads] if untrained else heads


def _paper_lookup(artifact: str) -> Callable[[Line, int | None], float | None]:
    """(line, multiple) -> number of the paper's `artifact`, by precision, method and condition."""
    table: dict[tuple[Any, ...], float] = {}
    for r in paper.select(artifact, metric="AIME-120"):
        condition = frozenset((k, v) for k, v in r.condition.items() if k != "total_tokens")
        table[r.precision, r.method, condition, paper.multiple(r.total_tokens)] = r.value
    return lambda li, m: table.get((li.precision, li.method, frozenset(paper.parse_condition(li.condition).items()), m))


def table1(results: Results, artifact: str = "table1") -> Table:
    """Paper Table 1: three precisions x methods x total budgets, the distance to BF16, and the paper's own block."""
    source = "table1"
    return grid(
        results,
        artifact,
        reference=bf16_at_budget,
        reference_name=f"Difference to {BF16} (points)",
        stub=(PRECISION, METHOD),
        labels=lambda li: (li.precision, li.method),
        reported=_paper_lookup(source),
        reported_name="Paper: R1-Qwen-14B, AIME-120 (%)",
        reported_columns=_paper_heads(source, untrained=True),
        reported_rows=paper.select(source),
        caption="Accuracy with 95% interval, by total training budget (fine-tuning and QAT together). "
        "Differences are to BF16 "
        "fine-tuning with the same total budget, where nothing is trained to the BF16 base; p from a paired test on "
        "the "
        "same problems and sampling seeds. The right block is what the paper reports on its own model and benchmark, "
        f"where the QAT budget is 70M tokens; here it is {tokens(results.plan.tier.budget.qat_tokens)}.",
        notes=(_BOLD, _SAME_BUDGET),
    )


def table4(results: Results, artifact: str = "table4") -> Table:
    """Paper Table 4: QAT alone, QAT after FT on other traces, QAT after FT on the same traces."""
    says = {"na": EMPTY, "no": "different", "yes": "same"}
    return grid(
        results,
        artifact,
        reference=where("aligned=no"),
        reference_name="Difference to different traces (points)",
        stub=(PRECISION, METHOD, Column("QAT's traces", align="l")),
        labels=lambda li: (li.precision, li.method, says[paper.parse_condition(li.condition)["aligned"]]),
        reported=_paper_lookup("table4"),
        reported_name="Paper: R1-Qwen-14B, AIME-120 (%)",
        reported_columns=_paper_heads("table4", untrained=False),
        reported_rows=paper.select("table4"),
        caption="Does it matter that QAT sees the very traces of fine-tuning? Both FT+QAT lines have the "
        "same first stage and the "
        "same number of QAT tokens; only the choice of traces differs. QAT alone spends the whole budget on QAT.",
        notes=(_BOLD, _SAME_BUDGET),
    )


def ptq(results: Results, artifact: str = "ptq") -> Table:
    """Post-training quantization: rounding (RTN) and GPTQ, of the base model and of the fine-tuned one."""

    def name(e: Entry) -> str:
        if e.precision == BF16:
            return EMPTY
        return (
            e.method.removeprefix("FT+").replace("PTQ", "RTN", 1)
            if "GPTQ" not in e.method
            else e.method.removeprefix("FT+")
        )

    def of_paper(li: Line, m: int | None) -> float | None:
        method = {(EMPTY, False): "Baseline", (EMPTY, True): "FT", ("RTN", False): "PTQ", ("RTN", True): "FT+PTQ"}.get(
            (li.method, m is not None)
        )
        found = paper.by_budget("table1", precision=li.precision, method=method) if method else {}
        return {paper.multiple(total): value for total, value in found.items()}.get(m)

    claim = results.plan.tier.budget.claim_total
    heads: list[tuple[int | None, str]] = [(None, "untrained")]
    heads += [(m, h) for m, h in _paper_heads("table1", untrained=False) if m == claim]
    return grid(
        results,
        artifact,
        reference=bf16_at_budget,
        reference_name=f"Difference to {BF16} (points)",
        stub=(PRECISION, Column("Solver", align="l")),
        labels=lambda li: (li.precision, li.method),
        method=name,
        reported=of_paper,
        reported_name="Paper's PTQ: R1-Qwen-14B, AIME-120 (%)",
        reported_columns=heads,
        reported_rows=[
            r
            for r in paper.select("table1")
            if r.method in ("Baseline", "FT", "PTQ", "FT+PTQ") and paper.multiple(r.total_tokens) in (None, claim)
        ],
        caption="Quantization without training, of the base model (untrained) and of the fine-tuned one. "
        "RTN rounds to nearest; "
        "rotated: a block Hadamard rotation of inputs and weights first. The transcribed numbers do not name the "
        "solver of "
        "the paper's PTQ lines; they stand beside RTN.",
        notes=(_BOLD,),
    )


def table2(results: Results, artifact: str = "table2") -> Table:
    """Paper Table 2: task families in place of GSM8K, MATH-500 and AIME."""
    entries = results.of(artifact)
    many = len(results.models(artifact)) > 1
    families = sorted({f for e in entries for f in results.families(e)})
    parts: list[str | None] = [*families, *([None] if len(families) > 1 else [])]
    metrics = ("GSM8K", "MATH-500", "AIME-120")
    columns = [
        *([Column("Model", align="l")] if many else []),
        PRECISION,
        METHOD,
        Column("Tokens"),
        *(Column("all" if f is None else f.replace("_", " "), "Accuracy (%)") for f in parts),
        Column("all families", f"Difference to {BF16} (points)"),
        *(Column(m, "Paper: R1-Llama-8B, 350M tokens (%)") for m in metrics),
    ]
    rows: list[dict[str, Any]] = []
    sections = []
    for (model, precision), group in _runs(lines(entries), lambda li: (li.model, li.precision)):
        flat = [e for li in group for e in li.by.values()]
        bolds = {
            f: best([100 * results.estimate(e, f).value if precision != BF16 else None for e in flat]) for f in parts
        }
        theirs = {
            m: [paper.value("table2", precision=e.precision, method=e.method, metric=m) for e in flat] for m in metrics
        }
        section = []
        for i, e in enumerate(flat):
            other = bf16_at_budget(e, entries)
            cells = [Text(model)] if many else []
            cells += [Text(precision), Text(e.method), Text(tokens(e.total_tokens))]
            cells += [measured_text(results.estimate(e, f), bolds[f][i]) for f in parts]
            cells.append(difference_text(results.paired(e, other) if other else None))
            cells += [reported_text(theirs[m][i], precision != BF16 and best(theirs[m])[i]) for m in metrics]
            section.append(tuple(cells))
            rows += [measured_row(results, e, family=f, reference=other) | {"best": bolds[f][i]} for f in parts]
        sections.append(tuple(section))
    rows += [paper_row(r) for r in paper.select("table2")]
    return Table(
        artifact,
        results.title(artifact),
        "Accuracy with 95% interval on each family of problems, all methods at one total budget (untrained ones at "
        "none). The "
        "difference is to BF16 fine-tuning with the same budget (to the BF16 base where nothing is trained), over all "
        "families.",
        footer(results, entries, _BOLD, f"Numbers of the paper: {paper.CITATION}."),
        tuple(columns),
        tuple(sections),
        tidy(rows),
    )


_BY_LENGTH = ("Baseline", "FT", "PTQ", "FT+PTQ", "QAT", "ReQAT-TQS")  # the paper's lines; its "ReQAT" is TQS
_LENGTH_BINS = 4


def table6(results: Results, artifact: str = "table6") -> Table:
    """Paper Table 6: accuracy by length of the response, made of the cells of `table2`.

    The bins are quartiles of the lengths of all responses of a model's lines together: one column means the same
    lengths in every line, and lines differ in how many of their responses fall into it.
    """
    from analysis.entropy import length_bins, length_edges
    from reqat.evaluation.statistics import clustered_means

    entries = [e for e in results.of("table2") if e.method in _BY_LENGTH]
    if not entries:
        raise ReqatError(f"tier {results.plan.tier.name}: table2 has none of the lines {', '.join(_BY_LENGTH)}.")
    models = list(dict.fromkeys(e.model for e in entries))
    pooled = {
        model: np.concatenate([r.n_tokens for e in entries if e.model == model for r in results.outcomes(e)])
        for model in models
    }
    edges = {model: length_edges(lengths, _LENGTH_BINS) for model, lengths in pooled.items()}
    bins = max(len(found) for found in edges.values()) - 1
    theirs = list(dict.fromkeys(r.condition["response_tokens"] for r in paper.select("table6")))
    one = len(models) == 1
    names = [f"{lo + 1} to {hi}" for lo, hi in zip(edges[models[0]], edges[models[0]][1:], strict=False)]
    columns = [
        *([] if one else [Column("Model", align="l")]),
        PRECISION,
        METHOD,
        Column("Mean tokens"),
        Column("Cut off (%)"),
        *(Column(names[b] if one else f"bin {b + 1}", "Accuracy (%) by response tokens") for b in range(bins)),
        *(Column(span, "Paper: R1-Qwen-14B, AIME-120 (%)") for span in theirs),
    ]
    sections, rows = [], []
    for (model, _), group in _runs(lines(entries), lambda li: (li.model, li.precision)):
        section = []
        for entry in (e for li in group for e in li.by.values()):
            runs = results.outcomes(entry)
            length, correct = (np.concatenate([getattr(r, k) for r in runs]) for k in ("n_tokens", "correct"))
            problem = pd.factorize(np.concatenate([np.asarray(r.problem_id, dtype=object) for r in runs]))[0]
            bin_T = length_bins(length, edges[model])
            means = clustered_means(correct, bin_T, problem, bins, proportion=True)
            cut_off = 1 - float(np.concatenate([r.finished for r in runs]).mean())
            of_paper = [
                paper.select(
                    "table6",
                    precision=entry.precision,
                    method=entry.method.replace("ReQAT-TQS", "ReQAT"),
                    response_tokens=span,
                )
                for span in theirs
            ]
            cells = [] if one else [Text(model)]
            cells += [Text(entry.precision), Text(entry.method)]
            cells += [Text(number(float(length.mean()))), Text(percent(cut_off))]
            made = {
                k: v for k, v in measured_row(results, entry).items() if k not in ("value", "lo", "hi", "unfinished")
            }
            for b, (lo, hi) in enumerate(zip(edges[model], edges[model][1:], strict=False)):
                n = int(means.n_G[b])
                detail = f"{interval(means.lo_G[b], means.hi_G[b])}, n={n:,}" if n else "n=0"
                cells.append(Text(percent(float(means.value_G[b])), detail=detail))
                inside = bin_T == b
                rows.append(
                    made
                    | {
                        "metric": "accuracy",
                        "tokens_lo": lo + 1,
                        "tokens_hi": hi,
                        "value": 100 * float(means.value_G[b]),
                        "lo": 100 * float(means.lo_G[b]),
                        "hi": 100 * float(means.hi_G[b]),
                        "n_responses": n,
                        "n_problems": int(means.clusters_G[b]),
                        "unfinished": 1 - float(np.concatenate([r.finished for r in runs])[inside].mean())
                        if n
                        else 0.0,
                    }
                )
            cells += [Text()] * (bins - len(edges[model]) + 1)
            cells += [Text(number(r[0].value), detail=f"n={r[0].condition['n']}") if r else Text() for r in of_paper]
            section.append(tuple(cells))
        sections.append(tuple(section))
    rows += [paper_row(r) | {"n_responses": int(r.condition["n"])} for r in paper.select("table6")]
    data = tidy(rows)
    data[["tokens_lo", "tokens_hi", "n_responses"]] = data[["tokens_lo", "tokens_hi", "n_responses"]].astype("Int64")
    limits = "; ".join(f"{model}: {', '.join(f'{hi:,}' for hi in ends[1:])}" for model, ends in edges.items())
    return Table(
        artifact,
        "Accuracy by response length",
        "Accuracy of the responses whose length falls into each bin, with 95% interval and the number of responses; "
        "the bins are quartiles of the lengths of all lines' responses together. A response that the token limit cut "
        "off counts as it stands, in the bin of its length. Lines differ in which problems end up in a bin, so that a "
        "column compares no two of them on the same problems. The right block is what the paper reports, by bins of "
        "8K tokens.",
        (
            *results.provenance(entries).notes(),
            "Intervals: 95%, clustered by problem; training runs are taken as given.",
            f"Last length of each bin, {limits} tokens.",
            f"Numbers of the paper: {paper.CITATION}.",
        ),
        tuple(columns),
        tuple(sections),
        data,
    )


def final_losses(results: Results, entry: Entry) -> list[float]:
    """Final training loss (nats a response token) of the stage behind each cell of an entry."""
    out = []
    for cell in entry.cells:
        stage = results.plan.evaluation(cell.evaluation).stage
        loss = results.metrics(stage).get("final_loss")
        if loss is None:
            raise ReqatError(
                f"{results.folder(stage)}: the record has no final_loss, so {entry} has none; {results.remedy([stage])}"
            )
        out.append(float(loss))
    return out


def table5(results: Results, artifact: str = "table5") -> Table:
    """Paper Table 5: E1M2, pre-RoPE scale and post-RoPE shift on and off; final QAT loss and accuracy."""
    keys = ("e1m2", "pre_rope_scale", "post_rope_shift")
    entries = results.of(artifact)
    many = len(results.models(artifact)) > 1
    none = ";".join(f"{k}=0" for k in keys)
    reference = where(none)
    compared = any(reference(e, entries) for e in entries)
    columns = [
        *([Column("Model", align="l")] if many else []),
        *(Column(n, "Q-FIT", "c") for n in ("E1M2", "scale", "shift")),
        Column("Tokens"),
        Column("Final loss (nats)"),
        Column("Accuracy (%)"),
        *([Column("Difference to none (points)")] if compared else []),
        Column("final loss", "Paper: R1-Qwen-14B, 280M tokens"),
        Column("AIME-120 (%)", "Paper: R1-Qwen-14B, 280M tokens"),
    ]
    values = [results.estimate(e).value for e in entries]
    losses = [final_losses(results, e) for e in entries]
    their_loss, theirs = (
        [paper.value("table5", precision=e.precision, method=e.method, metric=m, **e.conditions) for e in entries]
        for m in ("final_loss", "AIME-120")
    )
    bolds = _best_by_model(entries, [100 * v for v in values])
    lowest = _best_by_model(entries, [-fmean(x) for x in losses], digits=4)
    section, rows = [], []
    for i, e in enumerate(entries):
        other = reference(e, entries)
        loss = Text(
            number(fmean(losses[i]), 4), lowest[i], f"\u00b1 {stdev(losses[i]):.4f}" if len(losses[i]) > 1 else ""
        )
        cells = [Text(e.model)] if many else []
        cells += [Text("yes" if e.conditions[k] == "1" else EMPTY) for k in keys]
        cells += [Text(tokens(e.total_tokens)), loss, measured_text(results.estimate(e), bolds[i])]
        cells += [difference_text(results.paired(e, other) if other else None)] if compared else []
        cells += [
            reported_text(their_loss[i], best([None if v is None else -v for v in their_loss], 4)[i], 4),
            reported_text(theirs[i], best(theirs)[i]),
        ]
        section.append(tuple(cells))
        rows.append(measured_row(results, e, reference=other) | {"best": bolds[i]})
        common = {
            k: v
            for k, v in rows[-1].items()
            if k
            in (
                "source",
                "tier",
                "model",
                "precision",
                "method",
                "condition",
                "recipe",
                "total_tokens",
                "multiple",
                "training_seeds",
                "arithmetic",
                "commit",
            )
        }
        rows.append(
            common
            | {
                "metric": "final_loss",
                "value": fmean(losses[i]),
                "best": lowest[i],
                "sd": stdev(losses[i]) if len(losses[i]) > 1 else math.nan,
            }
        )
    rows += [paper_row(r) for r in paper.select("table5")]
    return Table(
        artifact,
        results.title(artifact),
        "E1M2 in place of E2M1 for the KV cache, the pre-RoPE scale and the post-RoPE shift of Q-FIT, one at a time "
        "and together. "
        "Final loss: mean of the QAT stage's last 5% of steps, in nats a response token"
        + (", with the standard deviation over training seeds" if any(len(x) > 1 for x in losses) else "")
        + ".",
        footer(results, entries, "Bold: best of a column, as printed.", f"Numbers of the paper: {paper.CITATION}."),
        tuple(columns),
        (tuple(section),),
        tidy(rows),
    )


def table15(results: Results, artifact: str = "table15") -> Table:
    """Paper Table 15: the same models under sampling and under greedy decoding.

    Sampled and greedy responses of one model to one problem are compared, the sampled ones by their mean over seeds:
    greedy decoding has one response, so the pairing by seed of the other tables has nothing to pair.
    """
    entries = results.of(artifact)
    many = len(results.models(artifact)) > 1
    sampled = [e for e in entries if e.conditions["decoding"] == "sampled"]
    greedy = {(e.model, e.precision, e.method, e.multiple): e for e in entries if e.conditions["decoding"] == "greedy"}
    epochs = sorted({int(r.condition["epochs"]) for r in paper.select(artifact)})
    theirs = f"Paper: R1-Llama-8B, AIME-120 (%), after {epochs[0]} to {epochs[-1]} epochs"
    columns = [
        *([Column("Model", align="l")] if many else []),
        PRECISION,
        METHOD,
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
        found = [
            paper.value(artifact, precision=e.precision, method=e.method, epochs=str(epoch), **flag) for epoch in epochs
        ]
        return Text(", ".join(number(v, 1) for v in found if v is not None)) if found[0] is not None else Text()

    sections, rows = [], []
    pairs = [(e, greedy[e.model, e.precision, e.method, e.multiple]) for e in sampled]
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
            cells += [Text(precision), Text(e.method), Text(tokens(e.total_tokens))]
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
        "Differences to BF16 are at equal budget (untrained: to the BF16 base) and within one way of decoding.",
        footer(
            results,
            entries,
            _BOLD,
            "Greedy \u2212 sampled: mean over seeds on the same problems and training runs, 95% interval clustered by "
            "problem; it says nothing about other training runs.",
            f"Numbers of the paper, an epoch each: {paper.CITATION}.",
        ),
        tuple(columns),
        tuple(sections),
        tidy(rows),
    )


def greedy_minus_sampled(results: Results, greedy: Entry, sampled: Entry) -> tuple[float, float, float]:
    """Accuracy (a fraction) of greedy decoding minus the mean over sampling seeds, with its 95% interval clustered by
    problem.

    A problem's value is the mean over the training runs that both have; the problems must be the same. Raises
    `ReqatError` where they are not.
    """
    from reqat.evaluation.statistics import clustered_means

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


def _best_by_model(entries: Sequence[Entry], values: Sequence[float], digits: int = 1) -> list[bool]:
    out = [False] * len(entries)
    for model in {e.model for e in entries}:
        at = [i for i, e in enumerate(entries) if e.model == model]
        for i, flag in zip(at, best([values[i] for i in at], digits), strict=True):
            out[i] = flag
    return out


_CAPTIONS = {
    "global-scale": "One trained model, evaluated with three modes of the FP32 global scale of activations, "
    "keys and values: from the "
    "whole tensor at hand (dynamic, the paper's), from each row alone (row: a response does not depend on its "
    "batch), or fixed by calibration (static).",
    "sem": "Selective entropy minimization: its weight lambda, and a binary mask (at lambda 0.1) in place "
    "of the soft one.",
    "smollm": "A published small model under quantization without training. Its weights went through 4-bit "
    "integers (Q4_1) before "
    "they came here.",
}
_FIRST = {"global-scale": "global_scale=dynamic", "sem": "sem_lambda=none"}


def generic(results: Results, artifact: str) -> Table:
    """Any other artifact of `config/recipes.yaml`: one line a precision, method and condition; columns by budget.

    The reference is BF16 at the same budget if the artifact has BF16 cells, else its first condition.
    """
    entries = results.of(artifact)
    has_bf16 = any(e.precision == BF16 for e in entries)
    first = _FIRST.get(artifact, entries[0].condition)
    conditional = any(e.condition for e in entries)

    def says(condition: str) -> str:
        return condition.replace("=", ": ").replace("_", " ").replace(";", ", ")

    stub = (PRECISION, METHOD, *([Column("Condition", align="l")] if conditional else []))
    return grid(
        results,
        artifact,
        caption=_CAPTIONS.get(artifact, results.title(artifact) + "."),
        reference=bf16_at_budget if has_bf16 else where(first),
        reference_name=f"Difference to {BF16} (points)" if has_bf16 else f"Difference to {says(first)} (points)",
        stub=stub,
        labels=lambda li: (li.precision, li.method, *([says(li.condition)] if conditional else [])),
        bold=not conditional,
        notes=(_BOLD,) if not conditional else (),
    )


# -- claims ----------------------------------------------------------------------------------------------------------
def claims(results: Results) -> Table:
    """The paper's comparisons, tested here: difference, interval, p, Holm's adjustment, and a verdict on the paper's
    direction.
    """
    found = tested(results)
    if not found:
        raise ReqatError(
            f"tier {results.plan.tier.name} has both sides of none of the claims; they need table1 or table4 in its "
            "artifacts."
        )
    many = len({t.model for t in found}) > 1
    columns = [
        *([Column("Model", align="l")] if many else []),
        Column("Claim", align="l"),
        PRECISION,
        Column("Tokens"),
        Column("Difference (points)", "Measured"),
        Column("p", "Measured"),
        Column("Holm", "Measured"),
        Column("Verdict", "Measured", "l"),
        Column("mean (points)", "Paper"),
        Column("range over its budgets", "Paper", "c"),
    ]
    sections, rows = [], []
    for block in dict.fromkeys(t.block for t in found):
        section = []
        for t in (t for t in found if t.block == block):
            spread = f"{number(min(t.paper), sign=True)} to {number(max(t.paper), sign=True)}" if t.paper else EMPTY
            cells = [Text(t.model)] if many else []
            cells += [
                Text(t.claim.name),
                Text(t.precision),
                Text(tokens(t.a.total_tokens)),
                Text(number(t.value, sign=True), detail=f"[{number(t.lo, sign=True)}, {number(t.hi, sign=True)}]"),
                Text(p_value(t.p)),
                Text(p_value(t.holm)),
                Text(t.verdict, bold=t.primary and t.verdict in ("agrees", "disagrees")),
                Text(number(t.paper_mean, sign=True)),
                Text(spread),
            ]
            section.append(tuple(cells))
            rows.append(
                {
                    "tier": results.plan.tier.name,
                    "model": t.model,
                    "claim": t.claim.name,
                    "block": t.block,
                    "precision": t.precision,
                    "total_tokens": t.a.total_tokens,
                    "multiple": t.multiple,
                    "a": f"{t.a.precision} {t.a.method} {t.a.condition}".strip(),
                    "b": f"{t.b.precision} {t.b.method} {t.b.condition}".strip(),
                    "difference": t.value,
                    "lo": t.lo,
                    "hi": t.hi,
                    "p": t.p,
                    "p_holm": t.holm,
                    "verdict": t.verdict,
                    "paper_mean": t.paper_mean,
                    "paper_min": min(t.paper, default=math.nan),
                    "paper_max": max(t.paper, default=math.nan),
                    **_made(results, Results.common(t.a, t.b)[0], results.estimate(t.a).n_problems),
                }
            )
        sections.append(tuple(section))
    used = [e for t in found for e in (t.a, t.b)]
    return Table(
        "claims",
        "The paper's claims, tested",
        f"Paired comparisons at equal total budget. First block: the primary claims (budget "
        f"{tokens(results.plan.tier.budget.claim_total * results.plan.tier.budget.qat_tokens)}; {REFERENCE_PRECISION}, "
        "and Table 4's "
        "precision for the traces). Below, a block a precision: the same at other budgets and precisions, and "
        "comparisons for "
        "context. Holm: adjusted for the number of comparisons in the block. Verdict: the direction agrees or "
        "disagrees with the paper's if "
        f"Holm's p is below {ALPHA}; reaching BF16 FT agrees if the whole interval lies above "
        f"{number(-PARITY_POINTS, 0)} points and "
        f"disagrees if it lies below; no direction: the paper's own differences have no common sign.",
        footer(results, used, f"Numbers of the paper: {paper.CITATION}; differences of its Table 1 and Table 4."),
        tuple(columns),
        tuple(sections),
        tidy(rows),
    )


BUILDERS: dict[str, Callable[[Results, str], Table]] = {
    "table1": table1,
    "table2": table2,
    "table4": table4,
    "table5": table5,
    "table6": table6,
    "table15": table15,
    "ptq": ptq,
}


def tables(results: Results) -> list[Table]:
    """Every table that the tier's plan asks for."""
    return [
        claims(results) if name == "claims" else BUILDERS.get(name, generic)(results, name)
        for name in table_names(results.plan)
    ]
