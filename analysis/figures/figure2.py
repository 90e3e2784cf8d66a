"""Figure 2: where FP4 causes errors, from studies of the kinds `pair`, `routing` and `noise`.

Digits and operators are what a model is surest of (a); four bits multiply the probability of everything else there and
change little where a model is unsure (b, f); and it is there that an error costs the answer: give back those decisions
alone to BF16 (c, d), or disturb them alone (e). Whether this holds for the models at hand is what the figure is for.

It is drawn from the small files that a study leaves and that pinning keeps; it reads no token traces.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from analysis.figures._routing import draw_choosers, draw_paper_policies, draw_policies, threshold_words
from analysis.report import paper, style
from analysis.report.plots import KIND_COLOURS, draw_damage, draw_kinds
from analysis.report.studies import ByKind, Study, conditions_named, one, optional, several
from analysis.report.study_words import nats, notes, roles, short

NAME = "figure2"
STUDIES = ("pair", "routing", "noise")

_CLOUD_COLUMNS, _CLOUD_ROWS = 4, 6
_LOW, _HIGH = style.VERMILION, style.SKY  # decisions of low and of high entropy


def build(studies: ByKind) -> Figure:
    """Figure 2: token types by entropy (a), distributions at two positions (b), routed decoding (c, d), noise (e), and
    damage by entropy (f).

    Needs a `pair`, a `noise` and a `routing` study (of several, the first with its threshold in nats).
    """
    pair, noise, routing = one(studies, "pair"), one(studies, "noise"), _in_nats(several(studies, "routing"))
    fig = style.figure(7.9)
    rows: Any = fig.subfigures(3, 1, height_ratios=[1.0, 1.0, 1.05])
    first = rows[0].subplots(1, 3, width_ratios=[1, 1, 0.95])
    _clouds(first[0], first[1], pair)
    _kinds(first[2], pair)
    second = rows[1].subplots(1, 3, width_ratios=[1, 1, 0.95])
    _examples(second[0], second[1], pair)
    draw_choosers(second[2], routing)
    style.panel(second[2], "c", "Who chose")
    third = rows[2].subplots(1, 4, width_ratios=[1.2, 1.05, 1, 1])
    draw_policies(third[0], routing, narrow=True)
    said = draw_paper_policies(third[0], "figure2d")
    style.panel(third[0], "d", "Routed decoding")
    _noise(third[1], noise)
    _damage(third[2], third[3], pair)
    words = f"(a) Size: number of tokens of that type. (c, d) {threshold_words(routing).capitalize()}."
    style.footer(
        rows[-1],
        [
            *notes(pair, routing, noise),
            words,
            f"(d) {said}",
            f"Dotted: {paper.READ_OFF}: (e) R1-Qwen-7B and 14B, Qwen3-4B and 8B on AIME-2025; (f) R1-Qwen-14B.",
        ],
    )
    return fig


def _in_nats(routings: Sequence[Study]) -> Study:
    return next((r for r in routings if not str(r.settings["threshold"]).startswith("p")), routings[0])


def _clouds(left: Axes, right: Axes, pair: Study) -> None:
    """Token types by mean entropy, lowest and highest, in reading order; larger where there are more tokens."""
    frame = pair.table("entropy-by-token")
    per_side = min(_CLOUD_COLUMNS * _CLOUD_ROWS, len(frame) // 2)
    counts = np.log(frame["n"].to_numpy(dtype=float)) if len(frame) else np.zeros(1)
    spread = max(float(counts.max() - counts.min()), 1e-9)
    for ax, part, letter, title in (
        (left, frame.head(per_side), "a", "Surest token types"),
        (right, frame.tail(per_side)[::-1], "", "Least sure token types"),
    ):
        style.panel(ax, letter, title)
        ax.set_axis_off()
        ax.set_xlim(0, _CLOUD_COLUMNS)
        ax.set_ylim(_CLOUD_ROWS + 0.3, 0)
        if part.empty:
            ax.text(0.5 * _CLOUD_COLUMNS, 2, "no token type is seen often enough", ha="center", fontsize=7)
            continue
        for i, row in enumerate(part.itertuples()):
            size = 6.2 + 6.0 * (np.log(row.n) - counts.min()) / spread
            ax.text(
                i % _CLOUD_COLUMNS + 0.5,
                i // _CLOUD_COLUMNS + 0.5,
                visible(str(row.token)),
                ha="center",
                va="center",
                fontsize=size * min(1.0, 8 / max(len(str(row.token)), 1)),
                color=KIND_COLOURS[str(row.kind)],
                fontweight="bold" if row.kind != "other" else "normal",
            )
        ends = part["value"].to_numpy()
        words = f"mean entropy {nats(ends[0])} to {nats(ends[-1])} nats, in reading order"
        ax.text(0, _CLOUD_ROWS + 0.3, words, fontsize=6.2, color="#555555", va="bottom")
    handles = [Patch(color=colour, label=f"{kind}s") for kind, colour in KIND_COLOURS.items() if kind != "other"]
    right.legend(
        handles=handles, loc="lower right", bbox_to_anchor=(1.02, -0.13), ncols=2, fontsize=6.2, handlelength=0.8
    )


def visible(token: str) -> str:
    """A token as print shows it: a line break as a sign, a space in front as a low bracket."""
    text = token.replace("\n", "\u21b5").replace("\t", "\u21e5")
    stripped = text.lstrip(" ")
    return "\u2423" * (len(text) - len(stripped)) + stripped.replace("$", r"\$")


def _kinds(ax: Axes, pair: Study) -> None:
    draw_kinds(ax, pair.table("kinds-by-bin"))
    _percentile_axis(ax, pair)
    ax.legend(loc="upper left", ncols=2)
    style.panel(ax, "", "Digits and operators")


def _percentile_axis(ax: Axes, pair: Study) -> None:
    ax.set_xlim(0, 100)
    ax.set_xlabel(f"percentile of {roles(pair)[0]} entropy", fontsize=7.2)


def _examples(left: Axes, right: Axes, pair: Study) -> None:
    frame = optional(pair, "examples")
    reference, candidate = roles(pair)
    labels = list(dict.fromkeys(frame["label"])) if frame is not None else []
    # One scale for both, so that the difference between them can be seen.
    least = float(frame["probability"].min()) if frame is not None else 1.0
    legend = False
    titles = {"derailment": "Where a response derails", "high entropy": "Least sure where responses part"}
    for ax, name, letter in ((left, "derailment", "b"), (right, "high entropy", "")):
        style.panel(ax, letter, titles[name])
        rows = frame[frame["example"] == name] if frame is not None else None
        if rows is None or rows.empty:
            ax.set_axis_off()
            ax.text(0.5, 0.5, "no such position in these traces", ha="center", transform=ax.transAxes, fontsize=7)
            continue
        tokens = list(dict.fromkeys(rows.sort_values(["rank", "label"], kind="stable")["token"]))[:6]
        for label, words, colour, marker, shift in (
            (labels[0], reference, style.colour("FT"), "o", -0.12),
            (labels[1], candidate, style.colour("FT+PTQ"), "s", 0.12),
        ):
            given = rows[(rows["label"] == label) & rows["token"].isin(tokens)]
            x = np.array([tokens.index(token) for token in given["token"]]) + shift
            ax.vlines(x, 1e-9, given["probability"], color=colour, lw=1.0, alpha=0.5)
            ax.plot(x, given["probability"], marker, color=colour, ms=4.5, label=words)
        first = rows.iloc[0]
        ax.set_yscale("log")
        ax.set_ylim(10 ** np.floor(np.log10(max(least, 1e-9) / 1.5)), 2)
        ax.set_xticks(range(len(tokens)), [visible(token) for token in tokens])
        ax.set_xlim(-0.6, len(tokens) - 0.4)
        ax.grid(axis="x", visible=False)
        if not legend:
            ax.set_ylabel("probability of the next token")
            ax.legend(loc="upper right")
            legend = True
        ax.set_xlabel(
            f"\u201c\u2026{_context(str(first.context))} \u25a1\u201d\n"
            f"entropy {nats(first.entropy_reference)} and {nats(first.entropy_candidate)} nats; "
            f"taken: {visible(str(first.taken))}",
            fontsize=6.8,
        )


def _context(text: str) -> str:
    return text[-26:].replace("\n", "\u21b5").replace("$", r"\$")


def _noise(ax: Axes, noise: Study) -> None:
    """Accuracy over sigma, for noise on low- and on high-entropy decisions; sigma 0 is no noise."""
    share = f"{100 * float(noise.settings['share']):g}%"
    words = {"low": f"surest {share}", "high": f"least sure {share}"}
    sigmas = [float(s) for s in noise.settings["sigmas"]]
    for side, colour, marker in (("low", _LOW, "o"), ("high", _HIGH, "s")):
        names = ["none", *(f"{side}-{sigma:g}" for sigma in sigmas)]
        rows = conditions_named(noise, names)
        value, lo, hi = (100 * rows[key].to_numpy(dtype=float) for key in ("accuracy", "lo", "hi"))
        ax.errorbar(
            [0, *sigmas], value, yerr=[value - lo, hi - value], color=colour, marker=marker, ms=4, label=words[side]
        )
        for model, curve in _their_noise(side).items():
            ax.plot(
                list(curve), list(curve.values()), **style.theirs(f"{paper.READ_OFF}, {model}, {side}", color=colour)
            )
    ax.set_ylim(0, 145)  # room for the legend
    ax.set_yticks(range(0, 101, 20))
    ax.set_xlabel("noise \u03c3 (relative)")
    ax.set_ylabel("accuracy (%)")
    ax.xaxis.set_major_locator(MaxNLocator(4))
    shown = [*ax.containers, Line2D([], [], **style.theirs(paper.READ_OFF))]
    ax.legend(handles=shown, loc="upper right", fontsize=6, borderaxespad=0.1)
    style.panel(ax, "e", f"Noise, {short(noise.settings['precisions']['model'])}")


def _their_noise(side: str) -> dict[str, dict[float, float]]:
    """Model of the paper -> sigma -> accuracy, with noise on one side."""
    out: dict[str, dict[float, float]] = {}
    for r in paper.read_off("figure2e"):
        if r.condition["subset"] == side:
            out.setdefault(r.model, {})[float(r.condition["sigma"])] = r.value
    return out


def _their_damage(ax: Axes, metric: str, times: float) -> None:
    """The paper's curve over its bins of entropy, of equal counts."""
    value = [times * r.value for r in paper.read_off("figure2f", metric=metric)]
    ax.plot((np.arange(len(value)) + 0.5) * 100 / len(value), value, marker="o", **style.theirs(paper.READ_OFF))


def _damage(left: Axes, right: Axes, pair: Study) -> None:
    """Tail-mass ratio and top-1 mismatch by bin of the reference's entropy."""
    _their_damage(left, "tail-mass ratio", 1)  # first, so that the axes make room for it
    _their_damage(right, "top-1 mismatch", 100)
    draw_damage(left, right, pair.table("tail-and-mismatch"))
    right.set_ylim(top=1.2 * right.get_ylim()[1])  # room for the legend
    right.legend(loc="upper left", fontsize=6)
    style.panel(left, "f", "Tail mass")
    style.panel(right, "", "Other top token")
    for ax in (left, right):
        _percentile_axis(ax, pair)
