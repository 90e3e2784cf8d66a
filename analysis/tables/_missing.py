"""In place of a table of a benchmark that failed: the reason."""

from __future__ import annotations

import pandas as pd

from analysis.report.document import Column, Table, Text


def missing_table(name: str, reason: str) -> Table:
    """In place of a table whose benchmark failed: the reason."""
    return Table(
        name=name,
        title="Not measured",
        caption=f"The benchmark failed: {reason}",
        footer=("The next `make figures` tries again; every other table and figure is there.",),
        columns=(Column("provider", align="l"),),
        sections=(((Text(),),),),
        data=pd.DataFrame({"not_measured": [reason]}),
    )
