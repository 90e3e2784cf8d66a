"""Ways to damage a file of the material: functions that take its folder."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any


def torch_module() -> Any:
    import torch

    return torch


def first_weight(tensors: dict[str, Any]) -> str:
    return next(name for name in sorted(tensors) if name.endswith("down_proj.weight"))


def entries(name: str, change: dict[str, Any]) -> Callable[[Path], None]:
    """Replace entries of a JSON file."""

    def prepare(folder: Path) -> None:
        path = folder / name
        data = json.loads(path.read_text(encoding="utf-8")) | change
        path.write_text(json.dumps(data), encoding="utf-8")

    return prepare


def contents(name: str, data: bytes | None, also: Callable[[Path], None] | None = None) -> Callable[[Path], None]:
    """Other contents of a file, or (None) none of it."""

    def prepare(folder: Path) -> None:
        if also is not None:
            also(folder)
        (folder / name).unlink(missing_ok=True)
        if data is not None:
            (folder / name).write_bytes(data)

    return prepare


def rewritten(name: str, change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    """A file's bytes, changed."""

    def prepare(folder: Path) -> None:
        (folder / name).write_bytes(change((folder / name).read_bytes()))

    return prepare


def flip_last(data: bytes) -> bytes:
    return data[:-1] + bytes([data[-1] ^ 0x11])


def folder_for(name: str) -> Callable[[Path], None]:
    """A folder in place of a file."""

    def prepare(folder: Path) -> None:
        (folder / name).unlink()
        (folder / name).mkdir()

    return prepare


def pickled(folder: Path) -> None:
    (folder / "model/model.safetensors").rename(folder / "model/pytorch_model.bin")


def index_file(index: Any) -> Callable[[Path], None]:
    """Weights by an index, in place of one file; it may name one outside of the folder."""

    def prepare(folder: Path) -> None:
        shutil.copyfile(folder / "model/model.safetensors", folder / "outside.safetensors")
        (folder / "model/model.safetensors").unlink()
        (folder / "model/model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")

    return prepare


def tensors(
    change: Callable[[dict[str, Any]], dict[str, Any]], name: str = "model/model.safetensors"
) -> Callable[[Path], None]:
    """Other tensors in a safetensors file, with its metadata."""

    def prepare(folder: Path) -> None:
        from safetensors import safe_open
        from safetensors.torch import load_file, save_file

        with safe_open(folder / name, "pt") as file:
            metadata = file.metadata()
        save_file(change(load_file(folder / name)), folder / name, metadata)

    return prepare


def with_tensor(tensors: dict[str, Any], what: str, change: Callable[[Any], Any]) -> dict[str, Any]:
    """The tensors with ``change`` at the first one called ``what``."""
    name = next(name for name in sorted(tensors) if name.rsplit(".", 1)[-1] == what)
    return {**tensors, name: change(tensors[name])}


def filled(byte: int) -> Callable[[Any], Any]:
    def change(scales: Any) -> Any:
        torch = torch_module()
        changed = scales.view(torch.uint8).clone()
        changed.view(-1)[0] = byte
        return changed.view(scales.dtype)

    return change


def more_tokens(folder: Path) -> None:
    path = folder / "model/tokenizer.json"
    data = json.loads(path.read_text(encoding="utf-8"))
    data["model"]["vocab"] = {token: i + (1000 if token == "So" else 0) for token, i in data["model"]["vocab"].items()}
    path.write_text(json.dumps(data), encoding="utf-8")


def chat_template(template: str) -> Callable[[Path], None]:
    def prepare(folder: Path) -> None:
        entries("model/tokenizer_config.json", {"chat_template": template})(folder)
        (folder / "model/chat_template.jinja").write_text(template, encoding="utf-8")

    return prepare


def stored_trace(change: dict[str, Any]) -> Callable[[Path], None]:
    """Change the first trace, and the manifest along with it, as whoever writes a store of their own would."""

    def prepare(folder: Path) -> None:
        import hashlib

        path, manifest = folder / "store/train.jsonl", folder / "store/manifest.json"
        lines = path.read_bytes().splitlines()
        lines[0] = json.dumps(json.loads(lines[0]) | change).encode()
        data = b"".join(line + b"\n" for line in lines)
        path.write_bytes(data)
        stated = json.loads(manifest.read_text(encoding="utf-8"))
        stated["files"]["train"] |= {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
        manifest.write_text(json.dumps(stated), encoding="utf-8")

    return prepare


def without_column(column: str) -> Callable[[Path], None]:
    def prepare(folder: Path) -> None:
        import pyarrow.parquet as pq

        path = folder / "traces/tokens.parquet"
        table = pq.read_table(path)
        pq.write_table(table.drop_columns([column]), path)

    return prepare
