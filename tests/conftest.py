"""For every test: nothing from the network, one thread a process, no test that fails because the machine was busy."""

from __future__ import annotations

import os
from pathlib import Path

# Before anything imports torch or transformers, which read these once. Threads change the order of float sums, and the
# workers of pytest-xdist share the cores between them.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import torch

# Without a GPU, Triton kernels run in triton's interpreter, which has to be chosen before anything imports triton.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest
from hypothesis import HealthCheck, settings

# Deadlines measure the neighbours' load, not the code. CI repeats itself; elsewhere new examples are tried each time.
settings.register_profile(
    "reqat",
    deadline=None,
    derandomize="CI" in os.environ,
    suppress_health_check=[HealthCheck.too_slow],
    print_blob=True,
)
settings.load_profile("reqat")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files of slow tests come first, so that no worker is left alone with one at the end."""
    slow: dict[Path, int] = {}
    for item in items:
        slow[item.path] = slow.get(item.path, 0) + sum(1 for _ in item.iter_markers("slow"))
    items.sort(key=lambda item: -min(slow[item.path], 1))
