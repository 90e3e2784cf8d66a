"""FP4 kernels: native ones for CPUs (:mod:`reqat_kernels.native`), Triton ones for GPUs (:mod:`reqat_kernels.triton`).

A kernel is a drop-in for ``reqat.quantize`` and ``.dequantize()``, or for a composition of them with a matrix product,
attention or a loss: same codes and scales bit for bit, same sums up to the order of summation. Those functions are the
reference of its tests. The package stands between ``reqat.formats`` and ``reqat.quant``: it imports the former alone.
"""
