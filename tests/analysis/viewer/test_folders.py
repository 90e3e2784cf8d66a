"""Folders that no page can be made of, or only a part of one: what is wrong is named, also by the verb."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from analysis.viewer import build_page
from reqat.cli.main import main
from reqat.config.errors import ReqatError
from tests.analysis.viewer.read_pages import (
    index_of,
    rewrite,
    set_token,
)

NAME = r"trace 3 \(problem 'p0001', seed 0, source NVFP4-W4A4KV4\): "


@pytest.mark.parametrize(
    ("column", "value", "says"),
    [
        ("token", 77, r"token id 77 is not in the vocabulary of 30 tokens at position 5"),
        ("token", -1, r"token id -1 is not in the vocabulary"),
        ("top_BF16", [4, 99], r"the most probable tokens of BF16 have no probabilities.*at position 5"),
        ("top_BF16", [4, 99, 3, 2, 1], r"token id 99 of BF16 is not in the vocabulary.*at position 5"),
        ("top_BF16", None, r"a value of top_BF16 is missing"),
        ("entropy_BF16", float("nan"), r"the entropy of BF16 is nan at position 5"),
        ("entropy_BF16", -0.5, r"the entropy of BF16 is -0.5"),
        ("entropy_NVFP4-W4A4KV4", float("inf"), r"the entropy of NVFP4-W4A4KV4 is inf"),
        ("prob_BF16", float("nan"), r"the probability of BF16 is nan at position 5"),
        ("prob_BF16", 1.5, r"the probability of BF16 is 1.5"),
        ("top_prob_BF16", [0.5, float("nan"), 0.1, 0.1, 0.1], r"among the most probable of BF16 is nan at position 5"),
        ("position", 7, r"the positions of its tokens are not 0, 1, 2, \.\.\. at position 5"),
    ],
)
def test_what_is_wrong_with_a_trace_names_it_and_costs_no_other(
    pairs: Path, column: str, value: Any, says: str
) -> None:
    rewrite(pairs, "tokens.parquet", lambda rows: set_token(rows, column, value))
    with pytest.raises(ReqatError, match=f"^{NAME}.*{says}"):
        build_page(pairs)
    warnings: list[str] = []
    page = build_page(pairs, keep_going=True, warn=warnings.append)
    assert page.n_traces == 11 and len(page.left_out) == len(warnings) == 1
    assert re.search(f"left out: {NAME}", warnings[0])
    assert index_of(page.text)["leftOut"] == list(page.left_out)


def test_tokens_that_are_missing(pairs: Path) -> None:
    rewrite(pairs, "tokens.parquet", lambda rows: [r for r in rows if (r["trace"], r["position"]) != (3, 38)])
    with pytest.raises(ReqatError, match=f"^{NAME}tokens.parquet holds 38 of its 39 tokens in a row"):
        build_page(pairs)
    rewrite(pairs, "tokens.parquet", lambda rows: [row for row in rows if row["trace"] != 3])
    with pytest.raises(ReqatError, match=f"^{NAME}tokens.parquet holds none of its 39 tokens"):
        build_page(pairs)


def test_tokens_of_an_unknown_trace_and_out_of_order(pairs: Path) -> None:
    rewrite(pairs, "tokens.parquet", lambda rows: rows[:40] + rows[79:] + rows[40:79])
    assert build_page(pairs).n_traces == 12  # traces in another order are whole traces
    rewrite(pairs, "tokens.parquet", lambda rows: rows[1:] + rows[:1])
    with pytest.raises(ReqatError, match=r"^trace 0 \(.*\): tokens.parquet holds 39 of its 40 tokens in a row"):
        build_page(pairs)
    # Trace 0 in three runs, the last one in the midst of trace 2.
    rewrite(pairs, "tokens.parquet", lambda rows: rows[:90] + rows[-1:] + rows[90:-1])
    with pytest.raises(ReqatError, match="is not sorted: trace 0 comes twice"):
        build_page(pairs, keep_going=True, warn=lambda line: None)
    rewrite(pairs, "traces.parquet", lambda rows: rows[1:])
    with pytest.raises(ReqatError, match="holds tokens of trace 0, which traces.parquet does not list"):
        build_page(pairs)


def test_a_row_group_that_cannot_be_read_costs_its_own_traces(pairs: Path) -> None:
    path = pairs / "tokens.parquet"
    # Groups of 100 rows: 40 + 39 rows a problem, so that the second group begins within trace 2.
    pq.write_table(pq.read_table(path), path, row_group_size=100, write_page_checksum=True)
    column = pq.ParquetFile(path).metadata.row_group(1).column(3)
    data = bytearray(path.read_bytes())
    middle = column.data_page_offset + column.total_compressed_size // 2
    data[middle] ^= 0xFF
    path.write_bytes(data)
    with pytest.raises(ReqatError, match=r"tokens.parquet is damaged or cut short in row group 1, after trace 2"):
        build_page(pairs)
    page = build_page(pairs, keep_going=True, warn=lambda line: None)
    kept = {trace["i"] for trace in index_of(page.text)["traces"]}
    assert kept == {0, 1, *range(6, 12)}  # rows 100 to 199 are of traces 2 to 5
    for number in (2, 3, 4, 5):
        assert any(f"trace {number} " in line for line in page.left_out)


@pytest.mark.parametrize("name", ["tokens.parquet", "traces.parquet", "meta.json"])
def test_files_that_are_missing_cut_short_or_something_else(pairs: Path, name: str) -> None:
    path = pairs / name
    whole = path.read_bytes()
    for spoiled in (whole[: len(whole) // 2], b"", b"PAR1 something else PAR1", b"\xff\xfe"):
        path.write_bytes(spoiled)
        with pytest.raises(ReqatError, match=rf"{name}(:| is damaged).*collect the traces again"):
            build_page(pairs)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=rf"no {name} in .*`reqat entropy`"):
        build_page(pairs)


def test_a_column_that_is_missing(pairs: Path) -> None:
    table = pq.read_table(pairs / "tokens.parquet")
    pq.write_table(table.drop_columns(["top_BF16"]), pairs / "tokens.parquet")
    with pytest.raises(ReqatError, match="tokens.parquet lacks the columns top_BF16"):
        build_page(pairs)


def test_no_trace_at_all(pairs: Path, tmp_path: Path) -> None:
    rewrite(pairs, "traces.parquet", lambda rows: rows[:1])
    pq.write_table(pq.read_table(pairs / "traces.parquet").slice(0, 0), pairs / "traces.parquet")
    with pytest.raises(ReqatError, match=r"traces.parquet holds no trace"):
        build_page(pairs)
    with pytest.raises(ReqatError, match="no folder"):
        build_page(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"labels": []}, "labels is"),
        ({"labels": ["BF16", "BF16"]}, "name a precision twice"),
        ({"k": -1}, "k is -1"),
        ({"k": -1}, "k is -1"),
        ({"labels": ["BF16", "W4"]}, "lacks the columns entropy_W4"),
        ({"vocabulary": None}, "neither a vocabulary"),
        ({"vocabulary": [1, 2]}, "no string"),
        ({"vocabulary": None, "tokenizer": "gone"}, "no tokenizer.json in 'gone'"),
    ],
)
def test_meta_that_says_too_little(pairs: Path, change: dict[str, Any], says: str) -> None:
    meta = json.loads((pairs / "meta.json").read_text())
    (pairs / "meta.json").write_text(json.dumps(meta | change))
    with pytest.raises(ReqatError, match=says):
        build_page(pairs)


def reqat(*arguments: object) -> int:
    with pytest.raises(SystemExit) as end:
        main([str(argument) for argument in arguments])
    return int(end.value.code or 0)


def test_the_verb_writes_the_page(pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert reqat("view", pairs) == 0
    assert (pairs / "view.html").read_bytes() == build_page(pairs).text
    assert "6 problems, 12 traces, 474 tokens" in capsys.readouterr().out
    assert reqat("view", pairs, "--out", tmp_path / "page.html", "--limit", 1, "--title", "One") == 0
    assert b"<title>One</title>" in (tmp_path / "page.html").read_bytes()


def test_the_verb_ends_with_one_line(pairs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rewrite(pairs, "tokens.parquet", lambda rows: set_token(rows, "token", 77))
    assert reqat("view", pairs) == 2
    said = capsys.readouterr().err
    assert re.match(f"reqat: error: {NAME}token id 77", said) and said.count("\n") == 1
    assert not (pairs / "view.html").exists()
    assert reqat("view", pairs, "--keep-going") == 0
    assert "reqat: warning: left out: trace 3" in capsys.readouterr().err
