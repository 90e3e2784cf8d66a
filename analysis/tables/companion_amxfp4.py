"""Companion AMXFP4: perplexity by direct cast."""

from __future__ import annotations

from analysis.report.companions import Found
from analysis.report.document import Column, Table, Text, number

NAME = "companion-amxfp4"
COMPANION = "amxfp4"


def build(found: Found) -> Table:
    """A row a format."""
    rows = tuple((Text(row.family), Text(number(row.perplexity, 2))) for row in found.rows.itertuples())
    columns = (Column("Format", align="l"), Column("Perplexity"))
    return Table(NAME, "AMXFP4 by direct cast", "Perplexity.", found.notes, columns, (rows,), found.rows)
