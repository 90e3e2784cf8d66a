"""Responses of packed models with prompt lookup and without."""

from __future__ import annotations

import pandas as pd

from analysis.report.benchmark import Measured
from analysis.report.document import Column, Table, Text, number

NAME = "throughput-speculation"
BENCHMARK = ("speculation",)


def build(measured: Measured) -> Table:
    """Tokens a second by how many tokens are guessed a step, and how many guesses hold."""
    found = measured.record["metrics"]["speculation"]
    lines, data = [], []
    for part in found:
        model = Text(part["model"])
        if "skipped" in part:
            lines.append((model, Text(f"skipped: {part['skipped']}"), *[Text()] * 5))
            continue
        data.append(part)
        counts = (str(part["prompts"]), str(part["same_responses"]), str(part["tokens"]))
        rates = (number(part["accepted_per_step"] or 0.0, 2), number(part["tokens_per_s"], 1))
        lines.append((model, Text(str(part["guesses"])), *(Text(text) for text in (*counts, *rates))))
    return Table(
        name=NAME,
        title="Prompt lookup on this machine",
        caption=(
            "Greedy responses of packed models to test prompts, one row: tokens a second of whole responses, prompts "
            "included, in turns for each prompt. Accepted: guesses that held, a pass of the model. Same: responses "
            "that are those without guesses to the last token."
        ),
        footer=measured.notes()[:1],
        columns=(
            Column("model", align="l"),
            Column("guesses a step"),
            Column("prompts"),
            Column("same"),
            Column("tokens"),
            Column("accepted a step"),
            Column("tokens a second"),
        ),
        sections=(tuple(lines),),
        data=pd.DataFrame(data),
    )
