"""Training losses against tokens spent."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from analysis.figures._results import (
    dash,
    entry_at,
    finish,
    reference_precision,
)
from analysis.report import style
from analysis.report.cells import Results
from analysis.report.document import tokens
from analysis.report.lines import lines
from analysis.report.names import BF16
from reqat.config.errors import ReqatError

NAME = "losses"
ARTIFACT = "table1"
NEEDS = "trained"

_SMOOTHED = 0.2  # of the last stage: single batches differ by more than methods do

Curves = list[tuple[np.ndarray, np.ndarray]]
"""(tokens, loss) of one method's trainings, a pair a training seed."""


def build(results: Results, model: str) -> Figure:
    """Training loss against tokens spent: BF16 fine-tuning, QAT from the base, and stage 2 of each ReQAT variant.

    The horizontal axis counts from the base model, so that a second stage begins where its first one ended. Drawn is
    the negative log-likelihood (nats a response token, without SEM's term): left as recorded and smoothed, training
    seed by training seed; right the last stage alone, smoothed over the same stretch of tokens for every method and
    then averaged over training seeds.
    """
    entries = results.of("table1", model=model)
    precision, claim = reference_precision(entries), results.plan.tier.claim_total(model)
    all_lines = lines(entries)
    wanted = [(BF16, "FT"), *((precision, m) for m in ("QAT", "ReQAT-T", "ReQAT-TQ", "ReQAT-TQS"))]
    found: dict[str, Curves] = {}
    used = []
    for at, method in wanted:
        entry = entry_at(all_lines, at, method, claim)
        if entry is None:
            continue
        used.append(entry)
        found[method] = [curve(results, results.plan.evaluation(cell.evaluation).stage) for cell in entry.cells]
    if not used:
        raise ReqatError(f"tier {results.plan.tier.name} trains nothing at {precision}; there is no loss to draw")
    fig = style.figure(3.1)
    left, right = fig.subplots(1, 2, width_ratios=[1.25, 1])
    lows, highs = [], []
    for method, curves in found.items():
        look = {"color": style.colour(method), "ls": dash(BF16 if method == "FT" else precision)}
        for k, (x, y) in enumerate(curves):
            label = (f"{BF16} FT" if method == "FT" else method) if k == 0 else None
            left.plot(x, y, color=style.colour(method), lw=0.5, alpha=0.22)
            left.plot(
                x, moving_average(y, max(1, len(y) // 20)), lw=1.3, alpha=1.0 if k == 0 else 0.6, label=label, **look
            )
            lows.append(float(np.quantile(y, 0.005)))
            highs.append(float(np.quantile(y, 0.995)))
    starts = [x[0] for method, curves in found.items() if method.startswith("ReQAT") for x, _ in curves]
    style.panel(left, "", f"{model}, {precision}")
    margin = 0.05 * (max(highs) - min(lows)) or 0.05
    # Not from zero: late in training curves lie close together, far above it.
    left.set_ylim(min(lows) - margin, max(highs) + margin)
    left.set_xlim(left=0)
    words = ["Left, thin: as recorded; thick: mean over 5% of the stage; paler: further training seeds."]
    if starts:
        left.axvline(min(starts), color="#999999", lw=0.7, ls=":")
    # A stage of one step has a point and no course.
    if starts and max(x[-1] for curves in found.values() for x, _ in curves) > min(starts):
        width = _last_stage(right, found, precision, float(min(starts)))
        several = any(len(curves) > 1 for curves in found.values())
        bands = "; bands: lowest to highest training seed" if several else ""
        words.append(f"Right: mean over {tokens(round(width))} tokens{bands}.")
    else:
        right.set_visible(False)
    for ax in (left, right):
        ax.set_xlabel("tokens spent since the base model")
        ax.xaxis.set_major_locator(MaxNLocator(5))
        ax.xaxis.set_major_formatter(lambda value, _: tokens(round(value)))
        ax.set_ylabel("loss (nats / response token)")
    handles, labels = left.get_legend_handles_labels()
    fig.legend(handles, labels, loc="outside upper center", ncols=len(handles))
    return finish(fig, results, used, *words, intervals=False)


def _last_stage(ax: Axes, found: dict[str, Curves], precision: str, start: float) -> float:
    """Draw the last stage: a line a method, the mean of its training seeds; returns the tokens of a moving mean."""
    end = max(float(x[-1]) for curves in found.values() for x, _ in curves)
    width = _SMOOTHED * (end - start)
    # Half a window from the ends, where the mean would be of fewer and fewer points.
    grid = np.linspace(start + width / 2, end - width / 2, 101)
    for method, curves in found.items():
        seeds_SN = np.array([np.interp(grid, x, smoothed(x, y, width)) for x, y in curves])
        colour = style.colour(method)
        ax.plot(grid, seeds_SN.mean(axis=0), color=colour, lw=1.4, ls=dash(BF16 if method == "FT" else precision))
        if len(curves) > 1:
            ax.fill_between(grid, seeds_SN.min(axis=0), seeds_SN.max(axis=0), color=colour, alpha=0.13, lw=0)
    ax.set_xlim(start, end)
    ax.margins(y=0.08)
    style.panel(ax, "", "The last stage, smoothed")
    return width


def smoothed(x: np.ndarray, y: np.ndarray, width_tokens: float) -> np.ndarray:
    """Moving mean of a curve `y` over `width_tokens` of its tokens `x`, whatever its points are apart."""
    spacing = (x[-1] - x[0]) / (len(x) - 1) if len(x) > 1 else width_tokens
    return moving_average(y, max(1, round(width_tokens / spacing)))


def curve(results: Results, stage: str) -> tuple[np.ndarray, np.ndarray]:
    """(tokens spent since the base model, negative log-likelihood) of a training stage's record.

    Raises `ReqatError` if the stage or none of its parents trained anything.
    """
    chain = list(results.plan.since_base(stage))
    while chain and not chain[0].budget_tokens:
        chain = chain[1:]
    if not chain:
        raise ReqatError(f"{stage} trains nothing, so it has no curve")
    points = results.metrics(chain[0].id).get("curve")
    if not points:
        raise ReqatError(f"{results.folder(chain[0].id)}: the record has no curve; {results.remedy([chain[0].id])}")
    before = sum(s.budget_tokens for s in chain[1:])
    return (
        before + np.array([p["tokens"] for p in points], dtype=float),
        np.array([p.get("nll", p["loss"]) for p in points], dtype=float),
    )


def moving_average(y: np.ndarray, window: int) -> np.ndarray:
    """Mean over up to `window` points centred on each; shorter at the ends, same length as `y`."""
    total = np.concatenate([[0.0], np.cumsum(y)])
    half, i = window // 2, np.arange(len(y))
    lo, hi = np.maximum(0, i - half), np.minimum(len(y), i + half + 1)
    return (total[hi] - total[lo]) / (hi - lo)
