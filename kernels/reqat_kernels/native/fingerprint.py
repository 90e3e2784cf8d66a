"""What the native library was built from: it carries this digest of its sources, and a stale one is refused.

Only the standard library here: setup.py runs this file before anything is installed.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

FOLDER = Path(__file__).resolve().parent


def sources() -> list[Path]:
    """The C++ files, in order."""
    return sorted([*FOLDER.glob("*.cpp"), *FOLDER.glob("*.h")])


def fingerprint() -> str:
    """Sixteen hexadecimal digits that change with any of the sources."""
    digest = hashlib.sha256()
    for file in sources():
        digest.update(file.name.encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()[:16]
