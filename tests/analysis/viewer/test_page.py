"""The page of the trace viewer: what is in it is what was in the folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from analysis.viewer import build_page, encode, write_page
from reqat.config.errors import ReqatError
from tests.analysis.viewer import trace_folders as folders
from tests.analysis.viewer.read_pages import (
    Reader,
    Scripts,
    index_of,
    pieces_of,
    responses_of,
    rewrite,
    rows_of,
    unzigzag,
)
from tests.analysis.viewer.trace_folders import LABELS


def test_each_number_of_the_folder_is_in_the_page(pairs: Path) -> None:
    page = build_page(pairs)
    index, blobs = index_of(page.text), json.loads(Scripts(page.text).found["blobs"])
    assert (page.n_problems, page.n_traces, page.n_tokens) == (6, 12, 6 * 79)
    assert [item["t"] for item in index["items"]] == [[2 * i, 2 * i + 1] for i in range(6)]
    outside = 0
    for number in (0, 1, 11):
        rows, reader = rows_of(pairs, number), Reader(blobs[number])
        n, width = len(rows), index["width"]
        assert index["traces"][number]["n"] == n
        assert reader.numbers(n, width).tolist() == [row["token"] for row in rows]
        seen: dict[tuple[int, int], int] = {}  # the reference's probability steps by row and id
        lists: list[list[int]] = []  # its ids by row
        reference_N = np.zeros(n, np.int64)  # and its entropy steps
        for at, label in enumerate(LABELS):
            steps = reader.numbers(n, 2) if at == 0 else reference_N + unzigzag(reader.numbers(n, 2))
            reference_N = reference_N if at else steps
            expected_N = np.array([row[f"entropy_{label}"] for row in rows])
            # The root is rounded to the nearest step: at most half a step off.
            root_N = np.sqrt(expected_N.clip(0) / encode.MOST_NATS)
            assert np.abs(steps / encode.ENTROPY_STEPS - root_N).max() <= 0.5 / encode.ENTROPY_STEPS + 1e-6
            kept = reader.numbers(n, 1)
            place = reader.numbers(kept.sum(), 1)
            first = np.cumsum(kept) - kept
            alone = [i for i in range(n) if 0 not in place[first[i] : first[i] + kept[i]]]
            other = dict(zip(alone, reader.floats(len(alone)).tolist(), strict=True))
            spelled = iter(reader.numbers((place == encode.NOT_IN_LIST).sum(), width).tolist())
            stored = reader.numbers(kept.sum(), 2)
            for i, row in enumerate(rows):
                ids, angles = [], []
                for j in range(first[i], first[i] + kept[i]):
                    if place[j] == encode.NOT_IN_LIST:
                        ids.append(next(spelled))
                    else:
                        ids.append(row["token"] if place[j] == 0 else lists[i][place[j] - 1])
                    same = seen.get((i, ids[-1])) if at else None
                    angles.append(stored[j] if same is None else same + unzigzag(stored[j]))
                    if not at:
                        seen[i, ids[-1]] = angles[-1]
                if not at:
                    lists.append(ids)
                shown = [
                    (id, p)
                    for k, (id, p) in enumerate(zip(row[f"top_{label}"], row[f"top_prob_{label}"], strict=True))
                    if p >= encode.FLOOR or k == 0
                ]
                assert ids == [id for id, _ in shown]
                wanted = np.arcsin(np.sqrt([min(p, 1) for _, p in shown])) / (np.pi / 2)
                assert np.abs(np.array(angles) / encode.PROB_STEPS - wanted).max() <= 0.5 / encode.PROB_STEPS + 1e-6
                if i in other:
                    outside += 1
                    assert row["token"] not in ids and other[i] == np.float32(row[f"prob_{label}"])
        assert reader.at == len(reader.data)
    assert outside  # the rarer way was taken, too


def test_every_id_has_its_text(pairs: Path) -> None:
    index = index_of(build_page(pairs).text)
    table = pq.read_table(pairs / "tokens.parquet")
    pieces = pieces_of(index)
    needed = set(table["token"].to_pylist()) | {row[0] for row in table["top_BF16"].to_pylist()}
    assert needed <= set(pieces)
    assert pieces == {id: folders.WORDS[id] for id in pieces}


def test_traces_part_at_the_first_token_that_differs(pairs: Path) -> None:
    for item in index_of(build_page(pairs).text)["items"]:
        one, other = ([row["token"] for row in rows_of(pairs, trace)] for trace in item["t"])
        assert item["d"] == next(i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)


def test_a_trace_that_only_ends_earlier_parts_at_its_end(pairs: Path) -> None:
    def same(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        tokens = {row["position"]: row["token"] for row in rows if row["trace"] == 0}
        for row in rows:
            if row["trace"] == 1:
                row["token"] = tokens[row["position"]]
        return rows

    rewrite(pairs, "tokens.parquet", same)
    assert index_of(build_page(pairs).text)["items"][0]["d"] == 39  # of 40 and 39 tokens


def test_a_lone_trace_parts_where_the_most_probable_tokens_first_differ(lone: Path) -> None:
    items = index_of(build_page(lone).text)["items"]
    for item in items:
        rows = rows_of(lone, item["t"][0])
        differs = [row["position"] for row in rows if row["top_BF16"][0] != row[f"top_{LABELS[1]}"][0]]
        assert item["d"] == min(differs, default=-1)
        largest = max(abs(row[f"entropy_{LABELS[1]}"] - row["entropy_BF16"]) for row in rows)
        assert item["m"] == pytest.approx(largest, abs=5e-5)
    assert {item["o"] for item in items} == {"right", "wrong"}


def test_outcomes_name_the_precision(pairs: Path) -> None:
    outcomes = [item["o"] for item in index_of(build_page(pairs).text)["items"]]
    only = [f"only {label} right" for label in LABELS]
    assert outcomes == ["both wrong", only[0], only[1], "both right", "both wrong", only[0]]


def test_the_reference_comes_first_whatever_the_order_in_the_file(pairs: Path) -> None:
    rewrite(pairs, "traces.parquet", lambda rows: [*reversed(rows)])
    index = index_of(build_page(pairs).text)
    assert [[index["traces"][t]["s"] for t in item["t"]] for item in index["items"]] == [list(LABELS)] * 6


def test_ungraded_and_given_traces(lone: Path) -> None:
    rewrite(lone, "traces.parquet", lambda rows: [row | {"correct": None, "source": "given"} for row in rows])
    assert {item["o"] for item in index_of(build_page(lone).text)["items"]} == {"not graded"}


def test_three_precisions(tmp_path: Path) -> None:
    folder = folders.make_folder(tmp_path / "three", labels=("BF16", "MXFP4-W4A4", "NVFP4-W4A16"))
    index = index_of(build_page(folder).text)
    assert [len(item["t"]) for item in index["items"]] == [3] * 6
    assert {item["o"] for item in index["items"]} <= {
        "all wrong",
        "all right",
        "BF16 wrong",
        "BF16 right, not all others",
    }


def test_a_response_is_stored_only_where_its_tokens_do_not_spell_it(pairs: Path) -> None:
    assert set(responses_of(index_of(build_page(pairs).text))) == {None}
    rewrite(pairs, "traces.parquet", lambda rows: [rows[0] | {"response": "2 \u20ac <"}, *rows[1:]])
    assert responses_of(index_of(build_page(pairs).text)) == ["2 \u20ac <", *[None] * 11]


def test_an_empty_response_is_shown_as_one(tmp_path: Path) -> None:
    folder = folders.make_folder(tmp_path / "empty", tokens=0, problems=2)
    page = build_page(folder)
    assert (page.n_traces, page.n_tokens) == (4, 0)


def test_limit_and_family(pairs: Path) -> None:
    assert build_page(pairs, limit=2).n_traces == 4
    assert {item["f"] for item in index_of(build_page(pairs, family="leg_counting").text)["items"]} == {"leg_counting"}
    with pytest.raises(ReqatError, match="unknown family 'leg_countin'. Did you mean 'leg_counting'"):
        build_page(pairs, family="leg_countin")
    with pytest.raises(ReqatError, match="limit=0"):
        build_page(pairs, limit=0)


def test_row_groups_may_cut_traces_anywhere(pairs: Path) -> None:
    before = build_page(pairs).text
    pq.write_table(pq.read_table(pairs / "tokens.parquet"), pairs / "tokens.parquet", row_group_size=7)
    assert build_page(pairs).text == before


def test_the_same_folder_gives_the_same_bytes(pairs: Path, tmp_path: Path) -> None:
    one, other = tmp_path / "a" / "1.html", tmp_path / "2.html"
    write_page(pairs, one)
    write_page(pairs, other)
    assert one.read_bytes() == other.read_bytes()
    assert str(tmp_path).encode() not in one.read_bytes()
    assert [path.name for path in one.parent.iterdir()] == ["1.html"]
