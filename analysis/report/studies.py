"""From finished studies to tables and figures: which studies there are, and which function draws what of them.

A study (`reqat.config.studies`) is a folder with a record and what was measured. Whoever draws gets the studies of a
tier by kind, as a list (a tier may ask for two of one kind, such as routing at two thresholds, in the order of
`config/studies.yaml`), and reads nothing but their folders. `MAKERS` says which function makes which file; a figure
exists where the tier has every kind of study that it needs (`analysis.registry`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import Any

import pandas as pd

from analysis.registry import study_names
from analysis.report.document import EMPTY, Column, Table, Text
from reqat.config.base import digest, parse
from reqat.config.errors import MissingFileError, ReqatError
from reqat.config.files import explain, read_json, read_json_list
from reqat.config.studies import PlannedStudy
from reqat.records import record

STUDIES = "studies.json"
# File stem -> "module:function". Each takes the studies by kind and returns a Table, or a matplotlib Figure.
MAKERS = {
    "studies": "analysis.report.studies:overview",
    "figure2": "analysis.figures.figure2:figure2",
    "figure4": "analysis.figures.figure4:figure4",
    "figure7": "analysis.figures.figure4:figure7",
    "figure8": "analysis.figures.figure2:figure8",
    "figure9": "analysis.figures.figure2:figure9",
    "reset": "analysis.tables.reset:build",
}
ByKind = Mapping[str, Sequence["Study"]]


@dataclass(frozen=True)
class Study:
    """A finished study as tables and figures read it."""

    id: str
    kind: str
    name: str
    """As in `config/studies.yaml`; the kind where it has none."""
    path: Path
    """Its folder."""
    record: dict[str, Any]
    """`record.json`; besides, `settings`: those of the study, `recipes` and `precisions` (by role, the first role
    first), `tier`, and what was measured before it began (`threshold_nats`, `tau0`)."""

    @property
    def settings(self) -> dict[str, Any]:
        """What was asked for."""
        return dict(self.record["settings"])

    @property
    def metrics(self) -> dict[str, Any]:
        """What the record says was found."""
        return dict(self.record["metrics"])

    @property
    def seeds(self) -> list[int]:
        """Sampling seeds."""
        return list(self.record["seeds"])

    @cached_property
    def conditions(self) -> pd.DataFrame:
        """One row a graded condition (`summary.json`): condition, decoding, accuracy, lo, hi, problems, seeds, ...

        Raises `ReqatError` if the study grades none.
        """
        path = self.path / "summary.json"
        if not path.is_file():
            raise ReqatError(f"{self.path}: a study of kind {self.kind} grades no conditions; it has no {path.name}.")
        rows = read_json_list(path, "summary of conditions", self._remedy)
        if not rows or not all(isinstance(row, dict) for row in rows):
            raise ReqatError(f"{path}: not a summary of conditions, its entries are no objects; {self._remedy}.")
        return pd.DataFrame(rows)

    @property
    def _remedy(self) -> str:
        return f"run the study again (reqat study {self.id} --force)"

    def table(self, name: str) -> pd.DataFrame:
        """`tables/<name>.csv` or `<name>.csv`. Raises `ReqatError` naming the file if there is none."""
        for path in (self.path / "tables" / f"{name}.csv", self.path / f"{name}.csv"):
            if path.is_file():
                try:
                    return pd.read_csv(path, keep_default_na=False, na_values=[""])
                except OSError as error:
                    raise explain(error, path) from error
                except ValueError as error:  # empty, no table, not UTF-8
                    raise ReqatError(f"{path}: not a table ({error}); {self._remedy}.") from None
        raise ReqatError(f"{self.path}: no {name}.csv in it; {self._remedy}.")


def load_studies(
    planned: Mapping[str, PlannedStudy],
    source: Path,
    *,
    pinned: bool = False,
    stages: Mapping[str, str] | None = None,
) -> list[Study]:
    """The studies of a plan under `source` (which holds one folder a study), in the plan's order.

    With `pinned`, of each study the files that `reqat pin-studies` kept. `stages` are the stages that lie there now,
    id -> digest of its outputs (`reqat.records.record.outputs_digest`). Raises `ReqatError` that names the study that
    is missing, not whole or made from another stage than that, and the command that makes it.
    """
    return [load_study(study, Path(source) / study.id, pinned=pinned, stages=stages) for study in planned.values()]


def load_study(
    study: PlannedStudy, folder: Path, *, pinned: bool = False, stages: Mapping[str, str] | None = None
) -> Study:
    """One finished study. Raises `ReqatError` as `load_studies`."""
    if not (folder / record.FILE).is_file():
        raise ReqatError(f"{folder}: study {study.settings.label} is not there; `reqat study {study.id}` makes it.")
    found = record.read(folder)
    if pinned:
        if "pinned_outputs" not in found:
            raise ReqatError(f"{folder / record.FILE}: says nothing of pinned files; restore it from git.")
        for name, entry in found["pinned_outputs"].items():
            if not (folder / name).is_file() or record.sha256(folder / name) != entry["sha256"]:
                raise ReqatError(f"{folder / name} is not the file that was pinned; restore it from git.")
    else:
        record.verify(folder, id=study.id, deep=False)
    try:
        record.check_inputs(folder, found, stages or {})
    except ReqatError as error:
        raise ReqatError(f"{error} Run the study again: reqat study {study.id} --tier {found.get('tier')}.") from None
    if found["id"] != study.id or digest(parse(PlannedStudy, found["config"], str(folder))) != digest(study):
        raise ReqatError(f"{folder} holds {found['id']}, not {study.id}; delete the folder and run the study again.")
    names: dict[str, Any] = {
        "recipes": {role: choice.recipe for role, choice in study.settings.choices().items()},
        "precisions": {role: model.precision.name for role, model in study.models.items()},
        "tier": found.get("tier"),
    }
    settings = study.settings.model_dump(mode="json") | names | found["metrics"].get("measured", {})
    return Study(study.id, study.kind, study.settings.label, folder, found | {"settings": settings})


def pinned_studies(folder: Path) -> dict[str, PlannedStudy]:
    """The studies that `reqat pin-studies` kept in a folder, by id, as they were planned. Raises `ReqatError` if there
    are none."""
    path = Path(folder) / STUDIES
    if not path.exists():
        raise MissingFileError(f"{folder}: no pinned studies; `reqat pin-studies` keeps finished ones.")
    kept = read_json(path, "list of studies", "restore it from git")
    planned = {id: parse(PlannedStudy, value, str(path)) for id, value in kept.items()}
    for id, study in planned.items():
        if id != study.id:
            raise ReqatError(f"{path}: {id} is {study.id} under this version's rules; use the version that wrote it.")
    return planned


def by_kind(studies: Sequence[Study]) -> dict[str, list[Study]]:
    """Kind -> its studies, in order."""
    out: dict[str, list[Study]] = {}
    for study in studies:
        out.setdefault(study.kind, []).append(study)
    return out


def overview(studies: ByKind) -> Table:
    """What was measured on which models: a row a study."""
    lines, data = [], []
    for group in studies.values():
        for study in group:
            planned = parse(PlannedStudy, study.record["config"], str(study.path))
            recipes, precisions = study.settings["recipes"], study.settings["precisions"]
            models = {role: f"{recipe} at {precisions[role]}" for role, recipe in recipes.items()}
            row = {
                "kind": study.kind,
                "name": study.name,
                "models": "; ".join(f"{role}: {text}" for role, text in models.items()),
                "stages": "; ".join(sorted({model.stage for model in planned.models.values()})),
                "split": planned.problems.split if planned.problems else "",
                "problems": planned.problems.n if planned.problems else 0,
                "seeds": len(study.seeds),
                "study": study.id,
                "commit": study.record["commit"],
            }
            data.append(row)
            asked = f"{row['problems']} ({row['split']})" if row["split"] else EMPTY
            shown = row["models"] if len(models) < 3 else ", ".join(models)
            words = [row["kind"], row["name"], shown, asked, str(row["seeds"] or EMPTY), row["study"]]
            lines.append(tuple(Text(str(word)) for word in words))
    dirty = any(study.record["dirty"] is not False for group in studies.values() for study in group)
    commits = sorted({str(row["commit"])[:12] for row in data})
    return Table(
        name="studies",
        title="Studies of the tier's models",
        caption="Measurements on models that the tier's stages trained, each with its models, problems and sampling "
        "seeds; where there are many, by their labels in the figure. The studies' ids name their folders.",
        footer=(f"Commit {', '.join(commits)}{', with uncommitted changes' if dirty else ''}.",),
        columns=(
            Column("kind", align="l"),
            Column("name", align="l"),
            Column("models", align="l"),
            Column("problems"),
            Column("seeds"),
            Column("study", align="l"),
        ),
        sections=(tuple(lines),),
        data=pd.DataFrame(data),
    )


def _maker(name: str) -> Callable[[ByKind], Any]:
    module, function = MAKERS[name].split(":")
    return getattr(import_module(module), function)  # type: ignore[no-any-return]


def build_studies(
    planned: Mapping[str, PlannedStudy],
    source: Path,
    tables: Path,
    plots: Path,
    *,
    pinned: bool = False,
    stages: Mapping[str, str] | None = None,
) -> list[Path]:
    """Write every table and figure of a tier's studies; returns the files. Options and errors: `load_studies`."""
    from analysis.report import style

    studies = by_kind(load_studies(planned, source, pinned=pinned, stages=stages))
    wanted_tables, wanted_figures = study_names(planned)
    written: list[Path] = []
    for name in wanted_tables:
        written += _maker(name)(studies).write(Path(tables))
    for name in wanted_figures:
        with style.context():
            written += style.save(_maker(name)(studies), Path(plots), name)
    return written
