"""Studies of a plan as jobs: measurements on models that stages have trained.

What a study of a kind does is one function in `RUNNERS`, made of the same parts as the verb of its name (`entropy`,
`route`, `noise`, `reset`); here models come from the stages of a tier's plan, and settings from config/studies.yaml.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reqat.config.base import digest
from reqat.config.errors import ReqatError
from reqat.config.files import write_file
from reqat.config.paths import Paths
from reqat.config.plan import Plan
from reqat.config.studies import (
    FILE,
    DynamicsStudy,
    GradientsStudy,
    KeysStudy,
    LikelihoodStudy,
    NoiseStudy,
    PairStudy,
    PlannedStudy,
    ResetStudy,
    RoutingStudy,
    load_studies,
    sem_term,
)
from reqat.pipeline.conditions import Conditions
from reqat.pipeline.interventions import grade_noise, grade_routes, nats, noise_ends
from reqat.pipeline.jobs import finished, holds_parts, input_folders, running, trained_before
from reqat.pipeline.pairs import PairSettings, Side, collect
from reqat.pipeline.resets import fitted_tau0, grade_resets, reset_decodings
from reqat.pipeline.task import Grading, Task, load, same_tokens
from reqat.records import record
from reqat.tasks.problem_files import of_problems

if TYPE_CHECKING:
    from reqat.config.precision import PrecisionSpec
    from reqat.evaluation.entropies import ForcedTrace


def studies_of(plan: Plan, paths: Paths) -> dict[str, PlannedStudy]:
    """The studies of a tier by id. Raises `ReqatError` if it has none."""
    found = load_studies(plan, paths.config)
    if not found:
        raise ReqatError(f"tier {plan.tier.name} has no studies; give it a section in config/{FILE}.")
    return found


def stages_there(plan: Plan, studies: Iterable[PlannedStudy], paths: Paths) -> dict[str, str]:
    """The stages that studies stand on, as they lie there now: id -> digest of its outputs, of those that are there."""
    folders = {id: paths.stage(plan.stage(id)) for study in studies for id in study.inputs.values()}
    return {
        id: record.outputs_digest(record.read(folder))
        for id, folder in folders.items()
        if (folder / record.FILE).is_file()
    }


@dataclass(frozen=True)
class Run:
    """A study at work."""

    study: PlannedStudy
    plan: Plan
    inputs: Mapping[str, Path]
    """Role -> folder of the stage that fills it."""
    out: Path
    checkpoints: Path
    """For what goes on after a kill."""
    root: Path
    """Of the repository; records name paths from there."""
    quiet: bool

    @property
    def weights(self) -> dict[str, str]:
        """Role -> digest of the outputs of its stage."""
        return {role: record.outputs_digest(record.read(folder)) for role, folder in self.inputs.items()}

    @property
    def kept(self) -> Path:
        """A folder for parts of the result, of these models and no others: a stage may be trained again between a kill
        and the next attempt."""
        return self.checkpoints / digest(self.weights, 16)

    def load(self, role: str) -> tuple[Any, Any]:
        """Model and tokenizer of a role, at its precision."""
        return load(self.inputs[role] / "model", self.study.models[role].precision)

    @property
    def folders(self) -> dict[str, tuple[Path, PrecisionSpec]]:
        """Role -> the model's folder and its precision."""
        return {role: (self.inputs[role] / "model", model.precision) for role, model in self.study.models.items()}

    def verified(self, role: str) -> list[ForcedTrace]:
        """Verified solutions of the study's problems, tokenized as the model of a role reads them."""
        from reqat.evaluation.dynamics import verified_traces
        from reqat.models import load_tokenizer

        asked = self.study.problems
        assert asked is not None  # as planned, of every study of traces
        tokenizer = load_tokenizer(self.inputs[role] / "model")
        return verified_traces(asked.families, tokenizer, n=asked.n, split=asked.split, seed=asked.seed)

    @property
    def autocast(self) -> Any:
        """The dtype that models compute in under `torch.autocast`; None: without."""
        from reqat.evaluation.loading import AUTOCAST

        assert self.study.decoding is not None  # as planned, of every study that reads or samples responses
        return AUTOCAST[self.study.decoding.autocast]


def run_study(plan: Plan, study: PlannedStudy, paths: Paths, *, progress: bool = True, force: bool = False) -> None:
    """Run one study, unless its result is there and was made from the stages that are there. Raises `ReqatError` if a
    stage that it stands on is missing or is not what it was."""

    def current(out: Path, id: str) -> bool:
        if not finished(out, id):
            return False
        try:
            record.check_inputs(out, record.read(out), stages_there(plan, [study], paths))
        except ReqatError as stale:
            print(f"{stale} Measuring it again.", flush=True)
            return False
        return True

    out, tier, checkpoints = paths.study(study.id), plan.tier.name, paths.checkpoints(study.id)
    with running("study", study.id, study, out, paths, tier=tier, force=force, done=current) as job:
        if job is None:
            return
        inputs, job.inputs = input_folders(plan, study.inputs, paths)
        job.seeds = list(getattr(study.settings, "seeds", ()))
        run = Run(study, plan, inputs, job.partial, checkpoints, paths.root.absolute(), not progress)
        job.resumed = _goes_on(run)
        job.metrics = RUNNERS[study.kind](run)


def _goes_on(run: Run) -> bool:
    """Whether an earlier attempt left parts of this result, measured on the same models."""
    from reqat.pipeline.likelihoods import model_runs, part_of

    s = run.study.settings
    if isinstance(s, LikelihoodStudy):
        runs = model_runs(s, run.study.models)
        return any(part_of(one, run.weights, run.checkpoints).is_file() for one in runs)
    return trained_before(run.checkpoints) if isinstance(s, GradientsStudy) else holds_parts(run.kept)


def pair(run: Run) -> dict[str, Any]:
    """As `reqat entropy`: traces sampled by both models, read by both. A killed study samples no batch twice."""
    s = run.study.settings
    assert isinstance(s, PairStudy)
    task, models = Task.of_study(run.study), run.study.models
    reference, candidate = (
        Side(str(run.inputs[role] / "model"), models[role].precision.name, models[role].precision.for_prepare())
        for role in ("reference", "candidate")
    )
    settings = PairSettings(
        seeds=s.seeds,
        decoding=s.decoding,
        max_new_tokens=task.max_new_tokens,
        batch_rows=task.batch_rows,
        sample=True,
        top=s.top,
        bins=s.bins,
        more_than=s.more_than,
        autocast=run.autocast,
    )
    problems = of_problems(task.problems(s.n))
    return collect(
        reference, candidate, problems, settings, run.out, root=run.root, kept=run.kept, progress=not run.quiet
    ).metrics


def routing(run: Run) -> dict[str, Any]:
    """As `reqat route`: the four policies at one threshold. Killed, these three go on with what is not graded."""
    from reqat.generation.interventions import policies

    s = run.study.settings
    assert isinstance(s, RoutingStudy)
    grading = Grading(Task.of_study(run.study), s.n, s.seeds, s.decoding, s.held_out, run.quiet)
    conditions = Conditions(run.out, run.kept)
    grading.options("")  # refuses a text that is no policy before the first hour
    reference, tokenizer = run.load("reference")
    candidate, other = run.load("candidate")
    same_tokens(tokenizer, other)
    value = nats(s.threshold, reference, tokenizer, grading)
    grade_routes(conditions, reference, candidate, tokenizer, grading, list(policies(value)), value)
    return conditions.finish() | {"measured": {"threshold_nats": value}}


def noise(run: Run) -> dict[str, Any]:
    """As `reqat noise`: no noise, then every size at either end."""
    s = run.study.settings
    assert isinstance(s, NoiseStudy)
    grading = Grading(Task.of_study(run.study), s.n, s.seeds, s.decoding, s.held_out, run.quiet)
    conditions = Conditions(run.out, run.kept)
    grading.options("")
    model, tokenizer = run.load("model")
    ends = noise_ends(s.by, s.share, model, tokenizer, grading)
    grade_noise(conditions, model, tokenizer, grading, s.sigmas, s.share, ends)
    return conditions.finish() | {"measured": {"thresholds_nats": ends}}


def reset(run: Run) -> dict[str, Any]:
    """As `reqat fit-reset` and `reqat reset`: tau0 on held-out problems, then every decoding on the same problems."""
    import dataclasses

    from reqat.generation import Decoding

    s = run.study.settings
    assert isinstance(s, ResetStudy)
    grading = Grading(Task.of_study(run.study), s.n, s.seeds, s.decoding, s.held_out, run.quiet)
    conditions = Conditions(run.out, run.kept)
    rule: dict[str, Any] = {"top_p": s.top_p, "t_high": s.t_high, "window": s.window, "step": s.step}
    for text in (s.decoding, *s.controls, *(str(Decoding.reset(t, 0.0, **rule)) for t in s.t_low)):
        grading.options("", text)
    quantized, tokenizer = run.load("quantized")
    reference, other = run.load("reference")
    same_tokens(other, tokenizer)
    fit = fitted_tau0(quantized, tokenizer, dataclasses.replace(grading, seeds=s.fit_seeds), s.quantile)
    print(f"tau0: {fit}", flush=True)
    fits = {
        "reset" if i == 0 else f"reset-{t_low:g}": str(Decoding.reset(t_low, fit.value, **rule))
        for i, t_low in enumerate(s.t_low)
    }
    decodings = reset_decodings(s.decoding, fits, s.controls)
    grade_resets(conditions, quantized, reference, tokenizer, grading, decodings)
    return conditions.finish() | {"measured": {"tau0": dataclasses.asdict(fit), "decodings": decodings}}


def dynamics(run: Run) -> dict[str, Any]:
    """The same verified traces read by every model, and how each moved the base's entropies."""
    import pandas as pd

    from analysis.entropy import entropy_change
    from reqat.evaluation.dynamics import run_dynamics
    from reqat.evaluation.trace_folder import TraceFolder

    s = run.study.settings
    assert isinstance(s, DynamicsStudy)
    found = run_dynamics(run.folders, run.verified("base"), run.out, autocast=run.autocast, progress=not run.quiet)
    folder = TraceFolder(run.out)
    moved = [entropy_change(folder, "base", label, bins=s.bins).assign(label=label) for label in found["labels"][1:]]
    table = pd.concat(moved, ignore_index=True)
    write_file(run.out / "dynamics.csv", table.to_csv(index=False, lineterminator="\n"))
    return found


def likelihood(run: Run) -> dict[str, Any]:
    """The same verified traces read by every model beside the reference. A killed study goes on with the models that
    it has not read."""
    from reqat.pipeline.likelihoods import model_runs, run_likelihood

    s = run.study.settings
    assert isinstance(s, LikelihoodStudy)
    runs = model_runs(s, run.study.models)
    return run_likelihood(
        runs,
        run.load,
        run.weights,
        run.verified(runs[0].reference),
        run.out,
        percentile=s.percentile,
        checkpoints=run.checkpoints,
        autocast=run.autocast,
        progress=not run.quiet,
    )


def gradients(run: Run) -> dict[str, Any]:
    """A QAT stage trained anew while a probe looks on. A killed study goes on from the training's checkpoint."""
    from reqat.pipeline.gradients import run_gradients

    s = run.study.settings
    assert isinstance(s, GradientsStudy)
    return run_gradients(
        run.plan.stage(run.study.models["model"].stage),
        {role: run.inputs[role] for role in run.study.given},
        run.out,
        every=s.every_steps,
        trained=run.inputs["model"],
        checkpoints=run.checkpoints,
        progress=not run.quiet,
    )


def keys(run: Run) -> dict[str, Any]:
    """Keys, Q-FIT's error maps and the inputs of `down_proj` of the model that Q-FIT was calibrated on."""
    from reqat.pipeline.keys import run_keys

    s = run.study.settings
    assert isinstance(s, KeysStudy)
    stage = run.plan.stage(run.study.given["fitted"])
    found = record.read(run.inputs["fitted"])["metrics"]
    return run_keys(stage, found, run.inputs, run.out, sequences=s.sequences, rotation=s.rotation)


def overview(run: Run) -> dict[str, Any]:
    """One position of a verified trace as BF16, QAT and QAT with SEM see it."""
    from reqat.pipeline.overview import run_overview

    last = run.study.models["sem"].stage
    term = sem_term(run.plan, last)
    assert term is not None  # as planned
    return run_overview(
        run.plan,
        run.folders,
        run.verified("bf16"),
        run.out,
        last=last,
        term=term,
        autocast=run.autocast,
        progress=not run.quiet,
    )


RUNNERS: dict[str, Callable[[Run], dict[str, Any]]] = {
    "pair": pair,
    "routing": routing,
    "noise": noise,
    "reset": reset,
    "dynamics": dynamics,
    "likelihood": likelihood,
    "gradients": gradients,
    "keys": keys,
    "overview": overview,
}
"""Kind -> what measures it: writes its files into the run's folder and returns the record's metrics."""


def require_inputs(plan: Plan, study: PlannedStudy, folder: Path, there: Mapping[str, str]) -> None:
    """Refuse a study that was not made from the stages `there`. Raises `ReqatError` naming the command that helps."""
    found = record.verify(folder, id=study.id, deep=False)
    for role, id in study.inputs.items():
        if id not in there:
            raise ReqatError(
                f"{folder}: its {role} {id} is not there any more, so nobody can tell whether the study was made from "
                f"it; make it (reqat stage {id} --tier {plan.tier.name}), or bring it back."
            )
    try:
        record.check_inputs(folder, found, there)
    except ReqatError as error:
        raise ReqatError(f"{error} Run the study again: reqat study {study.id} --tier {plan.tier.name}.") from None
