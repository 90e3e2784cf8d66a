"""From a tier and the recipes to the plan: every stage once, every evaluation once, and the table cells that point at
them.

Each cell walks its recipe from the base model; stages are put in a dictionary by id, so cells that share work share
stages without anybody arranging it. Round-to-nearest PTQ needs no stage at all: an evaluation at a precision rounds
the weights itself.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from reqat.config.base import Strict, parse
from reqat.config.errors import ReqatError, unknown
from reqat.config.precision import PrecisionSpec, family
from reqat.config.ptq import has_option
from reqat.config.recipe import (
    OWN,
    Catalogue,
    DecodingOptions,
    PTQStep,
    QFitStep,
    Recipe,
    Rows,
    Step,
    TrainStep,
    amount,
)
from reqat.config.stage import (
    BaseSettings,
    DataStageSettings,
    Evaluation,
    PTQSettings,
    QFitSettings,
    Selection,
    Settings,
    Stage,
    TraceSource,
    TrainSettings,
)
from reqat.config.tier import ABSENT, Model, Tier

BF16 = PrecisionSpec()
UNPINNED = "not pinned yet"


class Cell(Strict):
    """One number of a table or figure that an evaluation is to measure."""

    artifact: str
    model: str
    recipe: str
    method: str
    precision: str
    condition: str
    total_tokens: int | None
    """Tokens that the method spent in all; None for methods that train nothing."""
    multiple: int | None
    """`total_tokens` in QAT budgets: the tier's 2 stands beside the paper's 140M (2 x 70M)."""
    training_seed: int
    evaluation: str
    """Id of the evaluation that measures it."""
    problems: str = OWN
    """Name of the set of problems that it is graded on."""


@dataclass(frozen=True)
class Plan:
    """Everything a tier asks for."""

    tier: Tier
    stages: dict[str, Stage] = field(default_factory=dict)
    """By id, parents before children."""
    evaluations: dict[str, Evaluation] = field(default_factory=dict)
    cells: list[Cell] = field(default_factory=list)
    bases: dict[str, str] = field(default_factory=dict)
    """Model label -> id of its base stage."""
    scratch: dict[str, str] = field(default_factory=dict)
    """Model label -> id of the `base` stage that trains it from scratch, where the tier says how (target `base`)."""

    def stage(self, id: str) -> Stage:
        """The stage called `id`; `ReqatError` with the closest match if the plan has none."""
        if id not in self.stages:
            raise unknown("stage", id, self.stages, where=f"tier {self.tier.name}")
        return self.stages[id]

    def evaluation(self, id: str) -> Evaluation:
        """The evaluation called `id`, or the part of one; `ReqatError` with the closest match if the plan has none."""
        if (whole := self.evaluations.get(id)) is not None:
            return whole
        name = id.rpartition("-")[0]
        if name in self.evaluations and id in (parts := self.shards(name)):
            return parts[id]
        raise unknown("evaluation", id, self.evaluations, where=f"tier {self.tier.name}")

    def shards(self, id: str) -> dict[str, Evaluation]:
        """The parts that the tier's jobs split an evaluation into, by id; none where one job does all of it, or `id`
        is a part itself."""
        whole = self.evaluations.get(id)
        return {} if whole is None else whole.shards(self.tier.resources.evaluation_shards)

    def lineage(self, id: str) -> Iterator[Stage]:
        """The stage `id` and the stages whose models it stands on, the newest first."""
        current: str | None = id
        while current is not None:
            stage = self.stage(current)
            yield stage
            current = stage.parent

    def since_base(self, id: str) -> Iterator[Stage]:
        """As `lineage`, without the base of a model of the tier and what made it."""
        bases = set(self.bases.values())
        return itertools.takewhile(lambda stage: stage.id not in bases and stage.kind != "base", self.lineage(id))

    @cached_property
    def needed(self) -> dict[str, Stage]:
        """Stages that some evaluation stands on, parents first: those that `figures/` runs (the rest serve target
        `base`)."""
        wanted = {id for evaluation in self.evaluations for id in self.behind(evaluation)}
        return {id: stage for id, stage in self.stages.items() if id in wanted}

    def behind(self, evaluation: str) -> set[str]:
        """Ids of the stages that an evaluation stands on."""
        asked = self.evaluation(evaluation)
        wanted, open_ids = set(asked.inputs.values()), [asked.stage]
        while open_ids:  # a teacher has a lineage of its own
            for stage in self.lineage(open_ids.pop()):
                wanted |= {stage.id, *stage.inputs.values()}
                open_ids += [stage.teacher] if stage.teacher is not None else []
        return wanted

    def dump(self) -> dict[str, Any]:
        """The plan as JSON values; `Plan.restore` reads it back."""
        return {
            "tier": self.tier.model_dump(mode="json"),
            "stages": {id: stage.model_dump(mode="json") for id, stage in self.stages.items()},
            "evaluations": {id: evaluation.model_dump(mode="json") for id, evaluation in self.evaluations.items()},
            "cells": [cell.model_dump(mode="json") for cell in self.cells],
            "bases": self.bases,
            "scratch": self.scratch,
        }

    @classmethod
    def restore(cls, data: dict[str, Any], where: str) -> Plan:
        """The plan that `dump` gave. Raises `ReqatError` if `where` (a file) holds something else, or ids that no
        longer fit."""
        try:
            stages = {id: parse(Stage, value, f"{where}: {id}") for id, value in data["stages"].items()}
            evaluations = {id: parse(Evaluation, v, f"{where}: {id}") for id, v in data["evaluations"].items()}
            cells = [parse(Cell, value, f"{where}: cells") for value in data["cells"]]
            bases, scratch = dict(data["bases"]), dict(data["scratch"])
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            if isinstance(error, ReqatError):
                raise
            raise ReqatError(f"{where}: not a plan ({error!r}); `reqat plan --json` prints one.") from None
        restored = cls(parse(Tier, data.get("tier"), f"{where}: tier"), stages, evaluations, cells, bases, scratch)
        ids = {id: stage.id for id, stage in stages.items()} | {id: e.id for id, e in evaluations.items()}
        for id, now in ids.items():
            if id != now:
                raise ReqatError(f"{where}: {id} is {now} under this version's rules; use the version that wrote it.")
        restored.check(where)
        return restored

    def check(self, where: str) -> None:
        """Raise `ReqatError`, opening with `where`, if the plan names a stage or evaluation that it does not have."""
        named = {id: f"base of {label}" for label, id in [*self.bases.items(), *self.scratch.items()]}
        reads = {id: stage.inputs for id, stage in self.stages.items()}
        reads |= {id: evaluation.inputs for id, evaluation in self.evaluations.items()}
        for owner, inputs in reads.items():
            named |= dict.fromkeys(inputs.values(), f"input of {owner}")
        for id, role in named.items():
            if id not in self.stages:
                raise ReqatError(f"{where}: stage {id}, {role}, is missing; write the plan again (reqat plan --json).")
        measured = {cell.evaluation for cell in self.cells}
        for id in sorted(measured ^ self.evaluations.keys()):
            what = "evaluation" if id in measured else "cell of evaluation"
            raise ReqatError(f"{where}: the {what} {id} is missing; write the plan again (reqat plan --json).")

    @cached_property
    def artifacts(self) -> list[str]:
        """Names of the artifacts that the tier makes, in order."""
        return list(dict.fromkeys(cell.artifact for cell in self.cells))


class _Builder:
    def __init__(
        self, tier: Tier, catalogue: Catalogue, pinned: Mapping[str, str], files: Mapping[str, str] | None = None
    ) -> None:
        self.tier, self.catalogue = tier, catalogue
        self.plan = Plan(tier)
        self.pinned = pinned
        self.files = files or {}

    def add(
        self,
        kind: str,
        settings: Settings,
        precision: PrecisionSpec = BF16,
        parent: str | None = None,
        data: str | None = None,
        teacher: str | None = None,
    ) -> Stage:
        stage = Stage(
            kind=kind,  # type: ignore[arg-type]
            settings=settings,
            precision=precision,
            parent=parent,
            data=data,
            teacher=None if teacher == parent else teacher,
        )
        return self.plan.stages.setdefault(stage.id, stage)

    def base(self, label: str, model: Model) -> Stage:
        given = self.given(label, model)
        if model.tuning is None:
            return given
        read = DataStageSettings(**model.tuning.data.model_dump() | {"tokenizer": "model"})
        store = self.add("data", read, parent=given.id)
        return self.add("finetune", model.tuning.settings(), parent=given.id, data=store.id)

    def given(self, label: str, model: Model) -> Stage:
        if model.scratch is not None:
            store = self.add("data", DataStageSettings(**model.scratch.data.model_dump()))
            trained = self.add("base", model.scratch.settings(label), data=store.id)
            self.plan.scratch[label] = trained.id
            if model.source == "scratch":
                return trained
        reference = self.pinned.get(label, UNPINNED) if model.source == "pinned" else model.reference
        return self.add("base", BaseSettings(source=model.source, name=label, reference=reference))

    def store(self, base: Stage) -> Stage:
        """The store that fine-tuning and QAT read, counted with the base model's own tokenizer; of a file of traces,
        those that fit into a row of every training, unless the tier says another length."""
        settings = self.tier.data.model_dump() | {"tokenizer": "model"}
        name = self.tier.data.source
        if name != "generated":
            own = self.tier.data.own or TraceSource()
            shortest = min(training.row_tokens for training in self.tier.train.all)
            settings["own"] = own.model_copy(
                update={
                    "name": name,
                    "sha256": self.files.get(name, ABSENT),
                    "row_tokens": own.row_tokens or shortest,
                }
            )
        return self.add("data", DataStageSettings(**settings), parent=base.id)

    def selection(self, step: TrainStep, total: int, model: Model, recipe: str) -> Selection:
        values = self.amounts(total)
        tokens, skip, epochs = amount(step.tokens, values), 0, step.epochs
        if step.traces == "different":
            skip = values["ft"]
        subset = model.finetune_subset_tokens
        if subset is not None and tokens > subset:
            if tokens % subset:
                raise ReqatError(
                    f"recipe {recipe}: {tokens} tokens are no whole number of epochs over a subset of {subset} tokens."
                )
            tokens, epochs = subset, epochs * tokens // subset
        if subset is not None and skip:
            skip = subset
        if skip + tokens > self.tier.data.tokens:
            raise ReqatError(
                f"recipe {recipe} reads traces up to token {skip + tokens}, but the store is asked for "
                f"{self.tier.data.tokens} only: raise data.tokens in config/tiers/{self.tier.name}.yaml."
            )
        return Selection(tokens=tokens, skip_tokens=skip, epochs=epochs)

    def amounts(self, total: int) -> dict[str, int]:
        qat = self.tier.budget.qat_tokens
        return {"total": total, "qat": qat, "ft": total - qat}

    def settings(self, step: Step, name: str, total: int, model: Model, seed: int, finetuned: bool) -> Settings:
        if isinstance(step, QFitStep):
            qfit = self.tier.qfit
            return QFitSettings(
                scale=step.scale, shift=step.shift, variant=step.variant, grid=qfit.grid, calibration=qfit.calibration
            )
        if isinstance(step, PTQStep):
            ptq = self.tier.ptq
            of_tier = {"damp": ptq.damp} if has_option(step.method, "damp") else {}
            return PTQSettings(
                method=step.method,
                options={**of_tier, **step.options},
                calibration=ptq.calibration,
                share_global_scale=self.tier.train.share_global_scale,
            )
        train = self.tier.train
        training = train.finetune if step.step == "finetune" else train.qat
        if step.step == "qat" and not finetuned and train.qat_from_base is not None:
            training = train.qat_from_base
        rate = train.rates.get(name) if step.step == "qat" else None
        given = {"objective": step.objective, "gradient": step.gradient, "lr": rate}
        training = training.model_copy(update={name: value for name, value in given.items() if value is not None})
        return TrainSettings(
            training=training,
            traces=self.selection(step, total, model, name),
            seed=seed,
            share_global_scale=train.share_global_scale and step.step == "qat",
        )

    def precision(self, name: str, recipe: Recipe, global_scale: str, model: Model) -> PrecisionSpec:
        options = recipe.precision.get(family(name))
        given = options.model_dump(exclude_none=True) if options else {}
        if (rotation := recipe.rotation(name)) is not None:
            given = {"rotation": rotation} | given
        if given.get("kv_rotation") == "head_dim":
            given["kv_rotation"] = model.head_dim
            if model.head_dim is None:
                raise ReqatError(
                    f"{recipe.method}: kv_rotation: head_dim of a model whose size is not stated; add `shape` to it in "
                    f"config/tiers/{self.tier.name}.yaml."
                )
        return PrecisionSpec(**({"global_scale": global_scale} | given | {"name": name}))

    def chain(self, name: str, precision: str, total: int, model: Model, base: Stage, store: Stage, seed: int) -> Stage:
        """The last stage of a recipe."""
        recipe = self.catalogue.recipe(name)
        quantized = self.precision(precision, recipe, self.tier.train.global_scale, model)
        current, finetuned = base, False
        teachers = {"base": base.id}
        for step in recipe.steps:
            if step.formats is not None and quantized.family not in step.formats:
                continue
            settings = self.settings(step, name, total, model, seed, finetuned)
            at = BF16 if step.step == "finetune" else quantized
            teacher = None
            if isinstance(step, TrainStep) and step.teacher != "parent":
                teacher = self.teacher(step.teacher, teachers, f"recipe {name}")
            current = self.add(step.step, settings, at, current.id, store.id, teacher)
            finetuned |= step.step == "finetune"
            if step.step == "finetune":
                teachers["finetuned"] = current.id
        return current

    def teacher(self, name: str, made: dict[str, str], where: str) -> str:
        """Id of the stage whose model is the teacher called `name`; of another model of the tier, its base."""
        if name in made:
            return made[name]
        if name == "finetuned" or name not in self.tier.models:
            raise unknown("teacher", name, ["parent", *made, *self.tier.models], where=where)
        return self.base(name, self.tier.models[name]).id

    def evaluate(
        self, stage: Stage, precision: PrecisionSpec, store: Stage, options: DecodingOptions, asked: str
    ) -> Evaluation:
        decoding = self.tier.evaluation.decoding.model_copy(update=options.model_dump(exclude_none=True))
        problems, seeds = self.tier.problem_set(asked, self.files)
        seeds = seeds[:1] if decoding.greedy else seeds
        static: dict[str, Any] = {}
        if precision.global_scale == "static":
            static = {"calibration": self.tier.ptq.calibration, "data": store.id}
        evaluation = Evaluation(
            stage=stage.id, precision=precision, problems=problems, decoding=decoding, seeds=tuple(seeds), **static
        )
        return self.plan.evaluations.setdefault(evaluation.id, evaluation)

    def totals(self, rows: Rows, recipe: Recipe, label: str) -> list[int | None]:
        trains = any(isinstance(step, TrainStep) for step in recipe.steps)
        if not trains:
            return [None]
        if (fixed := self.fixed_multiple(recipe)) is not None:
            return [fixed]
        return list(self.tier.budget.totals) if rows.totals == "all" else [self.tier.claim_total(label)]

    def fixed_multiple(self, recipe: Recipe) -> int | None:
        """The recipe's fixed total in QAT budgets, where it has one."""
        qat = self.tier.budget.qat_tokens
        total = recipe.fixed_total(qat)
        if total is not None and total % qat:
            raise ReqatError(
                f"{recipe.method}: its {total} tokens are no whole number of QAT budgets of {qat}; give its amounts "
                "in whole multiples of `qat`, or one of them in `total` or `ft`."
            )
        return None if total is None else total // qat

    def seeds(self, recipe: str, precision: str, multiple: int | None, label: str) -> list[int]:
        claim, total = self.tier.claim_seeds, self.tier.claim_total(label)
        seeds = list(self.tier.training_seeds if multiple is not None else self.tier.training_seeds[:1])
        at_claim = multiple == total or self.fixed_multiple(self.catalogue.recipe(recipe)) is not None
        if at_claim and recipe in claim.recipes and precision in claim.precisions:
            seeds += [seed for seed in claim.seeds if seed not in seeds]
        return seeds

    def rows(self, artifact: str, rows: Rows, label: str, model: Model, base: Stage, store: Stage) -> None:
        only = self.tier.only
        for name in rows.recipes:
            recipe = self.catalogue.recipe(name)
            for precision in rows.precisions:
                if (only.recipes is not None and name not in only.recipes) or (
                    only.precisions is not None and precision not in (*only.precisions, "BF16")
                ):
                    continue
                for multiple in self.totals(rows, recipe, label):
                    for seed in self.seeds(name, precision, multiple, label):
                        total = None if multiple is None else multiple * self.tier.budget.qat_tokens
                        stage = self.chain(name, precision, total or 0, model, base, store, seed)
                        scale = rows.global_scale or self.tier.evaluation.global_scale
                        at = self.precision(precision, recipe, scale, model)
                        for asked in rows.problems:
                            evaluation = self.evaluate(stage, at, store, rows.decoding, asked)
                            self.plan.cells.append(
                                Cell(
                                    artifact=artifact,
                                    model=label,
                                    recipe=name,
                                    method=rows.method or recipe.method,
                                    precision=precision,
                                    condition=rows.condition,
                                    total_tokens=total,
                                    multiple=multiple,
                                    training_seed=seed,
                                    evaluation=evaluation.id,
                                    problems=asked,
                                )
                            )

    def build(self) -> Plan:
        for label, model in self.tier.models.items():
            base = self.base(label, model)
            self.plan.bases[label] = base.id
            store = self.store(base)
            for artifact in model.artifacts:
                for rows in self.catalogue.artifacts[artifact].rows:
                    self.rows(artifact, rows, label, model, base, store)
        return self.plan


def plan(
    tier: Tier,
    catalogue: Catalogue,
    *,
    pinned: Mapping[str, str] | None = None,
    files: Mapping[str, str] | None = None,
) -> Plan:
    """The plan of a tier. `pinned` has the sha256 of the weights of pinned bases by model label (`pinned_base` reads
    one); a model that is not in it has none yet. `files` has the sha256 of files of the data folder by name, those of
    `tier.files` that are there.

    Raises `ReqatError` if a recipe's amounts do not fit the tier's budgets and trace store.
    """
    return _Builder(tier, catalogue, pinned or {}, files).build()


class _OwnBuilder(_Builder):
    """For one recipe on a store that is there already: a step that asks for more tokens than it has sees its traces
    again, each equally often."""

    def __init__(self, tier: Tier, catalogue: Catalogue, longest: int) -> None:
        super().__init__(tier, catalogue, {})
        self.longest = longest
        self.seen: int | None = None  # by the last fine-tuning, of the store

    def selection(self, step: TrainStep, total: int, model: Model, recipe: str) -> Selection:
        values, there = self.amounts(total), self.tier.data.tokens
        tokens, skip = amount(step.tokens, values), 0
        if step.traces == "different":
            skip = values["ft"]
            there -= skip + self.longest  # both ends are rounded up to whole traces
        elif step.step == "qat" and self.seen is not None:
            there = min(there, self.seen)  # the very traces of stage 1, and no others
        if there < 1:
            raise ReqatError(
                f"recipe {recipe}: fine-tuning takes {skip} of the {self.tier.data.tokens} tokens, which leaves no "
                "other traces for QAT; lower --total, or give more traces."
            )
        passes = -(-tokens // there)
        chosen = Selection(tokens=-(-tokens // passes), skip_tokens=skip, epochs=passes * step.epochs)
        if step.step == "finetune":
            self.seen = chosen.tokens
        return chosen


def own_plan(
    tier: Tier, catalogue: Catalogue, recipe: str, precision: str, total: int, base: Stage, store: Stage, longest: int
) -> tuple[Plan, Stage, PrecisionSpec]:
    """The plan of one recipe of `total` tokens on a model (`base`) and traces (`store`) of somebody's own, its last
    stage, and the precision that the recipe's model is meant for. `tier` has the settings, and the size of the store
    (`data.tokens`), whose longest trace has `longest` tokens; its one model is the base's.

    Raises `ReqatError` if the recipe's amounts do not fit the traces.
    """
    builder = _OwnBuilder(tier, catalogue, longest)
    builder.plan.stages.update({base.id: base, store.id: store})
    (model,) = tier.models.values()
    last = builder.chain(recipe, precision, total, model, base, store, tier.training_seeds[0])
    at = builder.precision(precision, catalogue.recipe(recipe), tier.train.global_scale, model)
    return builder.plan, last, at
