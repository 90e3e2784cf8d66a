"""Estimated time of each job of a plan, from the rates stated in its tier. A rough estimate.

Three rates describe a tier, each of a job on the cores or GPUs that it gets: tokens that BF16 training and QAT see a
second, and responses graded a second. What is read
without training (a forward pass alone) goes at twice training's rate, and a trace is taken to be half a packed row.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import get_args

from reqat.config.paths import made
from reqat.config.plan import Plan
from reqat.config.resources import Job, need
from reqat.config.stage import PTQSettings, QFitSettings, Stage, TrainSettings
from reqat.config.studies import (
    DynamicsStudy,
    GradientsStudy,
    LikelihoodStudy,
    NoiseStudy,
    OverviewStudy,
    PairStudy,
    PlannedStudy,
    ResetStudy,
    RoutingStudy,
)
from reqat.config.tier import Resources

#: Of jobs that no rate describes: looking at keys, the drawing of tables or figures, the benchmark.
STUDY_S, DRAWING_S, BENCH_S = 40.0, 10.0, 220.0
# Reading in training's tokens: the backward pass is two thirds of a step, but entropies are computed and written.
_READ = 2.0
# Measured on SmolLM2-135M and on the testbed, whose records agree within a factor of two: points of Q-FIT's grid that
# cost as much as reading its calibration set once, and passes that PTQ makes over its own.
_QFIT_POINTS_A_READ, _PTQ_READS = 30.0, 12.0
# A distilling step runs the teacher forward, too.
_TEACHER = 1.3


def seconds(plan: Plan, studies: Iterable[PlannedStudy] = ()) -> dict[str, float]:
    """Id -> seconds, of every stage that a job makes, every evaluation, and of ``studies``."""
    rates = plan.tier.resources
    out = {stage.id: _stage(stage, rates) + rates.job_s for stage in plan.needed.values() if made(stage)}
    for evaluation in plan.evaluations.values():
        parts = plan.shards(evaluation.id)
        for id, part in (parts or {evaluation.id: evaluation}).items():
            out[id] = part.problems.n * len(part.seeds) / rates.responses_per_s + rates.job_s
        if parts:
            out[evaluation.id] = rates.job_s
    return out | {study.id: _study(plan, study) + rates.job_s for study in studies}


@dataclass(frozen=True)
class Hours:
    """Hours of GPUs (of cores on a tier for CPUs) of an artifact's jobs, by kind of job."""

    training: float
    """Of every stage that computes: trainings, Q-FIT, PTQ."""
    evaluating: float

    @property
    def total(self) -> float:
        """Both."""
        return self.training + self.evaluating


def hours(plan: Plan) -> dict[str, Hours]:
    """Artifact -> its hours, computed from the tier's rates and from the GPUs that its jobs ask for (`need`); work that
    artifacts share is in each of them. Under "all", every job once."""
    each, tier = seconds(plan), plan.tier
    of_kind: dict[Job, float] = {}
    for job in get_args(Job):
        wanted = need(plan, job)
        of_kind[job] = (tier.resources.threads if wanted is None else wanted.gpus) / 3600

    def of(evaluations: set[str]) -> Hours:
        stages = {s for id in evaluations for s in plan.behind(id)}
        training = sum(
            each[id] * of_kind["training" if isinstance(plan.stage(id).settings, TrainSettings) else "calibrating"]
            for id in stages
            if id in each and plan.stage(id).kind not in ("data", "base")
        )
        graded = {part for id in evaluations for part in plan.shards(id) or (id,)}
        return Hours(training, sum(each[id] for id in graded) * of_kind["evaluating"])

    found = {name: of({c.evaluation for c in plan.cells if c.artifact == name}) for name in plan.artifacts}
    return found | {"all": of(set(plan.evaluations))}


def _stage(stage: Stage, rates: Resources) -> float:
    s = stage.settings
    read = _READ * rates.train_tokens_per_s
    if isinstance(s, QFitSettings):
        tokens = s.calibration.sequences * s.calibration.sequence_tokens
        points = (s.grid if s.scale else 1) * (s.grid if s.shift else 1)
        return tokens * points / _QFIT_POINTS_A_READ / read
    if isinstance(s, PTQSettings):
        return 0.0 if s.method == "rtn" else _PTQ_READS * s.calibration.sequences * s.calibration.sequence_tokens / read
    training = getattr(s, "training", None)
    taught = training is not None and any(term.name == "qad" for term in training.objective)
    rate = rates.qat_tokens_per_s if stage.kind == "qat" else rates.train_tokens_per_s
    return stage.budget_tokens * (_TEACHER if taught else 1.0) / rate


def _study(plan: Plan, study: PlannedStudy) -> float:
    s, rates = study.settings, plan.tier.resources
    if isinstance(s, GradientsStudy):
        stage = plan.stage(study.models["model"].stage)
        # A look is a forward and a backward pass of its own.
        return _stage(stage, rates) * (1 + 1 / s.every_steps)
    trace_s = plan.tier.train.finetune.row_tokens / 2 / (_READ * rates.train_tokens_per_s)
    asked = getattr(s, "n", 0)
    sampled = asked * len(getattr(s, "seeds", ()))
    responses, traces = 0.0, 0.0
    if isinstance(s, PairStudy):
        responses, traces = 2 * sampled, 4 * sampled  # both read what both wrote
    elif isinstance(s, RoutingStudy):
        responses = 6 * sampled + s.held_out  # two of the four policies run both models
    elif isinstance(s, NoiseStudy):
        responses = (1 + 2 * len(s.sigmas)) * sampled + s.held_out
    elif isinstance(s, ResetStudy):
        responses = (2 + len(s.t_low) + len(s.controls)) * sampled + s.held_out * len(s.fit_seeds)
    elif isinstance(s, DynamicsStudy):
        traces = len(study.models) * asked
    elif isinstance(s, LikelihoodStudy):
        traces = 2 * len(study.models) * asked  # each beside its reference
    elif isinstance(s, OverviewStudy):
        traces = 3 * asked
    else:
        return STUDY_S
    return responses / rates.responses_per_s + traces * trace_s
