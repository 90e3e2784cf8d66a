"""Decoding of whole models on this machine."""

from __future__ import annotations

import math

from analysis.report.benchmark import MIB, Measured, decode_rows, pick, providers, shortest_prompt
from analysis.report.document import EMPTY, Column, Table, Text, number

NAME = "throughput-decode"
BENCHMARK = ("decode",)


def build(measured: Measured) -> Table:
    """Tokens a second of whole models, one column a batch and output length, and what weights and cache take.

    Where the model is not installed, a table that says so.
    """
    if measured.of("decode").empty:
        return _no_decode(measured)
    rows = decode_rows(measured)
    keys = ["prompt_tokens", "m", "output_tokens"]
    cells = sorted(dict.fromkeys(zip(*(rows[key].astype(int) for key in keys), strict=True)))
    columns = [Column("provider", align="l"), Column("precision", align="l")]
    columns += [Column("bits: decoder / head / embeddings", align="l")] if "bits" in rows else []
    columns += [Column(f"{tokens} tokens", f"prompt {prompt}, batch {batch}") for prompt, batch, tokens in cells]
    columns += [Column("weights, MiB"), Column("cache, MiB")]
    best = {cell: rows[(rows[keys] == list(cell)).all(axis=1)].tokens_per_s.max() for cell in cells}
    lines = []
    for provider, fmt in providers(rows):
        own = rows[(rows.provider == provider) & (rows.format == fmt)]
        line = [Text(provider), Text(fmt)]
        if "bits" in rows:
            line.append(Text(next(iter(own.bits.dropna()), EMPTY)))
        for cell in cells:
            row = pick(own, **dict(zip(keys, cell, strict=True)))
            value = math.nan if row is None else row.tokens_per_s
            line.append(Text(number(value), bold=value == best[cell]))
        line.append(Text(number(own.weight_bytes.max() / MIB, 1)))
        cache = shortest_prompt(own[own.m == own.m.min()]).cache_bytes.max()
        line.append(Text(EMPTY if math.isnan(cache) else number(cache / MIB, 2)))
        lines.append(tuple(line))
    asked = measured.record["config"]["decode"]
    models = ", ".join(dict.fromkeys(part["model"] for part in asked))
    return Table(
        name=NAME,
        title="Decoding on this machine, tokens a second",
        caption=(
            f"{models} through generate(), greedy; all rows of a batch together, steps after the first token. Weights "
            "and cache as allocated, the cache at the shortest prompt, smallest batch and longest output. Bold: the "
            "fastest."
        ),
        footer=(*measured.notes("decode"), *measured.absences()),
        columns=tuple(columns),
        sections=(tuple(lines),),
        data=rows,
    )


def _no_decode(measured: Measured) -> Table:
    """In place of the table of decoding where its model is not installed: the reason, not silence."""
    reason = (
        "; ".join(s for s in measured.record["metrics"]["skipped"] if s.startswith("decode")) or "nothing was timed"
    )
    return Table(
        name=NAME,
        title="Decoding on this machine",
        caption=f"Not measured: {reason}",
        footer=measured.notes(),
        columns=(Column("provider", align="l"),),
        sections=((((Text()),),),),
        data=measured.of("decode"),
    )
