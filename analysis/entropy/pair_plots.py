"""The figures of `reqat entropy`: damage by entropy, kinds of tokens by entropy, where responses differ and go wrong.

matplotlib is imported by the functions that draw, so that the report can be written without it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from analysis.entropy.pair_report import Report


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
    from analysis.report.plots import draw_damage

    fig = style.figure(2.7)
    left, right = fig.subplots(1, 2)
    draw_damage(left, right, found.frames["tail-and-mismatch"])
    style.panel(left, "a", "Tail mass, candidate over reference")
    style.panel(right, "b", "Another most likely token")
    return _finished(fig, found, left, right)


def _kinds(found: Report) -> Any:
    from analysis.report import style
    from analysis.report.plots import draw_kinds

    fig = style.figure(2.5, width_in=style.WIDTH_IN / 1.6)
    ax = fig.subplots()
    draw_kinds(ax, found.frames["kinds-by-bin"])
    ax.legend(loc="upper left", ncols=2)
    return _finished(fig, found, ax)


def _errors(found: Report) -> Any:
    from analysis.report import style
    from analysis.report.plots import draw_divergences, draw_first_errors

    errors = found.frames.get("derailment-shares")
    fig = style.figure(2.9)
    left, right = fig.subplots(1, 2)
    draw_divergences(left, found.frames["divergence-shares"], errors)
    draw_first_errors(right, errors)
    style.panel(left, "a", "Where responses part")
    style.panel(right, "b", "What went wrong first")
    return _finished(fig, found)


def _finished(fig: Any, found: Report, *by_percentile: Any) -> Any:
    """The figure with its footer, and the axes over percentiles with their label."""
    from analysis.report import style

    for ax in by_percentile:
        ax.set_xlabel(f"percentile of token entropy under {found.reference}")
        ax.set_xlim(0, 100)
    style.footer(fig, found.table.footer[:2])
    return fig
