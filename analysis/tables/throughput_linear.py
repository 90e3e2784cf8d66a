"""Matrix products of linear layers."""

from __future__ import annotations

from analysis.report.benchmark import Measured
from analysis.report.document import Table
from analysis.tables._kernels import Kernel, is_four_bit, kernel_table

NAME = "throughput-linear"
BENCHMARK = ("linear",)

KERNEL = Kernel(
    name="linear",
    title="Matrix product of a linear layer, \u00b5s",
    caption=(
        "Median time of y = x W with M rows of inputs; in brackets bytes read and written at that time, as a share of "
        "the read roofline. Inputs in bfloat16 (float32 for INT8 and ggml), rounding them included. Each provider's "
        "result was held against a float64 product first; copies of the weights take turns, so that caches do not "
        "help. ggml and ours run the calls of a burst in native code, as a model does; of the others each is a call "
        "from Python. Bold: the fastest. The roofline is the best rate of a probe in the whole run; the last line is "
        "its median while a shape was measured."
    ),
    memory_bound=True,
    against={
        "the best BF16": lambda row: row.format == "BF16",
        "the best other 4-bit": lambda row: is_four_bit(row.format),
        "INT8": lambda row: row.format == "INT8",
    },
)


def build(measured: Measured) -> Table:
    """The table of the kernel, see `kernel_table`."""
    return kernel_table(measured, KERNEL)
