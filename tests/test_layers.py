"""Layers of imports: a module imports only from layers below its own, and no imports go round in a circle.

Imports are read from the syntax tree, wherever they stand in a file: one inside a function or in
``import_module("...")`` binds two packages together just as much as one at the top. For circles, what stands under
``if TYPE_CHECKING:`` does not count: it is never executed. Notebooks are left out: they are written as a user would.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
#: From the bottom; packages of one line do not know each other.
LAYERS = (
    ("reqat.config",),
    ("reqat.formats", "reqat.decoding"),
    ("reqat_kernels", "reqat.vllm"),
    ("reqat.quant",),
    ("reqat.models", "reqat.data", "reqat.tasks"),
    ("reqat.inference", "reqat.hf", "reqat.export"),
    ("reqat.training", "reqat.generation"),
    ("reqat.evaluation",),
    ("reqat.methods",),
    ("reqat.records",),
    ("analysis",),
    ("reqat.pipeline",),
    ("reqat.lm_eval",),
    ("reqat.cli",),
    ("reqat.__main__",),
)
LAYER = {package: level for level, packages in enumerate(LAYERS) for package in packages}
#: Folders of modules, by the folder that their dotted names start from.
FOLDERS = (("reqat", Path()), ("analysis", Path()), ("reqat_kernels", Path("kernels")))
#: Of packages that are kept narrow on purpose: what they may import from outside the project.
THIRD_PARTY = {
    "reqat.config": {"pydantic", "yaml", "filelock", "tqdm"},
    "reqat.formats": {"torch", "safetensors"},
    "reqat.decoding": {"torch"},
    "reqat.vllm": {"torch", "vllm", "safetensors"},
    "reqat_kernels": {"torch", "triton", "numpy"},
}
#: Of these packages, no other ones: kernels are used by projects that have no use for the rest, and the plugin runs
#: beside another transformers than ours.
ONLY = {"reqat_kernels": {"reqat.formats"}, "reqat.vllm": {"reqat.config", "reqat.formats", "reqat.decoding"}}
#: Within analysis/ a folder builds on those before it; the modules beside the folders on all.
ANALYSIS = ("report", "viewer", "entropy", "tables", "figures")
MOST_LINES = 500
#: Slow to import, and of use to few verbs: loaded in the function that needs them.
LOADED_WHERE_USED = {"math_verify", "matplotlib", "accelerate", "peft", "snakemake", "datasets"}


def modules(root: Path) -> dict[str, Path]:
    """Dotted name of every module -> its file."""
    found = {}
    for top, base in FOLDERS:
        for file in sorted((root / base / top).rglob("*.py")):
            name = ".".join(file.relative_to(root / base).with_suffix("").parts)
            if "notebooks" in file.parts:
                continue
            found[name.removesuffix(".__init__")] = file
    return found


def imports_in(name: str, file: Path) -> Iterator[tuple[int, str, bool, bool]]:
    """(line, absolute dotted name, at module level, only for types) of each import; ``from a import b`` is ``a.b``."""
    tree = ast.parse(file.read_text(), filename=str(file))
    package = name.split(".") if file.name == "__init__.py" else name.split(".")[:-1]
    nested, typed = set(), set()
    for outer in ast.walk(tree):
        if isinstance(outer, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            nested |= {id(inner) for inner in ast.walk(outer)}
        if isinstance(outer, ast.If) and "TYPE_CHECKING" in ast.unparse(outer.test):
            typed |= {id(inner) for line in outer.body for inner in ast.walk(line)}
    for node in ast.walk(tree):
        how = id(node) not in nested, id(node) in typed
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name, *how) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package[: len(package) - node.level + 1]
                base = ".".join([*above, base] if base else above)
            yield from ((node.lineno, f"{base}.{alias.name}", *how) for alias in node.names)
        elif (
            isinstance(node, ast.Call)
            and (getattr(node.func, "attr", None) or getattr(node.func, "id", None)) in ("import_module", "__import__")
            and node.args
            and isinstance(node.args[0], ast.Constant)
            and isinstance(node.args[0].value, str)
        ):
            yield node.lineno, node.args[0].value, *how


def package_of(name: str) -> str:
    """``reqat.models`` of ``reqat.models.linear``, ``analysis`` of ``analysis.cells``."""
    parts = name.split(".")
    return ".".join(parts[:2]) if parts[0] == "reqat" else parts[0]


def wrong_imports(root: Path) -> list[str]:
    """Imports that do not point strictly downwards, one line each."""
    wrong = []
    for name, file in modules(root).items():
        own = package_of(name)
        if own == "reqat":  # reqat/__init__.py hands out names of every layer
            continue
        for line, target, _, _ in imports_in(name, file):
            where, top = f"{file.relative_to(root)}:{line} imports {target}", target.split(".")[0]
            other = package_of(target)
            if top in ("tests", "tools"):
                wrong.append(f"{where}: {own} knows nothing of {top}/")
            elif top == "reqat" and other not in LAYER:
                if not other.startswith("reqat.__") and own != "reqat.cli":  # reqat.__version__; the top layer may
                    wrong.append(f"{where}: name the package that it is in")
            elif (
                other in LAYER and other != own and (LAYER[other] >= LAYER[own] or other not in ONLY.get(own, {other}))
            ):
                wrong.append(f"{where}: {own} (layer {LAYER[own]}) may not use {other} (layer {LAYER[other]})")
    return wrong


def graph(root: Path) -> dict[str, set[str]]:
    """Module -> the modules that it imports, in a function or at the top, but not for types alone."""
    known = modules(root)
    edges: dict[str, set[str]] = {}
    for name, file in known.items():
        targets = {target for _, target, _, types in imports_in(name, file) if not types}
        found = {target if target in known else target.rpartition(".")[0] for target in targets}
        edges[name] = (found & known.keys()) - {name}
    return edges


def circle(edges: Mapping[str, set[str]]) -> list[str]:
    """Modules that import each other in a ring, the first one repeated at the end; [] if there is no ring."""
    try:
        list(TopologicalSorter(edges).static_order())
    except CycleError as error:
        return list(error.args[1])
    return []


def test_every_package_has_a_layer() -> None:
    assert {package_of(name) for name in modules(ROOT)} - {"reqat"} == set(LAYER)


def test_packages_import_only_from_layers_below() -> None:
    assert wrong_imports(ROOT) == []


def test_no_imports_in_a_circle() -> None:
    assert circle(graph(ROOT)) == []


def test_folders_of_analysis_build_on_those_before_them() -> None:
    wrong = []
    for name, file in modules(ROOT).items():
        if not name.startswith("analysis.") or name.count(".") < 2:
            continue
        folder = ANALYSIS.index(name.split(".")[1])
        for line, target, _, _ in imports_in(name, file):
            parts = target.split(".")
            if parts[0] == "analysis" and (parts[1] not in ANALYSIS or ANALYSIS.index(parts[1]) > folder):
                wrong.append(f"{file.relative_to(ROOT)}:{line} imports {target}")
    assert wrong == []


@pytest.mark.parametrize("folder", ["reqat", "kernels", "analysis", "tests", "tools"])
def test_files_are_short(folder: str) -> None:
    lines = {file: len(file.read_text().splitlines()) for file in (ROOT / folder).rglob("*.py")}
    assert {str(file.relative_to(ROOT)): n for file, n in lines.items() if n > MOST_LINES} == {}


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("reqat/config/inner", "from reqat.formats import quantize"),
        ("reqat/quant/inner", "import reqat.models.attention"),
        ("reqat/quant/inner", "from ..models import attention"),
        ("reqat/quant/inner", "from .. import models"),
        ("reqat/data/inner", "from reqat import tasks"),  # beside it, in one layer
        ("reqat/training/inner", "def late():\n    from reqat.generation import generate"),
        ("reqat/evaluation/inner", "if TYPE_CHECKING:\n    from reqat.methods import sem"),
        ("reqat/evaluation/inner", "importlib.import_module('reqat.cli.app')"),
        ("reqat/methods/inner", "import reqat"),  # hands out names of every layer
        ("reqat/methods/inner", "from reqat import prepare"),
        ("reqat/records/inner", "def late():\n    from analysis import tables"),
        ("analysis/inner", "from reqat.cli import app"),
        ("analysis/inner", "from tests.campaign import cases"),
        ("kernels/reqat_kernels/inner", "from reqat.config.errors import ReqatError"),
    ],
)
def test_the_check_of_layers_sees_each_way_to_import(tmp_path: Path, name: str, line: str) -> None:
    file = tmp_path / f"{name}.py"
    file.parent.mkdir(parents=True)
    file.write_text(line + "\n")
    assert len(wrong_imports(tmp_path)) == 1


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("reqat/quant/inner", "from reqat.formats import quantize"),
        ("reqat/quant/inner", "from ..formats import quantize"),
        ("reqat/quant/inner", "from . import hadamard"),
        ("reqat/evaluation/inner", "from reqat import tasks, models"),
        ("reqat/cli/inner", "import reqat.records.record"),
        ("reqat/cli/inner", "import reqat"),
        ("reqat/cli/inner", "from analysis import tables"),
        ("reqat/records/inner", "from reqat import __version__"),
        ("kernels/reqat_kernels/inner", "from reqat.formats import Format"),
    ],
)
def test_the_check_of_layers_lets_pass_what_is_right(tmp_path: Path, name: str, line: str) -> None:
    file = tmp_path / f"{name}.py"
    file.parent.mkdir(parents=True)
    file.write_text(line + "\n")
    assert wrong_imports(tmp_path) == []


def test_the_check_of_circles_sees_one_and_passes_over_types(tmp_path: Path) -> None:
    folder = tmp_path / "reqat" / "quant"
    folder.mkdir(parents=True)
    (folder / "a.py").write_text("from reqat.quant.b import x\n")
    (folder / "b.py").write_text("def late():\n    from reqat.quant import c\n")
    (folder / "c.py").write_text("if TYPE_CHECKING:\n    from reqat.quant import a\n")
    assert circle(graph(tmp_path)) == []
    (folder / "c.py").write_text("import reqat.quant.a\n")
    assert set(circle(graph(tmp_path))) == {"reqat.quant.a", "reqat.quant.b", "reqat.quant.c"}


@pytest.mark.parametrize("package", sorted(THIRD_PARTY))
def test_narrow_packages_stay_narrow(package: str) -> None:
    allowed = THIRD_PARTY[package] | set(sys.stdlib_module_names) | {"reqat", "reqat_kernels"}
    assert [
        f"{file.relative_to(ROOT)}:{line} imports {target}"
        for name, file in modules(ROOT).items()
        if package_of(name) == package
        for line, target, _, _ in imports_in(name, file)
        if target.split(".")[0] not in allowed
    ] == []


def test_slow_packages_load_where_they_are_used() -> None:
    assert [
        f"{file.relative_to(ROOT)}:{line} imports {target} at the top"
        for name, file in modules(ROOT).items()
        if name.split(".")[0] == "reqat"
        for line, target, top, types in imports_in(name, file)
        if top and not types and target.split(".")[0] in LOADED_WHERE_USED
    ] == []


@pytest.mark.parametrize(
    ("statement", "absent"),
    [
        ("import reqat", ["torch", "transformers", "pandas", "matplotlib", "datasets"]),
        ("import reqat.config", ["torch", "transformers", "pandas", "matplotlib", "datasets"]),
        ("import reqat.formats, reqat.decoding", ["transformers", "pandas", "matplotlib", "datasets"]),
        ("import reqat.vllm", ["torch", "transformers", "vllm"]),  # vLLM imports it in every process, used or not
    ],
)
def test_imports_are_light(statement: str, absent: list[str]) -> None:
    code = f"{statement}\nimport sys\nassert not set(sys.modules) & set({absent!r}), sorted(sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
