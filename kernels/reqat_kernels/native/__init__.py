"""Native CPU kernels: a small C++ library, one file a kernel, opened through ctypes, and their torch operators."""

from __future__ import annotations

from reqat_kernels.native.library import instruction_set, status

__all__ = ["instruction_set", "status"]
