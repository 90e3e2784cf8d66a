"""The position that Figure 3 shows: the rule, and SEM's weights there."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from reqat.config.errors import ReqatError
from reqat.config.stage import SEMTerm
from reqat.evaluation.trace_files import TokenColumns, TraceInfo, TraceWriter
from reqat.evaluation.trace_folder import TraceFolder
from reqat.pipeline.overview import LABELS, strip

WORDS = ["<eos>", " so", " 4", " =", " 7"]


def folder(path: Path, ids: list[int]) -> TraceFolder:
    """Two traces; in the second QAT gives the digit at position 4 half of the probability that BF16 does. One at
    position 1 loses more, but BF16 is unsure of it."""
    n = len(ids)
    top = np.tile(np.arange(3, dtype=np.int32), (n, 1))
    with TraceWriter(path, list(LABELS.values()), WORDS, k=3) as writer:
        for trace in range(2):
            p = {label: np.full(n, 0.9) for label in LABELS.values()}
            if trace == 1:
                p["BF16"][1], p["QAT"][1] = 0.7, 0.01
                p["QAT"][4], p["QAT with SEM"][4] = 0.45, 0.6
            entropy = np.linspace(0.1, 0.8, n)[::-1] + trace
            columns = {
                label: TokenColumns(
                    entropy.astype(np.float32), (1 - p[label]).astype(np.float32), p[label].astype(np.float32),
                    top, np.full((n, 3), 0.3, dtype=np.float32),
                )
                for label in LABELS.values()
            }  # fmt: skip
            info = TraceInfo(
                f"p{trace}", family="f", prompt="?", response="!", answer="4", seed=0, source="given", correct=True,
                finished=True,
            )  # fmt: skip
            writer.add(info, np.array(ids), columns)
    return TraceFolder(path)


def test_the_digit_that_lost_most_of_the_surest_is_shown_with_its_weights(tmp_path: Path) -> None:
    table = strip(folder(tmp_path, [1, 2, 3, 2, 2, 3, 4, 0]), SEMTerm(name="sem"))
    assert list(table["token"]) == [" 4", " =", " 4", " 4", " =", " 7"]  # three before the digit, two after it
    assert list(table["chosen"]) == [False, False, False, True, False, False]
    row = table[table["chosen"]].iloc[0]
    assert [row[f"p {label}"] for label in LABELS.values()] == pytest.approx([0.9, 0.45, 0.6])
    H = np.linspace(0.1, 0.8, 8)[::-1] + 1  # of the second trace
    tau = np.quantile(H, 0.75)
    w = np.maximum(0, 1 - (H - H.min()) / (tau - H.min()))
    assert list(table["entropy"]) == pytest.approx(H[1:7], abs=1e-6)
    assert list(table["weight"]) == pytest.approx(w[1:7], abs=1e-5)


def test_traces_without_a_digit_have_nothing_to_show(tmp_path: Path) -> None:
    with pytest.raises(ReqatError, match="hold no digit"):
        strip(folder(tmp_path, [1, 3, 3, 1, 1, 3, 1, 0]), SEMTerm(name="sem"))
