"""Figure 1(a): what rounding to four bits costs, by task family, beside the paper's four models on three benchmarks."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from analysis.figures._results import entry_at, finish, reference_precision
from analysis.report import paper, style
from analysis.report.cells import Entry, Results
from analysis.report.document import number, tokens
from analysis.report.lines import lines
from analysis.report.names import BF16
from reqat.config.errors import ReqatError

NAME = "figure1a"
ARTIFACT = "figure1"
NEEDS = "quantized"

# (in BF16, rounded): the model as it was given, and after fine-tuning
_PAIRS = {"as given": ("Baseline", "PTQ"), "after FT": ("FT", "FT+PTQ")}
_COLOURS = (style.SKY, style.BLUE, style.PURPLE, style.ORANGE)


def build(results: Results, model: str) -> Figure:
    """Figure 1(a): accuracy in BF16 minus accuracy after rounding to nearest, in points.

    Ours: the tier's model as given and fine-tuned (at the claim budget), by task family, paired differences with 95%
    intervals. The paper's: four models on three benchmarks, read off the figure. Raises `ReqatError` where the tier
    rounds nothing.
    """
    entries = results.of("figure1", model=model)
    all_lines, precision = lines(entries), reference_precision(entries)
    claim = results.plan.tier.claim_total(model)
    pairs = {
        name: (entry_at(all_lines, BF16, plain, claim), entry_at(all_lines, precision, rounded, claim))
        for name, (plain, rounded) in _PAIRS.items()
    }
    there = {name: (a, b) for name, (a, b) in pairs.items() if a is not None and b is not None}
    if not there:
        raise ReqatError(f"tier {results.plan.tier.name} rounds no model of {model} to {precision}; nothing to draw")
    used: list[Entry] = [entry for pair in there.values() for entry in pair]
    families = results.families(used[0])
    fig = style.figure(3.2)
    left, right = fig.subplots(1, 2, width_ratios=[1, 1.35])
    series = {}
    for name, (plain, rounded) in there.items():
        found = [results.paired(plain, rounded, family) for family in (None, *families)]
        series[name] = np.array([[100 * d.value, 100 * d.lo, 100 * d.hi] for d in found])
    _groups(left, ["all", *(family.replace("_", " ") for family in families)], series)
    style.panel(left, "a", f"Measured: {model}, {precision}")
    read = paper.read_off("figure1a")
    models, benchmarks = (list(dict.fromkeys(getattr(r, key) for r in read)) for key in ("model", "metric"))
    theirs = {(r.model, r.metric): r.value for r in read}
    _groups(
        right,
        [name.removesuffix(" drop") for name in benchmarks],
        {m: np.array([[theirs[m, b], np.nan, np.nan] for b in benchmarks]) for m in models},
    )
    style.panel(right, "", f"Paper, read off: {read[0].precision}", theirs=True)
    left.set_ylabel("accuracy lost to rounding (points)")
    right.set_ylabel("")
    total = next((e.total_tokens for e in entries if e.multiple == claim), None)
    said = f"After FT: on {tokens(total)} tokens. " if "after FT" in there else ""
    return finish(fig, results, used, f"{said}Paper: to about 0.1 points.")


def _groups(ax: Axes, ticks: list[str], series: dict[str, np.ndarray]) -> None:
    """Groups of bars with their values; ``series`` has rows (value, lo, hi), NaN where there is no interval."""
    width = 0.8 / len(series)
    for j, ((name, rows), colour) in enumerate(zip(series.items(), _COLOURS, strict=False)):
        x = np.arange(len(ticks)) + (j - (len(series) - 1) / 2) * width
        value, lo, hi = rows.T
        ax.bar(x, value, width * 0.92, color=colour, label=name, zorder=2)
        known = ~np.isnan(lo)
        if known.any():
            ax.errorbar(x[known], value[known], yerr=[(value - lo)[known], (hi - value)[known]], fmt="none",
                        ecolor="#333333", elinewidth=0.8, capsize=1.6, zorder=3)  # fmt: skip
        for at, v, top in zip(x, value, np.where(known, hi, np.maximum(value, 0)), strict=True):
            said = number(v)
            ax.annotate(said, (at, max(top, 0)), (0, 2), textcoords="offset points", ha="center", fontsize=6)
    ax.axhline(0, color="#333333", lw=0.7)
    ax.set_xticks(range(len(ticks)), [tick.replace(" ", "\n") for tick in ticks])
    ax.tick_params(axis="x", length=0)
    ax.margins(y=0.12)
    ax.legend(loc="upper left", fontsize=6.8)
