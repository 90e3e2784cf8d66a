"""A step of training, BF16 and QAT."""

from __future__ import annotations

from analysis.report.benchmark import Measured
from analysis.report.document import Table
from analysis.tables._kernels import Kernel, kernel_table

NAME = "throughput-train-step"
BENCHMARK = ("train_step",)

KERNEL = Kernel(
    name="train_step",
    title="A training step, ms",
    caption=(
        "Median time of one optimizer step of the training loop, BF16 and QAT in turns: B rows of T response "
        "tokens, one micro-batch. QAT's arithmetic is fake-quantized."
    ),
    milliseconds=True,
    against={"a BF16 step": lambda row: row.format == "BF16"},
)


def build(measured: Measured) -> Table:
    """The table of the kernel, see `kernel_table`."""
    return kernel_table(measured, KERNEL)
