"""Sources from packages: found, checked, prepared; on packages that are written here."""

from __future__ import annotations

import dataclasses
import gzip
import json
import struct
import zlib
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from reqat.config.errors import MissingFileError, ReqatError
from reqat.config.files import sha256
from reqat.data import packaged
from reqat.data.packaged import austen, brown, digest_of, fashion_mnist, minilm, spam_assassin


def installed(module: ModuleType, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a module look for its package in `folder`, and expect the files that are there."""
    monkeypatch.delenv(module.PACKAGE.variable, raising=False)
    files = {}
    for name in module.PACKAGE.files:
        found = sorted(folder.glob(name))
        files[name] = digest_of(found, folder) if "*" in name or "[" in name else sha256(found[0])
    monkeypatch.setattr(module, "PACKAGE", dataclasses.replace(module.PACKAGE, files=files, places=lambda: [folder]))


def idx(path: Path, array: np.ndarray) -> None:
    head = struct.pack(f">{1 + array.ndim}I", 2048 + array.ndim, *array.shape)
    path.write_bytes(gzip.compress(head + array.tobytes()))


def test_fashion_mnist(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng, made = np.random.default_rng(0), {}
    monkeypatch.setattr(fashion_mnist, "_SPLITS", {"train": ("train", 5), "test": ("t10k", 3)})
    for split, (stem, count) in fashion_mnist._SPLITS.items():
        made[split] = rng.integers(0, 256, (count, 28, 28), np.uint8), rng.integers(0, 10, count, np.uint8)
        idx(tmp_path / f"{stem}-images-idx3-ubyte.gz", made[split][0])
        idx(tmp_path / f"{stem}-labels-idx1-ubyte.gz", made[split][1])
    installed(fashion_mnist, tmp_path, monkeypatch)
    out = tmp_path / "out"
    out.mkdir()
    packaged.prepare("fashion-mnist", out)
    for split, (images, labels) in made.items():
        ours = fashion_mnist.load(out, split)
        assert np.array_equal(ours[0], images) and np.array_equal(ours[1], labels)

    idx(tmp_path / "t10k-labels-idx1-ubyte.gz", np.array([1, 10, 2], np.uint8))
    with pytest.raises(ReqatError, match="t10k-labels.*sha256"):
        packaged.prepare("fashion-mnist", out)
    installed(fashion_mnist, tmp_path, monkeypatch)
    with pytest.raises(ReqatError, match="10 classes"):
        packaged.prepare("fashion-mnist", out)
    (tmp_path / "t10k-labels-idx1-ubyte.gz").write_bytes(b"\x1f\x8b, and no more")
    installed(fashion_mnist, tmp_path, monkeypatch)
    with pytest.raises(ReqatError, match="not a whole gzip"):
        packaged.prepare("fashion-mnist", out)


def record(lines: list[str], version: int = 3) -> bytes:
    """A record of R's lazy-load files, written by its definition."""
    encoding = struct.pack(">I", 5) + b"UTF-8" if version == 3 else b""
    body = b"X\n" + struct.pack(">3I", version, 0x040201, 0x030500) + encoding + struct.pack(">2I", 16, len(lines))
    for line in lines:
        body += struct.pack(">2I", 0x00040009, len(line.encode())) + line.encode()
    return struct.pack(">I", len(body)) + zlib.compress(body)


def test_austen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    novels = {title: ["", title.upper().replace("-", " "), "", "One", "line.", "", "é"] for title in austen.TITLES}
    (tmp_path / "data").mkdir()
    path = tmp_path / "data" / "Rdata.rdb"
    path.write_bytes(b"".join(record(lines, 2 + i % 2) for i, lines in enumerate(novels.values())))
    installed(austen, tmp_path, monkeypatch)
    out = tmp_path / "out"
    out.mkdir()
    packaged.prepare("austen", out)
    assert {file.stem for file in out.iterdir()} == set(austen.TITLES)
    assert austen.load(out, "emma").split("\n") == ["EMMA", "One line.", "é"]

    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(ReqatError, match="no whole record"):
        austen.records(path)
    path.write_bytes(record(["Only this"]))
    installed(austen, tmp_path, monkeypatch)
    with pytest.raises(ReqatError, match="only-this"):
        packaged.prepare("austen", out)


def test_brown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "\n\n\tThe/at jury/nn said/vbd ``/`` no/at ''/'' ,/, and/cc 1\\/2/cd ./.\n\n\tWhy/wrb ?/. ?/.\n"
    (tmp_path / "ca01").write_text(text)
    (tmp_path / "cr09").write_text("\tA/at\n")
    (tmp_path / "cats.txt").write_text("ca01 news\ncr09 humor\n")
    monkeypatch.setattr(brown, "TEXTS", 2)
    installed(brown, tmp_path, monkeypatch)
    out = tmp_path / "out"
    out.mkdir()
    packaged.prepare("brown", out)
    first, second = brown.load(out)
    assert (first["id"], first["genre"], second["genre"]) == ("ca01", "news", "humor")
    assert first["sentences"][0][-2:] == [["1\\/2", "cd"], [".", "."]]
    assert brown.written(first["sentences"][0]) == 'The jury said "no", and 1\\/2.'
    assert brown.written(first["sentences"][1]) == "Why?"

    (tmp_path / "cr09").write_text("\tA\n")
    installed(brown, tmp_path, monkeypatch)
    with pytest.raises(ReqatError, match="cr09.*'A'"):
        packaged.prepare("brown", out)


@pytest.mark.parametrize(
    ("words", "text"),
    [
        ("( a ) , b ; ; c", "(a), b; c"),
        ("`` a ? ? '' he said : `` b '' !", '"a?" he said: "b"!'),
        ("$ 5 to Jr. . .", "$ 5 to Jr."),
        ("o'clock ' -- it's", "o'clock' -- it's"),
    ],
)
def test_words_of_the_brown_corpus_as_they_are_printed(words: str, text: str) -> None:
    assert brown.written([(word, "x") for word in words.split()]) == text.replace("$ 5", "$5")


def test_spam_assassin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mails = {
        "easy-ham-1/00001.a": "From: server\nSubject: secret\n\nHello  there\n",
        "hard-ham-1/00001.b": "Content-Type: text/html\n\n<style>x</style><p>1 &lt; 2</p><!-- no -->\n",
        "spam-1/00001.c": "Received: x\n\nHello there",  # as the first: kept once
        "spam-2/00002.d": "Content-Type: text/plain; charset=no-such\n\nBuy caf\u00e9\n",
    }
    for name, mail in mails.items():
        path = tmp_path / "data" / f"{name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"id": name, "text": mail}))
    (tmp_path / "data" / "file_list.json").write_text("[]")
    installed(spam_assassin, tmp_path, monkeypatch)
    out = tmp_path / "out"
    out.mkdir()
    packaged.prepare("spam-assassin", out)
    rows = [(row["id"], row["label"]) for row in spam_assassin.load(out)]
    assert rows == [("easy-ham-1/00001", 0), ("hard-ham-1/00001", 0), ("spam-2/00002", 1)]
    texts = [row["text"] for row in spam_assassin.load(out)]
    assert texts[:2] == ["Hello there", "1 < 2"] and texts[2].startswith("Buy caf")


def test_a_package_is_looked_for_where_it_may_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = dataclasses.replace(minilm.PACKAGE, files={"model.safetensors": "0" * 64}, places=lambda: [tmp_path])
    monkeypatch.delenv(package.variable, raising=False)
    with pytest.raises(MissingFileError, match=r"pip install.*REQAT_MINILM"):
        package.find()
    (tmp_path / "model.safetensors").write_text("here")
    assert package.find() == tmp_path
    deep = tmp_path / "unpacked" / "some" / "where"
    deep.mkdir(parents=True)
    with pytest.raises(MissingFileError, match="unpacked"):
        package.find(tmp_path / "unpacked")
    (deep / "model.safetensors").write_text("there")
    assert package.find(tmp_path / "unpacked") == deep
    monkeypatch.setenv(package.variable, str(tmp_path / "no"))
    with pytest.raises(MissingFileError, match="REQAT_MINILM="):
        package.find(tmp_path / "unpacked")


def test_every_source_says_where_it_comes_from() -> None:
    for name in packaged.names():
        package = packaged.package_of(name)
        assert package.name == name and package.install and package.licence and list(package.places()) is not None
        assert all(len(digest) in (0, 64) for digest in package.files.values())
    with pytest.raises(ReqatError, match="brown"):
        packaged.package_of("bronw")
