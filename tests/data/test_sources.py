"""Traces of one's own: what a row becomes, in which order, and how faults are named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import reqat.data.sources as sources
from reqat.config.errors import ReqatError
from reqat.data import Trace, Traces, TraceStore, build_tokenizer, encode_prompt, pack, select, write_store
from reqat.data.sources import Columns, Imported, import_traces, read_source

THINK = "<think>\nTwo and two is four.\n</think>\nThe answer is 4."
# As reasoning models have it: the reasoning of an assistant's message is deleted, and the next one's is opened.
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'assistant' %}b: {{ m.content.split('</think>')[-1] }}<eos>"
    "{% else %}u: {{ m.content }}\n{% endif %}{% endfor %}{% if add_generation_prompt %}b: <think>\n{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return build_tokenizer(
        [THINK, "How many? Hello there, u: b: 2 + 2 =\n", " one two four", "two", "four.", " <think>"]
    )


@pytest.fixture
def chat(tokenizer: Any, tmp_path: Path) -> Any:
    from transformers import AutoTokenizer

    tokenizer.save_pretrained(tmp_path / "chat")
    made = AutoTokenizer.from_pretrained(tmp_path / "chat")
    made.chat_template = TEMPLATE
    return made


def lines(folder: Path, rows: list[Any], name: str = "traces.jsonl") -> str:
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def imported(source: str, tokenizer: Any, folder: Path, **options: Any) -> tuple[Imported, Traces]:
    rows = read_source(source, folder / "cache", progress=False)
    given = {"columns": Columns(), "most_row_tokens": 4096, **options}
    found = import_traces(rows, tokenizer, folder / "store", "train", where="traces", progress=False, **given)
    return found, TraceStore.read(folder / "store").traces


def pairs(n: int = 30) -> list[dict[str, Any]]:
    return [{"prompt": f"{i} + 2 =\n", "response": " one" * (i % 7 + 1)} for i in range(n)]


def test_a_prompt_and_its_response_are_read_as_generation_reads_them(tokenizer: Any, tmp_path: Path) -> None:
    rows = pairs()
    found, traces = imported(lines(tmp_path, rows), tokenizer, tmp_path)
    assert isinstance(traces.ids, np.memmap) and traces.ids.dtype == np.int32
    assert [t.id for t in traces] == [f"row-{i}" for i in range(1, 31)]
    for row, trace in zip(rows, traces, strict=True):
        assert [tokenizer.bos_token_id, *trace.prompt_ids] == encode_prompt(tokenizer, row["prompt"]) and trace.bos
        assert tokenizer.decode(trace.response_ids) == f"{row['response']}<eos>"
    assert (found.traces, found.tokens) == (30, sum(t.n_tokens for t in traces))
    assert found.longest == found.row_tokens == max(t.n_tokens for t in traces)


def test_qat_sees_the_first_tokens_of_fine_tuning(tokenizer: Any, tmp_path: Path) -> None:
    _, traces = imported(lines(tmp_path, pairs(200)), tokenizer, tmp_path)
    stage1, same = select(traces, 3 * traces.n_tokens // 4), select(traces, traces.n_tokens // 4)
    different = select(traces, traces.n_tokens // 5, skip_tokens=3 * traces.n_tokens // 4)
    assert isinstance(same, Traces) and isinstance(stage1, Traces) and 0 < len(same) < len(stage1)
    assert list(same) == list(stage1)[: len(same)]
    n = int(same.starts[-1] - same.starts[0])
    assert np.array_equal(same.ids[same.starts[0] :][:n], stage1.ids[stage1.starts[0] :][:n])
    assert not {t.id for t in stage1} & {t.id for t in different}


def test_only_the_last_message_counts_and_its_reasoning_is_kept(chat: Any, tmp_path: Path) -> None:
    talk = [
        {"role": "user", "content": "Hello there"},
        {"role": "assistant", "content": THINK},
        {"role": "user", "content": "How many?"},
    ]
    rows = [
        {"messages": [*talk, {"role": "assistant", "content": THINK}]},
        {"messages": [{"role": "user", "content": "How many?"}, {"role": "assistant", "content": "four."}]},
    ]
    _, traces = imported(lines(tmp_path, rows), chat, tmp_path)
    packed = pack(traces, 160, bos_id=chat.bos_token_id, pad_id=0)
    batch = packed.batch([0])
    learned = batch.labels[0][batch.labels[0] != -100]
    # The template opened the thought, so the response begins inside it; nothing before it is learned.
    assert chat.decode(learned) == f"{THINK.removeprefix('<think>').lstrip()}<eos>four.<eos>"
    prompt = chat.apply_chat_template(talk, add_generation_prompt=True, return_dict=False)
    assert traces[0].prompt_ids == tuple(prompt)
    assert chat.decode(traces[0].prompt_ids).endswith("b: <think>\n")


def test_other_names_of_messages_and_columns(chat: Any, tokenizer: Any, tmp_path: Path) -> None:
    usual = [{"messages": [{"role": "user", "content": "How many?"}, {"role": "assistant", "content": "two"}], "n": 1}]
    shared = [{"conversations": [{"from": "human", "value": "How many?"}, {"from": "gpt", "value": "two"}]}]
    for name, rows in (("a", usual), ("b", shared)):
        (tmp_path / name).mkdir()
        _, traces = imported(lines(tmp_path / name, rows), chat, tmp_path / name)
        assert chat.decode(traces[0].response_ids) == "two<eos>"
        assert list(traces) == list(TraceStore.read(tmp_path / "a" / "store").traces)
    rows = [{"question": r["prompt"], "answer": r["response"]} for r in pairs(3)]
    columns = Columns(prompt="question", response="answer")
    _, traces = imported(lines(tmp_path, rows), tokenizer, tmp_path, columns=columns)
    assert len(traces) == 3


def test_every_format_and_any_number_of_processes_give_the_same_store(
    tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = pairs(40)
    (tmp_path / "list.json").write_text(json.dumps(rows))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    monkeypatch.setattr(sources, "_ROWS_A_PROCESS", 10)
    monkeypatch.setattr(sources, "_BATCH", 7)
    digests = set()
    for i, source in enumerate([lines(tmp_path, rows), tmp_path / "list.json", tmp_path / "rows.parquet"]):
        imported(str(source), tokenizer, tmp_path / str(i), processes=2 if i == 0 else 1)
        digests.add(TraceStore.read(tmp_path / str(i) / "store").digest)
    assert len(digests) == 1


@pytest.mark.parametrize("over_long", ["drop", "truncate"])
def test_what_is_too_long_is_left_out_or_cut_and_counted(over_long: str, tokenizer: Any, tmp_path: Path) -> None:
    rows = pairs(20)
    rows[3]["prompt"] = "one " * 40  # the prompt alone is too long
    _, whole = imported(lines(tmp_path, rows), tokenizer, tmp_path / "whole")
    found, traces = imported(lines(tmp_path, rows), tokenizer, tmp_path, over_long=over_long, row_tokens=12)
    expected = []
    for trace in whole:
        room = 12 - trace.bos - len(trace.prompt_ids)
        if len(trace.response_ids) <= room or (over_long == "truncate" and room > 0):
            expected.append((trace.id, trace.prompt_ids, trace.response_ids[:room]))
    assert [(t.id, t.prompt_ids, t.response_ids) for t in traces] == expected
    assert found.left_out == len(whole) - len(traces) > 0
    assert found.cut == sum(len(t.response_ids) > 12 - 1 - len(t.prompt_ids) for t in whole) * (
        over_long == "truncate"
    ) - (over_long == "truncate")
    assert found.row_tokens == 12 and found.longest == max(t.n_tokens for t in whole)
    with pytest.raises(ReqatError, match="every row is longer than 2 tokens"):
        imported(lines(tmp_path, rows), tokenizer, tmp_path / "none", over_long=over_long, row_tokens=2)


GOOD = {"prompt": "How many?", "response": "two"}
USER = {"role": "user", "content": "How many?"}


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        ([GOOD, {"prompt": "How many?", "response": None}], "row 2: it has no response"),
        ([GOOD, GOOD, {"prompt": "How many?", "response": "  "}], "row 3: it has no response"),
        ([GOOD, {"response": "two"}], "row 2: prompt is None"),
        ([{"messages": [USER, USER]}], "row 1: it has no response.*assistant"),
        ([{"messages": [USER]}], "row 1: .*two messages"),
        ([{"messages": [{"role": "user"}, USER]}], "row 1: the message .* no role and content"),
        ([{"question": "How many?"}], "columns are question.*--prompt-column"),
    ],
)
def test_a_row_that_is_no_trace_is_named(rows: list[Any], says: str, chat: Any, tmp_path: Path) -> None:
    with pytest.raises(ReqatError, match=says):
        imported(lines(tmp_path, rows), chat, tmp_path)
    assert not (tmp_path / "store").exists()


def test_messages_need_a_chat_template(tokenizer: Any, tmp_path: Path) -> None:
    rows = [{"messages": [USER, {"role": "assistant", "content": "two"}]}]
    with pytest.raises(ReqatError, match="row 1: .*no chat template"):
        imported(lines(tmp_path, rows), tokenizer, tmp_path)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ('{"prompt": "a", "response": "b"}\n\n{"prompt": "a", \n', r"traces\.jsonl, line 3: not JSON"),
        ('{"prompt": "a", "response": "b"}\n[1]\n', r"traces\.jsonl, line 2: .*no object"),
        ("", "is empty"),
        ("\n", "traces.jsonl"),
    ],
)
def test_a_file_that_cannot_be_read_is_named_with_its_line(content: str, says: str, tmp_path: Path) -> None:
    (tmp_path / "traces.jsonl").write_text(content)
    with pytest.raises(ReqatError, match=says):
        read_source(str(tmp_path / "traces.jsonl"), tmp_path / "cache", progress=False)


@pytest.mark.parametrize(
    ("name", "other"), [("x[1].jsonl", "x1.jsonl"), ("x?.jsonl", "xy.jsonl"), ("*.json", "a.json")]
)
def test_a_name_is_no_pattern(name: str, other: str, tmp_path: Path) -> None:
    lines(tmp_path, [GOOD, GOOD], other)
    for folder in (tmp_path, tmp_path / "[a]*"):
        folder.mkdir(exist_ok=True)
        rows = read_source(lines(folder, [GOOD], name), tmp_path / "cache", progress=False)
        assert list(rows) == [GOOD]


def test_sources_that_are_none(tmp_path: Path) -> None:
    (tmp_path / "traces.csv").write_text("a,b\n")
    for source, says in (
        (str(tmp_path), "is a folder"),
        (str(tmp_path / "none.jsonl"), "no such file"),
        (str(tmp_path / "traces.csv"), "not .csv"),
        ("owner/name", "owner/name@COMMIT"),
        ("owner/name@main", "owner/name@COMMIT"),
        ("owner/name@0123abc:train", "owner/name@COMMIT"),
        (f"owner/name@{'0123abcd' * 5}", "cannot be loaded.*without a network"),  # tests run offline
        ("words", "no such file"),
    ):
        with pytest.raises(ReqatError, match=says):
            read_source(source, tmp_path / "cache", progress=False)


def test_a_damaged_store_of_arrays_is_refused(tokenizer: Any, tmp_path: Path) -> None:
    _, traces = imported(lines(tmp_path, pairs(5)), tokenizer, tmp_path)
    expected, store = list(traces), tmp_path / "store"
    del traces
    for name in ("train.ids", "train.index", "manifest.json"):
        whole = (store / name).read_bytes()
        for at in range(0, len(whole), 7):
            (store / name).write_bytes(whole[:at] + bytes([whole[at] ^ 0x04]) + whole[at + 1 :])
            try:
                assert list(TraceStore.read(store).traces) == expected
            except ReqatError as error:
                assert str(store) in str(error) and "reqat train" in str(error)
        for cut in (whole[:-4], whole + b"0000"):
            (store / name).write_bytes(cut)
            with pytest.raises(ReqatError, match="store.*reqat train"):
                TraceStore.read(store)
        (store / name).unlink()
        with pytest.raises(ReqatError, match="store.*reqat train"):
            TraceStore.read(store)
        (store / name).write_bytes(whole)


def test_both_forms_of_a_store_train_alike(tmp_path: Path) -> None:
    """Rows, digests and batches do not depend on whether token ids lie in lists, in a file of lines or are mapped."""
    made = [Trace(f"row-{i + 1}", f"row-{i + 1}", "own", "", "", (5 + i, 6), (7,) * (i % 4 + 1)) for i in range(20)]
    write_store(tmp_path / "lines", {"train": made})
    ids = np.concatenate([np.array([*t.prompt_ids, *t.response_ids], dtype=np.int32) for t in made])
    index = np.array([[t.n_tokens - 1, len(t.prompt_ids), 1, i + 1] for i, t in enumerate(made)])
    from reqat.data import write_arrays

    write_arrays(tmp_path / "arrays", "train", [(ids, index)])
    stores = [made, *(TraceStore.read(tmp_path / name).traces for name in ("lines", "arrays"))]
    packed = [pack(traces, 16, bos_id=1, pad_id=0) for traces in stores]
    assert len({rows.digest for rows in packed}) == 1
    batches = [rows.batch(range(len(rows))) for rows in packed]
    assert all(
        torch.equal(batches[0].input_ids, b.input_ids) and torch.equal(batches[0].labels, b.labels) for b in batches
    )
    assert [list(traces[3:9]) for traces in stores[1:]] == [made[3:9]] * 2
    assert all(list(traces) == made and traces[-1] == made[-1] for traces in stores[1:])
    with pytest.raises(IndexError):
        stores[2][20]
