"""The figures: drawn from the same entries and estimates as the tables, with the paper's numbers in panels of their
own.

Every figure is `figure(results, model) -> matplotlib.figure.Figure`; `analysis.build` saves them as PNG and PDF. Axes
carry units, error bars and bands are 95% intervals clustered by problem, and the footer says tier, n, seeds and
arithmetic.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from analysis.report import paper, style
from analysis.report.cells import Entry, Results
from analysis.report.document import tokens
from analysis.report.keys import error_maps
from analysis.report.lines import Line, lines
from analysis.report.names import BF16, REFERENCE_PRECISION
from analysis.report.needs import qfit_cell
from reqat.config.errors import ReqatError

METHODS = ("PTQ", "FT+PTQ", "QAT", "ReQAT-T", "ReQAT-TQ", "ReQAT-TQS")  # quantized methods of Figure 1, in this order
PAPER_AXIS = "AIME-120 accuracy (%)"
MODEL_OF_PAPER = "R1-Qwen-14B"


def reference_precision(entries: Sequence[Entry]) -> str:
    """NVFP4-W4A4KV4 if the tier has it, else its last quantized precision."""
    quantized = list(dict.fromkeys(e.precision for e in entries if e.precision != BF16))
    if not quantized:
        raise ReqatError("no quantized cell to draw; add a precision to the tier's `only.precisions`")
    return REFERENCE_PRECISION if REFERENCE_PRECISION in quantized else quantized[-1]


def _at(all_lines: Sequence[Line], precision: str, method: str, multiple: int | None) -> Entry | None:
    """The entry of a method at a budget; a method that trains nothing stands at every budget."""
    for li in all_lines:
        if li.precision == precision and li.method == method:
            return li.by.get(multiple, li.by.get(None))
    return None


def _paper(precision: str, method: str, multiple: int | None) -> float | None:
    found = {paper.multiple(t): v for t, v in paper.by_budget("table1", precision=precision, method=method).items()}
    return found.get(multiple, found.get(None))


def _percent(results: Results, entry: Entry) -> tuple[float, float, float]:
    e = results.estimate(entry)
    return 100 * e.value, 100 * e.lo, 100 * e.hi


def _finish(fig: Figure, results: Results, used: Sequence[Entry], *more: str, intervals: bool = True) -> Figure:
    """Put the footer under a figure."""
    made = results.provenance(used)
    notes = list(made.notes())
    if intervals:
        one = "; of one training run they say nothing about another" if made.training_seeds[0] == 1 else ""
        notes.append(f"Bars and bands: 95% intervals clustered by problem{one}.")
    style.footer(fig, [*notes, *more])
    return fig


# -- Figure 1(b) -----------------------------------------------------------------------------------------------------
def figure1b(results: Results, model: str) -> Figure:
    """Figure 1(b): what each method reaches at each FP4 precision, at one total budget, beside BF16.

    The specification names Figure 1(b) but does not describe it. Inferred from Table 1, whose numbers it must show: one
    group of bars a precision (PTQ, FT+PTQ, QAT, and the stages of ReQAT), a line for BF16 fine-tuning and one for the
    BF16 base. The budget is the tier's `claim_total`; the paper's panel takes the same multiple of its own QAT budget.
    PTQ of the base spends no tokens.
    """
    entries = results.of("figure1", model=model)
    all_lines, claim = lines(entries), results.plan.tier.budget.claim_total
    precisions = list(dict.fromkeys(e.precision for e in entries if e.precision != BF16))
    fig = style.figure(3.3)
    left, right = fig.subplots(1, 2, width_ratios=[1.75, 1])
    used: list[Entry] = []

    def measured(precision: str, method: str) -> tuple[float, float, float] | None:
        entry = _at(all_lines, precision, method, claim)
        if entry is None:
            return None
        used.append(entry)
        return _percent(results, entry)

    def of_paper(precision: str, method: str) -> tuple[float, float, float] | None:
        value = _paper(precision, method, claim)
        return None if value is None else (value, math.nan, math.nan)

    ours_total = next((e.total_tokens for e in entries if e.multiple == claim), None)
    _bars(left, precisions, measured, labelled=True)
    _bars(right, precisions, of_paper, labelled=False)
    left.set_ylabel("accuracy (%)")
    right.set_ylabel(PAPER_AXIS)
    style.panel(left, "b", f"Measured: {model}, {tokens(ours_total)} tokens")
    style.panel(right, "", f"Paper: {MODEL_OF_PAPER}, {tokens(claim * paper.QAT_TOKENS)} tokens", theirs=True)
    handles: list[Artist] = [_patch(m) for m in METHODS if any(_at(all_lines, p, m, claim) for p in precisions)]
    handles += [
        Line2D([], [], color=style.colour("FT"), lw=1.2, label="BF16 FT"),
        Line2D([], [], color=style.colour("Baseline"), lw=1.2, ls="--", label="BF16 base"),
    ]
    fig.legend(handles=handles, loc="outside upper center", ncols=len(handles), columnspacing=1.2, handlelength=1.3)
    return _finish(fig, results, used, "PTQ and the BF16 base spend no tokens.")


def _bars(
    ax: Axes,
    precisions: Sequence[str],
    value: Callable[[str, str], tuple[float, float, float] | None],
    *,
    labelled: bool,
) -> None:
    width = 0.14
    for method, line_style in (("FT", "-"), ("Baseline", "--")):
        found = value(BF16, method)
        if found:
            ax.axhline(found[0], color=style.colour(method), lw=0.9, ls=line_style, zorder=2.5)
            if not math.isnan(found[1]):
                ax.axhspan(found[1], found[2], color=style.colour(method), alpha=0.10, lw=0, zorder=0)
    for i, precision in enumerate(precisions):
        shown = [m for m in METHODS if value(precision, m)]
        for j, method in enumerate(shown):
            found = value(precision, method)
            assert found is not None
            v, lo, hi = found
            x = i + (j - (len(shown) - 1) / 2) * width
            ax.bar(x, v, width * 0.9, color=style.colour(method), edgecolor="white", lw=0.4, zorder=2)
            if not math.isnan(lo):
                ax.errorbar(x, v, yerr=[[v - lo], [hi - v]], color="#333333", lw=0.8, capsize=1.6, zorder=3)
            if labelled:
                # In the foot of the bar, out of the way of error bars and lines; above a bar too short for it.
                short = lo < 9
                ax.text(
                    x,
                    hi + 1 if short else 1.5,
                    f"{v:.0f}",
                    ha="center",
                    va="bottom",
                    fontsize=6,
                    zorder=4,
                    color="white" if method in ("FT+PTQ", "ReQAT-T", "ReQAT-TQS") and not short else "black",
                )
    ax.set_xticks(range(len(precisions)), [p.replace("-", "\n", 1) for p in precisions])
    ax.tick_params(axis="x", length=0)
    ax.set_xlim(-0.5, len(precisions) - 0.5)
    ax.set_ylim(0, 100)


def _patch(method: str) -> Patch:
    return Patch(facecolor=style.colour(method), label=method)


# -- Figure 1(c) -----------------------------------------------------------------------------------------------------
def figure1c(results: Results, model: str) -> Figure:
    """Figure 1(c): accuracy against the total token budget, one line a method, at NVFP4-W4A4KV4.

    Inferred from Table 1 like Figure 1(b): the horizontal axis is the total (fine-tuning and QAT together), equal for
    all methods; the BF16 base and PTQ of it, which spend nothing, are the levels on the left edge. The paper's curves
    are in a panel of their own, with the paper's totals.
    """
    entries = results.of("figure1", model=model)
    all_lines, precision = lines(entries), reference_precision(entries)
    fig = style.figure(3.3)
    left, right = fig.subplots(1, 2, width_ratios=[1.3, 1])
    used: list[Entry] = []
    rows = [(BF16, "Baseline"), (BF16, "FT"), *((precision, m) for m in METHODS)]
    shown = []
    for at, method in rows:
        line = next((li for li in all_lines if li.precision == at and li.method == method), None)
        if line is None:
            continue
        shown.append(method)
        trained = {m: e for m, e in line.by.items() if m is not None}
        used += line.by.values()
        if trained:
            x: list[float] = [e.total_tokens for e in trained.values() if e.total_tokens is not None]
            v = np.array([_percent(results, e) for e in trained.values()])
            if len(x) > 1:
                left.fill_between(x, v[:, 1], v[:, 2], color=style.colour(method), alpha=0.13, lw=0)
                left.plot(x, v[:, 0], **style.line(method), ls=_dash(at), zorder=3)
            else:  # points instead of lines, side by side
                x = [x[0] * (1 + 0.07 * (len(shown) - len(rows) / 2))]
                error = [v[:, 0] - v[:, 1], v[:, 2] - v[:, 0]]
                left.errorbar(x, v[:, 0], yerr=error, **style.line(method), ls="none", lw=0.9, zorder=3)
        else:
            v0, lo, hi = _percent(results, line.by[None])
            left.axhline(v0, color=style.colour(method), ls=":", lw=1.1)
            left.axhspan(lo, hi, color=style.colour(method), alpha=0.10, lw=0)
        theirs = paper.by_budget("table1", precision=at, method=method)
        budgets = {t: a for t, a in theirs.items() if t is not None}
        if budgets:
            right.plot(list(budgets), list(budgets.values()), **style.line(method), ls=_dash(at))
        elif theirs:
            right.axhline(theirs[None], color=style.colour(method), ls=":", lw=1.1)
    for ax, totals in (
        (left, sorted({e.total_tokens for e in entries if e.total_tokens})),
        (right, list(paper.budgets("table1"))),
    ):
        ax.set_xticks(totals, [tokens(t) for t in totals])
        ax.set_xlabel("total training budget (tokens)")
        pad = 0.08 * (totals[-1] - totals[0]) or 0.5 * totals[0]
        ax.set_xlim(totals[0] - pad, totals[-1] + pad)
    left.set_ylabel("accuracy (%)")
    right.set_ylabel(PAPER_AXIS)
    style.panel(left, "c", f"Measured: {model}, {precision}")
    style.panel(right, "", f"Paper: {MODEL_OF_PAPER}, {precision}", theirs=True)
    right.yaxis.set_major_locator(MaxNLocator(integer=True))
    handles = [_handle(m) for m in shown]
    fig.legend(handles=handles, loc="outside upper center", ncols=len(handles), columnspacing=1.2, handlelength=2.0)
    return _finish(fig, results, used)


def _dash(precision: str) -> str:
    return "--" if precision == BF16 else "-"


def _handle(method: str) -> Line2D:
    label = {"FT": "BF16 FT", "Baseline": "BF16 base"}.get(method, method)
    if method in ("Baseline", "PTQ"):
        return Line2D([], [], color=style.colour(method), ls=":", lw=1.3, label=label)
    return Line2D([], [], **style.line(method), ls=_dash(BF16 if method == "FT" else ""), label=label)


# -- Table 1 as dots and intervals -----------------------------------------------------------------------------------
def table1_dots(results: Results, model: str) -> Figure:
    """Table 1 at a glance: a dot and its interval a method and budget, one column of panels a precision; the paper's
    below.
    """
    entries = results.of("table1", model=model)
    all_lines = lines(entries)
    precisions = list(dict.fromkeys(e.precision for e in entries if e.precision != BF16))
    rows = [m for m in ("Baseline", "FT", *METHODS) if any(li.method == m for li in all_lines)]
    fig = style.figure(1.7 + 0.5 * len(rows))
    axes = fig.subplots(2, len(precisions), squeeze=False, sharey="row", height_ratios=[1.25, 1])
    ours = sorted({e.multiple for e in entries if e.multiple})
    theirs = sorted(m for m in map(paper.multiple, paper.budgets("table1")) if m)
    for column, precision in enumerate(precisions):
        top, bottom = axes[0, column], axes[1, column]
        for y, method in enumerate(rows):
            at = BF16 if method in ("Baseline", "FT") else precision
            for m in [None, *ours]:
                entry = next((li.by.get(m) for li in all_lines if li.precision == at and li.method == method), None)
                if entry is not None:
                    v, lo, hi = _percent(results, entry)
                    top.errorbar(
                        v,
                        y + _offset(m, ours),
                        xerr=[[v - lo], [hi - v]],
                        lw=1.0,
                        capsize=0,
                        zorder=3,
                        **_dot(method, m, ours),
                    )
            for m in [None, *theirs]:
                budgets = {
                    paper.multiple(t): a for t, a in paper.by_budget("table1", precision=at, method=method).items()
                }
                if m in budgets:
                    bottom.plot(budgets[m], y + _offset(m, theirs), zorder=3, **_dot(method, m, theirs))
        for ax in (top, bottom):
            ax.set_yticks(range(len(rows)), [{"FT": "BF16 FT", "Baseline": "BF16 base"}.get(m, m) for m in rows])
            ax.set_ylim(len(rows) - 0.4, -0.6)
            ax.grid(axis="x")
            ax.grid(axis="y", visible=False)
            ax.axhline(1.5, color="#BBBBBB", lw=0.6)
            ax.tick_params(axis="y", length=0)
        style.panel(top, "", precision)
        top.set_xlabel("accuracy (%)")
        bottom.set_xlabel(PAPER_AXIS)
    _share_limits(list(axes[0]))
    _share_limits(list(axes[1]))
    axes[0, 0].set_ylabel(f"measured: {model}", fontweight="bold")
    axes[1, 0].set_ylabel(f"paper: {MODEL_OF_PAPER}", color=style.GREY, fontweight="bold")
    totals = {e.multiple: e.total_tokens for e in entries}
    several = len(ours) > 1
    words = (
        (
            f"From the top of each line: {', '.join(tokens(totals[m]) for m in ours)} tokens in all (darker: more); "
            f"paper: {', '.join(tokens(t) for t in paper.budgets('table1'))}."
        )
        if several
        else ""
    )
    return _finish(fig, results, entries, *([words] if words else []))


def _offset(multiple: int | None, known: Sequence[int]) -> float:
    """Vertical place within a line: budgets spread over half of it, ascending downwards."""
    if multiple is None or len(known) < 2:
        return 0.0
    return 0.5 * (known.index(multiple) / (len(known) - 1) - 0.5)


def _dot(method: str, multiple: int | None, known: Sequence[int]) -> dict[str, Any]:
    """Marker and colour of a method, paler for smaller budgets."""
    share = 1.0 if multiple is None or len(known) < 2 else 0.45 + 0.55 * known.index(multiple) / (len(known) - 1)
    return {**style.line(method), "ls": "none", "alpha": share}


def _share_limits(axes: Sequence[Axes]) -> None:
    lo, hi = min(ax.get_xlim()[0] for ax in axes), max(ax.get_xlim()[1] for ax in axes)
    for ax in axes:
        # A little beyond 0 and 100, so that a marker there is whole.
        ax.set_xlim(max(-3.0, lo), min(103.0, hi))
        ax.xaxis.set_major_locator(MaxNLocator(6, integer=True, steps=[1, 2, 5, 10]))


# -- training losses -------------------------------------------------------------------------------------------------
def losses(results: Results, model: str) -> Figure:
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
        entry = _at(all_lines, at, method, claim)
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
                    ls=_dash(at),
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
    return _finish(fig, results, used, note, intervals=False)


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


# -- Q-FIT -----------------------------------------------------------------------------------------------------------
def qfit(results: Results, model: str) -> Figure:
    """Q-FIT's search: attention error over the grid of scale exponent and shift, a panel a layer, the chosen point
    marked.

    Colour is the error relative to no Q-FIT (alpha = beta = 0), in percent: every layer has a scale of its own for its
    errors, and what matters is how much of it goes away.
    """
    found = qfit_cell(results.plan, model)
    if found is None:
        raise ReqatError(f"tier {results.plan.tier.name} has no Q-FIT stage for {model}; there is no map to draw")
    id, cell = found
    entry = next(e for e in results.entries if cell in e.cells)
    m = results.metrics(id)
    missing = [k for k in ("error_map", "alphas", "betas", "alpha", "beta") if k not in m]
    if missing:
        raise ReqatError(f"{results.folder(id)}: the record lacks {', '.join(missing)}; {results.remedy([id])}")
    errors = np.array(m["error_map"], dtype=float)  # [L, A, B]
    choice = [(m["alphas"].index(a), m["betas"].index(b)) for a, b in zip(m["alpha"], m["beta"], strict=True)]
    fig = error_maps(errors, m["alphas"], m["betas"], choice)
    note = "Circle: the chosen point; its change of the error stands over each layer."
    made = results.provenance([entry])
    calibration = results.plan.stage(id).settings.calibration  # type: ignore[union-attr]
    style.footer(
        fig,
        [
            made.notes()[0],
            f"{model}, {entry.precision}, before the QAT of {entry.method}.",
            f"Calibration: {calibration.sequences} sequences of {calibration.sequence_tokens} tokens.",
            note,
            *made.notes()[2:],
        ],
    )
    return fig


DRAW: dict[str, Callable[[Results, str], Figure]] = {
    "figure1b": figure1b,
    "figure1c": figure1c,
    "table1-dots": table1_dots,
    "losses": losses,
    "qfit": qfit,
}
