"""Figure 3: ReQAT at a glance. Its stages as the tier runs them, and below one real position: what SEM weighs, and how
sure three models are of a digit.
"""

from __future__ import annotations

from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

from analysis.figures.figure2 import visible
from analysis.report import style
from analysis.report.document import tokens
from analysis.report.studies import ByKind, one
from analysis.report.study_words import made_notes, nats
from reqat.config.errors import ReqatError

NAME = "figure3"
STUDIES = ("overview",)

_NAMES = {"finetune": "Stage 1: fine-tuning", "qfit": "Stage 1.5: Q-FIT", "qat": "Stage 2: QAT"}
_COLOURS = {"finetune": "#E8E8E8", "qfit": "#F6DDEB", "qat": "#FBE0CC"}


def build(studies: ByKind) -> Figure:
    """Figure 3: boxes for the stages of ReQAT-TQS; six tokens with entropy and SEM weight; the digit's probability."""
    study = one(studies, "overview")
    strip, s = study.table("strip"), study.settings
    chosen = strip[strip["chosen"].astype(bool)]
    if len(chosen) != 1:
        raise ReqatError(f"{study.path}: strip.csv marks {len(chosen)} tokens as chosen; run the study again.")
    fig = style.figure(3.6)
    rows: Any = fig.subfigures(2, 1, height_ratios=[1.0, 1.35])
    _stages(rows[0].subplots(), s["stages"])
    left, right = rows[1].subplots(1, 2, width_ratios=[2.1, 1])
    _strip(left, strip)
    _bars(right, chosen.iloc[0])
    quantized = sorted({v for k, v in s["precisions"].items() if k != "bf16"})
    style.footer(
        rows[1],
        [
            f"{study.tier}; BF16 is the fine-tuned model, the others are trained and read at "
            f"{' and '.join(quantized)}.",
            f"The position: of {s['n']} verified validation traces, among the quarter of the digits that BF16 is "
            "surest of, the one that lost most probability in QAT without SEM: an illustration.",
            "Entropies are those of QAT; weights as of a micro-batch of this trace "
            f"(percentile {100 * s['percentile']:g}).",
            "The paper's Figure 3 draws 1/s on queries and s on keys; drawn here as its Equation 2: queries times s, "
            "keys over s.",
            *made_notes(study),
        ],
    )
    return fig


def stage_words(stage: dict[str, Any]) -> list[str]:
    """The lines of a stage's box."""
    kind = stage["kind"]
    if kind == "qfit":
        return [
            "scale before RoPE: q \u00b7 s, k / s",
            "shift after RoPE: k \u2212 m",
            f"{stage['grid']} x {stage['grid']} points a layer",
            f"on {stage['sequences']} x {stage['sequence_tokens']} tokens",
        ]
    terms = " + ".join(
        {"nll": "NLL", "sem": "SEM"}.get(term["name"], term["name"])
        if term["weight"] == 1
        else f"{term['weight']:g} {term['name'].upper()}"
        for term in stage["objective"]
    )
    same = kind == "qat" and not stage["skip_tokens"]
    return [
        stage["precision"].partition(":")[0],
        f"{'the first ' if same else ''}{tokens(stage['tokens'])} tokens",
        *(["of the same traces"] if same else []),
        f"loss: {terms}",
    ]


def _stages(ax: Axes, stages: list[dict[str, Any]]) -> None:
    """Boxes from left to right, with arrows between them."""
    ax.set_axis_off()
    ax.set_xticks([])
    ax.set_yticks([])
    ax.set_xlim(0, len(stages) + 0.45)
    ax.set_ylim(0, 1)
    ax.text(0.0, 0.5, "base\nmodel", ha="left", va="center", fontsize=8)
    for i, stage in enumerate(stages):
        x = 0.45 + i
        box = FancyBboxPatch(
            (x, 0.08),
            0.84,
            0.84,
            boxstyle="round,pad=0,rounding_size=0.04",
            fc=_COLOURS[stage["kind"]],
            ec="#888888",
            lw=0.8,
        )
        ax.add_patch(box)
        ax.text(x + 0.42, 0.78, _NAMES[stage["kind"]], ha="center", va="center", fontsize=8.5, fontweight="bold")
        ax.text(x + 0.42, 0.38, "\n".join(stage_words(stage)), ha="center", va="center", fontsize=6.8, linespacing=1.5)
        ax.annotate(
            "", (x - 0.01, 0.5), (x - 0.14, 0.5), arrowprops={"arrowstyle": "->", "lw": 1.0, "color": "#444444"}
        )


def _strip(ax: Axes, strip: pd.DataFrame) -> None:
    """A bar of SEM's weight a token, with the token and its entropy under it; the digit in colour."""
    colours = [style.VERMILION if chosen else style.SKY for chosen in strip["chosen"].astype(bool)]
    ax.bar(range(len(strip)), strip["weight"], 0.62, color=colours, zorder=2)
    for i, weight in enumerate(strip["weight"]):
        ax.text(i, weight + 0.03, f"{weight:.2g}", ha="center", va="bottom", fontsize=7)
    words = [f"{visible(str(t))}\n{nats(float(h))}" for t, h in zip(strip["token"], strip["entropy"], strict=True)]
    ax.set_xticks(range(len(strip)), words, fontsize=8)
    ax.tick_params(axis="x", length=0)
    ax.set_ylim(0, 1.2)
    ax.set_yticks([0, 0.5, 1])
    ax.set_ylabel("weight of SEM")
    ax.set_xlabel("token, and its entropy (nats)")
    style.panel(ax, "", "Selective entropy minimization")


def _bars(ax: Axes, chosen: pd.Series) -> None:
    """The probability of the digit in each model."""
    labels = [name.removeprefix("p ") for name in chosen.index if name.startswith("p ")]
    for i, (label, colour) in enumerate(zip(labels, (style.colour("FT"), style.PURPLE, style.VERMILION), strict=True)):
        p = float(chosen[f"p {label}"])
        ax.bar(i, p, 0.62, color=colour, zorder=2)
        ax.text(i, p + 0.02, f"{p:.3f}", ha="center", va="bottom", fontsize=7)
    ax.set_xticks(range(len(labels)), [label.replace(" with ", "\n+ ") for label in labels], fontsize=8)
    ax.tick_params(axis="x", length=0)
    ax.set_ylim(0, 1.15)
    ax.set_yticks([0, 0.5, 1])
    ax.set_ylabel("probability")
    style.panel(ax, "", f"Next token \u201c{visible(str(chosen['token']))}\u201d")
