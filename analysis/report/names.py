"""Names that tables, figures and the DAG share. Imports nothing, so that the DAG can read it while it is parsed."""

from __future__ import annotations

BF16 = "BF16"
REFERENCE_PRECISION = "NVFP4-W4A4KV4"  # where the claims rest
TABLE_SUFFIXES, FIGURE_SUFFIXES = ("csv", "md", "tex"), ("png", "pdf", "csv")
