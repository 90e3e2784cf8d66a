"""What reaches a shell is quoted: read from the rules, without running any."""

from __future__ import annotations

import re
import shlex
import string
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
RULES = sorted((ROOT / "rules").glob("*.smk"))
# Shell text that rules/common.smk made with shlex, and a number.
MADE_WITH_SHLEX = {"params.reqat", "params.draw", "threads"}


def shell_texts(file: Path) -> list[str]:
    """The text of each ``shell:`` of a file."""
    return [
        "".join(re.findall(r'"((?:[^"\\]|\\.)*)"', block))
        for block in re.findall(r"^ *shell:\n((?: +\".*\n)+)", file.read_text(), re.MULTILINE)
    ]


def unquoted(text: str) -> list[str]:
    """Fields of a ``shell:`` text that Snakemake would put in as they are."""
    fields = [(name, spec) for _, name, spec, _ in string.Formatter().parse(text) if name is not None]
    return [name for name, spec in fields if spec != "q" and name not in MADE_WITH_SHLEX]


@pytest.mark.parametrize("file", RULES, ids=lambda file: file.stem)
def test_every_field_of_a_shell_command_is_quoted(file: Path) -> None:
    text = file.read_text()
    found = shell_texts(file)
    assert len(found) == len(re.findall(r"^ *shell:", text, re.MULTILINE)), "a command that the test cannot read"
    assert [unquoted(command) for command in found] == [[] for _ in found]
    assert not re.search(r"\bshell\(|\brun:", text), "commands are built in one place"


def test_the_check_sees_what_is_not_quoted() -> None:
    assert unquoted("{params.reqat} stage {wildcards.id} > {log:q}") == ["wildcards.id"]
    assert unquoted("cp {input} {output:q}") == ["input"]


def test_commands_are_joined_by_shlex_alone() -> None:
    common = (ROOT / "rules" / "common.smk").read_text()
    assert re.findall(r"^REQAT = (.*)$", common, re.MULTILINE) == ["shlex.join(COMMAND)"]
    assert re.findall(r"^TRAIN = (.*)$", common, re.MULTILINE) == [
        "shlex.join([*LAUNCH, *COMMAND] if PROCESSES > 1 else COMMAND)"
    ]


def test_recipes_quote_what_they_read_from_the_environment() -> None:
    """In the Makefile, a name that a user sets is a shell variable in double quotes; ARGS alone is meant as words."""
    makefile = (ROOT / "Makefile").read_text()
    recipes = [line for line in makefile.splitlines() if line.startswith("\t")]
    for name in ("TIER", "CORES", "BENCH", "VENV"):
        assert not [line for line in recipes if f"$({name})" in line], name
        used = [line for line in recipes if f"$${name}" in line]
        assert all(f'"$${name}"' in line or f'"$${name}/' in line or f'"./$${name}/' in line for line in used), used
    assert shlex.split('"$$VENV/bin"') == ["$$VENV/bin"]
