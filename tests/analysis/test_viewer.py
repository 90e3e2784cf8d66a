"""The builder of the trace viewer: what is in the page is what was in the folder, and nothing can run in it."""

from __future__ import annotations

import base64
import hashlib
import importlib.util
import json
import re
import sys
import zlib
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from analysis.viewer import build_page, colours, encode, write_page
from analysis.viewer.folder import open_folder
from analysis.viewer.vocabulary import Vocabulary
from reqat.cli.main import main
from reqat.config.errors import ReqatError


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"viewer_{name}", Path(__file__).with_name(f"{name}.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


folders = load("trace_folders")
LABELS = folders.LABELS


class Scripts(HTMLParser):
    """Text of the script elements, as a browser cuts them out of the page."""

    def __init__(self, page: bytes) -> None:
        super().__init__()
        self.found: dict[str, str] = {}
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self._in: str | None = None
        self.feed(page.decode())

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))
        if tag == "script":
            self._in = dict(attributes).get("id") or "script"
            self.found[self._in] = ""

    def handle_data(self, data: str) -> None:
        if self._in:
            self.found[self._in] += data

    def handle_endtag(self, tag: str) -> None:
        if tag == "script":
            self._in = None


def index_of(page: bytes) -> dict[str, Any]:
    return dict(json.loads(Scripts(page).found["index"]))


def from_base_85(text: str) -> bytes:
    """Each five letters are the digits of four bytes, the first the highest; the last group may be shorter."""
    out = b""
    for at in range(0, len(text), 5):
        group = text[at : at + 5]
        value = 0
        for letter in group.ljust(5, encode.ALPHABET[-1]):
            value = 85 * value + encode.ALPHABET.index(letter)
        out += value.to_bytes(4, "big")[: len(group) - 1]
    return out


def unzigzag(values: np.ndarray) -> np.ndarray:
    return np.where(values % 2, -(values + 1) // 2, values // 2)


class Reader:
    """Unpacks a trace as the layout in analysis/viewer/encode.py says, with nothing of its code."""

    def __init__(self, packed: str) -> None:
        self.data, self.at = zlib.decompress(from_base_85(packed)), 0

    def numbers(self, n: int, width: int) -> np.ndarray:
        raw = np.frombuffer(self.data, np.uint8, n * width, self.at).reshape(width, n)
        self.at += n * width
        return sum((plane.astype(np.int64) << (8 * i) for i, plane in enumerate(raw)), np.zeros(n, np.int64))

    def floats(self, n: int) -> np.ndarray:
        self.at += 4 * n
        return np.frombuffer(self.data, "<f4", n, self.at - 4 * n)


def pieces_of(index: dict[str, Any]) -> dict[int, str]:
    """The text of each id."""
    found = json.loads(zlib.decompress(from_base_85(index["pieces"])))
    return dict(zip(np.cumsum(found["steps"]).tolist(), found["texts"], strict=True))


def responses_of(index: dict[str, Any]) -> list[str | None]:
    return list(json.loads(zlib.decompress(from_base_85(index["responses"]))))


def rows_of(folder: Path, trace: int) -> list[dict[str, Any]]:
    return [row for row in pq.read_table(folder / "tokens.parquet").to_pylist() if row["trace"] == trace]


def rewrite(folder: Path, name: str, change: Callable[[list[dict[str, Any]]], Any]) -> None:
    """Change the rows of a parquet file in place."""
    table = pq.read_table(folder / name)
    rows = table.to_pylist()
    rows = change(rows) or rows
    pq.write_table(pa.Table.from_pylist(rows, schema=table.schema), folder / name)


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    return Path(folders.make_folder(tmp_path / "traces"))


@pytest.fixture
def lone(tmp_path: Path) -> Path:
    return Path(folders.make_folder(tmp_path / "traces", pairs=False))


# -- what is in it ----------------------------------------------------------------------------------------------------


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


# -- nothing runs, nothing is fetched ---------------------------------------------------------------------------------

NASTY = [
    "</script><script>document.title='broken'</script>", "<!--<script>", "\u2028", "]]>", "&lt;", "\x00", "\r\n",
    "'\"`", "{{script}}", "\\u003c", "<img src=x onerror=alert(1)>",
]  # fmt: skip


def test_text_cannot_leave_the_data(tmp_path: Path) -> None:
    labels = ("<b>BF16</b>", "</script>")
    folder = folders.make_folder(
        tmp_path / "nasty", problems=len(NASTY), words=["<eos>", *NASTY], prompts=dict(enumerate(NASTY)), labels=labels
    )
    page = build_page(folder, title="</title><script>1</script>")
    scripts = Scripts(page.text)
    assert list(scripts.found) == ["index", "blobs", "script"]
    index = json.loads(scripts.found["index"])
    assert index["labels"] == list(labels)
    assert [item["q"] for item in index["items"]] == NASTY
    assert set(pieces_of(index).values()) == {"<eos>", *NASTY}
    assert set(responses_of(index)) == {None}  # the tokens spell them
    assert "<" not in scripts.found["index"] + scripts.found["blobs"]
    assert b"\0" not in page.text and b"\r" not in page.text


def test_only_the_pages_own_script_may_run_and_nothing_is_fetched(pairs: Path) -> None:
    text = build_page(pairs).text
    scripts = Scripts(text)
    policy = next(a["content"] for tag, a in scripts.tags if a.get("http-equiv") == "Content-Security-Policy")
    digest = base64.b64encode(hashlib.sha256(scripts.found["script"].encode()).digest()).decode()
    assert policy is not None
    assert policy.startswith(f"default-src 'none'; script-src 'sha256-{digest}'; style-src 'sha256-")
    assert "unsafe" not in policy
    assert not re.search(rb"https?://|@import|url\(", text)
    assert {tag for tag, a in scripts.tags if a.get("src")} == set()
    assert {a["href"] for _, a in scripts.tags if a.get("href")} == {"data:,", "#main"}
    script = scripts.found["script"]
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b|\bfetch\(", script)


# -- errors -----------------------------------------------------------------------------------------------------------


def set_token(rows: list[dict[str, Any]], column: str, value: Any, trace: int = 3, position: int = 5) -> None:
    row = next(row for row in rows if (row["trace"], row["position"]) == (trace, position))
    row[column] = value


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


# -- texts of tokens --------------------------------------------------------------------------------------------------


def test_byte_level_and_sentencepiece_spellings_are_turned_back() -> None:
    byte_level = Vocabulary(dict(enumerate(["Ġthe", "Ċ", "Ã©", "âĤ", "<|end|>", "Ġ"])), "vocabulary", padded=False)
    assert [byte_level.text(id) for id in range(6)] == [" the", "\n", "é", "\\xe2\\x82", "<|end|>", " "]
    pieces = Vocabulary(dict(enumerate(["▁the", "<0x0A>", "a", "<0xE2>"])), "vocabulary", padded=False)
    assert [pieces.text(id) for id in range(4)] == [" the", "\n", "a", "\\xe2"]
    plain = Vocabulary(dict(enumerate([" the", "\n", "<0x0A>"])), "vocabulary", padded=False)
    assert [plain.text(id) for id in range(3)] == [" the", "\n", "<0x0A>"]


def test_a_tokenizers_folder_names_the_tokens(pairs: Path) -> None:
    meta = json.loads((pairs / "meta.json").read_text())
    words = meta.pop("vocabulary")
    (pairs / "tok").mkdir()
    vocabulary = {word: id for id, word in enumerate(words) if id}
    described = {"model": {"vocab": vocabulary}, "added_tokens": [{"id": 0, "content": words[0]}]}
    (pairs / "tok" / "tokenizer.json").write_text(json.dumps(described))
    (pairs / "meta.json").write_text(json.dumps(meta | {"tokenizer": "tok"}))
    assert open_folder(pairs).vocabulary.text(0) == "<eos>"
    # A model has more logits than its tokenizer has tokens: such an id may be probable, but nobody can have said it.
    rewrite(pairs, "tokens.parquet", lambda rows: set_token(rows, "top_BF16", [31, 1, 2, 3, 4]))
    index = index_of(build_page(pairs).text)
    assert pieces_of(index)[31] == "<31>"
    rewrite(pairs, "tokens.parquet", lambda rows: set_token(rows, "token", 31))
    with pytest.raises(ReqatError, match="token id 31 is not in the tokenizer tok of 30 tokens"):
        build_page(pairs)


# -- colours ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_text_can_be_read_on_every_step(theme: str) -> None:
    for name, (background, text) in colours.scales(theme).items():
        assert colours.contrast(background, text) >= 4.5, name


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_more_is_always_further_from_the_paper(theme: str) -> None:
    look = colours.THEMES[theme]
    for arm in (look["entropy"], (look["entropy"][0], *look["less"]), (look["entropy"][0], *look["more"])):
        lightness = [colours.luminance(colour) for colour in arm]
        assert lightness == sorted(lightness, reverse=theme == "light")
        assert len(set(lightness)) == len(arm)
    assert len(look["entropy"]) == len(colours.ENTROPY_EDGES) + 1
    assert len(look["less"]) == len(look["more"]) == len(colours.CHANGE_EDGES)


# -- the verb ---------------------------------------------------------------------------------------------------------


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
