"""Decoding of whole models on this machine."""

from __future__ import annotations

import math

import pandas as pd

from analysis.report.benchmark import MIB, Measured, decode_rows, pick, providers, short_failure, shortest_prompt
from analysis.report.document import EMPTY, Column, Table, Text, number

NAME = "throughput-decode"
BENCHMARK = ("decode",)
_KEYS = ["threads", "prompt_tokens", "m", "output_tokens"]


def build(measured: Measured) -> Table:
    """Tokens a second of whole models, one column a number of threads, batch and output length, and of prompts read
    alone; what weights and cache take; and how many times as fast more threads are.

    Where the model is not installed, a table that says so.
    """
    if measured.of("decode").empty:
        return _no_decode(measured)
    decoded = decode_rows(measured)
    rows = pd.concat([decoded, decode_rows(measured, "prefill").assign(output_tokens=0)])  # 0: a prompt alone
    failed = pd.concat([_failed(measured, "decode"), _failed(measured, "prefill").assign(output_tokens=0)])
    everyone = pd.concat([rows, failed]) if len(failed) else rows
    few = int(rows.threads.min())
    cells = sorted(dict.fromkeys(zip(*(rows[key].astype(int) for key in _KEYS), strict=True)))
    columns = [Column("provider", align="l"), Column("precision", align="l")]
    with_bits = "bits" in rows and bool(rows.bits.notna().any())
    columns += [Column("bits: decoder / head / embeddings", align="l")] * with_bits
    columns += [_column(cell, few) for cell in cells]
    columns += [Column("weights, MiB"), Column("cache, MiB")]
    best = {cell: rows[(rows[_KEYS] == list(cell)).all(axis=1)].tokens_per_s.max() for cell in cells}
    lines, scaling = [], []
    for provider, fmt in providers(everyone):
        own = rows[(rows.provider == provider) & (rows.format == fmt)]
        lost = failed[(failed.provider == provider) & (failed.format == fmt)] if len(failed) else failed
        line, faster = [Text(provider), Text(fmt)], [Text(provider), Text(f"{fmt}: times as fast as with {few}")]
        if with_bits:
            line.append(Text(next(iter(own.bits.dropna()), EMPTY)))
            faster.append(Text())
        for cell in cells:
            row = pick(own, **dict(zip(_KEYS, cell, strict=True)))
            alone = pick(own, **dict(zip(_KEYS, (few, *cell[1:]), strict=True)))
            why = pick(lost, **dict(zip(_KEYS, cell, strict=True))) if len(lost) else None
            value = math.nan if row is None else row.tokens_per_s
            if why is not None:
                line.append(Text("failed", detail=f"({short_failure(why.failure)})"))
            else:
                line.append(Text(number(value), bold=value == best[cell]))
            scaled = row is not None and alone is not None and cell[0] != few
            faster.append(Text(number(value / alone.tokens_per_s, 2)) if scaled and alone is not None else Text())
        line.append(Text(number(own.weight_bytes.max() / MIB, 1) if len(own) else EMPTY))
        mine = decoded[(decoded.provider == provider) & (decoded.format == fmt)]
        cache = shortest_prompt(mine[mine.m == mine.m.min()]).cache_bytes.max() if len(mine) else math.nan
        line.append(Text(EMPTY if math.isnan(cache) else number(cache / MIB, 2)))
        lines.append(tuple(line))
        scaling.append((*faster, Text(), Text()))
    asked = measured.record["config"]["decode"]
    models = ", ".join(dict.fromkeys(part["model"] for part in asked))
    alone_too = bool((rows.output_tokens == 0).any())
    prompts = " A prompt alone: its tokens over the time to the first new one." if alone_too else ""
    return Table(
        name=NAME,
        title="Decoding on this machine, tokens a second",
        caption=(
            f"{models} through generate(), greedy; all rows of a batch together, steps after the first token. Weights "
            "and cache as allocated, the cache at the shortest prompt, smallest batch and longest output."
            f"{prompts} Bold: the fastest."
        ),
        footer=(*measured.notes("decode"), *measured.absences()),
        columns=tuple(columns),
        sections=(tuple(lines), tuple(scaling)) if rows.threads.nunique() > 1 else (tuple(lines),),
        data=everyone,
    )


def _column(cell: tuple[int, ...], fewest: int) -> Column:
    threads, prompt, batch, tokens = cell
    more = f", {threads} threads" if threads != fewest else ""
    return Column(f"{tokens} tokens" if tokens else "prompt alone", f"prompt {prompt}, batch {batch}{more}")


def _failed(measured: Measured, kernel: str) -> pd.DataFrame:
    """Rows without a time, with the sizes that their shape names as columns."""
    rows = measured.failed_of(kernel)
    if rows.empty:
        return rows.assign(prompt_tokens=[], output_tokens=[])
    sizes = [dict(part.split("=") for part in shape.split()) for shape in rows["shape"]]
    return rows.assign(
        prompt_tokens=[int(size.get("P", 0)) for size in sizes],
        output_tokens=[int(size.get("T", 0)) for size in sizes],
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
