"""Looking at single tokens and single traces: what the notebooks draw.

:mod:`analysis.entropy.pair_report` says how much two models differ on average. Here one sees it: where the entropies
lie, which tokens carry them, and one response of each model around the token at which they part.

Shapes: N tokens of a trace.
"""

from __future__ import annotations

import html
from collections.abc import Sequence
from io import BytesIO
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from analysis import entropy
from analysis.entropy.frames import tokens_of
from analysis.report import style
from analysis.viewer import colours
from reqat.config.errors import ReqatError
from reqat.evaluation.low_entropy import LOW_NATS
from reqat.evaluation.trace_folder import TraceFolder
from reqat.evaluation.trace_tables import stream_tokens

if TYPE_CHECKING:
    from IPython.display import HTML, Image

_SERIES = (style.BLUE, style.VERMILION, style.GREEN, style.PURPLE)
_KIND_COLOURS = {"digit": style.BLUE, "operator": style.VERMILION, "other": style.GREY}
# Entropies below this are as good as none; a logarithmic axis has to begin somewhere.
_LEAST_NATS = 1e-5


def show(fig: Figure) -> Image:
    """A figure as a notebook shows it: the same bytes as in the PNG file."""
    from IPython.display import Image

    data = BytesIO()
    with style.context():
        fig.savefig(data, format="png", metadata={"Software": None})
    return Image(data.getvalue(), width=round(96 * fig.get_figwidth()))


def visible(text: str) -> str:
    """A token's text with its white space made visible."""
    return text.replace(" ", "\u2423").replace("\n", "\u23ce").replace("\t", "\u21e5") or "\u2205"


# -- entropies and token types ---------------------------------------------------------------------------------------
def draw_entropies(folder: TraceFolder, labels: Sequence[str], *, notes: Sequence[str] = ()) -> Figure:
    """The share of tokens above each entropy, a line a precision, over the same tokens."""
    keep = tokens_of(folder, entropy.trace_source(folder, labels[0]))
    with style.context():
        fig = style.figure(2.5, style.WIDTH_IN / 1.6)
        ax = fig.subplots()
        for label, colour in zip(labels, _SERIES, strict=False):
            values = np.sort(folder.entropy(label)[keep].clip(min=_LEAST_NATS))
            above = 100 * (1 - np.arange(len(values)) / len(values))
            ax.plot(values, above, color=colour, label=label, drawstyle="steps-post")
        ax.axvline(LOW_NATS, color=style.GREY, lw=0.8, ls="--")
        ax.set_xscale("log")
        ax.set_xlim(left=_LEAST_NATS)
        ax.set_ylim(0, 100)
        ax.set_xlabel(f"token entropy, nats (dashed: {LOW_NATS})")
        ax.set_ylabel("tokens above it, %")
        ax.legend(loc="upper center")
        style.footer(fig, [f"n = {int(keep.sum()):,} tokens that both models read.", *notes])
        return fig


def draw_token_types(frame: pd.DataFrame, *, each: int = 12, notes: Sequence[str] = ()) -> Figure:
    """Mean entropy of the token types with the lowest and the highest, from :func:`analysis.entropy.entropy_by_token`.

    Bars are 95% intervals clustered by problem. Raises `ReqatError` for a frame without tokens.
    """
    if frame.empty:
        raise ReqatError("no token type was seen often enough; collect more traces, or ask for a smaller more_than.")
    parts = [("Lowest", frame.head(each)), ("Highest", frame.iloc[::-1].head(each)[::-1])]
    with style.context():
        fig = style.figure(0.9 + 0.16 * min(each, len(frame)))
        for letter, ax, (title, part) in zip("ab", fig.subplots(1, 2), parts, strict=True):
            y = np.arange(len(part))
            for kind, colour in _KIND_COLOURS.items():
                of_kind = (part["kind"] == kind).to_numpy()
                rows = part[of_kind]
                spread = np.nan_to_num([rows["value"] - rows["lo"], rows["hi"] - rows["value"]]).clip(min=0)
                ax.errorbar(
                    rows["value"], y[of_kind], xerr=spread, fmt="o", ms=4, color=colour, capsize=0, lw=1, label=kind
                )
            ax.set_yticks(y, [visible(text) for text in part["token"]])
            ax.set_ylim(-0.6, len(part) - 0.4)
            ax.set_xlim(left=0)
            ax.xaxis.set_major_locator(MaxNLocator(5))
            ax.ticklabel_format(axis="x", scilimits=(-2, 3), useMathText=True)
            ax.grid(axis="x")
            ax.set_xlabel("mean entropy, nats")
            style.panel(ax, letter, f"{title} mean entropy")
        fig.axes[1].legend(loc="lower right")
        style.footer(fig, [f"{len(frame):,} token types; bars: 95% interval, clustered by problem.", *notes])
        return fig


# -- one pair of traces ----------------------------------------------------------------------------------------------
def pair_to_show(divergences: pd.DataFrame) -> pd.Series:
    """Of the pairs of :func:`analysis.entropy.first_divergences` one to look at: a derailed one where there is one, and
    of those the one that parts at the lowest entropy.

    Raises `ReqatError` where no pair parts.
    """
    parted = divergences[divergences["position"] >= 0]
    if parted.empty:
        raise ReqatError("the two models gave the same responses to every problem; there is no divergence to show.")
    parted = parted[parted["derailed"]] if parted["derailed"].any() else parted
    return parted.sort_values(["entropy", "problem", "seed"], na_position="last").iloc[0]


def trace_frame(folder: TraceFolder, trace: int) -> pd.DataFrame:
    """The tokens of one trace: ``position``, ``token`` (id), ``text``, and for each label ``entropy_``, ``prob_``,
    ``top_`` and ``top_prob_``.

    Raises `ReqatError` for a trace that the folder does not have.
    """
    rows = np.flatnonzero(folder.traces["trace"].to_numpy() == trace)
    if not len(rows):
        raise ReqatError(f"{folder.folder} has no trace {trace}; it has {len(folder.traces)}.")
    names = [f"{name}_{label}" for label in folder.labels for name in ("entropy", "prob", "top", "top_prob")]
    columns = next(
        found for number, found in stream_tokens(folder.folder, ["position", "token", *names]) if number == trace
    )
    frame = pd.DataFrame({name: values.to_pandas() for name, values in columns.items() if name != "trace"})
    frame.insert(2, "text", [folder.vocabulary[i] for i in frame["token"]])
    return frame


def choices(folder: TraceFolder, trace: int, position: int, labels: Sequence[str]) -> pd.DataFrame:
    """What each precision would say at one token: its most likely tokens with their probabilities, best first."""
    row = trace_frame(folder, trace).iloc[position]
    columns: dict[str, Any] = {}
    for label in labels:
        columns[label] = [visible(folder.vocabulary[i]) for i in row[f"top_{label}"]]
        columns[f"p, {label}"] = row[f"top_prob_{label}"]
    return pd.DataFrame(columns)


def draw_around(
    folder: TraceFolder,
    trace: int,
    position: int,
    labels: Sequence[str],
    *,
    before: int = 14,
    after: int = 10,
    notes: Sequence[str] = (),
) -> Figure:
    """Entropies of each precision at the tokens of a trace around ``position``, which is marked."""
    frame = trace_frame(folder, trace).iloc[max(0, position - before) : position + after + 1]
    with style.context():
        fig = style.figure(2.4)
        ax = fig.subplots()
        x = frame["position"].to_numpy()
        for label, colour, marker in zip(labels, _SERIES, "osD^", strict=False):
            values = frame[f"entropy_{label}"].clip(lower=_LEAST_NATS)
            ax.plot(x, values, color=colour, marker=marker, ms=4, lw=1, label=label)
        ax.axvspan(position - 0.5, position + 0.5, color=style.YELLOW, alpha=0.5, lw=0)
        ax.axhline(LOW_NATS, color=style.GREY, lw=0.8, ls="--")
        ax.set_yscale("log")
        ax.set_ylabel("entropy, nats")
        ax.set_xticks(x, [visible(text) for text in frame["text"]], rotation=90 if _wide(frame["text"]) else 0)
        ax.set_xlim(x[0] - 0.6, x[-1] + 0.6)
        ax.set_xlabel(f"token (shaded: the first that differs, at {position})")
        fig.legend(loc="outside upper right", ncols=len(labels))
        style.footer(fig, [f"{folder.name(trace)}.", *notes])
        return fig


def _wide(texts: pd.Series) -> bool:
    return bool(texts.str.len().max() > 3)


def token_html(folder: TraceFolder, trace: int, label: str, *, mark: int = -1, until: int | None = None) -> HTML:
    """A trace's text with each token coloured by its entropy under ``label``, as the trace viewer does it.

    ``mark`` is outlined (-1: none). Tokens from ``until`` on are left out. What a model wrote is escaped.
    """
    from IPython.display import HTML

    look = colours.scales("light")
    frame = trace_frame(folder, trace)
    parts = []
    for i, text, value in zip(frame["position"], frame["text"], frame[f"entropy_{label}"], strict=True):
        if until is not None and i >= until:
            parts.append(" \u2026")
            break
        back, ink = look[f"h{int(np.searchsorted(colours.ENTROPY_EDGES, value, side='right'))}"]
        outline = ";outline:2px solid #0072B2" if i == mark else ""
        shown = html.escape(text).replace("\n", "\u23ce<br>")
        parts.append(
            f'<span title="{i}: {value:.3f} nats" style="background:{back};color:{ink}{outline}">{shown}</span>'
        )
    row = folder.traces[folder.traces["trace"] == trace].iloc[0]
    verdict = {True: "right", False: "wrong"}.get(row["correct"], "not graded")
    head = f"<b>{html.escape(str(row['source']))}</b> ({verdict}), entropies of {html.escape(label)}"
    body = "".join(parts)
    return HTML(
        f'<div style="background:#fff;color:#14161a;padding:6px">{head}'
        f'<div style="font-family:monospace;white-space:pre-wrap;line-height:1.6">{body}</div></div>'
    )
