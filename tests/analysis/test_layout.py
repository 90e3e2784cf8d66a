"""The layout of analysis/: imports form no circle, folders import from those before them alone, files are short."""

from __future__ import annotations

from collections.abc import Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest
from tests.test_house import imports_in, package_of

ROOT = Path(__file__).parents[2]
MOST_LINES = 500
# Each folder may import from itself and from those before it; the modules beside the folders from all.
ORDER = ("report", "viewer", "entropy", "tables", "figures", "notebooks")


def modules(root: Path) -> dict[str, Path]:
    """Dotted name -> file, of every module of analysis/."""
    return {
        ".".join(file.relative_to(root).with_suffix("").parts).removesuffix(".__init__"): file
        for file in sorted((root / "analysis").rglob("*.py"))
    }


def imported(root: Path) -> dict[str, set[str]]:
    """Module -> modules of analysis/ that it imports, wherever in the file."""
    known = modules(root)
    out: dict[str, set[str]] = {}
    for module, file in known.items():
        names = {name for _, name, _ in imports_in(file, package_of(file, root)) if name.split(".")[0] == "analysis"}
        # "from analysis.report import paper" names a module, "from analysis.report.paper import select" a thing in one
        found = {name if name in known else name.rpartition(".")[0] for name in names}
        out[module] = (found & known.keys()) - {module}
    return out


def circle(graph: Mapping[str, set[str]]) -> list[str]:
    """Modules that import each other in a circle; none where there is no circle."""
    try:
        list(TopologicalSorter(graph).static_order())
    except CycleError as error:
        return list(error.args[1])
    return []


def test_no_imports_in_a_circle() -> None:
    assert circle(imported(ROOT)) == []


def test_a_circle_through_a_function_is_seen(tmp_path: Path) -> None:
    for name, text in (
        ("a", "from analysis import b\n"),
        ("b", "def late():\n    from analysis.c import thing\n"),
        ("c", "import analysis.a\n"),
    ):
        (tmp_path / "analysis").mkdir(exist_ok=True)
        (tmp_path / "analysis" / f"{name}.py").write_text(text)
    assert set(circle(imported(tmp_path))) == {"analysis.a", "analysis.b", "analysis.c"}


def test_folders_build_on_those_before_them() -> None:
    wrong = []
    for module, names in imported(ROOT).items():
        folder = module.split(".")[1] if module.count(".") > 1 else ""
        for name in names:
            other = name.split(".")[1]
            if folder and (other not in ORDER or ORDER.index(other) > ORDER.index(folder)):
                wrong.append(f"{module} imports {name}")
    assert wrong == []


@pytest.mark.parametrize("folder", ["analysis", "tests/analysis"])
def test_files_are_short(folder: str) -> None:
    lines = {file: len(file.read_text().splitlines()) for file in (ROOT / folder).rglob("*.py")}
    assert {str(file.relative_to(ROOT)): n for file, n in lines.items() if n > MOST_LINES} == {}
