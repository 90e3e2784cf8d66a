"""The notebooks run from top to bottom, and what git holds of them is their pair of files without outputs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jupytext
import nbformat
import pytest
from nbclient import NotebookClient

FOLDER = Path(__file__).parents[3] / "analysis" / "notebooks"
NAMES = sorted(path.stem for path in FOLDER.glob("*.py"))


def cells(name: str) -> list[Any]:
    return list(nbformat.read(FOLDER / f"{name}.ipynb", as_version=4).cells)


def run(name: str) -> list[Any]:
    """The executed cells. An error in one ends the test, naming it."""
    notebook = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)
    client = NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(FOLDER)}})
    return list(client.execute().cells)


def outputs(cells: list[Any], kind: str) -> int:
    """How many outputs of a MIME type there are."""
    return sum(kind in output.get("data", {}) for cell in cells for output in cell.get("outputs", []))


def test_every_notebook_is_a_pair() -> None:
    assert NAMES == sorted(path.stem for path in FOLDER.glob("*.ipynb")) == ["entropy_walkthrough", "qfit_on_real_keys"]


@pytest.mark.parametrize("name", NAMES)
def test_a_pair_agrees(name: str) -> None:
    script = jupytext.read(FOLDER / f"{name}.py").cells
    remedy = f"run `jupytext --sync analysis/notebooks/{name}.py`"
    assert [(c.cell_type, c.source) for c in script] == [(c.cell_type, c.source) for c in cells(name)], remedy
    tags = [[c.metadata.get("tags") for c in both] for both in (script, cells(name))]
    assert tags[0] == tags[1], remedy


@pytest.mark.parametrize("name", NAMES)
def test_nothing_that_a_run_left_is_kept(name: str) -> None:
    for cell in cells(name):
        if cell.cell_type == "code":
            assert (cell.outputs, cell.execution_count) == ([], None)
        assert set(cell.metadata) <= {"tags"}
    assert set(nbformat.read(FOLDER / f"{name}.ipynb", as_version=4).metadata) == {"jupytext", "kernelspec"}


@pytest.mark.parametrize("name", NAMES)
def test_functions_live_in_the_library(name: str) -> None:
    for cell in cells(name):
        if cell.cell_type == "code":
            assert not any(line.lstrip().startswith(("def ", "class ")) for line in cell.source.splitlines())


@pytest.mark.slow
@pytest.mark.long
def test_the_entropy_walkthrough_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REQAT_TRACES", str(tmp_path / "pair"))
    monkeypatch.setenv("REQAT_NOTEBOOK_PROBLEMS", "6")
    done = run("entropy_walkthrough")
    assert outputs(done, "image/png") == 5
    assert outputs(done, "text/html") >= 4  # two frames, two coloured traces
    assert (tmp_path / "pair" / "tokens.parquet").is_file()
    assert (tmp_path / "pair" / "record.json").is_file()


@pytest.mark.slow
@pytest.mark.long
def test_the_q_fit_notebook_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("SEQUENCES", "2"), ("TOKENS", "64"), ("GRID", "4"), ("SMALL", "1")):
        monkeypatch.setenv(f"REQAT_NOTEBOOK_{name}", value)
    done = run("qfit_on_real_keys")
    assert outputs(done, "image/png") == 2
    assert "alpha" in "".join(output.get("text", "") for cell in done for output in cell.get("outputs", []))
