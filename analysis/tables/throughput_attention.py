"""Decode attention over the KV cache."""

from __future__ import annotations

from analysis.report.benchmark import Measured
from analysis.report.document import Table
from analysis.tables._kernels import Kernel, kernel_table

NAME = "throughput-attention"
BENCHMARK = ("attention",)

KERNEL = Kernel(
    name="attention",
    title="Decode attention over the KV cache, \u00b5s",
    caption=(
        "Median time of one new token of B sequences over T cached tokens (H query heads share G of keys and values, "
        "each D wide); in brackets the share of the read roofline. Outputs were held against a float64 softmax first. "
        "The last line is the probe's median while a shape was measured."
    ),
    memory_bound=True,
    against={"the best BF16": lambda row: row.format == "BF16"},
)


def build(measured: Measured) -> Table:
    """The table of the kernel, see `kernel_table`."""
    return kernel_table(measured, KERNEL)
