"""What storing the output head and the embeddings of packed models in fewer bits changes."""

from __future__ import annotations

from typing import Any

import pandas as pd

from analysis.report.benchmark import MIB, Measured
from analysis.report.document import EMPTY, Column, Table, Text, number

NAME = "throughput-heads"
BENCHMARK = ("heads",)


def build(measured: Measured) -> Table:
    """Each choice against the same packed model with both in BF16: likelihoods of a text, and answers."""
    found = measured.record["metrics"]["heads"]
    lines, data = [], []
    for part in found:
        model = Text(part["model"])
        if "skipped" in part:
            lines.append((model, Text(f"skipped: {part['skipped']}"), *[Text()] * 8))
            continue
        data.append(part)
        sizes = [Text(number(part[key] / MIB, 2)) for key in ("weight_bytes", "reference_weight_bytes")]
        lines.append(
            (
                model,
                Text(part["head"] or EMPTY),
                Text(part["embeddings"] or EMPTY),
                *sizes,
                *_of_text(part),
                *_answers(part),
            )
        )
    return Table(
        name=NAME,
        title="Packed models by what head and embeddings are stored in",
        caption=(
            "Against the same packed model with both in BF16. Of a text's tokens: how often the most likely next token "
            "is the same, the forward divergence, and perplexity. Of problems: greedy answers that are right, of both. "
            "± is the standard error over rows of text."
        ),
        footer=measured.notes()[:1],
        columns=(
            Column("model", align="l"),
            Column("head", align="l"),
            Column("embeddings", align="l"),
            Column("weights, MiB"),
            Column("in BF16, MiB"),
            Column("same next token, %", "text"),
            Column("KL, nats a token", "text"),
            Column("perplexity", "text"),
            Column("in BF16", "text"),
            Column("right, in BF16, of", "problems"),
        ),
        sections=(tuple(lines),),
        data=pd.DataFrame(data),
    )


def _of_text(part: dict[str, Any]) -> list[Text]:
    if not part["tokens"]:
        return [Text(EMPTY)] * 4
    error = part["kl_nats_se"]
    return [
        Text(number(100 * part["same_argmax"] / part["tokens"], 1)),
        Text(number(part["kl_nats"], 4), detail="" if error is None else f"±{number(error, 4)}"),
        Text(number(part["perplexity"], 3)),
        Text(number(part["reference_perplexity"], 3)),
    ]


def _answers(part: dict[str, Any]) -> list[Text]:
    if not part["problems"]:
        return [Text(EMPTY)]
    return [Text(f"{part['correct']}, {part['reference_correct']}, {part['problems']}")]
