"""Block Hadamard rotation of every quantized linear layer (ReQAT section 1; MXFP4 gains most).

``(x H)(w H)^T = x w^T``: weights are rotated when they are quantized, inputs at run time
(:mod:`reqat.formats.hadamard`). A rotation that the precision names already stays; otherwise blocks are of 32.
"""

from __future__ import annotations

from reqat.methods.transform import Transform
from reqat.quant import Precision

_BLOCK = 32


def rotated(precision: Precision) -> Precision:
    """``precision`` with a rotation."""
    return precision if precision.rotation is not None else precision.replace(rotation=_BLOCK)


TRANSFORM = Transform(prepared_for=rotated, online="the rotation of each linear layer's input")
