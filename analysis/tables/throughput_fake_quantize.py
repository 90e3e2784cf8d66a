"""Fake quantization of a tensor."""

from __future__ import annotations

from analysis.report.benchmark import Measured
from analysis.report.document import Table
from analysis.tables._kernels import Kernel, kernel_table

NAME = "throughput-fake-quantize"
BENCHMARK = ("fake_quantize",)

KERNEL = Kernel(
    name="fake_quantize",
    title="Fake quantization, \u00b5s",
    caption=(
        "Median time of a float32 tensor to four bits and back; in brackets one read and one write at that time, as a "
        "share of the read roofline. A copy is the floor. The last line is the probe's median in the same rounds."
    ),
    memory_bound=True,
    against={
        "a copy": lambda row: row.provider == "copy",
        "the best other": lambda row: row.provider != "copy",
    },
)


def build(measured: Measured) -> Table:
    """The table of the kernel, see `kernel_table`."""
    return kernel_table(measured, KERNEL)
