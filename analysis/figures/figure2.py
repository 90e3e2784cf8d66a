"""Where four bits hurt, drawn: Figures 2, 8 and 9 of studies of the kinds `pair`, `routing` and `noise`.

The argument in one page (Figure 2): digits and operators are what a model is surest of (a), four bits multiply the
probability of everything else there and change little where a model is unsure (b, f), and it is there that an error
costs the answer: give back those decisions alone to BF16 (c, d), or disturb them alone (e). Figure 8 has the routing
at every threshold, Figure 9 where responses derail and how. Whether this holds for the models at hand is what the
figures are for.

Every figure is a function of the small files that a study leaves and that pinning keeps; none reads token traces.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from analysis.entropy import outcome_shares
from analysis.report import style
from analysis.report.document import MINUS
from analysis.report.plots import draw_bars, draw_interval_line, percentiles
from analysis.report.studies import ByKind, Study
from reqat.config.errors import ReqatError
from reqat.evaluation.statistics import holm

POLICIES = ("all-reference", "low-reference", "low-candidate", "all-candidate")
KIND_COLOURS = {"digit": style.BLUE, "operator": style.VERMILION, "other": "#333333"}
_CLOUD_COLUMNS, _CLOUD_ROWS = 4, 6
_LOW, _HIGH = style.VERMILION, style.SKY  # decisions of low and of high entropy


# -- studies ---------------------------------------------------------------------------------------------------------
def one(studies: ByKind, kind: str) -> Study:
    """The first study of a kind. Raises `ReqatError` if there is none."""
    return several(studies, kind)[0]


def several(studies: ByKind, kind: str) -> Sequence[Study]:
    """All studies of a kind. Raises `ReqatError` if there is none."""
    found = studies.get(kind)
    if not found:
        raise ReqatError(f"no study of kind {kind!r} to draw; add one to the tier in config/studies.yaml.")
    return found


def short(precision: str) -> str:
    """`NVFP4-W4A4KV4` -> `NVFP4`."""
    return precision.partition("-")[0]


def roles(study: Study) -> tuple[str, str]:
    """What reference and candidate of a study of two models are called: their formats, where these differ."""
    names = study.settings["precisions"]
    a, b = short(names["reference"]), short(names["candidate"])
    return (a, b) if a != b else ("reference", "candidate")


def notes(*chosen: Study) -> list[str]:
    """Footer: tier, precisions, n and seeds of each study (once where they agree), arithmetic, commits, intervals."""
    from analysis.report.cells import arithmetic_of, commit_of

    asked: dict[str, list[str]] = {}
    for study in chosen:
        s = study.settings
        decoding = s.get("decoding", "")
        size = f"{s['n']:,} problems, {len(study.seeds)} sampling {'seed' if len(study.seeds) == 1 else 'seeds'}"
        asked.setdefault(f"{size}{f', {decoding}' if decoding else ''}", []).append(study.name)
    sizes = list(asked)
    if len(sizes) > 1:
        sizes = [f"{', '.join(dict.fromkeys(names))}: {size}" for size, names in asked.items()]
    precisions = sorted({name for study in chosen for name in study.settings["precisions"].values()})
    arithmetic = sorted({arithmetic_of(study.record) for study in chosen})
    commits = sorted({commit_of(study.record) for study in chosen})
    return [
        f"Tier {', '.join(sorted({str(study.settings['tier']) for study in chosen}))}; {' and '.join(precisions)}.",
        *(f"{size}." for size in sizes),
        f"Arithmetic: {'; '.join(arithmetic)}.",
        "Intervals: 95%, clustered by problem; one training run.",
        f"Commit {', '.join(commits)}.",
    ]


def optional(study: Study, name: str) -> pd.DataFrame | None:
    """`tables/<name>.csv` of a study, None where it measured no such thing (or the file is empty)."""
    if not (study.path / "tables" / f"{name}.csv").is_file():
        return None
    frame = study.table(name)
    return frame if len(frame) else None


# -- Figure 2 --------------------------------------------------------------------------------------------------------
def figure2(studies: ByKind) -> Figure:
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
    _policies(second[2], routing, label_size=5.5)
    style.panel(second[2], "c", "Routed decoding")
    third = rows[2].subplots(1, 4, width_ratios=[0.95, 1.05, 1, 1])
    _choosers(third[0], routing)
    style.panel(third[0], "d", "Who chose")
    _noise(third[1], noise)
    _damage(third[2], third[3], pair)
    words = f"(a) Size: number of tokens of that type. (c, d) {threshold_words(routing).capitalize()}."
    style.footer(rows[-1], [*notes(pair, routing, noise), words])
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


def nats(value: float) -> str:
    """An entropy in two digits."""
    if value <= 0:
        return "0"
    text = f"{value:.2g}" if value >= 0.01 else f"{value:.0e}".replace("e-0", "e-")
    return text.replace("-", MINUS)


def _kinds(ax: Axes, pair: Study) -> None:
    frame = pair.table("kinds-by-bin")
    for kind, marker in (("digit", "o"), ("operator", "s")):
        rows = frame[frame["kind"] == kind]
        draw_interval_line(ax, percentiles(rows), _in_percent(rows), KIND_COLOURS[kind], marker, f"{kind}s")
    ax.set_ylabel("share of tokens (%)")
    ticks = [tick for tick in ax.get_yticks() if 0 <= tick <= 100]
    ax.set_ylim(0, 1.22 * ax.get_ylim()[1])  # room for the legend
    ax.set_yticks(ticks)
    _percentile_axis(ax, pair)
    ax.legend(loc="upper left", ncols=2)
    style.panel(ax, "", "Digits and operators")


def _percentile_axis(ax: Axes, pair: Study) -> None:
    ax.set_xlim(0, 100)
    ax.set_xlabel(f"percentile of {roles(pair)[0]} entropy", fontsize=7.2)


def _in_percent(rows: pd.DataFrame) -> pd.DataFrame:
    return rows.assign(**{name: 100 * rows[name] for name in ("value", "lo", "hi")})


def _examples(left: Axes, right: Axes, pair: Study) -> None:
    frame = optional(pair, "examples")
    if frame is not None:  # an empty text, such as that before a first token, is no number
        read = frame[["context", "taken", "token"]]
        frame = frame.assign(**read.astype(object).where(read.notna(), ""))
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


# -- routing ---------------------------------------------------------------------------------------------------------
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


def _conditions(study: Study, names: Sequence[str]) -> pd.DataFrame:
    """Rows of these conditions, in this order. Raises `ReqatError` naming one that is not there."""
    frame = study.conditions.set_index("condition")
    missing = [name for name in names if name not in frame.index]
    if missing:
        raise ReqatError(f"{study.path}: no condition {missing[0]!r} in summary.json; run the study again.")
    return frame.loc[list(names)]


def adjusted(conditions: pd.DataFrame) -> pd.Series:
    """Holm's adjusted p of each row of a study's conditions, over all comparisons of the study; NaN without one.

    A study asks several questions of the same responses; each p alone would find something by chance too often.
    """
    if "p" not in conditions:
        return pd.Series(np.nan, index=conditions.index)
    p = conditions["p"].astype(float)
    known = p.notna()
    out = p.copy()
    out[known] = holm(p[known].tolist())
    return out


def _policies(ax: Axes, routing: Study, *, differences: bool = False, label_size: float = 6.2) -> None:
    """Accuracy of the four policies, with how many responses were right in the foot of each bar."""
    rows, colours = _conditions(routing, POLICIES), policy_colours()
    p_holm = adjusted(rows)
    for i, (name, row) in enumerate(rows.iterrows()):
        value, lo, hi = (100 * float(row[key]) for key in ("accuracy", "lo", "hi"))
        ax.bar(i, value, 0.74, color=colours[str(name)], zorder=2)
        ax.errorbar(i, value, yerr=[[value - lo], [hi - value]], color=style.GREY, lw=1.1, zorder=3)
        asked = int(row["problems"]) * int(row["seeds"])
        solved = f"{round(row['accuracy'] * asked):,}\nof {asked:,}"
        above = []
        if differences and i and pd.notna(row.get("difference")):
            points = f"{100 * row['difference']:+.1f}".replace("-", MINUS)
            above = [points, _p(float(p_holm[name]))]
        if value > 25:
            light = name in ("all-reference", "all-candidate", "low-reference")
            colour = "white" if light else "black"
            ax.text(i, 2, solved, ha="center", va="bottom", fontsize=5.8, color=colour, zorder=4)
        else:  # too low to be written into
            above.append(solved)
        if above:
            ax.text(i, hi + 2, "\n".join(above), ha="center", va="bottom", fontsize=6.2, zorder=4)
    words = policy_words(routing)
    ax.set_xticks(range(len(POLICIES)), [words[name] for name in POLICIES], fontsize=label_size)
    ax.tick_params(axis="x", length=0)
    ax.set_ylim(0, 118 if differences else 105)
    ax.set_yticks(range(0, 101, 20))
    ax.set_ylabel("accuracy (%)")


def _p(p: float) -> str:
    return "p<0.001" if p < 0.001 else f"p={p:.2g}"


def _choosers(ax: Axes, routing: Study) -> None:
    """Which share of the tokens each model chose, a bar a policy."""
    rows = _conditions(routing, POLICIES)
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


# -- noise -----------------------------------------------------------------------------------------------------------
def _noise(ax: Axes, noise: Study) -> None:
    """Accuracy over sigma, for noise on low- and on high-entropy decisions; sigma 0 is no noise."""
    share = f"{100 * float(noise.settings['share']):g}%"
    words = {"low": f"surest {share}", "high": f"least sure {share}"}
    sigmas = [float(s) for s in noise.settings["sigmas"]]
    for side, colour, marker in (("low", _LOW, "o"), ("high", _HIGH, "s")):
        names = ["none", *(f"{side}-{sigma:g}" for sigma in sigmas)]
        rows = _conditions(noise, names)
        value, lo, hi = (100 * rows[key].to_numpy(dtype=float) for key in ("accuracy", "lo", "hi"))
        ax.errorbar(
            [0, *sigmas], value, yerr=[value - lo, hi - value], color=colour, marker=marker, ms=4, label=words[side]
        )
    ax.set_ylim(0, 105)
    ax.set_yticks(range(0, 101, 20))
    ax.set_xlabel("noise \u03c3 (relative)")
    ax.set_ylabel("accuracy (%)")
    ax.xaxis.set_major_locator(MaxNLocator(4))
    ax.legend(loc="lower left", fontsize=6.5, borderaxespad=0.1)
    style.panel(ax, "e", f"Noise, {short(noise.settings['precisions']['model'])}")


# -- damage ----------------------------------------------------------------------------------------------------------
def _damage(left: Axes, right: Axes, pair: Study) -> None:
    """Tail-mass ratio and top-1 mismatch by bin of the reference's entropy."""
    frame = pair.table("tail-and-mismatch")
    for statistic, colour, marker in (
        ("tail ratio (geometric mean)", style.BLUE, "o"),
        ("tail ratio (of means)", style.ORANGE, "s"),
    ):
        rows = frame[frame["statistic"] == statistic]
        words = statistic.removeprefix("tail ratio (").removesuffix(")")
        draw_interval_line(left, percentiles(rows), rows, colour, marker, words)
    left.axhline(1, color=style.GREY, lw=0.8)
    bottom, top = left.get_ylim()
    if top > 20:
        left.set_yscale("log")
    left.set_ylim(top=top * 8 if top > 20 else top + 0.35 * (top - bottom))  # room for the legend
    left.set_ylabel("tail mass, ratio")
    left.legend(loc="upper left")
    rows = frame[frame["statistic"] == "top-1 mismatch"]
    draw_interval_line(right, percentiles(rows), _in_percent(rows), style.VERMILION, "D", "")
    right.set_ylabel("top-1 mismatch (%)")
    right.set_ylim(0, None)
    style.panel(left, "f", "Tail mass")
    style.panel(right, "", "Other top token")
    for ax in (left, right):
        _percentile_axis(ax, pair)


# -- Figure 8 --------------------------------------------------------------------------------------------------------
def figure8(studies: ByKind) -> Figure:
    """Figure 8: the four routing policies at every threshold that the tier asks for, and who chose how many tokens.

    Over each bar: the difference from the reference alone, in points, with its paired p-value, adjusted (Holm) over the
    comparisons of its study.
    """
    routings = several(studies, "routing")
    fig = style.figure(4.3, min(style.WIDTH_IN, 1.0 + 3.1 * len(routings)))
    axes = fig.subplots(2, len(routings), squeeze=False, sharey="row", height_ratios=[1.7, 1])
    for i, routing in enumerate(routings):
        _policies(axes[0, i], routing, differences=True)
        style.panel(axes[0, i], chr(ord("a") + i), threshold_words(routing).capitalize())
        _choosers(axes[1, i], routing)
        if i:
            axes[0, i].set_ylabel("")
    words = (
        "Over the bars: difference from the reference alone in points, p of the paired test, "
        "adjusted for the comparisons at its threshold (Holm)."
    )
    style.footer(fig, [*notes(*routings), words])
    return fig


def _with_interval(row: pd.Series) -> str:
    """`12.3% [9.0, 16.1]` of a share and its interval."""
    value, lo, hi = (100 * float(row[name]) for name in ("value", "lo", "hi"))
    return f"{value:.1f}% [{lo:.1f}, {hi:.1f}]"


# -- Figure 9 --------------------------------------------------------------------------------------------------------
def figure9(studies: ByKind) -> Figure:
    """Figure 9: at which tokens the responses of a pair part and go wrong, and what goes wrong first."""
    pair = one(studies, "pair")
    shares, errors = pair.table("divergence-shares"), optional(pair, "derailment-shares")
    shares = shares.assign(threshold=shares["threshold"].fillna(""))
    fig = style.figure(2.9)
    left, right = fig.subplots(1, 2)
    below = shares[shares["threshold"] != ""]
    derailed = below[below["pairs"] == "derailed"]
    series = [
        ("first divergence, all pairs", below[below["pairs"] == "all"], style.SKY),
        ("first divergence, derailed pairs", derailed, style.BLUE),
    ]
    if errors is not None:
        series.append(
            ("first wrong token, derailed pairs", errors[errors["statistic"] == "low entropy"], style.VERMILION)
        )
    chances = below[below["pairs"] == "all"]
    draw_bars(left, [f"below\n{name}" for name in chances["threshold"]], series)
    for i, chance in enumerate(chances["chance"]):
        left.plot([i - 0.45, i + 0.45], [100 * chance] * 2, color=style.BLACK, lw=1.0, ls="--", zorder=4)
    left.plot([], [], color=style.BLACK, lw=1.0, ls="--", label="all tokens")
    left.set_ylim(0, 165)  # room for the legend
    left.set_yticks(range(0, 101, 25))
    left.set_ylabel("share (%)")
    left.legend(loc="upper left", fontsize=6.5)
    style.panel(left, "a", f"{roles(pair)[0]} entropy where responses go apart")
    parted = shares[(shares["threshold"] == "") & (shares["pairs"] == "all")].iloc[0]
    ends = outcome_shares(pair.table("first-divergences")).set_index("pairs")
    a, b = roles(pair)
    derail, back = (_with_interval(ends.loc[name]) for name in ("derailed", "reversed"))
    words = (
        f"Of {int(parted['n']):,} pairs of responses {_with_interval(parted)} part; {derail} derail ({a} right, "
        f"{b} wrong) and {back} go the other way ({a} wrong, {b} right); sampling alone would do both as often."
    )
    derailed_n = 0 if errors is None else int(errors[errors["statistic"] == "error"]["n"].max())
    style.panel(right, "b", f"What goes wrong first ({derailed_n:,} derailed)")
    if errors is None:
        right.set_axis_off()
        right.text(0.5, 0.5, "no response derailed", ha="center", transform=right.transAxes, fontsize=7)
    else:
        kinds = errors[errors["statistic"] == "error"]
        draw_bars(right, [str(k).replace(" ", "\n") for k in kinds["which"]], [("", kinds, style.VERMILION)])
        right.set_ylim(0, 100)
        right.set_ylabel("derailed responses (%)")
    style.footer(fig, [*notes(pair), words])
    return fig
