"""Tables as text: what is printed, what is escaped, and that LaTeX would take it."""

from __future__ import annotations

import io
import math
import re
from pathlib import Path

import pandas as pd
import pytest

from analysis.report.document import Column, Table, Text, best, interval, number, p_value, percent, tokens


def a_table(**changes: object) -> Table:
    values: dict[str, object] = {
        "name": "t",
        "title": "50% & more_less",
        "caption": "A {brace} #1 ~ ^ \\ < | $",
        "footer": ("One.", "Two."),
        "columns": (Column("Method", align="l"), Column("a", "G"), Column("b", "G"), Column("c")),
        "sections": (
            ((Text("x_y"), Text("1.0", True, "[0.1, 2.0]"), Text("\u22122.0"), Text()),),
            ((Text("z|w"), Text("3.0"), Text("4.0"), Text("5.0")),),
        ),
        "data": pd.DataFrame({"v": [0.1 + 0.2, math.nan], "n": pd.array([3, None], dtype="Int64")}),
    }
    return Table(**(values | changes))  # type: ignore[arg-type]


def check_latex(text: str, columns: int) -> None:
    """What a LaTeX run would trip over: braces, environments, unescaped specials, cells a row."""
    bare = re.sub(r"\\.", "", text)  # without escapes and one-letter starts of commands
    assert bare.count("{") == bare.count("}")
    assert text.count("$") - text.count(r"\$") - 2 * len(re.findall(r"\$[^$]*\$", text.replace(r"\$", ""))) == 0
    assert re.findall(r"\\begin\{(\w+\*?)\}", text) == list(reversed(re.findall(r"\\end\{(\w+\*?)\}", text))) or sorted(
        re.findall(r"\\begin\{(\w+\*?)\}", text)
    ) == sorted(re.findall(r"\\end\{(\w+\*?)\}", text))
    body = text[text.index(r"\toprule") : text.index(r"\bottomrule")]
    body = re.sub(r"\\shortstack\[.\]\{(.*?)\\\\\[-1pt\]", r"\1", body)
    rows = [line for line in body.splitlines() if line.endswith(r"\\")]
    for row in rows:
        cells = len(re.findall(r"(?<!\\)&", row)) + 1
        spans = [int(n) for n in re.findall(r"\\multicolumn\{(\d+)\}", row)]
        assert cells - len(spans) + sum(spans) == columns, row
    assert not re.search(r"(?<!\\)[#_^~]", text.replace(r"\textasciitilde{}", "").replace(r"\textasciicircum{}", ""))


def test_latex_is_balanced_and_escaped() -> None:
    text = a_table().latex()
    check_latex(text, 4)
    assert r"x\_y" in text and r"50\% \& more\_less" in text and r"\{brace\}" in text
    assert r"\shortstack[r]{\textbf{1.0}\\[-1pt]{\tiny [0.1, 2.0]}}" in text
    assert r"$-$2.0" in text
    assert r"\multicolumn{2}{c}{G}" in text and r"\cmidrule(lr){2-3}" in text
    assert text.count(r"\midrule") == 2


def test_latex_refuses_a_character_it_cannot_set() -> None:
    with pytest.raises(ValueError, match="no LaTeX for '\u96ea'"):
        a_table(title="\u96ea").latex()


def test_markdown_has_every_cell_in_its_column() -> None:
    lines = [x for x in a_table().markdown().splitlines() if x.startswith("|")]
    assert {len(re.findall(r"(?<!\\)\|", x)) for x in lines} == {5}
    assert "**1.0** [0.1, 2.0]" in lines[2] and r"z\|w" in lines[3]


def test_csv_keeps_full_precision() -> None:
    back = pd.read_csv(io.StringIO(a_table().csv()))
    assert back["v"][0] == 0.1 + 0.2
    assert back["n"].isna().tolist() == [False, True] and "3.0" not in a_table().csv()


def test_rows_and_columns_must_fit() -> None:
    with pytest.raises(ValueError, match="a row of 1 cells under 4 columns"):
        a_table(sections=(((Text("x"),),),))


def test_files_appear_whole_or_not_at_all(tmp_path: Path) -> None:
    a_table().write(tmp_path / "new")
    assert sorted(p.name for p in (tmp_path / "new").iterdir()) == ["t.csv", "t.md", "t.tex"]
    with pytest.raises(ValueError):
        a_table(name="u", title="\u96ea").write(tmp_path / "new")
    assert not list((tmp_path / "new").glob("*.partial")) and not (tmp_path / "new" / "u.tex").exists()


def test_numbers_as_read() -> None:
    assert number(-1.25) == "\u22121.2" and number(0.04, sign=True) == "0.0" and number(-0.04) == "0.0"
    assert number(2.0, sign=True) == "+2.0" and number(math.nan) == "\u2013"
    assert percent(0.6314) == "63.1" and interval(0.5, 0.7512) == "[50.0, 75.1]"
    assert [p_value(p) for p in (0.0002, 0.0123, 0.5, 1.0)] == ["<0.001", "0.012", "0.50", "1.00"]
    assert [tokens(n) for n in (None, 0, 600_000, 1_500_000, 140_000_000, 999, 999_999)] == [
        "0",
        "0",
        "600K",
        "1.5M",
        "140M",
        "999",
        "1000K",
    ]


def test_best_compares_what_is_printed() -> None:
    assert best([63.14, 63.06, None, 60.0]) == [True, True, False, False]
    assert best([None, 5.0]) == [False, False]  # nothing to compete with
    assert best([5.01, 5.0]) == [False, False]  # nothing to tell them apart
    assert best([math.nan, 1.0, 2.0]) == [False, False, True]
