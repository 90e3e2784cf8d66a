"""Tables of a study read back as they were written."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

from analysis.figures.figure2 import visible
from analysis.report.studies import TEXTS, Study


@pytest.mark.parametrize("name", sorted(TEXTS))
def test_tokens_are_texts_whatever_they_look_like(tmp_path: Path, name: str) -> None:
    texts = ["7", "08", "", "nan", "1e5", "\n", "True", " 12"]
    pd.DataFrame(dict.fromkeys(TEXTS[name], texts) | {"probability": 0.5}).to_csv(tmp_path / f"{name}.csv", index=False)
    study = Study("study-a", "pair", "pair", tmp_path, {})
    read = study.table(name)
    for column in TEXTS[name]:
        assert list(read[column]) == texts
        assert all(isinstance(visible(text), str) for text in read[column])
    assert read["probability"].dtype == float


def test_a_table_of_digits_alone_has_texts(tmp_path: Path) -> None:
    pd.DataFrame({"token": ["7", "3"]}).to_csv(tmp_path / "strip.csv", index=False)
    study = Study("study-a", "pair", "pair", tmp_path, {})
    assert list(study.table("strip")["token"]) == ["7", "3"]
