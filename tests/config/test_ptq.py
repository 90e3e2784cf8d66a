"""Options of PTQ methods in recipes: whose they are, what they are checked for, and when they rename a stage."""

from __future__ import annotations

from pathlib import Path

import pytest

from reqat.config import ReqatError, load_catalogue, load_tier, plan
from reqat.config.base import digest, merge, parse
from reqat.config.precision import PrecisionSpec
from reqat.config.recipe import Catalogue, PTQStep, Recipe
from reqat.config.stage import PTQSettings
from reqat.config.tier import Tier

ROOT = Path(__file__).parents[2]
CATALOGUE = load_catalogue(ROOT / "config")


def settings_of(step: dict, **of_tier: float) -> PTQSettings:
    """Of the `ptq` stages that a recipe of one step makes, in a tier whose `ptq` says ``of_tier``."""
    catalogue = CATALOGUE.model_copy(
        update={"recipes": {**CATALOGUE.recipes, "gptq": parse(Recipe, {"method": "m", "steps": [step]}, "recipes")}}
    )
    usual = load_tier("testbed", ROOT / "config").model_dump(mode="json")
    tier = parse(Tier, merge(usual, {"only": {"recipes": ["gptq"]}, "ptq": of_tier}), "test")
    made = plan(tier, catalogue, pinned={"testbed": "0" * 64})
    (settings,) = {repr(s.settings): s.settings for s in made.stages.values() if s.kind == "ptq"}.values()
    assert isinstance(settings, PTQSettings)
    return settings


def test_a_recipe_sets_the_options_of_its_method():
    usual = settings_of({"step": "ptq", "method": "gptq"})
    for same in ({"act_order": True}, {"damp": 0.01}, {"damp": None}, {"options": {"act_order": True}}):
        assert digest(settings_of({"step": "ptq", "method": "gptq", **same})) == digest(usual)
    other = settings_of({"step": "ptq", "method": "gptq", "act_order": False, "damp": 0.02})
    assert other.options == {"act_order": False, "damp": 0.02} and digest(other) != digest(usual)
    clipped = settings_of({"step": "ptq", "method": "awq", "clip": False})
    assert clipped.options == {"clip": False}
    assert PTQStep.model_validate(PTQStep(step="ptq", method="awq", clip=False).model_dump()).options == {"clip": False}


def test_what_a_step_says_goes_before_the_tier_also_at_the_methods_default():
    gptq = {"step": "ptq", "method": "gptq"}
    for given, damp in (({}, 0.05), ({"damp": None}, 0.05), ({"damp": 0.02}, 0.02), ({"damp": 0.01}, 0.01)):
        for step in ({**gptq, **given}, {**gptq, "options": given}):
            assert settings_of(step, damp=0.05).options.get("damp", 0.01) == damp
    assert digest(settings_of({**gptq, "damp": 0.01}, damp=0.05)) == digest(settings_of(gptq))
    assert settings_of({"step": "ptq", "method": "awq"}, damp=0.05).options == {}


@pytest.mark.parametrize("options", [None, [1], "damp", 3])
def test_options_that_are_no_mapping_are_named(options: object):
    for model, data in (
        (Recipe, {"method": "m", "steps": [{"step": "ptq", "damp": 0.02, "options": options}]}),
        (PTQSettings, {"method": "gptq", "damp": 0.02, "options": options}),
    ):
        with pytest.raises(ReqatError, match="recipes.yaml.*options"):
            parse(model, data, "recipes.yaml")


@pytest.mark.parametrize(
    ("step", "says"),
    [
        ({"method": "rtn", "act_order": True}, ["rtn", "act_order", "none"]),
        ({"method": "smoothquant", "damp": 0.1}, ["smoothquant", "damp", "alpha"]),
        ({"method": "gptq", "act_ordr": True}, ["act_ordr", "act_order"]),
        ({"method": "gptq", "damp": 0}, ["gptq", "damp", "0"]),
        ({"method": "awq", "clip": 3}, ["awq", "clip", "3"]),
        ({"method": "flatquant", "epochs": True}, ["epochs"]),
    ],
)
def test_an_option_that_a_method_does_not_have_is_named(step: dict, says: list[str]):
    with pytest.raises(ReqatError) as error:
        parse(Recipe, {"method": "m", "steps": [{"step": "ptq", **step}]}, "recipes")
    assert all(part in str(error.value) for part in says)


def test_plans_of_earlier_versions_name_the_same_stages():
    """They state three options of whatever method; at what was the default they say nothing."""
    for method in ("rtn", "gptq", "awq", "smoothquant", "gptaq"):
        stated = {"method": method, "act_order": True, "damp": 0.01, "alpha": None}
        assert digest(parse(PTQSettings, stated, "plan")) == digest(PTQSettings(method=method))
    assert parse(PTQSettings, {"method": "gptq", "act_order": False}, "plan").options == {"act_order": False}
    with pytest.raises(ReqatError, match="rtn.*act_order"):
        parse(PTQSettings, {"method": "rtn", "act_order": False}, "plan")


def test_a_rotation_that_a_method_adds_is_in_the_precision_of_stage_and_evaluation():
    recipe = parse(Recipe, {"method": "m", "steps": [{"step": "ptq", "method": "mr_gptq"}]}, "recipes")
    sizes = {"NVFP4-W4A4": 16, "MXFP4-W4A16": 32, "INT4-row-W4A4KV4": 32, "INT4-g128-W4A16": 128, "NVFP4-KV4": None}
    assert {name: recipe.rotation(name) for name in sizes} == sizes
    assert recipe.rotation("MXFP4-W4A4:skip=*.down_proj") == 32
    assert parse(Recipe, {"method": "m", "steps": [{"step": "ptq"}]}, "recipes").rotation("NVFP4-W4A4") is None
    limited = {"method": "m", "steps": [{"step": "ptq", "method": "mr_gptq", "formats": ["MXFP4"]}]}
    assert parse(Recipe, limited, "recipes").rotation("NVFP4-W4A4") is None


def test_a_rotation_that_the_precision_names_stays():
    recipe = parse(Recipe, {"method": "m", "steps": [{"step": "ptq", "method": "mr_gptq"}]}, "recipes")
    rows = {"recipes": ["mr-gptq"], "precisions": ["MXFP4-W4A4", "MXFP4-W4A4:rotation=16"]}
    artifacts = {name: {"title": "t", "rows": [rows]} for name in CATALOGUE.artifacts}
    catalogue = parse(Catalogue, {"recipes": {"mr-gptq": recipe}, "artifacts": artifacts}, "recipes")
    made = plan(load_tier("testbed", ROOT / "config"), catalogue, pinned={"testbed": "0" * 64})
    assert {s.precision.rotation for s in made.stages.values() if s.kind == "ptq"} == {16, 32}
    assert {e.precision.rotation for e in made.evaluations.values()} == {16, 32}


@pytest.mark.parametrize("skip", [3, "*.down_proj", [3], {"a": 1}])
def test_a_skip_that_is_no_list_of_patterns_is_named(skip: object):
    with pytest.raises(ReqatError, match="recipes.yaml.*skip"):
        parse(PrecisionSpec, {"name": "MXFP4-W4A4:skip=*.down_proj", "skip": skip}, "recipes.yaml")
