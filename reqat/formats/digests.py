"""Digests of tensors, by content: the same for the same numbers, whatever file, order or device they come from."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor


def tensor_digest(tensor: Tensor) -> str:
    """sha256 (hex) of a tensor's dtype, shape and bytes."""
    plain = tensor.detach().cpu().contiguous()
    hasher = hashlib.sha256(f"{plain.dtype} {tuple(plain.shape)} ".encode())
    hasher.update(plain.reshape(-1).view(torch.uint8).numpy().data)
    return hasher.hexdigest()


def tensors_digest(tensors: Mapping[str, Tensor]) -> str:
    """sha256 (hex) of named tensors, in the order of their names. Hashes several at a time: hashlib lets other threads
    run meanwhile, and one thread would take longer than a disk takes to write them."""
    names = sorted(tensors)
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        digests = pool.map(lambda name: tensor_digest(tensors[name]), names)
        lines = [f"{name} {digest}\n" for name, digest in zip(names, digests, strict=True)]
    return hashlib.sha256("".join(lines).encode()).hexdigest()
