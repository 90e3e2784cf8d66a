"""Columns and notes that several tables have."""

from __future__ import annotations

from analysis.report.document import Column

PRECISION, METHOD = Column("Precision", align="l"), Column("Method", align="l")
BOLD = "Bold: best quantized method of a precision and budget, as printed."
SAME_BUDGET = "Every method of a column spent the same total of training tokens."
