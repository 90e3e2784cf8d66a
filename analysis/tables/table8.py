"""Table 8: the formats, as this configuration has them."""

from __future__ import annotations

import pandas as pd

from analysis.report import paper
from analysis.report.cells import Results
from analysis.report.document import EMPTY, Column, Table, Text
from reqat.config.formats import FAMILIES, has_global_scale
from reqat.config.precision import ROLES, resolve

NAME = "table8"
NEEDS = "quantized"

PROPERTIES = ("element", "block scale", "global scale", "block size")
PAPER = {"MXFP4": ("E2M1", "E8M0", "none", "32"), "NVFP4": ("E2M1", "E4M3", "FP32", "16")}


def properties(family: str) -> tuple[str, ...]:
    """Element, type of the block scales, of the global scale, and block size that a family's name stands for."""
    of = FAMILIES[family]
    block = "the whole row" if of["block"][0] is None else str(of["block"][0])
    return of["element"][0], of["scale"][0], "FP32" if has_global_scale(family) else "none", block


def build(results: Results, artifact: str = NAME) -> Table:
    """Paper Table 8: element, scales and block of each format that the tier's precisions name."""
    found = dict.fromkeys(
        resolved.families[role]
        for cell in results.plan.cells
        for resolved in [resolve(cell.precision)]
        for role in ROLES
        if role in resolved.families
    )
    section, rows = [], []
    for family in sorted(found):
        ours, theirs = properties(family), PAPER.get(family, (EMPTY,) * len(PROPERTIES))
        section.append((Text(family), *(Text(value) for value in (*ours, *theirs))))
        for source, values in (("configuration", ours), ("paper", theirs)):
            rows += [
                {"source": source, "format": family, "property": name, "value": value}
                for name, value in zip(PROPERTIES, values, strict=True)
                if value != EMPTY
            ]
    head = [name[0].upper() + name[1:] for name in PROPERTIES]
    tier = results.plan.tier
    scales = dict.fromkeys((tier.train.global_scale, tier.evaluation.global_scale))
    return Table(
        artifact,
        "Formats",
        "What the names of the tier's formats stand for, read from the table that configuration, quantizer and kernels "
        "share. Options of single precisions (E1M2 keys and values, rotations) stand under the tables of their cells.",
        (
            f"Tier {tier.name}: {tier.title}.",
            f"The global scale of activations, keys and values is taken from: {', '.join(scales)} (training, "
            "evaluation).",
            *paper.notes("table8"),
        ),
        (
            Column("Format", align="l"),
            *(Column(name, "Ours", "c") for name in head),
            *(Column(name, "Paper", "c") for name in head),
        ),
        (tuple(section),),
        pd.DataFrame(rows),
    )
