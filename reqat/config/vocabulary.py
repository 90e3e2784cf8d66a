"""How a packed model stores its matrices of the vocabulary, the output head and the embeddings: names, without torch.

A precision says nothing of these: they are a quarter of a small model's weights, and in four bits they change its
logits, so that it is a choice of its own. ``NVFP4-A8`` is a head in NVFP4 whose input is rounded to int8, a token at a
time; without ``-A8`` the input is not rounded.
"""

from __future__ import annotations

from reqat.config.errors import unknown

STORED = ("BF16", "INT8", "NVFP4", "MXFP4")
"""Ways to store a matrix [vocabulary, hidden]; INT8 has a scale a row."""
HEADS = (*STORED, "INT8-A8", "NVFP4-A8", "MXFP4-A8")
ROUNDED = "-A8"
BLOCKS = {"NVFP4": 16, "MXFP4": 32}


def check_head(name: str | None, where: str = "head") -> str | None:
    """``name`` itself. Raises ReqatError unless it is one of HEADS, or None: as the model has it."""
    if name is not None and name not in HEADS:
        raise unknown("way to store the output head", name, HEADS, where=where)
    return name


def check_embeddings(name: str | None, where: str = "embeddings") -> str | None:
    """``name`` itself. Raises ReqatError unless it is one of STORED, or None: as the model has them."""
    if name is not None and name not in STORED:
        raise unknown("way to store the embeddings", name, STORED, where=where)
    return name


def stored_as(head: str) -> str:
    """How a head of this name is stored: ``NVFP4`` of ``NVFP4-A8``."""
    return head.removesuffix(ROUNDED)


def format_of(head: str) -> str | None:
    """The format that a matrix of this name is rounded to, ``INT8-row`` of ``INT8-A8``; None for BF16."""
    stored = stored_as(head)
    return {"BF16": None, "INT8": "INT8-row"}.get(stored, stored)
