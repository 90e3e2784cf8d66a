"""The repository: what the package hands out, and no trace of one person's machine."""

from __future__ import annotations

import importlib.util
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def test_the_package_hands_out_what_it_lists() -> None:
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
