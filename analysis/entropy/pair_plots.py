"""The figures of `reqat entropy`: damage by entropy, kinds of tokens by entropy, where responses differ and go wrong.

matplotlib is imported by the functions that draw, so that the report can be written without it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from analysis.entropy.pair_report import Report
from analysis.report.plots import draw_bars, draw_interval_line, percentiles


def draw(found: Report, folder: Path) -> list[Path]:
    """Draw the figures that the report has numbers for, as PNG and PDF; returns the files."""
    from analysis.report import style

    written = []
    for name, fig in figures(found).items():
        with style.context():
            written += style.save(fig, folder, name)
    return written


def figures(found: Report) -> dict[str, Any]:
    """The figures that the report has numbers for, by name: ``entropy-damage``, ``entropy-kinds``, and
    ``entropy-errors`` where both models sampled.
    """
    from analysis.report import style

    make = {"entropy-damage": _damage, "entropy-kinds": _kinds}
    if "divergence-shares" in found.frames:
        make["entropy-errors"] = _errors
    with style.context():
        return {name: one(found) for name, one in make.items()}


def _damage(found: Report) -> Any:
    from analysis.report import style

    fig = style.figure(2.7)
    left, right = fig.subplots(1, 2)
    frame = found.frames["tail-and-mismatch"]
    for statistic, colour, marker in (
        ("tail ratio (geometric mean)", style.BLUE, "o"),
        ("tail ratio (of means)", style.ORANGE, "s"),
    ):
        rows = frame[frame["statistic"] == statistic]
        words = statistic.removeprefix("tail ratio (").removesuffix(")")
        draw_interval_line(left, percentiles(rows), rows, colour, marker, words)
    left.axhline(1, color=style.GREY, linewidth=0.8)
    left.set_yscale("log")
    left.set_ylabel("tail-mass ratio")
    left.legend(loc="best")
    style.panel(left, "a", "Tail mass, candidate over reference")
    rows = frame[frame["statistic"] == "top-1 mismatch"]
    draw_interval_line(
        right,
        percentiles(rows),
        rows.assign(**{c: 100 * rows[c] for c in ("value", "lo", "hi")}),
        style.VERMILION,
        "D",
        "",
    )
    right.set_ylabel("top-1 mismatch, %")
    right.set_ylim(bottom=0)
    style.panel(right, "b", "Another most likely token")
    for ax in (left, right):
        ax.set_xlabel(f"percentile of token entropy under {found.reference}")
        ax.set_xlim(0, 100)
    style.footer(fig, found.table.footer[:2])
    return fig


def _kinds(found: Report) -> Any:
    from analysis.report import style

    fig = style.figure(2.5, width_in=style.WIDTH_IN / 1.6)
    ax = fig.subplots()
    frame = found.frames["kinds-by-bin"]
    for kind, colour, marker in (("digit", style.BLUE, "o"), ("operator", style.VERMILION, "s")):
        rows = frame[frame["kind"] == kind]
        scaled = rows.assign(**{c: 100 * rows[c] for c in ("value", "lo", "hi")})
        draw_interval_line(ax, percentiles(rows), scaled, colour, marker, f"{kind}s")
    ax.set_ylabel("share of tokens, %")
    ax.set_xlabel(f"percentile of token entropy under {found.reference}")
    ax.set_xlim(0, 100)
    ax.set_ylim(0, 1.35 * ax.get_ylim()[1])  # room for the legend
    ax.legend(loc="upper left", ncols=2)
    style.footer(fig, found.table.footer[:2])
    return fig


def _errors(found: Report) -> Any:
    from analysis.report import style

    shares, errors = found.frames["divergence-shares"], found.frames.get("derailment-shares")
    if errors is None:  # no response derailed: there is one panel, of all pairs
        fig = style.figure(2.7, style.WIDTH_IN / 1.6)
        left, right = fig.subplots(), None
    else:
        fig = style.figure(2.7)
        left, right = fig.subplots(1, 2)
    series = [
        ("first divergence, all pairs", shares[(shares["pairs"] == "all") & (shares["threshold"] != "")], style.SKY),
    ]
    if errors is not None:
        derailed = shares[(shares["pairs"] == "derailed") & (shares["threshold"] != "")]
        series.append(("first divergence, derailed", derailed, style.BLUE))
        series.append(("first error, derailed", errors[errors["statistic"] == "low entropy"], style.VERMILION))
    low = shares[(shares["pairs"] == "all") & (shares["threshold"] != "")]
    draw_bars(left, [f"below\n{name}" for name in low["threshold"]], series)
    for i, chance in enumerate(low["chance"]):
        left.plot([i - 0.45, i + 0.45], [100 * chance] * 2, color=style.BLACK, linewidth=0.9, linestyle="--")
    left.set_ylim(0, 150)  # room for the legend
    left.set_yticks(range(0, 101, 25))
    left.set_ylabel("share, %")
    left.legend(loc="upper left")
    style.panel(left, "a" if right is not None else "", "Where responses part (dashed: by chance)")
    if errors is not None and right is not None:
        kinds = errors[errors["statistic"] == "error"]
        draw_bars(right, [k.replace(" ", "\n") for k in kinds["which"]], [("", kinds, style.VERMILION)])
        right.set_ylabel("share of derailed responses, %")
        style.panel(right, "b", "What went wrong first")
    style.footer(fig, found.table.footer[:2])
    return fig
