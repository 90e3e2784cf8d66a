"""The loss with and without the entropy term, and its gradients."""

from __future__ import annotations

from analysis.report.benchmark import Measured
from analysis.report.document import Table
from analysis.tables._kernels import Kernel, kernel_table

NAME = "throughput-sem-loss"
BENCHMARK = ("sem_loss",)

KERNEL = Kernel(
    name="sem_loss",
    title="Loss and its gradients, ms",
    caption=(
        "Median time of the loss and the gradients of hidden states and output matrix; ce-*: cross-entropy alone, "
        "reqat: with the entropy term. In brackets the most memory taken beyond inputs and gradients."
    ),
    milliseconds=True,
    shows_memory=True,
    against={
        "cross-entropy with its gradient in the forward sweep": lambda row: row.provider == "ce-forward",
        "cross-entropy that recomputes": lambda row: row.provider == "ce-recompute",
    },
)


def build(measured: Measured) -> Table:
    """The table of the kernel, see `kernel_table`."""
    return kernel_table(measured, KERNEL)
