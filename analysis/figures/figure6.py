"""Figure 6: throughput relative to BF16 over the batch and the output length, and memory.

Three sources, never mixed: lines are modelled, circles and squares reported, diamonds measured. Which model stands
behind each is said under the figure.
"""

from __future__ import annotations

import math
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.legend_handler import HandlerTuple
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from analysis.report import roofline, style
from analysis.report.benchmark import (
    Measured,
    decode_rows,
    decoded_model,
    fewest_threads,
    memory_rows,
    shortest_prompt,
    size,
)

NAME = "figure6"
BENCHMARK = ()

DEVICE_COLOURS = {"B200": style.BLUE, "DGX Spark": style.VERMILION, "H100": style.GREY}
DEVICE_MARKERS = {"B200": "o", "DGX Spark": "s", "H100": "^"}
OURS = style.GREEN
REPORTED = ("B200", "DGX Spark")  # devices that the paper measured, in the order of the legend
MOST_LINEAR = 12.0  # a ratio beyond this would flatten all the others: the axis becomes logarithmic


def build(measured: Measured) -> Figure:
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
        _ratio_axis(ax, top)
        ax.axhline(1, color=style.BLACK, lw=0.7, ls=(0, (1, 1)), zorder=1)
    left.set_ylabel("throughput relative to BF16")
    _memory(right, memory_rows(measured))
    fig.legend(
        handles=_handles(len(ours) > 0),
        loc="outside upper center",
        ncols=4,
        columnspacing=1.3,
        handlelength=1.8,
        handler_map={tuple: HandlerTuple(ndivide=None, pad=0.3)},
    )
    notes = [
        "Modelled: R1-Qwen-14B at W4A4KV4 from the datasheets' bandwidth, dense operations and memory (DGX Spark in "
        "(b): FP8 KV, as reported).",
        "Reported: R1-Qwen-14B in the paper, on B200 (circles) and DGX Spark (squares); batch not given.",
        f"Measured: {decoded_model(measured)}, packed, against transformers' BF16."
        if len(ours)
        else "No packed model was measured.",
        *measured.notes("decode"),
    ]
    style.footer(fig, notes)
    return fig


def _ratio_axis(ax: Axes, top: float) -> None:
    """From 0 to the largest ratio; logarithmic where that one is many times the others."""
    if top <= MOST_LINEAR:
        ax.set_ylim(0, 1.06 * top)
        return
    ax.set_yscale("log", base=2)
    ax.set_ylim(0.8, 1.15 * top)
    ax.yaxis.set_major_locator(FixedLocator([2**i for i in range(math.ceil(math.log2(top)))]))
    ax.yaxis.set_minor_locator(NullLocator())
    ax.yaxis.set_major_formatter(FuncFormatter(lambda ratio, _: f"{ratio:g}"))


def decode_ratios(measured: Measured) -> pd.DataFrame:
    """batch, output_tokens, and the best of ours over the best of transformers' BF16, in tokens a second; of
    the smallest number of threads.

    Heads in fewer bits are left out: the paper's precisions leave the head at 16.
    """
    rows = fewest_threads(shortest_prompt(decode_rows(measured)))
    out = []
    for (batch, tokens), part in rows.groupby(["m", "output_tokens"]):
        base = part[part.provider.str.startswith("transformers")].tokens_per_s.max()
        ours = part[part.ours.astype(bool) & ~part.format.str.contains(", head ")].tokens_per_s.max()
        if not (math.isnan(base) or math.isnan(ours)):
            out.append((int(batch), int(tokens), ours / base))
    return pd.DataFrame(out, columns=["batch", "output_tokens", "ratio"])


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
    mark = _mark(point.device.name, filled=point.method == "ReQAT")
    ax.plot([x], [point.reported], zorder=3, clip_on=False, **mark)


def _mark(device: str, *, filled: bool) -> dict[str, Any]:
    """The mark of a reported ratio: the device's own, filled for ReQAT, hollow for plain NVFP4."""
    colour = DEVICE_COLOURS[device]
    return {
        "ls": "none",
        "marker": DEVICE_MARKERS[device],
        "ms": 5 if filled else 6.5,
        "mfc": colour if filled else "none",
        "mec": "white" if filled else colour,
        "mew": 0.4 if filled else 0.9,
    }


def _memory(ax: Axes, data: pd.DataFrame) -> None:
    """Bars in percent of BF16's total, with the bytes written in."""
    ticks, labels, at = [], [], 0.0
    for model in dict.fromkeys(data.model):
        part = data[data.model == model]
        total = float((part.weight_bytes + part.cache_bytes).iloc[0])
        start = at
        for r in part.itertuples():
            weights, cache = 100 * r.weight_bytes / total, 100 * r.cache_bytes / total
            ax.bar(at, weights, 0.92, color=style.SKY, edgecolor="white", lw=0.5, label="weights")
            ax.bar(at, cache, 0.92, bottom=weights, color=style.ORANGE, edgecolor="white", lw=0.5, label="KV cache")
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
    for words, filled in (("reported, ReQAT", True), ("reported, plain NVFP4", False)):
        out.append(_Together(Line2D([], [], **_mark(device, filled=filled)) for device in REPORTED).named(words))
    if measured:
        out.append(
            Line2D([], [], color=OURS, marker="D", ms=5, mec="white", mew=0.4, lw=1.0, label="measured, this CPU")
        )
    return [*out, Patch(color=style.SKY, label="weights"), Patch(color=style.ORANGE, label="KV cache")]


class _Together(tuple[Line2D, ...]):
    """Marks that share one line of a legend."""

    label = ""

    def named(self, label: str) -> _Together:
        self.label = label
        return self

    def get_label(self) -> str:
        return self.label
