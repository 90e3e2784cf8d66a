"""Triton kernels for GPUs, each with its naive PyTorch twin; they run on CPU tensors under ``TRITON_INTERPRET=1``."""
