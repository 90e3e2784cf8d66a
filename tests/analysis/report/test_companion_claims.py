"""Claims of companions in one table: as their tables tell them, nothing left out and nothing computed anew."""

from __future__ import annotations

from importlib import import_module

import pandas as pd
import pytest

from analysis.registry import discovered
from analysis.report.companion_claims import BEGIN, END, block, build, claims_of
from analysis.report.document import Column, Table, Text
from analysis.report.summary import filled
from reqat.config.companions import kinds
from reqat.config.errors import ReqatError


def table(rows: list[dict[str, object]]) -> Table:
    return Table("t", "t", "t", (), (Column("a"),), (((Text("a"),),),), pd.DataFrame(rows))


def row(claim: str, value: float, unit: str = "nats a token", **more: object) -> dict[str, object]:
    ends = {"difference": value, "difference_lo": value - 0.01, "difference_hi": value + 0.01}
    return {"claim": claim, "where": "smollm2", "unit": unit, "verdict": "agrees"} | ends | more


def test_rows_that_are_no_claims_are_left_out_and_numbers_have_their_units() -> None:
    made = table([{"perplexity": 3.0}, row("A below B", -0.25), row("C above D", 0.05, "share"), row("E", 3, "points")])
    found = claims_of("amxfp4", made, ("A ",))
    assert [one.claim for one in found] == ["A below B", "C above D", "E"]
    assert [one.measured for one in found] == [
        "\u22120.250 [\u22120.260, \u22120.240] nats a token",
        "+5.00 [+4.00, +6.00] points",
        "+3.00 [+2.99, +3.01] points",
    ]
    assert [one.headline for one in found] == [True, False, False]
    assert claims_of("amxfp4", table([{"perplexity": 3.0}]), ()) == []


def test_an_unknown_unit_is_refused() -> None:
    with pytest.raises(ReqatError, match="furlongs"):
        claims_of("amxfp4", table([row("A", 1, "furlongs")]), ())


def test_readme_shows_the_headlines_and_the_page_all() -> None:
    found = claims_of("tsld", table([row("A below B", -0.25), row("C below D", -0.1)]), ("A",))
    text = block(found, {"tsld": "results/x"}, {"tsld": "docs/companions/tsld.md"})
    assert "[TSLD](docs/companions/tsld.md)" in text and "A below B (smollm2)" in text and "C below D" not in text
    assert {"A below B", "C below D"} <= set(build(found, {"tsld": "results/x"}).data["claim"])
    document = f"before {BEGIN}\nold\n{END} after"
    assert filled(document, text, BEGIN, END) == f"before {BEGIN}\n{text}{END} after"
    assert filled("none", text, BEGIN, END) is None


def test_each_system_is_named_beside_the_folder_that_it_is_from() -> None:
    found = claims_of("tsld", table([row("A below B", -0.25)]), ("A",))
    one, two = ({"tsld": "results/x", "nce": there} for there in ("results/x", "results/y"))
    assert "results/x." in block(found, one, {}) and "NCE" not in block(found, one, {})
    text = block(found, two, {})
    assert "results/x (TSLD)" in text and "results/y (NCE)" in text


@pytest.mark.parametrize("kind", sorted(kinds()))
def test_every_companion_says_which_claims_readme_shows(kind: str) -> None:
    names = [name for name, made in discovered("tables").items() if made.companion == kind]
    modules = [import_module(f"analysis.tables.{name.replace('-', '_')}") for name in names]
    stated = [module.HEADLINE for module in modules if hasattr(module, "HEADLINE")]
    assert len(stated) == 1 and stated[0]
