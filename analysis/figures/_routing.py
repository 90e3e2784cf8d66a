"""Routed decoding, as Figures 2 and 8 draw it: accuracy of the four policies, and which model chose how many tokens."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from analysis.report import paper, style
from analysis.report.document import number
from analysis.report.studies import Study, adjusted, conditions_named
from analysis.report.study_words import nats, roles

POLICIES = ("all-reference", "low-reference", "low-candidate", "all-candidate")


def policy_words(routing: Study) -> dict[str, str]:
    """Policy -> tick label."""
    a, b = roles(routing)
    return {
        "all-reference": f"all\n{a}",
        "low-reference": f"low {a}\nhigh {b}",
        "low-candidate": f"low {b}\nhigh {a}",
        "all-candidate": f"all\n{b}",
    }


def policy_colours() -> dict[str, str]:
    """The pure policies have the colours of their models."""
    colours = (style.colour("FT"), style.GREEN, style.ORANGE, style.colour("FT+PTQ"))
    return dict(zip(POLICIES, colours, strict=True))


def threshold_words(routing: Study) -> str:
    """`low is below 0.6 nats`, or `low is below p75 (0.003 nats)`."""
    s = routing.settings
    text = str(s["threshold"])
    if not text.startswith("p"):
        return f"low is below {text} nats"
    return f"low is below {text} ({nats(float(s['threshold_nats']))} nats)"


def draw_policies(ax: Axes, routing: Study, *, differences: bool = False, narrow: bool = False) -> None:
    """Accuracy of the four policies, with how many responses were right in the foot of each bar unless narrow."""
    rows, colours = conditions_named(routing, POLICIES), policy_colours()
    p_holm = adjusted(rows)
    for i, (name, row) in enumerate(rows.iterrows()):
        value, lo, hi = (100 * float(row[key]) for key in ("accuracy", "lo", "hi"))
        ax.bar(i, value, 0.74, color=colours[str(name)], zorder=2)
        ax.errorbar(i, value, yerr=[[value - lo], [hi - value]], color=style.GREY, lw=1.1, zorder=3)
        asked = int(row["problems"]) * int(row["seeds"])
        solved = f"{round(row['accuracy'] * asked):,}\nof {asked:,}"
        above = []
        if differences and i and pd.notna(row.get("difference")):
            points = number(100 * row["difference"], sign=True)
            above = [points, _p(float(p_holm[name]))]
        if narrow:
            pass
        elif value > 25:
            light = name in ("all-reference", "all-candidate", "low-reference")
            colour = "white" if light else "black"
            ax.text(i, 2, solved, ha="center", va="bottom", fontsize=5.8, color=colour, zorder=4)
        else:  # too low to be written into
            above.append(solved)
        if above:
            ax.text(i, hi + 2, "\n".join(above), ha="center", va="bottom", fontsize=6.2, zorder=4)
    words = policy_words(routing)
    ax.set_xticks(
        range(len(POLICIES)),
        [words[name].replace(" ", "\n" if narrow else " ") for name in POLICIES],
        fontsize=5.8 if narrow else 6.2,
    )
    ax.tick_params(axis="x", length=0)
    ax.set_ylim(0, 124)  # room for what stands over the bars, and for the legend
    ax.set_yticks(range(0, 101, 20))
    ax.set_ylabel("accuracy (%)")


def draw_paper_policies(ax: Axes, artifact: str) -> str:
    """The paper's answers to one problem, in percent of its 8 seeds, over the bars; returns what a footer says."""
    read = paper.read_off(artifact)
    policies = {("BF16", "BF16"): 0, ("FP4", "BF16"): 1, ("BF16", "FP4"): 2, ("FP4", "FP4"): 3}  # (high, low)
    places = [policies[r.condition["high"], r.condition["low"]] for r in read]
    how = "paper (counted)" if read[0].how == "counted" else paper.READ_OFF
    look = style.theirs(how, color="black", marker="s", ls="none", mfc="white", alpha=1, zorder=4)
    beside = 0.26  # of the middle of a bar, where its interval and its counts are
    ax.plot([at + beside for at in places], [100 * r.value / 8 for r in read], **look)
    ax.legend(loc="upper right", fontsize=6, borderaxespad=0.0, handletextpad=0.2)
    return f"{how.capitalize()}: right answers of {read[0].model} to one problem, of 8 seeds."


def _p(p: float) -> str:
    return "p<0.001" if p < 0.001 else f"p={p:.2g}"


def draw_choosers(ax: Axes, routing: Study) -> None:
    """Which share of the tokens each model chose, a bar a policy."""
    rows = conditions_named(routing, POLICIES)
    a, b = roles(routing)
    theirs = 100 * rows["touched"].to_numpy(dtype=float)
    y = np.arange(len(POLICIES))
    ax.barh(y, 100 - theirs, 0.7, color=style.colour("FT"), label=a, zorder=2)
    ax.barh(y, theirs, 0.7, left=100 - theirs, color=style.colour("FT+PTQ"), label=b, zorder=2)
    for i, share in enumerate(theirs):
        if share > 12:
            ax.text(100 - share / 2, i, _share(share), ha="center", va="center", fontsize=6, color="white", zorder=4)
        if share < 88:
            ax.text(
                (100 - share) / 2, i, _share(100 - share), ha="center", va="center", fontsize=6, color="white", zorder=4
            )
    words = policy_words(routing)
    ax.set_yticks(y, [words[name] for name in POLICIES], fontsize=6.2)
    ax.set_ylim(len(POLICIES) - 0.4, -1.15)
    ax.tick_params(axis="y", length=0)
    ax.set_xlim(0, 100)
    ax.grid(visible=False)
    ax.set_xlabel("tokens chosen (%)")
    ax.legend(loc="upper center", ncols=2, handlelength=0.9, columnspacing=1.0, borderaxespad=0.1)


def _share(percent: float) -> str:
    return f"{percent:.0f}%"
