"""A base that is a local folder: its files are the outputs of its stage, as those of a trained one are."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from reqat.config import Paths, ReqatError
from reqat.config.stage import BaseSettings
from reqat.pipeline.jobs import link_base
from reqat.records import record


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "models" / "mine"
    (folder / "additional_chat_templates").mkdir(parents=True)
    for name in (
        "config.json",
        "tokenizer.json",
        "model.safetensors",
        "additional_chat_templates/tool.jinja",
        "notes.md",
    ):
        (folder / name).write_text(name)
    return folder


def linked(tmp_path: Path, folder: str) -> Path:
    """The finished stage of a base in `models/<folder>`."""
    out, partial = tmp_path / "build" / "stages" / folder, tmp_path / "build" / "partial" / folder
    settings = BaseSettings(name="m", source="path", reference=folder)
    paths = Paths(tmp_path, build=tmp_path / "build", models=tmp_path / "models")
    with record.job("base", f"base-{folder}", {}, root=tmp_path, out=out, partial=partial) as job:
        link_base(settings, paths, job.partial)
    return out


def test_its_files_are_in_the_record(tmp_path: Path, model: Path) -> None:
    out = linked(tmp_path, "mine")
    read = {"config.json", "tokenizer.json", "model.safetensors", "additional_chat_templates/tool.jinja"}
    assert {name.removeprefix("model/") for name in record.read(out)["outputs"]} == read
    assert all((out / "model" / name).read_text() == name for name in read)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "additional_chat_templates/tool.jinja"])
def test_another_model_behind_it_is_found_out(tmp_path: Path, model: Path, name: str) -> None:
    out = linked(tmp_path, "mine")
    record.verify(out)
    (model / name).write_text(name[::-1])  # as long as it was
    with pytest.raises(ReqatError, match=os.path.basename(name)):
        record.verify(out)


def test_two_models_are_told_apart_by_what_reads_them(tmp_path: Path, model: Path) -> None:
    other = model.with_name("other")
    other.mkdir()
    (other / "config.json").write_text("another")
    first, second = (record.outputs_digest(record.read(linked(tmp_path, name))) for name in ("mine", "other"))
    assert first != second


def test_no_model_is_an_error_that_names_the_folder(tmp_path: Path) -> None:
    (tmp_path / "models" / "empty").mkdir(parents=True)
    with pytest.raises(ReqatError, match="empty"):
        linked(tmp_path, "empty")
