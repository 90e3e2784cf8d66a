"""Table 6: accuracy by response length, made of Table 2's cells."""

from __future__ import annotations

import numpy as np
import pandas as pd

from analysis.entropy import length_bins, length_edges
from analysis.report import paper
from analysis.report.cells import Results
from analysis.report.document import Column, Table, Text, interval, number, percent
from analysis.report.lines import grouped, lines
from analysis.report.rows import measured_row, paper_row, tidy
from analysis.tables._columns import METHOD, PRECISION
from reqat.config.errors import ReqatError
from reqat.evaluation.statistics import clustered_means

NAME = "table6"
ARTIFACT = "table2"

_BY_LENGTH = ("Baseline", "FT", "PTQ", "FT+PTQ", "QAT", "ReQAT-TQS")  # the paper's lines; its "ReQAT" is TQS
_LENGTH_BINS = 4


def build(results: Results, artifact: str = NAME) -> Table:
    """Paper Table 6: accuracy by length of the response, made of the cells of `table2`.

    The bins are quartiles of the lengths of all responses of a model's lines together: one column means the same
    lengths in every line, and lines differ in how many of their responses fall into it.
    """
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
    for (model, _), group in grouped(lines(entries), lambda li: (li.model, li.precision)):
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
