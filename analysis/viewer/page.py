"""Puts the page together: one problem and seed is one entry, with all traces that answer it.

A lone trace (the same tokens read by every precision) is shown once for each precision; it parts where their most
probable tokens first differ. Two traces of a problem (each precision sampled its own) are shown beside each other;
they part at the first token that differs. What the list is sorted and filtered by is computed here, so that the page
unpacks nothing before it is looked at.

The same folder gives the same bytes: no date, no path of this machine beyond what ``meta.json`` holds.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from analysis.viewer import colours, encode
from analysis.viewer.folder import Folder, Tokens, Trace, TraceError, open_folder
from reqat.config.errors import ReqatError, unknown
from reqat.config.targets import is_page, making_file

# Opens at once and can be mailed. More than this is said, not refused.
COMFORTABLE_BYTES = 15_000_000
# As in viewer.js: characters that draw nothing or turn around what follows them are shown by their number.
_HIDDEN = re.compile("[\x00-\x1f\x7f-\x9f\xad\u061c\u180e\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb]")


@dataclass(frozen=True)
class Page:
    """A finished page: its text, how much is in it, and what was left out of it as damaged."""

    text: bytes
    n_problems: int
    n_traces: int
    n_tokens: int
    left_out: tuple[str, ...]


@dataclass
class _Seen:
    """What is kept of a trace once it is packed."""

    trace: Trace
    token: NDArray[np.int32]
    blob: str
    parts: int  # first position where the most probable tokens of two precisions differ; -1: nowhere
    change: float  # largest change of entropy against the reference, nats


def write_page(folder: Path | str, out: Path | str, *, overwrite: bool = False, **options: Any) -> Page:
    """Build the page of a folder (see :func:`build_page`) and write it to ``out``, whole or not at all.

    Only a page of ours is replaced there, and only with ``overwrite``. Raises `ReqatError` otherwise, or if the file
    cannot be written.
    """
    out = Path(out)
    with making_file(out, is_page, replace=overwrite) as write:
        page = build_page(folder, **options)
        write(page.text)
    return page


def build_page(
    folder: Path | str,
    *,
    title: str | None = None,
    limit: int | None = None,
    family: str | None = None,
    floor: float = encode.FLOOR,
    keep_going: bool = False,
    warn: Callable[[str], None] = lambda line: print(line, file=sys.stderr),
) -> Page:
    """The page of a folder of token traces.

    Args:
        folder: holds ``tokens.parquet``, ``traces.parquet`` and ``meta.json``.
        title: the page's heading; None makes one of the labels.
        limit: the first so many problems (a problem with two seeds counts twice); None takes all.
        family: problems of one task family only.
        floor: probabilities below this are left out of the lists of most probable tokens, but for the first.
        keep_going: leave out damaged traces instead of refusing the folder; each is named through ``warn``.
        warn: what happens with a line about a trace that was left out.

    Raises:
        FileNotFoundError: for a file that is missing.
        ReqatError: for a folder that is missing, a damaged file, a trace with an impossible number (the message
            names it), or nothing to show.
    """
    if limit is not None and limit < 1:
        raise ReqatError(f"limit={limit} leaves nothing to show; give at least 1, or leave it out")
    if not 0 <= floor <= 1:
        raise ReqatError(f"floor={floor} is no probability; give a number between 0 and 1, such as {encode.FLOOR}")
    opened = open_folder(Path(folder))
    title = f"Token traces: {' and '.join(opened.labels)}" if title is None else title
    groups = _groups(opened, limit, family)
    wanted = {number for numbers in groups.values() for number in numbers}
    seen, used, left_out = _pack(opened, wanted, floor, keep_going, warn)
    items: list[dict[str, Any]] = []
    traces: list[dict[str, Any]] = []
    blobs: list[str] = []
    responses: list[str | None] = []  # where the tokens do not spell it: letters of several tokens
    for (problem, seed), numbers in groups.items():
        members = sorted((seen[n] for n in numbers if n in seen), key=lambda kept: _place(kept.trace, opened.labels))
        if not members:
            continue
        first = members[0].trace
        items.append(
            {
                "p": problem,
                "f": first.family,
                "s": seed,
                "q": first.prompt,
                "a": first.answer,
                "t": list(range(len(traces), len(traces) + len(members))),
                "o": _outcome(members),
                "d": _parting(members),
                "m": round(max(kept.change for kept in members), 4),
            }
        )
        for kept in members:
            trace = kept.trace
            graded = None if trace.correct is None else int(trace.correct)
            about = {"i": trace.number, "s": trace.source, "c": graded, "e": int(trace.finished)}
            traces.append(about | {"n": len(kept.token)})
            blobs.append(kept.blob)
            spelled = "".join(opened.vocabulary.text(id) for id in kept.token.tolist())
            responses.append(None if trace.response in spelled else trace.response)
    if not items:
        raise ReqatError(f"{folder}: no trace left to show; " + "; ".join(left_out[:3]))
    index = {
        "schema": "reqat.viewer/1",
        "title": title,
        "labels": list(opened.labels),
        "width": _width(opened),
        "floor": floor,
        "entropyEdges": colours.ENTROPY_EDGES,
        "changeEdges": colours.CHANGE_EDGES,
        "about": opened.about,
        "leftOut": left_out,
        "pieces": _packed(
            {"steps": np.diff(used, prepend=0).tolist(), "texts": [opened.vocabulary.text(id) for id in used]}
        ),
        "items": items,
        "traces": traces,
        "responses": _packed(responses),
    }
    n_tokens = sum(trace["n"] for trace in traces)
    text = _assemble(title, encode.as_json(index), encode.as_json(blobs))
    return Page(text, len(items), len(traces), n_tokens, tuple(left_out))


def _packed(value: Any) -> str:
    return encode.pack([json.dumps(value, ensure_ascii=False).encode("utf-8", "backslashreplace")])


def _groups(opened: Folder, limit: int | None, family: str | None) -> dict[tuple[str, int], list[int]]:
    """Traces of each problem and seed, in the folder's order."""
    families = {trace.family for trace in opened.traces.values()}
    if family is not None and family not in families:
        raise unknown("family", family, families, str(opened.path))
    groups: dict[tuple[str, int], list[int]] = {}
    for trace in opened.traces.values():
        if family is None or trace.family == family:
            groups.setdefault((trace.problem, trace.seed), []).append(trace.number)
    return dict(list(groups.items())[:limit])


def _width(opened: Folder) -> int:
    """Bytes of an id. Models pad their vocabulary, never to twice its size; a byte that is always 0 costs nothing."""
    return encode.width_of(2 * opened.vocabulary.size)


def _pack(
    opened: Folder, wanted: set[int], floor: float, keep_going: bool, warn: Callable[[str], None]
) -> tuple[dict[int, _Seen], list[int], list[str]]:
    """Every wanted trace packed, the ids that need a text, and what was left out."""
    width = _width(opened)
    seen: dict[int, _Seen] = {}
    used: set[int] = set()
    left_out: list[str] = []

    def leave_out(error: ReqatError) -> None:
        left_out.append(str(error))
        warn(f"left out: {error}")

    for trace, tokens in opened.read(wanted, leave_out if keep_going else None):
        if isinstance(tokens, TraceError):
            if not keep_going:
                raise tokens
            leave_out(tokens)
            continue
        data, ids = encode.encode(tokens, opened.labels, width, floor)
        if len(ids) and int(ids[-1]) >= 1 << (8 * width):
            raise ReqatError(f"{trace}: token id {ids[-1]} is far beyond the {opened.vocabulary}")
        used.update(ids.tolist())
        parts, change = _differences(tokens, opened.labels)
        seen[trace.number] = _Seen(trace, tokens.token, encode.pack(data), parts, change)
    return seen, sorted(used), left_out


def _differences(tokens: Tokens, labels: Sequence[str]) -> tuple[int, float]:
    """Where the most probable tokens first differ (-1: nowhere), and the largest change of entropy."""
    reference, parts, change = tokens.by_label[labels[0]], -1, 0.0
    for label in labels[1:]:
        other = tokens.by_label[label]
        differs = np.flatnonzero(other.best != reference.best)
        if len(differs):
            parts = int(differs[0]) if parts < 0 else min(parts, int(differs[0]))
        if len(other.entropy):
            change = max(change, float(np.abs(other.entropy - reference.entropy).max()))
    return parts, change


def _place(trace: Trace, labels: Sequence[str]) -> tuple[int, int]:
    """Order of traces within a problem: as the labels are, the reference first."""
    return (labels.index(trace.source) if trace.source in labels else len(labels), trace.number)


def _parting(members: Sequence[_Seen]) -> int:
    """Position where the traces of a problem part; -1 where they never do. One that ends earlier parts there."""
    if len(members) == 1:
        return members[0].parts
    first, found = members[0].token, []
    for other in (kept.token for kept in members[1:]):
        shared = min(len(first), len(other))
        differs = np.flatnonzero(first[:shared] != other[:shared])
        if len(differs):
            found.append(int(differs[0]))
        elif len(first) != len(other):
            found.append(shared)
    return min(found, default=-1)


def _outcome(members: Sequence[_Seen]) -> str:
    """In words, as the filter shows it."""
    graded = [bool(kept.trace.correct) for kept in members]
    if any(kept.trace.correct is None for kept in members):
        return "not graded"
    if len(members) == 1:
        return "right" if graded[0] else "wrong"
    if len(members) == 2:
        if graded[0] == graded[1]:
            return "both right" if graded[0] else "both wrong"
        return f"only {members[0 if graded[0] else 1].trace.source} right"
    if all(graded) or not any(graded):
        return "all right" if graded[0] else "all wrong"
    return f"{members[0].trace.source} right, not all others" if graded[0] else f"{members[0].trace.source} wrong"


def _assemble(title: str, index: str, blobs: str) -> bytes:
    """Fill the template. The policy names the page's own script and style by their digests: no other ever runs."""
    files = resources.files("analysis.viewer")
    template, style, script = (
        files.joinpath(f"viewer.{kind}").read_text(encoding="utf-8") for kind in ("html", "css", "js")
    )
    style = f"\n{colours.css()}{style}"
    script = f"\n{script}"

    def digest(text: str) -> str:
        return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode("ascii")

    policy = f"default-src 'none'; script-src '{digest(script)}'; style-src '{digest(style)}'; img-src data:"
    filled = {
        "title": html.escape(_HIDDEN.sub(lambda match: f"[U+{ord(match[0]):04X}]", title)),
        "policy": policy,
        "style": style,
        "script": script,
        "index": index,
        "blobs": blobs,
    }
    # In one pass: nothing that was put in is looked at again.
    page = re.sub(r"\{\{(\w+)\}\}", lambda match: filled[match[1]], template)
    return page.encode("utf-8", "backslashreplace")
