"""Models that compute in four bits: packed weights and caches, and the kernels behind them."""

from __future__ import annotations

from reqat.inference.packed import is_packed, memory, pack
from reqat.inference.packed_cache import PackedCache

__all__ = ["PackedCache", "is_packed", "memory", "pack"]
