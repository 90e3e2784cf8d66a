"""Studies of the models that a tier has trained: `config/studies.yaml`, a list of studies for each tier.

A study changes no weight, so none of this may enter the digest that names a stage: hence a file of its own, outside
the tiers. It names models as tables do, by recipe and precision, and `load_studies` looks them up among the cells of
the tier's plan; a study thus stands on stages that the tables need anyway. Its id covers its own settings, the ids of
those stages and the problems that it asks: a model of other settings is another study. Ids know nothing of weights; a
stage trained again under its id is told by the digests of its outputs, which a study's record holds.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, get_args

from pydantic import AfterValidator, Field, field_validator, model_validator

from reqat.config.base import Count, Seed, Size, Strict, digest, distinct, parse
from reqat.config.decoding import SAMPLE, Threshold
from reqat.config.errors import ReqatError, unknown
from reqat.config.files import read_yaml
from reqat.config.plan import Plan
from reqat.config.policy import Decoding as Policy
from reqat.config.precision import PrecisionSpec, Rotation, family
from reqat.config.stage import DIGEST_LENGTH, Decoding, ProblemSet, QFitSettings, SEMTerm

FILE = "studies.yaml"
SeedTuple = Annotated[tuple[Seed, ...], AfterValidator(distinct)]


def _policy(text: str) -> str:
    Policy.parse(text)
    return text


PolicyText = Annotated[str, AfterValidator(_policy)]
REFERENCE = "reference"
"""Label of the model that a likelihood study starts from."""


def _sizes(name: str, values: tuple[float, ...]) -> tuple[float, ...]:
    """Positive numbers that stay apart in the names of conditions. Raises `ReqatError` naming the list."""
    if not all(math.isfinite(value) and value > 0 for value in values):
        raise ReqatError(f"{name} {list(values)}: every one must be a positive finite number.")
    if len({f"{value:g}" for value in values}) < len(values):
        raise ReqatError(f"{name} {list(values)}: one stands twice (conditions are named by six digits).")
    return values


class ModelChoice(Strict):
    """A model by the names that tables give it."""

    recipe: str
    """Of `config/recipes.yaml`; `ft-ptq` at an FP4 precision is the fine-tuned model, rounded as it is loaded."""
    precision: str
    total: Count | None = None
    """Total budget in QAT budgets; null: the one that claims rest on."""
    seed: Seed | None = None
    """Training seed; null: the tier's first."""
    model: str | None = None
    """Label of the base model; null: the tier's first."""

    @field_validator("precision")
    @classmethod
    def _known(cls, precision: str) -> str:
        family(precision)
        return precision


class _Study(Strict):
    name: str = ""
    """Tells studies of one kind apart; empty: the kind."""
    asks: ClassVar[Literal["tier", "validation", "nothing"]] = "tier"
    """Whose problems the models answer: those that the tier grades on, those held out for choices, or none."""

    def choices(self) -> dict[str, ModelChoice]:
        """Role -> model: every field that names one, and each of `models` under its own label."""
        out: dict[str, ModelChoice] = {}
        for name in type(self).model_fields:
            value = getattr(self, name)
            if isinstance(value, ModelChoice):
                out[name] = value
            elif name == "models":
                out |= value
        return out

    @property
    def label(self) -> str:
        """Name of the study in messages and file names."""
        return self.name or str(self.kind)  # type: ignore[attr-defined]


class _Asked(_Study):
    n: Count
    """Problems."""


class _Sampled(_Asked):
    seeds: SeedTuple = Field(min_length=1)
    """Sampling seeds."""
    decoding: PolicyText = SAMPLE
    """As `reqat.evaluation.Decoding.parse` reads it."""


class _TwoModels(_Sampled):
    reference: ModelChoice
    candidate: ModelChoice


class PairStudy(_TwoModels):
    """Entropies of two models over the same tokens, as `reqat entropy` collects them: Figures 2(a, b, f) and 9."""

    kind: Literal["pair"]
    top: Size = 5
    """Most likely tokens kept a position."""
    bins: int = Field(default=20, ge=2, le=10_000)
    more_than: int = Field(default=100, ge=0)
    """Token types seen more often than this have an entropy of their own."""


class RoutingStudy(_TwoModels):
    """Entropy-routed decoding, the four policies of `reqat route` at one threshold: Figures 2(c, d) and 8."""

    kind: Literal["routing"]
    threshold: str
    """In nats (`0.6`), or a percentile of the reference's entropies on held-out problems (`p75`)."""
    held_out: Size = 20
    """Validation problems that a percentile is measured on."""

    @field_validator("threshold", mode="before")
    @classmethod
    def _readable(cls, threshold: Any) -> str:
        text = f"{threshold:g}" if type(threshold) in (int, float) else threshold
        Threshold.parse(text)
        return str(text)


class NoiseStudy(_Sampled):
    """Noise on the logits of the surest and of the least sure decisions, as in `reqat noise`: Figure 2(e)."""

    kind: Literal["noise"]
    model: ModelChoice
    sigmas: tuple[float, ...] = Field(min_length=1)
    """Size of the noise, relative to the logits."""
    share: float = Field(default=0.25, gt=0, lt=1)
    by: Literal["batch", "percentile"] = "batch"
    held_out: Size = 20

    @field_validator("sigmas")
    @classmethod
    def _named_apart(cls, sigmas: tuple[float, ...]) -> tuple[float, ...]:
        return _sizes("sigmas", sigmas)  # no noise is a condition of its own, always there


class ResetStudy(_Sampled):
    """ReSET beside plain decoding and beside BF16, as `reqat fit-reset` and `reqat reset` do it: table `reset`."""

    kind: Literal["reset"]
    quantized: ModelChoice
    reference: ModelChoice
    t_low: tuple[float, ...] = Field(default=(0.3,), min_length=1)
    """Temperatures where the model is sure, each a condition; tau0 is fitted once."""
    t_high: float = Field(default=1.0, gt=0)
    top_p: float = Field(default=0.95, gt=0, le=1)
    window: Size = 32
    step: Literal["paragraph", "line", "sentence"] = "paragraph"
    quantile: float = Field(default=0.8, gt=0, lt=1)
    held_out: Size = 5
    """Validation problems that tau0 is fitted on."""
    fit_seeds: SeedTuple = Field(default=(0,), min_length=1)
    controls: tuple[PolicyText, ...] = ()
    """Other decodings of the quantized model."""

    @field_validator("t_low")
    @classmethod
    def _named_apart(cls, t_low: tuple[float, ...]) -> tuple[float, ...]:
        return _sizes("t_low", t_low)

    @field_validator("reference")
    @classmethod
    def _unquantized(cls, reference: ModelChoice) -> ModelChoice:
        if reference.precision != "BF16":
            raise ReqatError(
                f"reference at {reference.precision}: it is the condition `bf16` of the table; write precision: BF16."
            )
        return reference


class DynamicsStudy(_Asked):
    """What training does to entropies: models read the same verified traces, beside the base model: Figure 4."""

    kind: Literal["dynamics"]
    base: ModelChoice
    models: dict[str, ModelChoice] = Field(min_length=1)
    """Label in figures -> model."""
    bins: int = Field(default=4, ge=2, le=10_000)
    """Percentile bins of the base's entropy."""
    asks: ClassVar[Literal["tier", "validation", "nothing"]] = "validation"

    @field_validator("models")
    @classmethod
    def _labels(cls, models: dict[str, ModelChoice]) -> dict[str, ModelChoice]:
        if "base" in models:
            raise ReqatError("models: 'base' is the label of the base model; call this one something else.")
        return models


class LikelihoodStudy(_Asked):
    """How likely several models find the same verified solutions, and how far each is from a reference: table
    `likelihood`. Every model is read at each of the training seeds that the plan has of it."""

    kind: Literal["likelihood"]
    models: dict[str, ModelChoice] = Field(min_length=1)
    """Label in the table -> model."""
    reference: ModelChoice = ModelChoice(recipe="ft", precision="BF16")
    """Whose entropies divide the tokens, and whose distributions the divergence starts from; of a model's own training
    seed, where the plan has that."""
    training_seeds: SeedTuple = ()
    """Of those models that name no seed; empty: the tier's first alone."""
    percentile: float = Field(default=75, gt=0, lt=100)
    """Of the reference's entropies: tokens below it are low-entropy ones."""
    against: str | None = None
    """Label of the model that the others are compared with; null: no comparison."""

    @model_validator(mode="after")
    def _labels(self) -> LikelihoodStudy:
        if REFERENCE in self.models:
            raise ReqatError(f"models: {REFERENCE!r} is the label of the reference; call this one something else.")
        if self.against is not None and self.against not in self.models:
            raise unknown("label", self.against, self.models, where="against")
        return self

    def runs(self) -> dict[str, dict[int | None, ModelChoice]]:
        """Label, the reference's first -> training seed (None: the tier's first) -> the model of that seed."""
        out: dict[str, dict[int | None, ModelChoice]] = {}
        for label, choice in {REFERENCE: self.reference, **self.models}.items():
            seeds = [choice.seed] if choice.seed is not None or not self.training_seeds else self.training_seeds
            out[label] = {seed: choice.model_copy(update={"seed": seed}) for seed in seeds}
        return out

    @staticmethod
    def role(label: str, seed: int | None) -> str:
        """The role of one run of a model."""
        return label if seed is None else f"{label}, seed {seed}"

    def choices(self) -> dict[str, ModelChoice]:
        """Role of every run -> model."""
        return {self.role(label, seed): c for label, runs in self.runs().items() for seed, c in runs.items()}


class GradientsStudy(_Study):
    """The share of low-entropy tokens in the gradient while a QAT stage is trained anew: Figure 7."""

    kind: Literal["gradients"]
    model: ModelChoice
    every_steps: Count
    """Optimizer steps from one look to the next."""
    asks: ClassVar[Literal["tier", "validation", "nothing"]] = "nothing"


class KeysStudy(_Study):
    """Keys before and after RoPE, Q-FIT's error maps and the inputs of `down_proj`: Figures 5, 10(a) and 11(a).

    All of them are of the model that Q-FIT was calibrated on, in full precision.
    """

    kind: Literal["keys"]
    model: ModelChoice
    """One whose recipe has a Q-FIT step with scale and shift."""
    sequences: Size = 8
    """Of Q-FIT's calibration sequences, those that are looked at."""
    rotation: Rotation = 32
    """Size of the block Hadamard rotation of `down_proj`'s inputs."""
    asks: ClassVar[Literal["tier", "validation", "nothing"]] = "nothing"


class OverviewStudy(_Asked):
    """One position of a verified trace as three models see it, for the overview of Figure 3."""

    kind: Literal["overview"]
    bf16: ModelChoice
    qat: ModelChoice
    sem: ModelChoice
    """Trained with a term `sem`; its stages are those that the figure draws."""
    asks: ClassVar[Literal["tier", "validation", "nothing"]] = "validation"


StudySettings = Annotated[
    PairStudy
    | RoutingStudy
    | NoiseStudy
    | ResetStudy
    | DynamicsStudy
    | LikelihoodStudy
    | GradientsStudy
    | KeysStudy
    | OverviewStudy,
    Field(discriminator="kind"),
]
KINDS: tuple[str, ...] = tuple(
    kind for model in get_args(get_args(StudySettings)[0]) for kind in get_args(model.model_fields["kind"].annotation)
)
"""Kinds of study, in the order of the union."""


class StudiesFile(Strict):
    """`config/studies.yaml`: tier -> studies. A tier without a section has none of their tables and figures."""

    tiers: dict[str, list[StudySettings]]

    @model_validator(mode="after")
    def _named_apart(self) -> StudiesFile:
        for tier, studies in self.tiers.items():
            names = [(study.kind, study.label) for study in studies]
            for name in names:
                if names.count(name) > 1:
                    raise ReqatError(f"{tier}: two studies of kind {name[0]!r} are called {name[1]!r}; give names.")
        return self


class StudiedModel(Strict):
    """A stage's model at a precision."""

    stage: str
    precision: PrecisionSpec


class PlannedStudy(Strict):
    """A study with its models looked up: everything that its numbers depend on, and therefore its id."""

    settings: StudySettings
    models: dict[str, StudiedModel]
    """Role -> model."""
    given: dict[str, str] = Field(default_factory=dict)
    """Role -> further stage whose folder is read (of a training made anew: its parent and its trace store)."""
    problems: ProblemSet | None = None
    decoding: Decoding | None = None
    """The tier's limits of a response; how tokens are chosen is the study's own."""

    @property
    def kind(self) -> str:
        """Of `KINDS`."""
        return self.settings.kind

    @property
    def inputs(self) -> dict[str, str]:
        """Role -> id of the stage whose folder fills it."""
        return {role: model.stage for role, model in self.models.items()} | self.given

    @cached_property
    def id(self) -> str:
        """`study-<kind>-` and twelve hex digits of the sha256 over everything above."""
        return f"study-{self.kind}-{digest(self, DIGEST_LENGTH)}"


def resolve(plan: Plan, choice: ModelChoice, where: str) -> StudiedModel:
    """The stage and precision of a model among the cells of a plan.

    Raises `ReqatError` that opens with `where` if the plan has no such cell, saying what it has of the recipe.
    """
    tier = plan.tier
    label = choice.model or next(iter(tier.models))
    if label not in tier.models:
        raise unknown("model", label, tier.models, where=where)
    total = choice.total or tier.claim_total(label)
    seed = tier.training_seeds[0] if choice.seed is None else choice.seed
    of_recipe = [cell for cell in plan.cells if cell.model == label and cell.recipe == choice.recipe]
    if not of_recipe:
        raise unknown("recipe", choice.recipe, {cell.recipe for cell in plan.cells if cell.model == label}, where=where)
    found = [
        plan.evaluation(cell.evaluation)
        for cell in of_recipe
        if cell.precision == choice.precision
        and cell.multiple in (None, total)
        and (cell.multiple is None or cell.training_seed == seed)
    ]
    if not found:
        there = sorted({f"{c.precision} (total {c.multiple}, seed {c.training_seed})" for c in of_recipe})
        raise ReqatError(
            f"{where}: tier {tier.name} has no model of recipe {choice.recipe!r} at {choice.precision}, total {total}, "
            f"training seed {seed}; of that recipe it has {', '.join(there)}. Name one of them, or add the cell to an "
            "artifact of config/recipes.yaml."
        )
    # An ablation of the global scale asks for one model in several modes; a study takes the one that is graded.
    usual = [e for e in found if e.precision.global_scale in (None, tier.evaluation.global_scale)]
    first = (usual or found)[0]
    if first.precision.global_scale == "static":
        raise ReqatError(f"{where}: a study calibrates nothing, so it takes no static global scales ({choice.recipe}).")
    return StudiedModel(stage=first.stage, precision=first.precision)


def _runs(plan: Plan, settings: LikelihoodStudy, where: str) -> dict[str, StudiedModel]:
    """The runs of every model that the plan has, at least one of each; what trains nothing is one model, not several.

    Raises `ReqatError` as `resolve` for a model that the plan has at none of the training seeds.
    """
    out: dict[str, StudiedModel] = {}
    for label, runs in settings.runs().items():
        found: dict[str, StudiedModel] = {}
        missing: list[ReqatError] = []
        for seed, choice in runs.items():
            try:
                model = resolve(plan, choice, where)
            except ReqatError as error:
                missing.append(error)
                continue
            if model not in found.values():
                found[settings.role(label, seed)] = model
        if not found:
            raise missing[0]
        out |= found
    return out


def plan_study(plan: Plan, settings: Any) -> PlannedStudy:
    """A study on the models of a plan.

    Raises `ReqatError` as `resolve`, and for a study that trains a stage anew which is no training, that looks at the
    keys of a model without Q-FIT, or at SEM in one without it."""
    where = f"config/{FILE}: study {settings.label} of tier {plan.tier.name}"
    if isinstance(settings, LikelihoodStudy):
        models = _runs(plan, settings, where)
    else:
        models = {role: resolve(plan, choice, where) for role, choice in settings.choices().items()}
    given: dict[str, str] = {}
    if isinstance(settings, GradientsStudy):
        stage = plan.stage(models["model"].stage)
        if stage.kind != "qat":
            raise ReqatError(f"{where}: {stage.id} is no QAT stage, so there is no training to look into.")
        given = stage.inputs
    if isinstance(settings, KeysStudy):
        given = _fitted(plan, models["model"], where)
    if isinstance(settings, OverviewStudy) and sem_term(plan, models["sem"].stage) is None:
        raise ReqatError(f"{where}: sem ({settings.sem.recipe}) was trained without a term sem; name another recipe.")
    if settings.asks == "nothing":
        return PlannedStudy(settings=settings, models=models, given=given)
    how = plan.tier.evaluation
    families = how.families if how.families is not None else plan.tier.data.families
    if not families:
        raise ReqatError(f"{where}: it asks task families, and the tier has a benchmark alone; leave the study out.")
    split = how.split if settings.asks == "tier" else "validation"
    problems = ProblemSet(families=families, split=split, n=settings.n, seed=how.problem_seed)
    return PlannedStudy(settings=settings, models=models, given=given, problems=problems, decoding=how.decoding)


def _fitted(plan: Plan, model: StudiedModel, where: str) -> dict[str, str]:
    """Role -> stage of a model's Q-FIT: the model `before`, what was `fitted`, and the trace store. Raises `ReqatError`
    where a model has none of scale and shift."""
    for stage in plan.lineage(model.stage):
        s = stage.settings
        if isinstance(s, QFitSettings) and s.scale and s.shift:
            return {"before": stage.inputs["parent"], "fitted": stage.id, "data": stage.inputs["data"]}
    raise ReqatError(f"{where}: {model.stage} has no Q-FIT of scale and shift behind it, so no keys that it fitted.")


def sem_term(plan: Plan, stage: str) -> SEMTerm | None:
    """The term `sem` that a stage was trained with; None if there is none."""
    training = getattr(plan.stage(stage).settings, "training", None)
    terms = training.objective if training is not None else ()
    return next((term for term in terms if isinstance(term, SEMTerm)), None)


def load_studies(plan: Plan, folder: Path) -> dict[str, PlannedStudy]:
    """The studies of a plan's tier by id, in the order of the file; none if it has no section.

    Raises `ReqatError` on a fault in the file, or for a model that the plan does not have.
    """
    path = folder / FILE
    if not path.exists():
        return {}
    asked = parse(StudiesFile, read_yaml(path), f"config/{FILE}").tiers.get(plan.tier.name, [])
    planned = [plan_study(plan, settings) for settings in asked]
    return {study.id: study for study in planned}


def study_called(studies: Mapping[str, PlannedStudy], id: str, tier: str) -> PlannedStudy:
    """The study `id`; `ReqatError` with the closest one if the tier has none of that name."""
    if id not in studies:
        raise unknown("study", id, studies, where=f"tier {tier} (config/{FILE} says which)")
    return studies[id]
