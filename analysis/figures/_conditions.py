"""Training losses of one artifact's conditions, as Figures 10 and 11 draw them: the same traces in the same order."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from matplotlib.figure import Figure

from analysis.figures._results import finish
from analysis.figures.losses import curve, smoothed
from analysis.report import paper, style
from analysis.report.cells import Results
from analysis.report.document import number, tokens
from reqat.config.errors import ReqatError

_SMOOTHED = 0.15  # of the stage, as a running mean
_LOOKS = ((style.BLACK, "-"), (style.GREEN, "-"), (style.ORANGE, "--"), (style.VERMILION, "-."))


def losses_by_condition(
    results: Results, model: str, artifact: str, words: Mapping[str, str], letter: str, read: str
) -> Figure:
    """Loss of the QAT stage of each condition along its tokens, and the mean of its last third beside the paper's.

    Args:
        words: condition of the artifact's entries -> what the legend calls it, in the order of the paper's rows.
        read: artifact of `paper_digitized.csv` with the paper's means of the last third.

    Raises `ReqatError` for a condition that the tier lacks, and where no training seed is common to all.
    """
    entries = {e.condition: e for e in results.of(artifact, model=model)}
    missing = [condition for condition in words if condition not in entries]
    if missing:
        raise ReqatError(f"tier {results.plan.tier.name}: artifact {artifact} has no cell {missing[0]!r} of {model}")
    chosen = {condition: entries[condition] for condition in words}
    seeds = set.intersection(*(set(e.training_seeds) for e in chosen.values()))
    if not seeds:
        raise ReqatError(f"{artifact}: no training seed in common, so no two conditions saw the same order of traces")
    seed = min(seeds)
    fig = style.figure(3.0)
    left, right = fig.subplots(1, 2, width_ratios=[1.6, 1])
    theirs = paper.read_off(read)
    places = np.arange(len(words))
    means = []
    for (condition, entry), (colour, dashes) in zip(chosen.items(), _LOOKS, strict=False):
        cell = next(c for c in entry.cells if c.training_seed == seed)
        stage = results.plan.evaluation(cell.evaluation).stage
        x, y = curve(results, stage)
        x = x - (x[-1] - results.plan.stage(stage).budget_tokens)  # from the start of this stage
        mean = smoothed(x, y, _SMOOTHED * float(x[-1] - x[0]))
        left.plot(x, mean, color=colour, ls=dashes, lw=1.3, label=words[condition])
        means.append(last_third(x, y))
    for values, marker, filled, label in (
        (np.array(means) - means[0], "o", True, "measured"),
        (np.array([r.value for r in theirs]) - theirs[0].value, "s", False, paper.READ_OFF),
    ):
        colour = "black" if filled else style.GREY
        right.plot(
            places,
            values,
            ls="none",
            marker=marker,
            color=colour,
            mfc=colour if filled else "none",
            label=label,
            gid=None if filled else style.PAPER,
        )
        for at, value in zip(places, values, strict=True):
            if at == 0:  # the zero that the others are measured from
                continue
            shift = -7 if filled else 7
            ha = "right" if filled else "left"
            said = number(value, 3, sign=True)
            right.annotate(
                said, (at, value), (shift, 0), textcoords="offset points", ha=ha, va="center", fontsize=6, color=colour
            )
    left.set_xlabel("QAT tokens")
    left.xaxis.set_major_formatter(lambda value, _: tokens(round(value)))
    left.set_ylabel("loss (nats / response token)")
    right.axhline(0, color="#333333", lw=0.7)
    right.set_xticks(places, [word.replace(" ", "\n", 1) for word in words.values()], fontsize=7)
    right.set_xlim(-0.9, len(words) - 0.1)
    right.margins(y=0.2)
    right.set_ylabel(f"last third: loss minus {next(iter(words.values()))}")
    right.legend(loc="best", fontsize=6.5)
    handles, names = left.get_legend_handles_labels()  # above the panels: curves of a few steps fill theirs
    fig.legend(handles, names, loc="outside upper left", ncols=len(handles), columnspacing=1.4)
    style.panel(left, letter, f"Measured: {model}")
    style.panel(right, "", "Mean of the last third")
    note = (
        f"Negative log-likelihood of training seed {seed}, the same traces in the same order; curves: running mean "
        f"over {_SMOOTHED:.0%} of the stage. Paper ({theirs[0].model}): to about 0.001 nats."
    )
    return finish(fig, results, list(chosen.values()), note, intervals=False)


def last_third(x: np.ndarray, y: np.ndarray) -> float:
    """Mean of a curve `y` over the last third of its tokens `x`, which count from the start of the stage."""
    return float(y[x > 2 / 3 * x[-1]].mean())
