"""Six novels by Jane Austen, in the public domain: running English of one author, 4.5 million characters.

The package is one of R's, whose data lie in a lazy-load file: records of four bytes (the length of what follows once
decompressed, big-endian) and a zlib stream, which holds one R object in XDR. Each record here is a vector of strings,
a line of a novel each. Prepared: `<title>.txt`, UTF-8.
"""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

from reqat.config.errors import ReqatError
from reqat.config.files import read_text, write_file
from reqat.data.packaged import Package, debian

TITLES = ("emma", "mansfield-park", "northanger-abbey", "persuasion", "pride-and-prejudice", "sense-and-sensibility")
# Of R's serialization (R Internals, chapter "Serialization Formats"): a vector of strings, and one string.
_STRINGS, _STRING, _VERSION_WITH_ENCODING = 16, 9, 3
_NO_STRING = 0xFFFFFFFF

PACKAGE = Package(
    name="austen",
    files={"data/Rdata.rdb": "8fb5198960d0da724b1562f96e4221e5c1b41ff455000280b02c55980c3d8f21"},
    places=debian("/usr/lib/R/site-library/janeaustenr", "/usr/local/lib/R/site-library/janeaustenr"),
    install="sudo apt install r-cran-janeaustenr",
    licence="public domain (the package: MIT)",
)


def prepare(out: Path, given: Path | None = None) -> None:
    """Write a text file a novel into `out`. Raises `ReqatError` if the package is missing or damaged."""
    path = PACKAGE.checked(given) / "data" / "Rdata.rdb"
    novels = {}
    for lines in records(path):
        title = next(line for line in lines if line.strip()).strip().lower().replace(" ", "-")
        novels[title] = "\n".join(lines) + "\n"
    if sorted(novels) != sorted(TITLES):
        raise ReqatError(f"{path}: it holds {', '.join(sorted(novels))}; {', '.join(TITLES)} are needed.")
    for title, text in novels.items():
        write_file(out / f"{title}.txt", text)


def load(folder: Path, title: str) -> str:
    """One novel (of `TITLES`) of a prepared folder, its lines joined to paragraphs."""
    text = read_text(folder / f"{title}.txt", "novel", "prepare the source again: reqat source austen --force")
    return "\n".join(" ".join(paragraph.split()) for paragraph in text.split("\n\n") if paragraph.strip())


def records(path: Path) -> list[list[str]]:
    """The vectors of strings in a lazy-load file, in its order. Raises `ReqatError` for anything else in it."""
    data, at, found = path.read_bytes(), 0, []
    while at < len(data):
        stream = zlib.decompressobj()
        try:
            (length,) = struct.unpack_from(">I", data, at)
            content = stream.decompress(data[at + 4 :])
            whole = stream.eof and len(content) == length
        except (zlib.error, struct.error):
            whole = False
        if not whole:
            raise ReqatError(f"{path}: no whole record at byte {at}; install the package again.")
        found.append(_strings(content, f"{path}, record at byte {at}"))
        at = len(data) - len(stream.unused_data)
    return found


def _strings(content: bytes, where: str) -> list[str]:
    try:
        marks = content[:2], struct.unpack_from(">I", content, 2)[0]
        at = 14  # behind b"X\n", the version of the format, that of R, and the oldest R that reads it
        if marks == (b"X\n", _VERSION_WITH_ENCODING):
            at += 4 + int(struct.unpack_from(">I", content, at)[0])
        flags, count = struct.unpack_from(">II", content, at)
        if marks[0] != b"X\n" or flags & 0xFF != _STRINGS:
            raise ReqatError(f"{where}: no vector of strings; install the package again.")
        at, lines = at + 8, []
        for _ in range(count):
            flags, length = struct.unpack_from(">II", content, at)
            at += 8
            if flags & 0xFF != _STRING or (length != _NO_STRING and at + length > len(content)):
                raise ReqatError(f"{where}: no string at byte {at}; install the package again.")
            length = 0 if length == _NO_STRING else length
            lines.append(content[at : at + length].decode("utf-8"))
            at += length
    except (struct.error, UnicodeDecodeError) as error:
        raise ReqatError(f"{where}: not whole ({error}); install the package again.") from None
    return lines
