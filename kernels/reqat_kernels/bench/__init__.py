"""Timing kernels so that the numbers can be believed: what is compared is checked, and runs in turns, on cold data.

    bench.machine   what else the machine does: where caches end, bandwidth probe, neighbours
    bench.measure   cases, providers, rows
    bench.worker    a process that serves one provider
    bench.turns     the round-robin clock over these processes
    bench.linear    the matrix product of a linear layer: torch, oneDNN, aten, ours
    bench.ggml      the same by llama.cpp's ggml, where llama-cpp-python is installed
    bench.attention, bench.fake_quantize, bench.table, bench.loss (on the providers of bench.sem_loss)

A kernel that is to be timed is a :class:`~reqat_kernels.bench.measure.Kernel`: a name, its cases, and providers. A
provider is one function from a case to a :class:`~reqat_kernels.bench.measure.Work`, registered with
``@KERNEL.provider(...)``; :data:`KERNELS` lists what the benchmark knows. Decoding with a whole model is timed by
``reqat.evaluation.throughput``, because this package knows formats and no models; the rows are the same.
"""

from __future__ import annotations

from reqat_kernels.bench.measure import Absent, Case, Kernel, Row, Work, Wrong
from reqat_kernels.bench.turns import measure

__all__ = ["Absent", "Case", "Kernel", "Row", "Work", "Wrong", "kernels", "measure"]


def kernels() -> dict[str, Kernel]:
    """Name -> kernel, with all of its providers registered."""
    # ggml registers its providers with linear's kernel.
    from reqat_kernels.bench import attention, fake_quantize, ggml, linear, loss, table  # noqa: F401

    found = [linear.LINEAR, attention.ATTENTION, fake_quantize.FAKE_QUANTIZE, table.TABLE, loss.SEM_LOSS]
    return {kernel.name: kernel for kernel in found}
