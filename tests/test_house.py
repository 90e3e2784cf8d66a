"""The layout of the house: floors of imports, a light ``import reqat``, and no trace of one person's machine.

Imports are read from the syntax tree, wherever they stand in a file: one hidden in a function, behind
``TYPE_CHECKING`` or in ``import_module("...")`` binds two rooms together just as much as one at the top.
"""

from __future__ import annotations

import ast
import importlib.util
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FLOORS = {
    "config": 0,
    "formats": 0,
    "quant": 1,
    "models": 2,
    "data": 2,
    "tasks": 2,
    "training": 3,
    "evaluation": 3,
    "recipes": 4,
    "records": 5,
    "cli": 5,
}
# On one floor rooms do not know each other, but for this one: every verb of the command line writes a record.
SAME_FLOOR = {("cli", "records")}
# What a room may import from outside the project, for the rooms that are kept narrow on purpose.
THIRD_PARTY = {"config": {"pydantic", "yaml", "tqdm", "filelock"}, "formats": {"torch"}}
# Slow to import, and of use to few verbs: loaded in the function that needs them.
LOADED_WHERE_USED = {"math_verify", "matplotlib", "accelerate", "snakemake", "tqdm"}


def imports_in(file: Path, package: str) -> Iterator[tuple[int, str, bool]]:
    """(line, absolute dotted name, at module level) of each import; ``from a import b`` yields ``a.b``."""
    tree = ast.parse(file.read_text(), filename=str(file))
    nested = {
        id(inner)
        for outer in ast.walk(tree)
        if isinstance(outer, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for inner in ast.walk(outer)
    }
    for node in ast.walk(tree):
        top = id(node) not in nested
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name, top) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, base] if base else above)
            yield from ((node.lineno, f"{base}.{alias.name}", top) for alias in node.names)
        elif (
            isinstance(node, ast.Call)
            and (getattr(node.func, "attr", None) or getattr(node.func, "id", None)) in ("import_module", "__import__")
            and node.args
            and isinstance(node.args[0], ast.Constant)
            and isinstance(node.args[0].value, str)
        ):
            yield node.lineno, node.args[0].value, top


def outside_of_kernels(root: Path) -> list[str]:
    """Imports of ``reqat_kernels`` beyond torch, triton, numpy and ``reqat.formats``; one line each."""
    allowed = {"torch", "triton", "numpy", "reqat_kernels"} | set(sys.stdlib_module_names)
    return [
        f"{file.relative_to(root)}:{line} imports {name}: kernels stand between reqat.formats and reqat.quant"
        for file in sorted((root / "kernels").rglob("*.py"))
        for line, name, _ in imports_in(file, package_of(file, root / "kernels"))
        if name.split(".")[0] not in allowed and name.split(".")[:2] != ["reqat", "formats"]
    ]


def package_of(file: Path, root: Path) -> str:
    """Dotted name of the package that a file's relative imports start from."""
    return ".".join(file.relative_to(root).parent.parts)


def wrong_floors(root: Path) -> list[str]:
    """Imports in ``root/reqat`` that do not point strictly downwards, one line each; empty when the house stands."""
    wrong = []
    for file in sorted((root / "reqat").rglob("*.py")):
        inside = file.relative_to(root / "reqat").parts
        if len(inside) == 1:  # reqat/__init__.py hands out names of every floor
            continue
        room = inside[0]
        for line, name, _ in imports_in(file, package_of(file, root)):
            where = f"{file.relative_to(root)}:{line}"
            parts = name.split(".")
            if parts[0] in ("tests", "tools") or (parts[0] == "analysis" and room != "cli"):
                wrong.append(f"{where} imports {name}: {room} knows nothing of {parts[0]}/")
            if parts[0] != "reqat" or parts[1:2] == [room]:
                continue
            other = parts[1] if len(parts) > 1 else ""
            if other.startswith("__") and other.endswith("__"):  # reqat.__version__
                continue
            if other not in FLOORS and room == "cli":  # it stands on every floor that the front door leads to
                continue
            if other not in FLOORS:
                wrong.append(f"{where} imports {name} from the front door; name the room it is in")
            elif FLOORS[other] >= FLOORS[room] and (room, other) not in SAME_FLOOR:
                wrong.append(
                    f"{where} imports {name}: {room} (floor {FLOORS[room]}) may use only floors below it, "
                    f"{other} is on floor {FLOORS[other]}"
                )
    return wrong


def rooms() -> set[str]:
    return {path.parent.name for path in (ROOT / "reqat").glob("*/*.py")}


def test_every_room_has_a_floor() -> None:
    assert rooms() <= set(FLOORS), "a new room needs its floor in tests/test_house.py"


def test_rooms_import_only_from_floors_below() -> None:
    assert wrong_floors(ROOT) == []


@pytest.mark.parametrize(
    ("room", "line"),
    [
        ("formats", "from reqat.config import errors"),  # sideways, on floor 0
        ("quant", "import reqat.models.attention"),
        ("quant", "from ..models import attention"),
        ("quant", "from .. import models"),
        ("data", "from reqat import tasks"),
        ("training", "def late():\n    from reqat.evaluation import generate"),
        ("evaluation", "if TYPE_CHECKING:\n    from reqat.recipes import sem"),
        ("evaluation", "importlib.import_module('reqat.cli.app')"),
        ("recipes", "import reqat"),  # the front door leads to every floor
        ("recipes", "from reqat import prepare"),
        ("records", "from reqat.cli import app"),
        ("records", "def late():\n    from analysis import tables"),
    ],
)
def test_the_floor_check_sees_each_way_to_import(tmp_path: Path, room: str, line: str) -> None:
    file = tmp_path / "reqat" / room / "inner.py"
    file.parent.mkdir(parents=True)
    file.write_text(line + "\n")
    assert len(wrong_floors(tmp_path)) == 1


@pytest.mark.parametrize(
    ("room", "line"),
    [
        ("quant", "from reqat.formats import quantize"),
        ("quant", "from ..formats import quantize"),
        ("quant", "from . import hadamard"),
        ("evaluation", "from reqat import tasks, models"),
        ("cli", "import reqat.records.record"),
        ("cli", "import reqat"),
        ("cli", "from analysis import tables"),  # `reqat tables` and `reqat figures`
        ("records", "from reqat import __version__"),
    ],
)
def test_the_floor_check_lets_pass_what_is_right(tmp_path: Path, room: str, line: str) -> None:
    file = tmp_path / "reqat" / room / "inner.py"
    file.parent.mkdir(parents=True)
    file.write_text(line + "\n")
    assert wrong_floors(tmp_path) == []


@pytest.mark.parametrize("room", sorted(THIRD_PARTY))
def test_narrow_rooms_stay_narrow(room: str) -> None:
    allowed = THIRD_PARTY[room] | set(sys.stdlib_module_names) | {"reqat"}
    outside = [
        f"{file.relative_to(ROOT)}:{line} imports {name}"
        for file in sorted((ROOT / "reqat" / room).rglob("*.py"))
        for line, name, _ in imports_in(file, package_of(file, ROOT))
        if name.split(".")[0] not in allowed
    ]
    assert outside == []


def test_kernels_know_the_formats_alone() -> None:
    assert outside_of_kernels(ROOT) == []


def test_formats_and_config_do_not_know_the_kernels() -> None:
    assert [
        f"{file.relative_to(ROOT)}:{line} imports {name}"
        for room in ("config", "formats")
        for file in sorted((ROOT / "reqat" / room).rglob("*.py"))
        for line, name, _ in imports_in(file, package_of(file, ROOT))
        if name.split(".")[0] == "reqat_kernels"
    ] == []


def test_slow_packages_load_where_they_are_used() -> None:
    early = [
        f"{file.relative_to(ROOT)}:{line} imports {name} at the top"
        for file in sorted((ROOT / "reqat").rglob("*.py"))
        for line, name, top in imports_in(file, package_of(file, ROOT))
        if top and name.split(".")[0] in LOADED_WHERE_USED
    ]
    assert early == []


def test_analysis_does_not_use_the_command_line() -> None:
    wrong = [
        f"{file.relative_to(ROOT)}:{line} imports {name}"
        for file in sorted((ROOT / "analysis").rglob("*.py"))
        for line, name, _ in imports_in(file, package_of(file, ROOT))
        if name.split(".")[:2] == ["reqat", "cli"] or name.split(".")[0] == "tests"
    ]
    assert wrong == []


@pytest.mark.parametrize(
    ("statement", "absent"),
    [
        ("import reqat", ["torch", "transformers", "pandas", "matplotlib", "datasets"]),
        ("import reqat.config", ["torch", "transformers", "pandas", "matplotlib", "datasets"]),
        ("import reqat.formats", ["transformers", "pandas", "matplotlib", "datasets"]),
    ],
)
def test_imports_are_light(statement: str, absent: list[str]) -> None:
    code = f"{statement}\nimport json, sys\nprint(json.dumps(sorted(set(sys.modules) & set({absent!r}))))"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert json.loads(printed) == []


def test_the_front_door_hands_out_what_it_lists() -> None:
    import reqat

    assert reqat.__all__ == sorted(set(reqat.__all__), key=reqat.__all__.index)
    for name in reqat.__all__:
        assert getattr(reqat, name) is not None, name
    assert set(reqat.__all__) <= set(dir(reqat))
    with pytest.raises(AttributeError, match="no_such_name"):
        reqat.no_such_name  # noqa: B018


def test_the_folder_of_kernels_is_not_a_package() -> None:
    # transformers looks for a package called `kernels`; ours must never be taken for it.
    assert not (ROOT / "kernels" / "__init__.py").exists()
    spec = importlib.util.find_spec("kernels")
    assert spec is None or spec.origin is None


# -- no trace of one person's machine ---------------------------------------------------------------------------------

MACHINE_PATH = re.compile(r"(?<![\w.~}>-])/(?:root|work|home|Users|mnt|opt|srv|scratch)/[\w.]")
# Installation must follow the user's own configuration of pip and conda, so nothing here says where packages lie.
INDEX_OPTION = re.compile(r"--(?:extra-)?index-url|--find-links|--trusted-host|PIP_(?:EXTRA_)?INDEX_URL\s*=")
LINK = re.compile(r"https?://([\w.-]+)")
LINKS_TO = {
    "arxiv.org", "doi.org", "www.apache.org", "keepachangelog.com", "semver.org", "json-schema.org",
    "www.w3.org", "localhost", "127.0.0.1",
}  # fmt: skip
# Words that mean something only to whoever was there; a reader of the repository cannot follow them.
INSIDE_TALK = re.compile(
    r"\bissues? #?\d|\bthis session\b|\b(?:previous|next) session\b|co-authored-by"
    r"|\bshared/(?:spec|paper|house|testbed)|\b(?:house|testbed|companions|formats|reqat)\.md\b",
    re.IGNORECASE,
)


def tracked_text() -> Iterator[tuple[Path, str]]:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode != 0:
        pytest.skip("not a git checkout")
    for name in filter(None, listed.stdout.split("\0")):
        file = ROOT / name
        if file.is_file() and file != Path(__file__).resolve():
            content = file.read_bytes()
            if b"\0" not in content[:8192]:
                yield Path(name), content.decode("utf-8", errors="replace")


def matches(pattern: re.Pattern[str]) -> list[str]:
    return [
        f"{name}:{number}: {line.strip()[:120]}"
        for name, text in tracked_text()
        for number, line in enumerate(text.splitlines(), 1)
        if pattern.search(line)
    ]


def test_no_file_names_a_path_of_one_machine() -> None:
    assert matches(MACHINE_PATH) == []


def test_no_file_says_where_packages_come_from() -> None:
    assert matches(INDEX_OPTION) == []
    unknown = {
        f"{name}: {host}" for name, text in tracked_text() for host in LINK.findall(text) if host not in LINKS_TO
    }
    assert unknown == set(), "only papers and standards are linked; add the host above if it is one"


def test_no_file_talks_of_what_a_reader_cannot_see() -> None:
    assert matches(INSIDE_TALK) == []


def test_nothing_made_by_a_run_is_tracked() -> None:
    folders = {name.parts[0] for name, _ in tracked_text()}
    assert folders.isdisjoint({"figures", "build", ".snakemake", ".venv"})
