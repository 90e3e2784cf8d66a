"""Companion AMXFP4: how many blocks are one-sided, and what one or two scales a block cost, by kind of tensor."""

from __future__ import annotations

import pandas as pd

from analysis.report.companions import Found
from analysis.report.document import Column, Table, Text, number, percent

NAME = "companion-amxfp4-blocks"
COMPANION = "amxfp4"

ROLES = ("weights", "inputs", "queries", "keys", "probabilities", "values")


def build(found: Found) -> Table:
    """A row a model and kind of tensor, without and with rotations."""
    data = shares(found)
    columns = [Column("Model", align="l"), Column("Tensor", align="l"), Column("Blocks")]
    columns += [
        Column(name, group)
        for group in ("As it is", "Rotated")
        for name in ("one-sided (%)", "MXFP4 error (%)", "AMXFP4 error (%)")
    ]
    sections = []
    for model, part in data.groupby("model", sort=False):
        lines = []
        for role, both in part.groupby("role", sort=False):
            cells = []
            for rotated in (False, True):
                row = both[both["rotated"] == rotated].iloc[0]
                cells += [Text(percent(row["share"])), *(Text(percent(row[name], 2)) for name in _ERRORS)]
            lines.append((Text(str(model)), Text(str(role)), Text(number(both["blocks"].iloc[0], 0)), *cells))
        sections.append(tuple(lines))
    return Table(
        NAME,
        "AMXFP4: one-sided blocks",
        "Share of blocks of 32 that are not all zero in which the largest positive and the largest negative number "
        "differ by more than a factor of two, and the squared error of rounding relative to the tensor's squares, "
        "means over tensors: MXFP4 with powers of two rounded down, AMXFP4 with E5M2 scales. Of the unquantized model.",
        found.notes,
        tuple(columns),
        tuple(sections),
        data,
    )


_COLUMNS = ("model", "rotated", "role", "tensors", "blocks", "share")
_ERRORS = ("error_mxfp4", "error_amxfp4")


def shares(found: Found) -> pd.DataFrame:
    """A row a model, rotation and kind of tensor: `blocks`, `share` that is one-sided, mean errors."""
    rows = found.rows[found.rows["blocks"].notna()] if "blocks" in found.rows else found.rows.iloc[:0]
    out = []
    for (model, rotated), part in rows.groupby(["model", "rotated"], sort=False):
        for role in ROLES:
            of_role = part[part["role"] == role]
            if len(of_role):
                share = of_role["one_sided"].sum() / of_role["blocks"].sum()
                about = {"model": model, "rotated": bool(rotated), "role": role, "tensors": len(of_role)}
                errors = {name: of_role[name].mean() for name in _ERRORS}
                out.append(about | {"blocks": int(of_role["blocks"].sum()), "share": share} | errors)
    return pd.DataFrame(out, columns=[*_COLUMNS, *_ERRORS])
