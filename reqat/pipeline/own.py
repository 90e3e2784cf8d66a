"""`reqat train`: a recipe on a model and traces of one's own, without a tier.

The stages are those of every tier, run as jobs of a plan (:mod:`reqat.pipeline.jobs`) in ``OUT.unfinished``: each is
done once, a killed training goes on from its checkpoint, and the folder says in ``settings.json`` which run it belongs
to. ``OUT`` appears whole at the end: the model at the precision asked for, its weights quantized once, and the record.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from reqat.config.errors import ReqatError
from reqat.config.files import read_json, write_file
from reqat.config.paths import Paths
from reqat.config.plan import Plan, own_plan
from reqat.config.precision import PrecisionSpec, family
from reqat.config.recipe import Catalogue, TrainStep
from reqat.config.stage import (
    BaseSettings,
    Calibration,
    DataSettings,
    DataStageSettings,
    Gradient,
    Stage,
    TraceSource,
    Training,
)
from reqat.config.targets import check_folder
from reqat.config.tier import Budget, EvaluationPlan, Model, PTQPlan, QFitPlan, Shape, Tier, Trainings
from reqat.pipeline.announced import announce
from reqat.pipeline.imported import check_file, import_store, positions
from reqat.pipeline.jobs import run_stage, running
from reqat.records import record

if TYPE_CHECKING:
    from reqat.data.sources import Columns

NAME = "own"
SETTINGS = "settings.json"
SCHEMA = "reqat.train/1"
"""In the settings of a run, by which its folder is told from others that hold a file of that name."""
_WORK = (SETTINGS, "cache", "checkpoints", "data", "locks", "partial", "stages")  # what a run leaves in its folder
_CALIBRATION_TOKENS = 512  # of a sequence that Q-FIT and PTQ look at, as in the paper


@dataclass(frozen=True)
class Run:
    """What `reqat train` was asked for. Amounts of None are the defaults, which the data decide."""

    recipe: str
    precision: str
    model: str
    """A folder, package:NAME, or owner/name@COMMIT of the hub."""
    data: str
    """A file, or owner/name@COMMIT."""
    columns: Columns
    training: Training
    """Of fine-tuning; its `row_tokens` is replaced by what the traces need unless `row_tokens` is given."""
    qat_lr: float | None = None
    total: int | None = None
    qat_tokens: int | None = None
    epochs: int = 1
    """The default `total` in sizes of the data: QAT's part revisits the first traces, so fine-tuning reads fewer."""
    row_tokens: int | None = None
    over_long: Literal["drop", "truncate"] = "drop"
    global_scale: Literal["dynamic", "row"] = "row"
    share_global_scale: bool = True
    """One for the weights that engines join (q, k, v; gate, up), so that the result can be exported."""
    calibration: int = 64
    """Sequences of 512 tokens that Q-FIT and PTQ look at, at most."""
    seed: int = 0
    processes: int = 1
    """Decides nothing of the result."""
    progress: bool = True

    def settings(self, catalogue: Catalogue) -> dict[str, Any]:
        """All that decides the result, with digests of model and data; what a run is resumed by."""
        amounts = {"total": self.total, "qat-tokens": self.qat_tokens, "epochs": self.epochs}
        return {
            "schema": SCHEMA,
            "recipe": self.recipe,
            "recipe's steps": catalogue.recipe(self.recipe).model_dump(mode="json"),
            "precision": self.precision,
            "model": Path(self.model).name if Path(self.model).is_dir() else self.model,
            "model's files (sha256)": _files(self.model),
            "data": Path(self.data).name if Path(self.data).is_file() else self.data,
            "data (sha256)": _digest(self.data),
            "columns": [self.columns.messages, self.columns.prompt, self.columns.response],
            **amounts,
            "row-tokens": self.row_tokens,
            "long": self.over_long,
            "qat-lr": self.qat_lr,
            "global-scale": self.global_scale,
            "share-global-scale": self.share_global_scale,
            "calibration": self.calibration,
            "seed": self.seed,
            **{key.replace("_", "-"): value for key, value in self.training.model_dump(mode="json").items()},
        }


def train_own(
    run: Run,
    catalogue: Catalogue,
    out: Path,
    root: Path,
    *,
    resume: bool = True,
    force: bool = False,
    plan_only: bool = False,
) -> None:
    """Run a recipe on a model and traces of one's own, and write the model to ``out``.

    With ``plan_only`` traces are tokenized, and what would be trained is printed, with the memory that it takes; the
    unfinished run then goes on from there.

    What ``out`` cannot be, a model that no adapter knows, and a source that cannot be read are refused first. An
    unfinished run of the same settings goes on; one of others is refused, naming them, or dropped without ``resume``.
    Raises `ReqatError` for all of these.
    """
    from reqat.data.sources import check_source

    out = Path(os.path.abspath(out))
    recipe = catalogue.recipe(run.recipe)
    quantizes = any(step.step in ("qat", "ptq", "qfit") for step in recipe.steps)
    if quantizes and family(run.precision) == "BF16":
        raise ReqatError(f"recipe {run.recipe} quantizes, and --precision is {run.precision}; name another, such as "
                         "NVFP4-W4A4KV4.")  # fmt: skip
    check_source(run.data)
    settings = run.settings(catalogue)
    if not force and _already(out, settings):
        print(f"{out}: already there, by the same settings")
        return
    inputs = [path for path in (run.model, run.data) if Path(path).exists()]
    if plan_only:
        check_folder(out, record.belongs("train"), replace=force, inputs=map(Path, inputs))
        work = out.with_name(f"{out.name}.unfinished")
        _claim(work, settings, resume, inputs)
        _carry_out(run, catalogue, work, None, root)
        print("nothing was trained: the same command without --plan goes on")
        return
    with record.asked_for("train", out, settings, root=root, force=force, inputs=inputs) as job:
        work = out.with_name(f"{out.name}.unfinished")
        job.resumed = _claim(work, settings, resume, inputs)
        job.seeds = [run.seed]
        job.metrics = _carry_out(run, catalogue, work, job.partial, root)
    shutil.rmtree(work, ignore_errors=True)
    print(f"written: {out}")


def _carry_out(run: Run, catalogue: Catalogue, work: Path, out: Path | None, root: Path) -> dict[str, Any]:
    """Do the stages of a run and write the model to ``out``; None: say what they are. Returns metrics."""
    from reqat.data.store import TraceStore

    paths = Paths(root, work)
    base = _base(run)
    run_base = Plan(_tier(run, tokens=1, total=2, qat=1, row_tokens=1), {base.id: base})
    _check_model(run, None)
    run_stage(run_base, base.id, paths, progress=run.progress)
    model = paths.model(base)
    sizes = _check_model(run, model)
    assert sizes is not None
    store = _store(run, base)
    imported = _import(run, run_base.tier.name, store, paths, model)
    traces = TraceStore.read(paths.stage(store)).traces
    tokens, longest = traces.n_tokens, int(traces.lengths.max())
    total, qat = _budget(run, catalogue, tokens, longest)
    tier = _tier(
        run,
        tokens=tokens,
        total=total,
        qat=qat,
        row_tokens=run.row_tokens or longest,
        shape=sizes[0],
        positions=positions(model),
    )
    plan, last, at = own_plan(tier, catalogue, run.recipe, run.precision, total, base, store, longest)
    metrics: dict[str, Any] = {"traces": imported, "total_tokens": total, "qat_tokens": qat, "precision": str(at.name)}
    metrics["stages"] = announce(Path(run.data).name, plan, last, at, traces, imported, sizes)
    if out is None:
        return metrics
    chain = [stage for stage in reversed(list(plan.lineage(last.id))) if stage.id != base.id]
    for stage in chain:
        check_file(run.data, store.settings.own)  # type: ignore[union-attr, arg-type]
        run_stage(plan, stage.id, paths, progress=run.progress)
    for stage, entry in zip(chain, metrics["stages"], strict=True):
        entry["metrics"] = record.read(paths.stage(stage))["metrics"]
    _write(paths.model(last), at, out, share_global_scale=run.share_global_scale)
    return metrics


def _write(folder: Path, at: PrecisionSpec, out: Path, *, share_global_scale: bool) -> None:
    """The last stage's model at the precision it is meant for, its weights quantized once."""
    from reqat.data import with_bos
    from reqat.models import freeze, load_model, load_tokenizer, prepare, save_model

    model = load_model(folder)
    if at != PrecisionSpec():
        print(prepare(model, at.name, override=True, **at.for_prepare()))
        freeze(model, share_global_scale=share_global_scale)
    save_model(model, with_bos(load_tokenizer(folder)), out)


def _base(run: Run) -> Stage:
    from reqat.models.loading import local_folder

    package = run.model.startswith("package:")
    reference = run.model.removeprefix("package:") if package else str(local_folder(run.model).resolve())
    settings = BaseSettings(source="package" if package else "path", name=NAME, reference=reference)
    return Stage(kind="base", settings=settings)


def _store(run: Run, base: Stage) -> Stage:
    name = Path(run.data).name if Path(run.data).is_file() else run.data
    columns = run.columns
    source = TraceSource(
        name=name,
        sha256=_digest(run.data),
        messages=columns.messages,
        prompt=columns.prompt,
        response=columns.response,
        row_tokens=run.row_tokens,
        over_long=run.over_long,
    )
    settings = DataStageSettings(source=name, own=source, tokens=1, tokenizer="model")
    return Stage(kind="data", settings=settings, parent=base.id)


def _import(run: Run, tier: str, store: Stage, paths: Paths, model: Path) -> dict[str, Any]:
    """The trace store of the run's data, made unless it is there; what became of the rows."""
    with running("data", store.id, store, paths.stage(store), paths, tier=tier, force=False) as job:
        if job is None:
            return dict(record.read(paths.stage(store))["metrics"])
        asked = store.settings.own  # type: ignore[union-attr]
        assert asked is not None
        job.metrics = import_store(
            run.data,
            asked,
            model,
            job.partial,
            paths.work / "cache",
            processes=run.processes,
            progress=run.progress,
        )
        return dict(job.metrics)


def _check_model(run: Run, folder: Path | None) -> tuple[Shape, int] | None:
    """Refuse a model that no adapter knows. ``folder`` holds a package's model once it was unpacked.

    Returns its shape and the number of its parameters; None for a package's model that was not unpacked.
    """
    from reqat.models import load_tokenizer
    from reqat.models.adapters import cached_attentions
    from reqat.models.loading import local_folder, package_gguf
    from reqat.models.outline import outline

    if folder is None:
        if run.model.startswith("package:"):
            package_gguf(run.model)
            return None
        folder = local_folder(run.model)
    load_tokenizer(folder)
    model = outline(folder, PrecisionSpec(name=run.precision).name)
    config: Any = model.config
    heads = cached_attentions(model)[0][1].heads
    shape = Shape(
        hidden_size=config.hidden_size,
        layers=config.num_hidden_layers,
        heads=heads.query_heads,
        kv_heads=heads.kv_heads,
        head_dim=heads.head_dim,
        mlp=getattr(config, "intermediate_size", None) or config.hidden_size,
        vocabulary=config.vocab_size,
        tie_embeddings=bool(config.tie_word_embeddings),
    )
    return shape, sum(parameter.numel() for parameter in model.parameters())


def _budget(run: Run, catalogue: Catalogue, tokens: int, longest: int) -> tuple[int, int]:
    """Tokens that the recipe trains on in all, and those of QAT: a whole pass over the data, and a quarter of it."""
    different = any(isinstance(s, TrainStep) and s.traces == "different" for s in catalogue.recipe(run.recipe).steps)
    total = run.total or run.epochs * tokens - (longest if different else 0)
    qat = run.qat_tokens or max(1, total // 4)
    if not qat < total:
        raise ReqatError(f"--qat-tokens {qat} must be fewer than all tokens, --total {total}.")
    return total, qat


def _tier(
    run: Run,
    *,
    tokens: int,
    total: int,
    qat: int,
    row_tokens: int,
    shape: Shape | None = None,
    positions: int | None = None,
) -> Tier:
    """The settings of the run in the form that plans are made of."""
    training = run.training.model_copy(update={"row_tokens": row_tokens, "gradient": Gradient()})
    at_qat = training.model_copy(update={"lr": run.qat_lr or training.lr})
    length = min(_CALIBRATION_TOKENS, tokens, positions or tokens)
    calibration = Calibration(sequences=min(run.calibration, tokens // length), sequence_tokens=length)
    return Tier(
        name=NAME,
        title="reqat train",
        models={NAME: Model(source="path", reference=run.model, artifacts=[], shape=shape)},
        data=DataSettings(source=run.data, tokens=tokens, tokenizer="model"),
        train=Trainings(
            finetune=training,
            qat=at_qat,
            global_scale=run.global_scale,
            share_global_scale=run.share_global_scale,
        ),
        budget=Budget(qat_tokens=qat, totals=[2], claim_total=2),
        training_seeds=[run.seed],
        evaluation=EvaluationPlan(n=1, seeds=[0]),
        qfit=QFitPlan(calibration=calibration),
        ptq=PTQPlan(calibration=calibration),
    )


def _claim(work: Path, settings: Mapping[str, Any], resume: bool, inputs: Iterable[str]) -> bool:
    """Begin or take up the unfinished run in ``work``; whether there was one.

    Raises `ReqatError` for anything else that is there, and where one of ``inputs`` lies in it.
    """
    check_folder(work, _of_a_run, replace=True, inputs=map(Path, inputs))
    file = work / SETTINGS
    there = file.is_file()
    if there and not resume:
        shutil.rmtree(work)
        there = False
    if there:
        different = _differences(_settings(file), settings)
        if different:
            raise ReqatError(
                f"{work} holds an unfinished run of other settings: {'; '.join(different)}. Run with those, name "
                "another folder, or begin anew (--no-resume), which deletes it."
            )
        return True
    write_file(file, record.text(settings))
    return False


def _of_a_run(work: Path) -> list[str]:
    """The files of an unfinished run. Raises `ReqatError` for a folder that is none."""
    file = work / SETTINGS
    if file.is_symlink() or not file.is_file() or _settings(file).get("schema") != SCHEMA:
        raise ReqatError("no unfinished run of `reqat train`.")
    # What its stages left, whatever it is called; links to models are not followed.
    return [
        Path(where, name).relative_to(work).as_posix()
        for where, folders, files in os.walk(work)
        for name in (*folders, *files)
        if Path(where, name).relative_to(work).parts[0] in _WORK
    ]


def _settings(file: Path) -> dict[str, Any]:
    return read_json(file, "record of an unfinished run", f"move {file.parent} elsewhere")


def _differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    def shown(value: Any) -> str:
        text = str(value)
        return text if len(text) <= 40 else f"{text[:37]}..."

    return [
        f"{key} {shown(then.get(key))}, now {shown(now.get(key))}"
        for key in {**then, **now}
        if then.get(key) != json.loads(json.dumps(now.get(key)))
    ]


def _already(out: Path, settings: Mapping[str, Any]) -> bool:
    """Whether ``out`` is the whole result of these settings."""
    try:
        found = record.verify(out, deep=False)
    except ReqatError:
        return False
    return found["kind"] == "train" and not _differences(found["config"], settings)


def _digest(source: str) -> str | None:
    path = Path(source)
    return record.sha256(path) if path.is_file() else None


def _files(model: str) -> Any:
    """Digests of all that is read of a model; of a package's, its version."""
    from reqat.models.folder import files_read
    from reqat.models.loading import local_folder

    if model.startswith("package:"):
        name = model.removeprefix("package:")
        try:
            return f"{name} {importlib.metadata.version(name)}"
        except importlib.metadata.PackageNotFoundError:
            return None
    folder = local_folder(model)
    read = (path for path in files_read(folder) if path.name != record.FILE)  # of how it was made
    return {path.relative_to(folder).as_posix(): record.sha256(path) for path in read}
