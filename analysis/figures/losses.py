"""Training losses against tokens spent."""

from __future__ import annotations

import math

import numpy as np
from matplotlib.figure import Figure

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


def build(results: Results, model: str) -> Figure:
    """Training loss against tokens spent: BF16 fine-tuning, QAT from the base, and stage 2 of each ReQAT variant.

    The horizontal axis counts from the base model, so that a second stage begins where its first one ended. Drawn is
    the negative log-likelihood (nats a response token, without SEM's term), smoothed over 5% of the stage; the pale
    line is what the record holds, training seed by training seed.
    """
    entries = results.of("table1", model=model)
    precision, claim = reference_precision(entries), results.plan.tier.budget.claim_total
    all_lines = lines(entries)
    wanted = [(BF16, "FT"), *((precision, m) for m in ("QAT", "ReQAT-T", "ReQAT-TQ", "ReQAT-TQS"))]
    fig = style.figure(3.1)
    left, right = fig.subplots(1, 2, width_ratios=[1.25, 1])
    used, start = [], math.inf
    tails: list[np.ndarray] = []
    for at, method in wanted:
        entry = entry_at(all_lines, at, method, claim)
        if entry is None:
            continue
        used.append(entry)
        for k, cell in enumerate(entry.cells):
            x, y = curve(results, results.plan.evaluation(cell.evaluation).stage)
            smooth = moving_average(y, max(1, len(y) // 20))
            if method.startswith("ReQAT"):
                start = min(start, float(x[0]))
            if at != BF16:
                tails.append(smooth[-max(1, len(y) // 5) :])
            for ax in (left, right):
                ax.plot(x, y, color=style.colour(method), lw=0.5, alpha=0.22)
                ax.plot(
                    x,
                    smooth,
                    color=style.colour(method),
                    lw=1.3,
                    ls=dash(at),
                    alpha=1.0 if k == 0 else 0.6,
                    label=(f"{BF16} FT" if method == "FT" else method) if k == 0 else None,
                )
    if not used:
        raise ReqatError(f"tier {results.plan.tier.name} trains nothing at {precision}; there is no loss to draw")
    ends = max(float(line.get_xdata()[-1]) for line in left.get_lines())  # type: ignore[index]
    if math.isfinite(start) and tails:
        right.set_xlim(start, ends)
        visible = [y for line in right.get_lines()[1::2] for x, y in zip(*line.get_data(), strict=True) if x >= start]
        lo, hi = float(np.min(visible)), float(np.quantile(visible, 0.98))
        right.set_ylim(lo - 0.06 * (hi - lo), hi + 0.12 * (hi - lo))
        style.panel(right, "", "The last stage, enlarged")
        left.axvline(start, color="#999999", lw=0.7, ls=":")
    else:
        right.set_visible(False)
    style.panel(left, "", f"{model}, {precision}")
    top = float(np.quantile(np.concatenate([line.get_ydata() for line in left.get_lines()[::2]]), 0.995))  # type: ignore[list-item]
    left.set_ylim(0, 1.05 * top)
    left.set_xlim(left=0)
    for ax in (left, right):
        ax.set_xlabel("tokens spent since the base model")
        ax.xaxis.set_major_formatter(lambda value, _: tokens(round(value)))
        ax.set_ylabel("loss (nats / response token)")
    handles, labels = left.get_legend_handles_labels()
    fig.legend(handles, labels, loc="outside upper center", ncols=len(handles))
    note = "Thin: as recorded; thick: mean over 5% of the stage; paler: further training seeds."
    return finish(fig, results, used, note, intervals=False)


def curve(results: Results, stage: str) -> tuple[np.ndarray, np.ndarray]:
    """(tokens spent since the base model, negative log-likelihood) of a training stage's record.

    Raises `ReqatError` if the stage or none of its parents trained anything.
    """
    chain = list(results.plan.lineage(stage))
    while chain and not chain[0].budget_tokens:
        chain = chain[1:]
    if not chain or chain[0].kind == "base":
        raise ReqatError(f"{stage} trains nothing, so it has no curve")
    points = results.metrics(chain[0].id).get("curve")
    if not points:
        raise ReqatError(f"{results.folder(chain[0].id)}: the record has no curve; {results.remedy([chain[0].id])}")
    before = sum(s.budget_tokens for s in chain[1:] if s.kind != "base")
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
