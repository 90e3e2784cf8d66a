"""All paths of a checkout, relative to the repository's root.

models/, data/                             given: local models; files of traces and of problems with answers

build/data/<data id>/                      tokenizer/, train.jsonl, manifest.json, record.json
build/stages/<stage id>/                   model/, record.json
build/evaluations/<evaluation id>/         outcomes.parquet, record.json
build/studies/<study id>/                  what a study measured, record.json
build/companions/<id>/                     rows.csv of a companion's part, record.json; <id>.json: how it ended
build/packaged/<source>/                   data or a model that companions read, record.json; <source>.json likewise
build/throughput/<id>/                     a benchmark's rows, record.json; <id>.json: how the last attempt at it ended
build/partial/<id>/                        where a job works until its output is whole
build/checkpoints/<id>/                    from where a killed job goes on
build/tables/<tier>/, build/plots/<tier>/  what analysis renders
results/base/, results/base-<label>/        the pinned bases of model testbed and of others: model/, record.json
results/<date>-<tier>/                     a pinned run (`reqat.records.pinned`)
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from reqat.config.errors import ReqatError
from reqat.config.files import read_json, sha256
from reqat.config.plan import Plan, plan
from reqat.config.stage import BaseSettings, Evaluation, Stage
from reqat.config.tier import Tier, load_catalogue, load_tier


@dataclass(frozen=True)
class Paths:
    """Paths of a checkout. `root` holds `config/` and `results/`; `build` is where work goes (relative to `root`, or
    absolute)."""

    root: Path = Path()
    build: Path = Path("build")
    models: Path = Path("models")
    """Folder of local models (`source: path`); environment variable REQAT_MODELS overrides it."""

    data: Path = Path("data")
    """Folder of files of traces and benchmarks; environment variable REQAT_DATA overrides it."""

    @property
    def config(self) -> Path:
        """Folder of tiers and recipes."""
        return self.root / "config"

    @property
    def results(self) -> Path:
        """Folder of pinned results. Rules only read it."""
        return self.root / "results"

    @property
    def base(self) -> Path:
        """Folder of the pinned base checkpoint of model `testbed`, which the benchmark and the notebooks take."""
        return self.pinned_base("testbed")

    def pinned_base(self, label: str) -> Path:
        """Folder of the pinned base checkpoint of a tier's model."""
        return self.results / ("base" if label == "testbed" else f"base-{label}")

    @property
    def work(self) -> Path:
        """The build folder."""
        return self.root / self.build

    def models_folder(self) -> Path:
        """Folder of local models."""
        return Path(os.environ.get("REQAT_MODELS") or self.root / self.models)

    def data_folder(self) -> Path:
        """Folder of files of traces and benchmarks."""
        return Path(os.environ.get("REQAT_DATA") or self.root / self.data)

    def stage(self, stage: Stage) -> Path:
        """Directory of a stage: made by a job, or given (the pinned base)."""
        if isinstance(stage.settings, BaseSettings) and not made(stage):
            return self.pinned_base(stage.settings.name)
        return self.work / ("data" if stage.kind == "data" else "stages") / stage.id

    def model(self, stage: Stage) -> Path:
        """Model folder of a stage (Hugging Face layout)."""
        return self.stage(stage) / "model"

    def evaluation(self, evaluation: Evaluation | str) -> Path:
        """Directory of an evaluation, or of one called so: a part has an id of its own (`Evaluation.shards`)."""
        return self.work / "evaluations" / (evaluation if isinstance(evaluation, str) else evaluation.id)

    @property
    def studies(self) -> Path:
        """Directory of all studies."""
        return self.work / "studies"

    def study(self, id: str) -> Path:
        """Directory of a study."""
        return self.studies / id

    def companion(self, id: str) -> Path:
        """Directory of a companion's part."""
        return self.work / "companions" / id

    def packaged(self, source: str) -> Path:
        """Directory of data or a model that companions read, prepared from a package."""
        return self.work / "packaged" / source

    def throughput(self, id: str) -> Path:
        """Directory of a benchmark."""
        return self.work / "throughput" / id

    def throughput_state(self, id: str) -> Path:
        """File that says how the last attempt at a benchmark ended: ``{"state": "measured"}``, or ``"failed"`` and a
        ``reason``."""
        return self.work / "throughput" / f"{id}.json"

    def partial(self, id: str) -> Path:
        """Working folder of the job that makes `id`, until its output is complete."""
        return self.work / "partial" / id

    def checkpoints(self, id: str) -> Path:
        """Folder of what the job of `id` has done, for the attempt after a kill."""
        return self.work / "checkpoints" / id


def made(stage: Stage) -> bool:
    """Whether a job makes the stage (False: it is given, the pinned base)."""
    return not (isinstance(stage.settings, BaseSettings) and stage.settings.source == "pinned")


def pinned_base(paths: Paths, label: str = "testbed") -> str | None:
    """sha256 of a pinned base's weights, as its record states it; None if there is none of the model `label`."""
    record = paths.pinned_base(label) / "record.json"
    if not record.exists():
        return None
    what, remedy = "record of a base checkpoint", "restore it from git"
    found = read_json(record, what, remedy)
    try:
        return str(found["outputs"]["model/model.safetensors"]["sha256"])
    except (KeyError, TypeError) as error:
        raise ReqatError(f"{record}: not a {what} ({error!r}); {remedy}.") from None


def read_plan(path: Path) -> Plan:
    """The plan in a file (`Plan.dump`). Raises `ReqatError` if it is absent or holds something else."""
    return Plan.restore(read_json(path, "plan", "`reqat plan --json` prints one"), str(path))


def load(tier: str, paths: Paths | None = None) -> Plan:
    """The plan of the tier called `tier` in a checkout."""
    paths = paths or Paths()
    wanted = load_tier(tier, paths.config)
    found = {label: pinned_base(paths, label) for label, model in wanted.models.items() if model.source == "pinned"}
    pinned = {label: sha for label, sha in found.items() if sha}
    there = {name: paths.data_folder() / name for name in wanted.files}
    files = {name: sha256(path) for name, path in there.items() if path.is_file()}
    return plan(wanted, load_catalogue(paths.config), pinned=pinned, files=files)


def require_given(plan: Plan, paths: Paths) -> None:
    """Raise `ReqatError` unless the local models, traces and benchmarks of a plan are there: before a training of days
    ends at a file of problems that is missing."""
    tier, models, data = plan.tier, paths.models_folder(), paths.data_folder()
    folders = [models / (m.reference or "") for m in tier.models.values() if m.source == "path"]
    missing = [f"{folder} (a model: config.json, *.safetensors)" for folder in folders if not has_config(folder)]
    missing += [f"{data / name} ({_what(name, tier)})" for name in tier.files if not (data / name).is_file()]
    if missing:
        raise ReqatError(
            f"tier {tier.name} cannot start: {'; '.join(missing)} missing. Put them there (docs/paper-tier.md), or "
            "name other folders: --models or REQAT_MODELS, --data or REQAT_DATA; of snakemake, --config models=... and "
            "data=..."
        )


def has_config(folder: Path) -> bool:
    """Whether a folder looks like one of a model."""
    return (folder / "config.json").is_file()


def _what(name: str, tier: Tier) -> str:
    return "traces" if name == tier.data.source else "problems with answers"
