"""A model that is tuned before it is a tier's base."""

from __future__ import annotations

from pathlib import Path

import pytest

from reqat.config import Plan, ReqatError, load_catalogue, load_tier, plan
from reqat.config.base import merge, parse
from reqat.config.stage import Selection, TrainSettings
from reqat.config.tier import Tier

CONFIG = Path(__file__).parents[2] / "config"


def make(**changes: object) -> Plan:
    tier = load_tier("smollm", CONFIG).model_dump(mode="json")
    return plan(parse(Tier, merge(tier, changes), "test"), load_catalogue(CONFIG))


def test_a_tuned_base_stands_before_every_recipe():
    tuning = {
        "data": {"families": {"chain_sum": {"min_terms": 3}}, "tokens": 50_000},
        "training": {"lr": 1e-4},
        "tokens": 40_000,
        "seed": 7,
    }
    plain = make()
    (label,) = plain.tier.models
    assert plain.stage(plain.bases[label]).kind == "base"
    tuned = make(models={label: {"tuning": tuning}})
    base = tuned.stage(tuned.bases[label])
    assert base.kind == "finetune" and base.precision.name == "BF16" and base.parent == plain.bases[label]
    settings = base.settings
    assert isinstance(settings, TrainSettings)
    assert (settings.traces, settings.seed, settings.training.lr) == (Selection(tokens=40_000), 7, 1e-4)
    assert base.data is not None
    store = tuned.stage(base.data)
    assert store.settings.tokenizer == "model" and store.parent == plain.bases[label]  # type: ignore[union-attr]
    for evaluation in tuned.evaluations.values():
        assert base.id in [stage.id for stage in tuned.lineage(evaluation.stage)]
        assert not {"base", "finetune"} & {stage.kind for stage in tuned.since_base(evaluation.stage)}, "of PTQ alone"
    again = make(models={label: {"tuning": tuning | {"seed": 8}}})
    assert not set(again.evaluations) & set(tuned.evaluations), "another base: other results"
    for wrong, says in (({"tokens": 60_000}, "60000.*50000"), ({"data": {"source": "x.jsonl"}}, "x.jsonl")):
        with pytest.raises(ReqatError, match=says):
            make(models={label: {"tuning": merge(tuning, wrong)}})
