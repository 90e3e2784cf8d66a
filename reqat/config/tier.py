"""Tiers: how much of everything. One word (`smoke`, `laptop`, `overnight`, `converged`, `paper`) picks a file of
`config/tiers/`.

A tier file may open with `extends: testbed` and then says only what differs; mappings merge key by key, lists are
replaced whole, and a model that is null is left out.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field, field_validator, model_validator

from reqat.config.base import Count, Families, Seed, Seeds, Size, Strict, distinct, merge, parse
from reqat.config.errors import ReqatError, unknown
from reqat.config.files import read_yaml
from reqat.config.precision import GlobalScale, family
from reqat.config.recipe import OWN, Catalogue
from reqat.config.stage import (
    Architecture,
    BaseSettings,
    Benchmark,
    BenchmarkName,
    Calibration,
    DataSettings,
    Decoding,
    ProblemSet,
    Selection,
    Training,
    TrainSettings,
)

Source = Literal["scratch", "pinned", "package", "path"]


class Scratch(Strict):
    """How the base model is trained from nothing; also what `snakemake base` does on tiers that start from the pinned
    checkpoint."""

    architecture: Architecture
    data: DataSettings
    training: Training = Training()
    tokens: Count
    epochs: Count = 1
    seed: Seed = 0

    def settings(self, name: str) -> BaseSettings:
        """Settings of the `base` stage that this describes."""
        traces = Selection(tokens=self.tokens, epochs=self.epochs)
        return BaseSettings(
            source="scratch",
            name=name,
            architecture=self.architecture,
            training=self.training,
            traces=traces,
            seed=self.seed,
        )


class Tuning(Strict):
    """How a model is fine-tuned, in BF16, to be the base that recipes start from: a published model answers in no
    form that is known beforehand, as R1-Distill's models did before their traces were distilled into them."""

    data: DataSettings
    training: Training = Training()
    tokens: Count
    epochs: Count = 1
    seed: Seed = 0

    @model_validator(mode="after")
    def _readable(self) -> Tuning:
        if self.data.source != "generated":
            raise ReqatError(
                f"tuning: data.source {self.data.source!r}: traces of a file cannot tune a base; generate them."
            )
        if self.tokens > self.data.tokens:
            raise ReqatError(
                f"tuning: it reads {self.tokens} tokens, but data.tokens asks for {self.data.tokens} only: raise those."
            )
        return self

    def settings(self) -> TrainSettings:
        """Settings of the `finetune` stage that this describes."""
        traces = Selection(tokens=self.tokens, epochs=self.epochs)
        return TrainSettings(training=self.training, traces=traces, seed=self.seed)


class Shape(Strict):
    """Size of a published model, enough to compute the memory it needs before it is there."""

    hidden_size: Size
    layers: Size
    heads: Size
    kv_heads: Size
    head_dim: Size
    mlp: Size
    vocabulary: Size
    tie_embeddings: bool = False


class Model(Strict):
    """One model of the tier and the artifacts made with it."""

    source: Source
    reference: str | None = None
    """`package`: name of the installed package; `path`: folder under the models folder."""
    scratch: Scratch | None = None
    tuning: Tuning | None = None
    """None: the base is the model as it is."""
    artifacts: list[str]
    """Empty for a model that is a teacher alone."""
    finetune_subset_tokens: Count | None = None
    """If set, longer stages make several epochs over this many tokens instead of seeing more traces (the paper's
    R1-Llama-8B)."""
    claim_total: Count | None = None
    """In place of the budget's, for this model's artifacts."""
    shape: Shape | None = None

    @property
    def head_dim(self) -> int | None:
        """Size of an attention head, where the tier says it."""
        if self.shape is not None:
            return self.shape.head_dim
        built = self.scratch.architecture if self.scratch is not None else None
        return None if built is None else built.hidden_size // built.heads

    @model_validator(mode="after")
    def _complete(self) -> Model:
        if self.source == "scratch" and self.scratch is None:
            raise ReqatError("source 'scratch' needs a `scratch` section: architecture, data, tokens.")
        if self.source in ("package", "path") and not self.reference:
            raise ReqatError(f"source {self.source!r} needs a `reference`: the package's name or the model's folder.")
        return self


class Trainings(Strict):
    """Training settings per kind of stage."""

    finetune: Training = Training()
    qat: Training = Training()
    qat_from_base: Training | None = None
    """For QAT that no fine-tuning precedes; null: as `qat`."""
    rates: dict[str, Annotated[float, Field(gt=0, le=1e3)]] = Field(default_factory=dict)
    """Recipe -> learning rate of its `qat` steps, so that every method can have its own best one; a recipe that is not
    named takes that of `qat` or `qat_from_base`."""
    global_scale: GlobalScale = "row"
    share_global_scale: bool = False
    """One global scale for the weights that engines join (q, k, v; gate, up), in QAT and in PTQ."""

    @property
    def all(self) -> list[Training]:
        """Those that a stage can have."""
        return [self.finetune, self.qat, *([self.qat_from_base] if self.qat_from_base is not None else [])]


class ClaimSeeds(Strict):
    """The cells that claims rest on are trained with these seeds too, at the tier's `claim_total`."""

    seeds: Seeds = Field(default_factory=list)
    recipes: list[str] = Field(default_factory=list)
    precisions: list[str] = Field(default_factory=list)


def _some_family(value: Families | None) -> Families | None:
    if value is not None and not value:
        raise ValueError("name at least one task family, or leave it out")
    return value


class Budget(Strict):
    """Tokens: QAT's share, and the totals compared, as multiples of it."""

    qat_tokens: Count
    totals: Annotated[list[Count], AfterValidator(distinct)] = Field(min_length=1)
    claim_total: Count

    @model_validator(mode="after")
    def _consistent(self) -> Budget:
        if self.claim_total not in self.totals:
            raise ReqatError(f"claim_total {self.claim_total} is none of the totals {self.totals}.")
        if min(self.totals) < 2:
            raise ReqatError(f"totals {self.totals}: each must be at least 2, one for fine-tuning and one for QAT.")
        return self


ABSENT = "not there yet"
"""In place of the digest of a file that is not in the data folder yet."""


class _Asked(Strict):
    families: Families | None = None
    """Null: the families of the traces."""
    benchmark: BenchmarkName | None = None
    """In place of families: a file of problems, `<benchmark>.jsonl` in the data folder."""

    _families = field_validator("families")(_some_family)

    @model_validator(mode="after")
    def _either(self) -> Self:
        if self.families is not None and self.benchmark is not None:
            raise ReqatError(f"families and benchmark {self.benchmark}: give one or the other (null: not).")
        return self


class NamedProblems(_Asked):
    """A set of problems beside the tier's own; what it leaves out is as in the tier's own."""

    n: Count | None = None
    split: Literal["validation", "test"] | None = None
    problem_seed: Seed | None = None
    seeds: Seeds | None = Field(default=None, min_length=1)
    """Sampling seeds."""


class EvaluationPlan(_Asked):
    """How every model of the tier is graded."""

    split: Literal["validation", "test"] = "test"
    n: Count
    problem_seed: Seed = 1
    seeds: Seeds = Field(min_length=1)
    decoding: Decoding = Decoding()
    global_scale: GlobalScale = "row"
    sets: dict[str, NamedProblems] = Field(default_factory=dict)
    """Further sets of problems by name. A tier that lists an artifact has every set that its rows name."""

    @field_validator("sets")
    @classmethod
    def _named(cls, sets: dict[str, NamedProblems]) -> dict[str, NamedProblems]:
        for name in sets:
            if name == OWN or not re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", name):
                raise ValueError(
                    f"{name!r}: name a set of problems with small letters, digits and hyphens, other than {OWN!r} (the "
                    "problems of the tier itself)"
                )
        return sets


class QFitPlan(Strict):
    """Q-FIT's grid and calibration."""

    grid: Size = 20
    calibration: Calibration = Calibration()


class PTQPlan(Strict):
    """Calibration of PTQ methods that need it."""

    damp: float = Field(default=0.01, gt=0)
    calibration: Calibration = Calibration()


class Only(Strict):
    """Restricts the artifacts to some recipes and precisions (null: all)."""

    recipes: list[str] | None = None
    precisions: list[str] | None = None


class Resources(Strict):
    """What jobs are given, and rough rates for `reqat plan`'s estimate."""

    device: Literal["cpu", "cuda"] = "cpu"
    gpu_memory_gib: float = Field(default=0, ge=0)
    """Memory of one GPU that the tier is planned for."""
    train_memory_mb: Count = 3000
    evaluate_memory_mb: Count = 2500
    runtime_minutes: Count = 600
    threads: int = Field(default=1, gt=0, le=4096)
    """Of a process."""
    processes: Annotated[int, Field(gt=0, le=1024)] = 1
    """Of a training, on each machine: they divide the model and its steps. On device `cuda`, one a GPU."""
    nodes: Annotated[int, Field(gt=0, le=1024)] = 1
    """Machines of a training, in a Slurm job."""
    offload: bool = False
    """Whether trainings keep weights, gradients and moments in host memory."""
    train_tokens_per_s: float = Field(default=8000, gt=0)
    qat_tokens_per_s: float = Field(default=5000, gt=0)
    responses_per_s: float = Field(default=15, gt=0)
    evaluation_shards: int = Field(default=1, gt=0, le=1024)
    """Jobs that share the sampling seeds of an evaluation; on a cluster they run side by side."""
    job_s: float = Field(default=8, ge=0)
    """Start-up and saving of a job, in seconds."""


class Tier(Strict):
    """A whole tier."""

    name: str
    title: str
    models: dict[str, Model]
    """Label in tables -> model."""
    data: DataSettings
    train: Trainings = Trainings()
    budget: Budget
    training_seeds: Seeds = Field(default_factory=lambda: [0], min_length=1)
    claim_seeds: ClaimSeeds = ClaimSeeds()
    evaluation: EvaluationPlan
    qfit: QFitPlan = QFitPlan()
    ptq: PTQPlan = PTQPlan()
    only: Only = Only()
    resources: Resources = Resources()

    @field_validator("models")
    @classmethod
    def _some(cls, models: dict[str, Model]) -> dict[str, Model]:
        if not models:
            raise ReqatError("name at least one model.")
        return models

    def claim_total(self, label: str) -> int:
        """The total, in QAT budgets, that the claims of the model `label` rest on: its own, else the budget's."""
        return self.models[label].claim_total or self.budget.claim_total

    @property
    def files(self) -> list[str]:
        """Names of the files in the data folder that the tier reads: traces, then benchmarks."""
        sets = [self.evaluation, *self.evaluation.sets.values()]
        traces = [] if self.data.source == "generated" else [self.data.source]
        return list(dict.fromkeys([*traces, *(f"{s.benchmark}.jsonl" for s in sets if s.benchmark is not None)]))

    def problem_set(self, name: str = OWN, digests: Mapping[str, str] = {}) -> tuple[ProblemSet, list[int]]:
        """The set of problems called `name`, and its sampling seeds. `digests` has the sha256 of the files of
        benchmarks that are there. Raises `ReqatError` with the closest name if the tier has no such set."""
        own = self.evaluation
        if name != OWN and name not in own.sets:
            remedy = f"Add it under evaluation.sets in config/tiers/{self.name}.yaml, or leave out the artifact."
            raise unknown("set of problems", name, [OWN, *own.sets], where=f"tier {self.name}", remedy=remedy)
        given = (own.sets[name] if name != OWN else NamedProblems()).model_dump(exclude_none=True)
        of = given if given.keys() & {"families", "benchmark"} else own.model_dump(include={"families", "benchmark"})
        benchmark, families = of.get("benchmark"), of.get("families")
        if benchmark is None and families is None:
            families = self.data.families
        problems = ProblemSet(
            families=families or {},
            benchmark=benchmark and Benchmark(name=benchmark, sha256=digests.get(f"{benchmark}.jsonl", ABSENT)),
            split=given.get("split", own.split),
            n=given.get("n", own.n),
            seed=given.get("problem_seed", own.problem_seed),
        )
        return problems, list(given.get("seeds", own.seeds))

    def check(self, catalogue: Catalogue) -> Tier:
        """The tier itself; raises `ReqatError` if it names a recipe, precision or artifact that `catalogue` lacks."""
        where = f"tier {self.name}"
        how = self.evaluation
        if how.families is None and how.benchmark is None and not self.data.families:
            raise ReqatError(f"{where}: evaluation: traces of a file have no families; name a benchmark, or families.")
        for label, model in self.models.items():
            for artifact in model.artifacts:
                if artifact not in catalogue.artifacts:
                    raise unknown("artifact", artifact, catalogue.artifacts, where=f"{where}: models.{label}.artifacts")
                for rows in catalogue.artifacts[artifact].rows:
                    for name in rows.problems:
                        self.problem_set(name)
        for key, named in (("claim_seeds", self.claim_seeds), ("only", self.only)):
            for recipe in named.recipes or ():
                if recipe not in catalogue.recipes:
                    raise unknown("recipe", recipe, catalogue.recipes, where=f"{where}: {key}.recipes")
            for precision in named.precisions or ():
                try:
                    family(precision)
                except ReqatError as error:
                    raise ReqatError(f"{where}: {key}.precisions: {error}") from None
        for recipe in self.train.rates:
            if recipe not in catalogue.recipes:
                raise unknown("recipe", recipe, catalogue.recipes, where=f"{where}: train.rates")
            if all(step.step != "qat" for step in catalogue.recipes[recipe].steps):
                raise ReqatError(
                    f"{where}: train.rates: recipe {recipe!r} has no step qat, whose learning rate this is; leave it "
                    "out (that of fine-tuning is train.finetune.lr)."
                )
        return self


def tier_names(folder: Path) -> list[str]:
    """Names of the tiers of a configuration folder."""
    return sorted(path.stem for path in (folder / "tiers").glob("*.yaml"))


def _tier_data(name: str, folder: Path, seen: tuple[str, ...] = ()) -> dict[str, Any]:
    if name not in tier_names(folder):
        raise unknown("tier", name, tier_names(folder))
    if name in seen:
        raise ReqatError(f"config/tiers/{name}.yaml: `extends` goes round in a circle: {' -> '.join([*seen, name])}.")
    path = folder / "tiers" / f"{name}.yaml"
    data = read_yaml(path)
    parent = data.pop("extends", None)
    if parent is not None and not isinstance(parent, str):
        raise ReqatError(f"{path}: extends: name one tier (given: {parent!r}).")
    merged = merge(_tier_data(parent, folder, (*seen, name)), data) if parent else data
    if isinstance(merged.get("models"), dict):
        merged["models"] = {label: model for label, model in merged["models"].items() if model is not None}
    return merged


def load_tier(name: str, folder: Path) -> Tier:
    """The tier called `name` of a configuration folder, checked against its recipes. Raises `ReqatError`."""
    data = _tier_data(name, folder) | {"name": name}
    return parse(Tier, data, f"config/tiers/{name}.yaml").check(load_catalogue(folder))


def load_catalogue(folder: Path) -> Catalogue:
    """Recipes and artifacts of a configuration folder. Raises `ReqatError`."""
    return parse(Catalogue, read_yaml(folder / "recipes.yaml"), "config/recipes.yaml")
