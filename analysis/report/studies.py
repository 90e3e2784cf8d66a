"""Finished studies as tables and figures read them.

A study (`reqat.config.studies`) is a folder with a record and what was measured. Tables and figures get the studies of
a tier by kind, as a list (a tier may ask for two of one kind, such as routing at two thresholds, in the order of
`config/studies.yaml`), and read nothing but their folders.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from reqat.config.base import digest, parse
from reqat.config.errors import ReqatError
from reqat.config.files import explain, read_json, read_json_list
from reqat.config.studies import PlannedStudy
from reqat.evaluation.statistics import holm
from reqat.records import record

STUDIES = "studies.json"
# Columns that hold texts, whatever they look like.
TEXTS = {"examples": ("context", "taken", "token"), "entropy-by-token": ("token",), "strip": ("token",)}
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
    first), `tier`, its `title`, and what was measured before it began (`threshold_nats`, `tau0`)."""

    @property
    def settings(self) -> dict[str, Any]:
        """What was asked for."""
        return dict(self.record["settings"])

    @property
    def metrics(self) -> dict[str, Any]:
        """What the record says was found."""
        return dict(self.record["metrics"])

    @property
    def tier(self) -> str:
        """The tier with what its title says of the models: how a footer opens."""
        name, title = self.settings["tier"], self.settings.get("title")
        return f"Tier {name} ({title})" if title else f"Tier {name}"

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

    def parquet(self, name: str) -> pd.DataFrame:
        """`<name>.parquet`, other than outcomes. Raises `ReqatError` naming the file if there is none, or not a whole
        one."""
        path = self.path / f"{name}.parquet"
        if not path.is_file():
            raise ReqatError(f"{self.path}: no {path.name} in it; {self._remedy}.")
        try:
            return pd.read_parquet(path)
        except (OSError, ValueError) as error:  # pyarrow's errors are of these kinds
            raise ReqatError(f"{path}: not a table ({error}); {self._remedy}.") from None

    @property
    def _remedy(self) -> str:
        return f"run the study again (reqat study {self.id} --force)"

    def table(self, name: str) -> pd.DataFrame:
        """`tables/<name>.csv` or `<name>.csv`. Raises `ReqatError` naming the file if there is none."""
        for path in (self.path / "tables" / f"{name}.csv", self.path / f"{name}.csv"):
            if path.is_file():
                try:
                    texts = dict.fromkeys(TEXTS.get(name, ()), str)  # a token of digits is no number
                    frame = pd.read_csv(path, keep_default_na=False, na_values=[""], dtype=texts)
                    return frame.fillna(dict.fromkeys(texts, ""))
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
    title: str = "",
) -> list[Study]:
    """The studies of a plan under `source` (which holds one folder a study), in the plan's order.

    With `pinned`, `source` is what `reqat pin` kept, as restored. `stages` are the stages that lie there now, id ->
    digest of its outputs (`reqat.records.record.outputs_digest`). `title` is the tier's, for footers. Raises
    `ReqatError` that names the study that is missing, not whole or made from another stage than that, and the command
    that makes it.
    """
    return [
        load_study(study, Path(source) / study.id, pinned=pinned, stages=stages, title=title)
        for study in planned.values()
    ]


def load_study(
    study: PlannedStudy,
    folder: Path,
    *,
    pinned: bool = False,
    stages: Mapping[str, str] | None = None,
    title: str = "",
) -> Study:
    """One finished study. Raises `ReqatError` as `load_studies`."""
    if not (folder / record.FILE).is_file():
        raise ReqatError(f"{folder}: study {study.settings.label} is not there; `reqat study {study.id}` makes it.")
    found = record.read(folder)
    if not pinned:  # what is pinned has no traces, and was checked when it was restored
        record.verify(folder, id=study.id, deep=False)
    try:
        record.check_inputs(folder, found, stages or {})
    except ReqatError as error:
        raise ReqatError(f"{error} Run the study again: reqat study {study.id} --tier {found.get('tier')}.") from None
    if found["id"] != study.id or digest(parse(PlannedStudy, found["config"], str(folder))) != digest(study):
        raise ReqatError(f"{folder} holds {found['id']}, not {study.id}; delete the folder and run the study again.")
    names: dict[str, Any] = {
        "recipes": {role: choice.recipe for role, choice in study.settings.choices().items() if role in study.models},
        "precisions": {role: model.precision.name for role, model in study.models.items()},
        "tier": found.get("tier"),
        "title": title,
    }
    settings = study.settings.model_dump(mode="json") | names | found["metrics"].get("measured", {})
    return Study(study.id, study.kind, study.settings.label, folder, found | {"settings": settings})


def pinned_studies(folder: Path) -> dict[str, PlannedStudy]:
    """The studies that `reqat pin` kept in a folder, by id, as they were planned: in the order of the configuration,
    as are the models of each, which records sort."""
    path = Path(folder) / STUDIES
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


def one(studies: ByKind, kind: str) -> Study:
    """The first study of a kind. Raises `ReqatError` if there is none."""
    return several(studies, kind)[0]


def several(studies: ByKind, kind: str) -> Sequence[Study]:
    """All studies of a kind. Raises `ReqatError` if there is none."""
    found = studies.get(kind)
    if not found:
        raise ReqatError(f"no study of kind {kind!r} to draw; add one to the tier in config/studies.yaml.")
    return found


def optional(study: Study, name: str) -> pd.DataFrame | None:
    """`tables/<name>.csv` of a study, None where it measured no such thing (or the file is empty)."""
    if not (study.path / "tables" / f"{name}.csv").is_file():
        return None
    frame = study.table(name)
    return frame if len(frame) else None


def responses(study: Study, condition: str) -> pd.DataFrame:
    """Graded responses of one condition, a row each, with the columns of `reqat.evaluation.Outcomes`.

    Raises `ReqatError` naming the file if there is none."""
    from reqat.evaluation.outcomes import Outcomes

    return Outcomes.from_parquet(study.path / f"{condition}.parquet").to_pandas()


def conditions_named(study: Study, names: Sequence[str]) -> pd.DataFrame:
    """Rows of these conditions, in this order. Raises `ReqatError` naming one that is not there."""
    frame = study.conditions.set_index("condition")
    missing = [name for name in names if name not in frame.index]
    if missing:
        raise ReqatError(f"{study.path}: no condition {missing[0]!r} in summary.json; run the study again.")
    return frame.loc[list(names)]


def adjusted(conditions: pd.DataFrame) -> pd.Series:
    """Holm's adjusted p of each row of a study's conditions, over all comparisons of the study; NaN without one.

    A study asks several questions of the same responses; each p alone would find something by chance too often.
    """
    if "p" not in conditions:
        return pd.Series(np.nan, index=conditions.index)
    p = conditions["p"].astype(float)
    known = p.notna()
    out = p.copy()
    out[known] = holm(p[known].tolist())
    return out
