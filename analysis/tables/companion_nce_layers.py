"""Companion NCE: which layers got channels, and what two bits do to each layer of the original network."""

from __future__ import annotations

import pandas as pd

from analysis.report.companions import Found
from analysis.report.document import Column, Table, Text, number, percent

NAME = "companion-nce-layers"
COMPANION = "nce"

_ERRORS = ("weight_error", "input_error", "output_error")
_SEARCHED = ("tas", "nce", "random")


def build(found: Found) -> Table:
    """A row a layer."""
    data = layers(found)
    columns = [Column("Layer", align="l"), Column("original")]
    columns += [Column(name, "Channels, mean over seeds") for name in ("TAS", "NCE", "random")]
    columns += [Column("NCE wider in")]
    columns += [Column(name, "Error in two bits (%)") for name in ("weight", "input", "output")]
    sections = []
    for _, part in data.groupby("companion", sort=False):
        lines = []
        for row in part.to_dict("records"):
            widths = [Text(number(row[f"width_{arm}"], 1)) for arm in _SEARCHED]
            errors = [Text(percent(row[name], 1)) for name in _ERRORS]
            grown = f"{int(row['grown'])} of {int(row['seeds'])} seeds" if row["seeds"] else "\u2013"
            lines.append((Text(row["layer"]), Text(number(row["original"], 0)), *widths, Text(grown), *errors))
        sections.append(tuple(lines))
    return Table(
        NAME,
        "NCE: layers",
        "Channels that each search gave a layer, and the squared error of rounding over the square of weights, inputs "
        "and output of each layer of the original network when it was trained in full precision and is then rounded, "
        "means over seeds. The first layer is not rounded.",
        found.notes,
        tuple(columns),
        tuple(sections),
        data,
    )


def layers(found: Found) -> pd.DataFrame:
    """A row a companion and layer, in the network's order; `width_<arm>` NaN where an arm is not there."""
    out = []
    for (label, layer), part in found.rows.groupby(["companion", "layer"], sort=False):
        nce, original = part[part["arm"] == "nce"], part[part["arm"] == "original"]
        row = {"companion": label, "layer": layer, "original": part["original"].iloc[0]}
        row |= {f"width_{arm}": part[part["arm"] == arm]["width"].mean() for arm in _SEARCHED}
        row |= {"seeds": len(nce), "grown": int((nce["width"] > nce["original"]).sum())}
        row |= {name: original[name].mean() if name in original else float("nan") for name in _ERRORS}
        out.append(row)
    return pd.DataFrame(out)
