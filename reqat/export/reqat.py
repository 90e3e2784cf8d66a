"""reqat's own folder: what :func:`reqat.models.save_model` writes for a frozen model, with every option of a precision.

Dense weights for everyone, codes and scales in the sidecar; :func:`reqat.load_model`, ``prepare`` and ``pack`` bring
them back bit for bit.
"""

from __future__ import annotations

from pathlib import Path

from reqat.export._exporter import Exporter, Frozen
from reqat.models.pretrained import write_pretrained


def write(frozen: Frozen, folder: Path) -> None:
    """Write model, sidecar and tokenizer."""
    write_pretrained(frozen.model, folder)
    if frozen.tokenizer is not None:
        frozen.tokenizer.save_pretrained(folder)


EXPORTER = Exporter(write, families=None)
