"""Captions of the HTML report: one for every table and figure that any tier makes, with fields that the rules give."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from analysis.registry import figure_names, study_names, table_names, throughput_names
from reqat.config.paths import Paths, load
from reqat.config.studies import load_studies
from reqat.config.throughput import load_throughput
from reqat.config.tier import tier_names

ROOT = Path(__file__).parents[2]
FIELDS = {"tier", "title", "problems", "split", "sampling_seeds", "training_seeds", "claim_seeds"}


@pytest.mark.parametrize("tier", tier_names(ROOT / "config"))
def test_every_table_and_figure_has_a_caption(tier: str) -> None:
    plan = load(tier, Paths(ROOT))
    tables, figures = throughput_names(load_throughput(tier, ROOT / "config"))
    names = [*table_names(plan), *(figure for figure, _ in figure_names(plan).values()), *tables, *figures]
    for made in study_names(load_studies(plan, ROOT / "config")):
        names += made
    assert [n for n in names if not (ROOT / "report" / f"{n}.rst").is_file()] == []


@pytest.mark.parametrize("path", sorted((ROOT / "report").glob("*.rst")), ids=lambda p: p.stem)
def test_captions_use_known_fields(path: Path) -> None:
    jinja2 = pytest.importorskip("jinja2")
    text = path.read_text()
    assert set(re.findall(r"snakemake\.params\.(\w+)", text)) <= FIELDS
    filled = jinja2.Template(text, undefined=jinja2.StrictUndefined).render(
        snakemake={"params": dict.fromkeys(FIELDS, "x"), "config": {"tier": "smoke"}}
    )
    assert "{" not in filled and len(filled.split()) > 20


@pytest.mark.parametrize("path", sorted((ROOT / "report").glob("*.rst")), ids=lambda p: p.stem)
def test_captions_say_what_the_tier_is(path: Path) -> None:
    """A tier's title is where a tier says what its readers must know of the weights."""
    if path.stem != "workflow":
        assert "snakemake.params.title" in path.read_text()
