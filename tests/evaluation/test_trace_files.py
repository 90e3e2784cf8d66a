"""Trace folders: what is written is what is read, and what is damaged is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from reqat.config.errors import ReqatError
from reqat.evaluation.trace_files import TokenColumns, TraceInfo, TraceWriter
from reqat.evaluation.trace_folder import TraceFolder
from reqat.evaluation.trace_tables import META, TOKENS, TRACES, stream_tokens

WORDS = [f"w{i}" for i in range(20)]


def info(i: int, **changes: Any) -> TraceInfo:
    given = {
        "problem": f"p{i // 2}",
        "family": "f",
        "seed": i,
        "source": "A" if i % 2 else "B",
        "prompt": "what?",
        "response": f"text {i}",
        "answer": "4",
        "correct": [True, False, None][i % 3],
        "finished": i != 1,
    }
    return TraceInfo(**{**given, **changes})


def columns(n: int, k: int = 3, seed: int = 0) -> TokenColumns:
    rng = np.random.default_rng(seed)
    entropy, tail, prob = rng.random((3, n)).astype(np.float32)
    return TokenColumns(
        entropy, tail, prob, rng.integers(0, 20, (n, k)).astype(np.int32), rng.random((n, k)).astype(np.float32)
    )


def write(folder: Path, lengths: list[int], **options: Any) -> list[dict[str, TokenColumns]]:
    written = []
    with TraceWriter(folder, ["A", "B"], WORDS, k=3, **options) as writer:
        for i, n in enumerate(lengths):
            found = {"A": columns(n, seed=i), "B": columns(n, seed=100 + i)}
            writer.add(info(i), np.arange(n) % 20, found)
            written.append(found)
    return written


def test_what_is_written_is_read(tmp_path: Path) -> None:
    lengths = [4, 1, 30, 7]
    written = write(tmp_path, lengths, group_tokens=5, metadata={"decoding": "greedy"})
    folder = TraceFolder(tmp_path)
    assert folder.labels == ("A", "B") and folder.k == 3 and folder.vocabulary == WORDS
    assert folder.meta["n"] == 4 and folder.meta["tokens"] == 42 and folder.meta["decoding"] == "greedy"
    assert folder.traces["tokens"].tolist() == lengths and folder.traces["trace"].tolist() == [0, 1, 2, 3]
    assert folder.traces["correct"].tolist() == [True, False, None, True]
    assert folder.traces["finished"].tolist() == [True, False, True, True]
    assert folder.trace_index.tolist() == np.repeat(range(4), lengths).tolist()
    for label in ("A", "B"):
        parts = [w[label] for w in written]
        assert (folder.entropy(label) == np.concatenate([p.entropy for p in parts])).all()
        assert (folder.tail(label) == np.concatenate([p.tail for p in parts])).all()
        assert (folder.column(f"prob_{label}") == np.concatenate([p.prob for p in parts])).all()
        assert (folder.top1(label) == np.concatenate([p.top[:, 0] for p in parts])).all()
    assert pq.ParquetFile(tmp_path / TOKENS).num_row_groups == 3  # 5 and 30 tokens, and the rest
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([META, TOKENS, TRACES])


def test_the_columns_are_those_of_the_contract(tmp_path: Path) -> None:
    write(tmp_path, [2])
    found = pq.read_schema(tmp_path / TOKENS)
    assert found.names[:7] == ["trace", "position", "token", "entropy_A", "prob_A", "top_A", "top_prob_A"]
    assert found.field("top_A").type == pa.list_(pa.int32()) and found.field("entropy_A").type == pa.float32()
    assert found.field("trace").type == found.field("position").type == found.field("token").type == pa.int32()


def test_without_tails_they_follow_from_the_probabilities(tmp_path: Path) -> None:
    written = write(tmp_path, [6])
    table = pq.read_table(tmp_path / TOKENS)
    pq.write_table(table.drop_columns(["tail_A", "tail_B"]), tmp_path / TOKENS)
    folder = TraceFolder(tmp_path)
    assert not folder.has_tail
    assert (folder.tail("A") == 1 - written[0]["A"].top_prob[:, 0].astype(np.float64)).all()


@pytest.mark.parametrize(
    ("tokens", "change", "says"),
    [
        ([], {}, "'p0', seed 0, source 'B'.*empty"),
        ([3, 20], {}, "token id 20.*position 1.*20 tokens"),
        (
            [3, 4],
            {"entropy": np.array([0.1, np.nan], dtype=np.float32)},
            "A at position 1.*not finite",
        ),
        ([3, 4, 5], {}, "2 statistics of A.*3 tokens"),
    ],
)
def test_a_faulty_trace_is_refused_and_the_others_stay(
    tmp_path: Path, tokens: list[int], change: dict[str, Any], says: str
) -> None:
    with TraceWriter(tmp_path, ["A"], WORDS, k=3) as writer:
        writer.add(info(7), [1, 2], {"A": columns(2)})
        bad = columns(2)
        vars(bad).update(change)
        with pytest.raises(ReqatError, match=says):
            writer.add(info(0), tokens, {"A": bad})
        with pytest.raises(ReqatError, match="no statistics of A"):
            writer.add(info(0), [1, 2], {"C": columns(2)})
        writer.add(info(9), [1, 2], {"A": columns(2)})
    assert TraceFolder(tmp_path).traces["seed"].tolist() == [7, 9]


def test_nothing_is_left_of_a_run_that_failed(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), TraceWriter(tmp_path, ["A"], WORDS) as writer:
        writer.add(info(0), [1, 2], {"A": columns(2)})
        raise RuntimeError
    assert not list(tmp_path.iterdir())
    with pytest.raises(ReqatError, match="no traces to write"), TraceWriter(tmp_path, ["A"], WORDS):
        pass
    with pytest.raises(ReqatError, match="different labels"):
        TraceWriter(tmp_path, ["A", "A"], WORDS)


def test_traces_that_are_there_are_not_replaced(tmp_path: Path) -> None:
    write(tmp_path, [2])
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ReqatError, match=r"meta\.json.*already"):
        TraceWriter(tmp_path, ["A"], WORDS)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    with pytest.raises(FileNotFoundError, match="meta.json.*`reqat entropy`"):
        TraceFolder(tmp_path / "none")


def damage(folder: Path, group: int) -> None:
    """Flip a byte in the middle of a row group's first entropies."""
    found = pq.ParquetFile(folder / TOKENS).metadata.row_group(group).column(3)
    data = bytearray((folder / TOKENS).read_bytes())
    data[found.data_page_offset + found.total_compressed_size // 2] ^= 0x55
    (folder / TOKENS).write_bytes(data)


def test_a_damaged_row_group_costs_its_traces_and_names_them(tmp_path: Path) -> None:
    written = write(tmp_path, [40, 40, 40, 40, 40], group_tokens=80)
    damage(tmp_path, 1)
    with pytest.raises(ReqatError, match=r"tokens.parquet.*row group 1.*traces 2 to 3.*'p1', seed 2"):
        TraceFolder(tmp_path)
    folder = TraceFolder(tmp_path, lost="skip")
    assert folder.skipped == [2, 3] and folder.traces["trace"].tolist() == [0, 1, 4]
    expected = np.concatenate([written[i]["B"].entropy for i in (0, 1, 4)])
    assert (folder.entropy("B") == expected).all() and folder.n_tokens == 120


@pytest.mark.parametrize("name", [TOKENS, TRACES])
@pytest.mark.parametrize("how", ["cut", "empty", "text"])
def test_a_file_that_is_no_parquet_is_named(tmp_path: Path, name: str, how: str) -> None:
    write(tmp_path, [5, 5])
    data = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes({"cut": data[: len(data) // 2], "empty": b"", "text": b"hello" * 100}[how])
    with pytest.raises(ReqatError, match=f"{name}.*damaged"):
        TraceFolder(tmp_path)


def rewritten(folder: Path, name: str, change: Any) -> None:
    table = pq.read_table(folder / name)
    pq.write_table(change(table), folder / name)


def test_nan_in_a_file_names_trace_and_position(tmp_path: Path) -> None:
    write(tmp_path, [3, 3])

    def spoil(table: pa.Table) -> pa.Table:
        values = table["entropy_B"].to_numpy().copy()
        values[4] = np.nan
        return table.set_column(table.schema.get_field_index("entropy_B"), "entropy_B", pa.array(values))

    rewritten(tmp_path, TOKENS, spoil)
    folder = TraceFolder(tmp_path)
    assert len(folder.entropy("A")) == 6  # the other columns are read all the same
    with pytest.raises(ReqatError, match="entropy_B is nan.*'p0', seed 1, source 'A'.*position 1"):
        folder.entropy("B")


@pytest.mark.parametrize(
    ("name", "change", "says"),
    [
        (
            TOKENS,
            lambda t: t.slice(0, 5),
            "'p0', seed 1, source 'A'.*2 tokens.*traces.parquet.*3",
        ),
        (TOKENS, lambda t: t.slice(0, 3), "no tokens.*'p0'"),
        (TOKENS, lambda t: t.take([1, 0, 2, 3, 4, 5]), "positions.*count up"),
        (TOKENS, lambda t: t.drop_columns(["prob_A"]), "lacks the columns prob_A"),
        (TRACES, lambda t: t.drop_columns(["seed"]), "lacks the columns seed"),
    ],
)
def test_files_that_do_not_belong_together_are_refused(tmp_path: Path, name: str, change: Any, says: str) -> None:
    write(tmp_path, [3, 3])
    rewritten(tmp_path, name, change)
    with pytest.raises(ReqatError, match=says):
        TraceFolder(tmp_path)


def test_unknown_names_are_answered_with_known_ones(tmp_path: Path) -> None:
    write(tmp_path, [3])
    folder = TraceFolder(tmp_path)
    with pytest.raises(ReqatError, match="label 'C'.*A, B"):
        folder.entropy("C")
    with pytest.raises(ReqatError, match="column 'entropies_A'.*'entropy_A'"):
        folder.column("entropies_A")
    (tmp_path / META).write_text(json.dumps({"labels": ["A"]}))
    with pytest.raises(ReqatError, match="meta.json is damaged"):
        TraceFolder(tmp_path)


def test_traces_are_streamed_one_by_one(tmp_path: Path) -> None:
    written = write(tmp_path, [40, 1, 70, 3], group_tokens=50)
    found = list(stream_tokens(tmp_path, ["entropy_B", "position"]))
    assert [number for number, _ in found] == [0, 1, 2, 3]
    for (_, columns), expected in zip(found, written, strict=True):
        assert (columns["entropy_B"].to_numpy() == expected["B"].entropy).all()
        assert columns["position"].to_pylist() == list(range(len(expected["B"].entropy)))
    with pytest.raises(ReqatError, match="lacks the columns entropy_C"):
        next(stream_tokens(tmp_path, ["entropy_C"]))


def test_streaming_tells_of_a_damaged_group_and_goes_on(tmp_path: Path) -> None:
    write(tmp_path, [40, 40, 40, 40, 40], group_tokens=80)
    damage(tmp_path, 1)
    told: list[ReqatError] = []
    assert [number for number, _ in stream_tokens(tmp_path, ["entropy_A"], damaged=told.append)] == [0, 1, 4]
    assert len(told) == 1 and "in row group 1, after trace 1" in str(told[0])
    with pytest.raises(ReqatError, match="row group 1.*trace 1"):
        list(stream_tokens(tmp_path, ["entropy_A"]))


META_DAMAGE: dict[str, dict[str, Any]] = {
    "schema": {"schema": "reqat.traces/2"},
    "labels": {"labels": "A"},
    "label": {"labels": ["A", 3]},
    "k": {"k": "5"},
    "k ": {"k": 0},
    "vocabulary": {"vocabulary": {"a": 1}},
    "vocabulary ": {"vocabulary": ["a", None]},
    "n": {"n": 3},
    "tokens": {"tokens": 5},
}


@pytest.mark.parametrize("what", META_DAMAGE)
def test_a_description_of_other_traces_is_refused(what: str, tmp_path: Path) -> None:
    write(tmp_path, [3, 3])
    meta = json.loads((tmp_path / META).read_text()) | META_DAMAGE[what]
    (tmp_path / META).write_text(json.dumps(meta))
    with pytest.raises(ReqatError, match=rf"meta\.json.*{what.strip()}.*collect the traces again"):
        TraceFolder(tmp_path)


def test_a_description_need_not_name_the_schema(tmp_path: Path) -> None:
    """Other programs that keep the contract of the files may write them."""
    write(tmp_path, [3, 3])
    meta = json.loads((tmp_path / META).read_text())
    del meta["schema"], meta["n"], meta["tokens"]
    (tmp_path / META).write_text(json.dumps(meta))
    assert TraceFolder(tmp_path).n_tokens == 6


def as_type(name: str, kind: pa.DataType) -> Any:
    return lambda table: table.set_column(table.schema.get_field_index(name), name, table[name].cast(kind))


def filled(name: str, values: list[Any]) -> Any:
    def change(table: pa.Table) -> pa.Table:
        at = table.schema.get_field_index(name)
        return table.set_column(at, name, pa.array(values, type=table.schema.field(name).type))

    return change


@pytest.mark.parametrize(
    ("name", "change"),
    [
        (TOKENS, as_type("trace", pa.string())),
        (TOKENS, as_type("token", pa.float32())),
        (TOKENS, as_type("entropy_A", pa.string())),
        (TOKENS, as_type("position", pa.string())),
        (TOKENS, filled("token", [0, 1, 2, 0, 1, len(WORDS)])),
        (TOKENS, filled("token", [0, 1, 2, 0, 1, -1])),
        (TOKENS, filled("token", [0, 1, 2, 0, 1, None])),
        (TOKENS, filled("position", [0, 1, None, 0, 1, 2])),
        (TRACES, as_type("trace", pa.string())),
        (TRACES, as_type("tokens", pa.string())),
        (TRACES, as_type("correct", pa.string())),
        (TRACES, filled("trace", [0, None])),
        (TRACES, filled("tokens", [3, None])),
        (TRACES, filled("problem", ["p0", None])),
    ],
)
def test_columns_of_another_kind_are_named(tmp_path: Path, name: str, change: Any) -> None:
    write(tmp_path, [3, 3])
    rewritten(tmp_path, name, change)
    with pytest.raises(ReqatError, match=rf"{name}"):
        TraceFolder(tmp_path)


@pytest.mark.parametrize(("column", "value"), [("entropy_A", -1.0), ("prob_A", 1.5), ("prob_A", -0.5), ("tail_B", 2.0)])
def test_numbers_that_no_distribution_has_name_the_trace(column: str, value: float, tmp_path: Path) -> None:
    write(tmp_path, [3, 3])
    rewritten(tmp_path, TOKENS, filled(column, [0.5, 0.5, 0.5, 0.5, 0.5, value]))
    with pytest.raises(ReqatError, match=rf"{column} is {value} in trace 1"):
        TraceFolder(tmp_path).column(column)
