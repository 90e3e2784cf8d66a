"""Estimated time of each job of a plan on one core, from the rates stated in its tier. A rough estimate."""

from __future__ import annotations

from reqat.config.paths import made
from reqat.config.plan import Plan

#: Of jobs that no rate describes: a study, the drawing of tables or figures, the benchmark.
STUDY_S, DRAWING_S, BENCH_S = 40.0, 10.0, 220.0


def seconds(plan: Plan) -> dict[str, float]:
    """Id -> seconds, of every stage that a job makes and every evaluation."""
    rates = plan.tier.resources
    out = {}
    for stage in plan.needed.values():
        if made(stage):
            rate = rates.qat_tokens_per_s if stage.kind == "qat" else rates.train_tokens_per_s
            out[stage.id] = stage.budget_tokens / rate + rates.job_s
    for evaluation in plan.evaluations.values():
        responses = evaluation.problems.n * len(evaluation.seeds)
        out[evaluation.id] = responses / rates.responses_per_s + rates.job_s
    return out
