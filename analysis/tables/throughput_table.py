"""Piecewise-linear tables of nonlinear functions against the functions."""

from __future__ import annotations

from analysis.report.benchmark import Measured
from analysis.report.document import Table
from analysis.tables._kernels import Kernel, kernel_table

NAME = "throughput-table"
BENCHMARK = ("table",)

KERNEL = Kernel(
    name="table",
    title="Nonlinear functions and their tables, \u00b5s",
    caption=(
        "Median time over n float32 numbers that are in the cache. A table takes the same time whatever its function "
        "is; libmvec: the C library's vectorized functions, torch: its own. Ratios of one run on one CPU: no claim on "
        "other hardware, where tables save area and power."
    ),
    against={
        "the C library's expf": lambda row: (row.provider, row.format) == ("libmvec", "expf"),
        "the C library's erff (GELU)": lambda row: (row.provider, row.format) == ("libmvec", "erff"),
        "torch's GELU": lambda row: (row.provider, row.format) == ("torch", "GELU"),
        "torch's SiLU": lambda row: (row.provider, row.format) == ("torch", "SiLU"),
        "torch's exp": lambda row: (row.provider, row.format) == ("torch", "exp"),
        "torch's 1/sqrt": lambda row: (row.provider, row.format) == ("torch", "1/sqrt"),
    },
)


def build(measured: Measured) -> Table:
    """The table of the kernel, see `kernel_table`."""
    return kernel_table(measured, KERNEL)
