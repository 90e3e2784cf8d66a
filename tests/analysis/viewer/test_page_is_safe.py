"""The page of the trace viewer: nothing that models wrote can run in it, and nothing is fetched."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from pathlib import Path

from analysis.viewer import build_page
from tests.analysis.viewer import trace_folders as folders
from tests.analysis.viewer.read_pages import (
    Scripts,
    pieces_of,
    responses_of,
)

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
