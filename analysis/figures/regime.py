"""The regime question: does quantized training learn less from a token than fine-tuning does?

ReQAT fine-tunes first because, in its setting, QAT from the base model is slow: the same tokens teach a quantized model
less. Where that is not so, splitting a budget can gain nothing. The losses of the two trainings answer it directly, as
both see the same traces in the same order: what QAT's loss has above fine-tuning's at equal tokens, and whether that
grows or shrinks.
"""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure

from analysis.figures._results import finish
from analysis.figures.losses import curve, moving_average
from analysis.report import style
from analysis.report.cells import Entry, Results
from analysis.report.document import tokens
from analysis.report.names import BF16
from reqat.config.errors import ReqatError

NAME = "regime"
NEEDS = "regime"

WINDOW_SHARE = 0.1  # of a training, that a running mean is taken over
LOOKS = (
    (style.ORANGE, "-"),
    (style.BLUE, "-."),
    (style.VERMILION, (0, (5, 1))),
    (style.GREEN, (0, (3, 1, 1, 1))),
    (style.PURPLE, (0, (1, 1))),
)
"""Of precisions, in the plan's order."""


def trainings(results: Results, model: str) -> tuple[Entry, dict[str, Entry]]:
    """Fine-tuning on the whole claim budget, and QAT from the base on the same, by precision: of the artifact that has
    the most training seeds of each.

    Raises `ReqatError` if the plan has not both.
    """
    claim = results.plan.tier.claim_total(model)
    best: dict[tuple[str, str], Entry] = {}
    for e in results.entries:
        if (
            e.model != model
            or e.multiple != claim
            or (e.recipe, e.precision == BF16) not in (("ft", True), ("qat", False))
        ):
            continue
        there = best.get((e.recipe, e.precision))
        if there is None or len(e.cells) > len(there.cells):
            best[e.recipe, e.precision] = e
    qat = {precision: e for (recipe, precision), e in best.items() if recipe == "qat"}
    if ("ft", BF16) not in best or not qat:
        raise ReqatError(
            f"tier {results.plan.tier.name} has no recipes ft and qat of {model} at one budget; add an artifact that "
            "has both, such as table1 or claims-rows."
        )
    return best["ft", BF16], qat


def running_loss(results: Results, entry: Entry) -> tuple[np.ndarray, np.ndarray]:
    """Tokens, and the running mean of the loss of every training seed [seeds, steps]; on the first seed's tokens."""
    curves = [curve(results, results.plan.evaluation(c.evaluation).stage) for c in entry.cells]
    x = curves[0][0]
    smooth = [np.interp(x, at, moving_average(y, max(1, round(WINDOW_SHARE * len(y))))) for at, y in curves]
    return x, np.stack(smooth)


def build(results: Results, model: str) -> Figure:
    """(a) The loss of BF16 fine-tuning and of QAT from the base at each precision against tokens, as running means;
    (b) QAT's minus fine-tuning's at equal tokens and training seed, from the second tenth on. Bands: all training
    seeds; lines: their mean.
    """
    ft, qat = trainings(results, model)
    fig = style.figure(3.1)
    left, right = fig.subplots(1, 2)
    shown: list[np.ndarray] = []
    ft_x, ft_losses = running_loss(results, ft)
    _draw(left, ft_x, ft_losses, "BF16 FT", style.BLACK, "--")
    shown.append(ft_losses)
    right.axhline(0, color=style.BLACK, lw=0.9, ls="--")
    for (precision, entry), (colour, dashes) in zip(qat.items(), _looks(len(qat)), strict=True):
        x, losses = running_loss(results, entry)
        _draw(left, x, losses, f"QAT {precision}", colour, dashes)
        shown.append(losses)
        qat_entry, ft_entry = Results.common(entry, ft)
        (x, losses), (at, base) = (running_loss(results, e) for e in (qat_entry, ft_entry))
        excess = losses - np.stack([np.interp(x, at, y) for y in base])
        late = x >= WINDOW_SHARE * x[-1]  # before that, means of a few batches on a steep slope
        _draw(right, x[late], excess[:, late], "", colour, dashes)
    tails = np.concatenate([y[:, y.shape[1] // 10 :].ravel() for y in shown])
    low, high = float(tails.min()), float(tails.max())  # without the steep beginning
    left.set_ylim(low - 0.1 * (high - low), high + 0.1 * (high - low))
    left.set_ylabel("loss (nats / response token)")
    right.set_ylabel("QAT's loss minus FT's (nats)")
    style.panel(left, "a", f"{model}: loss against tokens")
    style.panel(right, "b", "QAT's excess over FT at equal tokens")
    for ax in (left, right):
        ax.set_xlim(left=0)
        ax.set_xlabel("tokens since the base model")
        ax.xaxis.set_major_formatter(lambda value, _: tokens(round(value)))
    handles, labels = left.get_legend_handles_labels()
    fig.legend(handles, labels, loc="outside upper center", ncols=len(handles))
    rates = "; ".join(
        f"{name} {_rate(results, e)}" for name, e in (("FT", ft), *((f"QAT {p}", e) for p, e in qat.items()))
    )
    note = f"Running means over {WINDOW_SHARE:.0%} of a training; bands: range over training seeds. Rates: {rates}."
    return finish(fig, results, [ft, *qat.values()], note, intervals=False)


def _draw(ax, x, y_SN, label, colour, dashes) -> None:  # type: ignore[no-untyped-def]
    ax.plot(x, y_SN.mean(axis=0), color=colour, ls=dashes, lw=1.3, label=label or None)
    if len(y_SN) > 1:
        ax.fill_between(x, y_SN.min(axis=0), y_SN.max(axis=0), color=colour, alpha=0.15, lw=0)


def _looks(n: int):  # type: ignore[no-untyped-def]
    if n > len(LOOKS):
        raise ReqatError(f"{n} precisions, but looks for {len(LOOKS)}; add one to LOOKS in analysis/figures/regime.py.")
    return LOOKS[:n]


def _rate(results: Results, entry: Entry) -> str:
    settings = results.plan.stage(results.plan.evaluation(entry.cells[0].evaluation).stage).settings
    return f"{settings.training.lr:g}"  # type: ignore[union-attr]
