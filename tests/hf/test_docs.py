"""The snippets of docs/transformers.md run, one after the other, on a tiny model."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from reqat.data.tokenizer import build_tokenizer

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "transformers.md"


@pytest.mark.slow
def test_the_snippets_run(folder: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    snippets = re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(), re.DOTALL)
    assert len(snippets) >= 5
    tokenizer = build_tokenizer(["The sum of 12 and 30 is 42."])
    path = folder(vocab_size=len(tokenizer))
    tokenizer.save_pretrained(path)
    (tmp_path / "path/to").mkdir(parents=True)
    path.rename(tmp_path / "path/to/model")
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for snippet in snippets:
        if "peft" in snippet and importlib.util.find_spec("peft") is None:
            continue
        exec(compile(snippet, DOCUMENT.name, "exec"), names)
    assert {"saved", "static", "run"} <= {place.name for place in Path("path/to").iterdir()}
