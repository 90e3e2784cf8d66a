"""ARTIFACT.md keeps its word: everything the paper reports is listed, and every target it names exists in that tier."""

from __future__ import annotations

import csv
import re
from functools import cache
from pathlib import Path

import pytest

from analysis.registry import companion_names, figure_names, study_names, table_names, throughput_names
from reqat.config import Paths, load
from reqat.config.companions import load_companions
from reqat.config.studies import load_studies
from reqat.config.throughput import load_throughput

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "ARTIFACT.md").read_text()
TARGET = re.compile(r"`(tables|plots)/<tier>/([\w.-]+)`(?:, `([\w.-]+)`)?")
FILE = re.compile(r"`((?:analysis|config|results|reqat|tools)/[\w./-]+)`")


def rows() -> list[list[str]]:
    lines = [line for line in TEXT.splitlines() if line.startswith("| ") and not line.startswith("| paper ")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if not line.startswith("| name ")]


def listed() -> dict[str, list[str]]:
    return {row[0].lower().replace(" ", ""): row for row in rows() if row[0].startswith(("Table ", "Figure "))}


@cache
def made_by(tier: str) -> dict[str, set[str]]:
    plan = load(tier, Paths(ROOT))
    tables, figures = throughput_names(load_throughput(tier, Paths(ROOT).config))
    more_tables, more_figures = study_names(load_studies(plan, Paths(ROOT).config))
    companions = companion_names(load_companions(tier, Paths(ROOT).config).values()).values()
    return {
        "tables": {*table_names(plan), *tables, *more_tables, *(name for made, _ in companions for name in made)},
        "plots": {*figure_names(plan), *figures, *more_figures, *(name for _, made in companions for name in made)},
    }


def test_everything_that_the_paper_reports_is_listed() -> None:
    with open(ROOT / "analysis" / "report" / "paper_reported.csv", newline="") as file:
        reported = {row["artifact"] for row in csv.DictReader(file)}
    assert reported <= set(listed())


@pytest.mark.parametrize("row", [row for row in rows() if "<tier>" in " ".join(row)], ids=lambda row: row[0])
def test_the_target_of_a_row_exists_in_its_tier(row: list[str]) -> None:
    found = TARGET.findall(row[2])
    assert found, row[2]
    for kind, *names in found:
        assert {name for name in names if name} <= made_by(row[3])[kind]


def test_states_are_what_the_text_says_they_are() -> None:
    for name, row in listed().items():
        target, tier, state = row[2], row[3], row[4]
        assert state in ("done", "partly") and target and tier, name
        assert state == "done" or row[5], f"{name}: partly done, and no note says what is missing"
        assert "paper" not in tier, f"{name}: done means from the laptop tier on"


def test_files_that_it_names_are_there() -> None:
    named = FILE.findall(TEXT)
    assert "analysis/report/paper_reported.csv" in named
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_no_table_of_ours_is_left_out() -> None:
    named = {name for found in TARGET.findall(TEXT) for name in found[1:] if name}
    for tier in ("smoke", "laptop", "overnight", "converged", "smollm", "smollm-claims", "paper"):
        made = made_by(tier)
        assert {name for name in made["tables"] | made["plots"] if "-R1-" not in name} <= named, tier
