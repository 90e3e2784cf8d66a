"""Hadamard rotation of queries and keys along head_dim, after RoPE: the paper's alternative to Q-FIT (Table 17).

``(q H)(k H)^T = q k^T``. A rotation that the precision names already stays; otherwise blocks are of 32. It acts where
keys are quantized.
"""

from __future__ import annotations

from reqat.methods.transform import Transform
from reqat.quant import Precision

_BLOCK = 32


def rotated(precision: Precision) -> Precision:
    """``precision`` with a rotation of queries and keys."""
    return precision if precision.kv_rotation is not None else precision.replace(kv_rotation=_BLOCK)


TRANSFORM = Transform(prepared_for=rotated, online="the rotation of queries and keys")
