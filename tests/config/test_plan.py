"""Properties of the plan: what is shared, what is kept apart, and when a name changes."""

from __future__ import annotations

from pathlib import Path

import pytest

from reqat.config import Paths, Plan, PrecisionSpec, ReqatError, Stage, load, load_catalogue, load_tier, plan
from reqat.config.base import Strict, digest, merge, parse
from reqat.config.recipe import Recipe, Rows, TrainStep
from reqat.config.stage import (
    BaseSettings,
    Calibration,
    Decoding,
    PTQSettings,
    QADTerm,
    QFitSettings,
    Selection,
    SEMTerm,
    Training,
    TrainSettings,
)
from reqat.config.tier import Tier

ROOT = Path(__file__).parents[2]
CATALOGUE = load_catalogue(ROOT / "config")
TIERS = ("smoke", "testbed", "overnight", "smollm", "paper")


# What is tuned in config/tiers/ shall not move these tests.
FIXED = {
    "data": {"tokens": 1_000_000},
    "budget": {"qat_tokens": 200_000, "totals": [2, 3], "claim_total": 3},
    "only": {"recipes": None, "precisions": None},
    "train": {"qat_from_base": None},
}
LOADED = {name: load_tier(name, ROOT / "config").model_dump(mode="json") for name in TIERS}


def tier(name: str = "testbed", **changes: object) -> Tier:
    data = LOADED[name] if name in ("paper", "smollm") else merge(LOADED[name], FIXED)
    return parse(Tier, merge(data, changes), "test")


def make(name: str = "testbed", **changes: object) -> Plan:
    return plan(tier(name, **changes), CATALOGUE, pinned={"testbed": "0" * 64})


TESTBED = make()


def chain(
    of: Plan, recipe: str, precision: str, multiple: int | None, artifact: str = "table1", seed: int = 0
) -> list[Stage]:
    """Stages of a cell, base first."""
    (cell,) = [
        c
        for c in of.cells
        if (c.artifact, c.recipe, c.precision, c.multiple, c.training_seed)
        == (artifact, recipe, precision, multiple, seed)
    ]
    return list(of.lineage(of.evaluation(cell.evaluation).stage))[::-1]


@pytest.mark.parametrize("name", TIERS)
def test_plan_is_whole_and_in_order(name: str):
    made = make(name)
    seen: set[str] = set()
    for id, stage in made.stages.items():
        assert id == stage.id
        assert set(stage.inputs.values()) <= seen, "parents stand before their children"
        seen.add(id)
    for id, evaluation in made.evaluations.items():
        assert id == evaluation.id
        assert set(evaluation.inputs.values()) <= set(made.needed)
    assert {cell.evaluation for cell in made.cells} == set(made.evaluations)
    assert set(made.scratch.values()) | set(made.needed) <= set(made.stages)
    restored = Plan.restore(made.dump(), "test")
    assert restored.dump() == made.dump()


def test_planning_twice_gives_the_same_names():
    assert make().dump() == TESTBED.dump()


def test_a_recipe_has_a_learning_rate_of_its_own():
    rates = {"reqat-tqs": 5e-4, "qat": 3e-3}
    own = make(train={"rates": rates, "qat_from_base": {"lr": 7e-3}})
    usual = make(train={"qat_from_base": {"lr": 7e-3}})
    for recipe, precision in (("qat", "MXFP4-W4A16"), ("reqat-tqs", "NVFP4-W4A4KV4"), ("reqat-tq", "NVFP4-W4A4KV4")):
        (*before, last), (*as_before, was) = (chain(of, recipe, precision, 3) for of in (own, usual))
        assert before == as_before, "only the quantized training has it"
        was_lr = 7e-3 if recipe == "qat" else own.tier.train.qat.lr
        assert was.settings.training.lr == was_lr
        assert last.settings.training.lr == rates.get(recipe, was_lr)
        changed = last.settings.training.model_copy(update={"lr": was_lr})
        assert changed == was.settings.training, "and nothing but the rate is its own"
        assert (last.id == was.id) == (recipe not in rates)


def test_hand_over_is_the_first_stage_of_reqat():
    made = make(models={"testbed": {"artifacts": ["table1", "claims-rows"]}})
    for precision, recipe in (("BF16", "ft-handover"), ("NVFP4-W4A4KV4", "ft-handover-ptq")):
        assert chain(made, recipe, precision, 3, "claims-rows") == chain(made, "reqat-t", "NVFP4-W4A4KV4", 3)[:-1]
    rows = {(c.recipe, c.precision) for c in made.cells if c.artifact == "claims-rows"}
    fp4 = [
        "ptq",
        "ft-ptq",
        "ft-handover-ptq",
        "qat",
        "reqat-t",
        "reqat-tq",
        "reqat-tqs",
        "ft-qat-different",
        "qad",
        "ft-qad",
    ]
    assert rows == {(r, "BF16") for r in ("base", "ft", "ft-handover")} | {(r, "NVFP4-W4A4KV4") for r in fp4}


def test_table1_has_every_row():
    cells = [c for c in TESTBED.cells if c.artifact == "table1"]
    for precision in ("MXFP4-W4A16", "MXFP4-W4A4", "NVFP4-W4A4KV4"):
        methods = {(c.method, c.multiple) for c in cells if c.precision == precision}
        trained = {"FT+PTQ", "QAT", "ReQAT-T", "ReQAT-TQ", "ReQAT-TQS"}
        assert methods == {("PTQ", None)} | {(m, t) for m in trained for t in (2, 3)}
    assert {(c.method, c.multiple) for c in cells if c.precision == "BF16"} == {
        ("Baseline", None),
        ("FT", 2),
        ("FT", 3),
    }
    assert {c.condition for c in TESTBED.cells if c.artifact == "table5"} == {
        f"e1m2={e};pre_rope_scale={a};post_rope_shift={b}"
        for e, a, b in ((0, 0, 0), (1, 1, 0), (1, 0, 1), (0, 1, 1), (1, 1, 1))
    }


def test_a_recipe_that_trains_nothing_spends_no_tokens_whatever_its_rows_say():
    trains = {
        name: any(isinstance(step, TrainStep) for step in recipe.steps) for name, recipe in CATALOGUE.recipes.items()
    }
    assert {cell.recipe for cell in TESTBED.cells if not trains[cell.recipe]} == {"base", "ptq", "gptq", "ptq-rotated"}
    for cell in TESTBED.cells:
        assert (cell.multiple is None) == (cell.total_tokens is None) == (not trains[cell.recipe])
    keys = [(c.artifact, c.recipe, c.precision, c.condition) for c in TESTBED.cells if not trains[c.recipe]]
    assert len(keys) == len(set(keys)), "one cell, not one a total"


def test_every_method_of_a_row_spends_the_same_tokens():
    for cell in TESTBED.cells:
        if cell.multiple is not None and cell.artifact == "table1":
            spent = sum(
                s.budget_tokens for s in TESTBED.lineage(TESTBED.evaluation(cell.evaluation).stage) if s.kind != "base"
            )
            assert spent == cell.total_tokens == cell.multiple * TESTBED.tier.budget.qat_tokens


def test_fine_tuning_is_trained_once_however_many_variants_branch_from_it():
    finetunes = [s for s in TESTBED.needed.values() if s.kind == "finetune" and s.settings.traces.epochs == 1]
    qat = TESTBED.tier.budget.qat_tokens
    assert sorted(s.budget_tokens for s in finetunes) == [qat, 2 * qat, 3 * qat]
    ft_of_three = chain(TESTBED, "reqat-tqs", "NVFP4-W4A4KV4", 3)[1]
    assert ft_of_three.id == chain(TESTBED, "reqat-t", "MXFP4-W4A4", 3)[1].id == chain(TESTBED, "ft", "BF16", 2)[1].id


def test_table5_shares_its_last_row_with_table1_and_parts_differ():
    last = chain(TESTBED, "reqat-tq", "NVFP4-W4A4KV4", 3, artifact="table5")
    assert last[-1].id == chain(TESTBED, "reqat-tq", "NVFP4-W4A4KV4", 3)[-1].id
    settings = {
        c.condition: [s.settings for s in TESTBED.lineage(TESTBED.evaluation(c.evaluation).stage)]
        for c in TESTBED.cells
        if c.artifact == "table5"
    }
    for condition, stages in settings.items():
        fits = [s for s in stages if isinstance(s, QFitSettings)]
        wanted = dict(part.split("=") for part in condition.split(";"))
        assert [(f"{s.scale:d}", f"{s.shift:d}") for s in fits] == (
            []
            if wanted["pre_rope_scale"] == wanted["post_rope_shift"] == "0"
            else [(wanted["pre_rope_scale"], wanted["post_rope_shift"])]
        )
        for stage in stages:
            if isinstance(stage, TrainSettings):
                assert [t.name for t in stage.training.objective] == ["nll"]
    elements = {
        c.condition[5]: TESTBED.evaluation(c.evaluation).precision.kv_element
        for c in TESTBED.cells
        if c.artifact == "table5"
    }
    assert elements == {"0": "E2M1", "1": "E1M2"}


@pytest.mark.parametrize("multiple", [2, 3])
def test_aligned_qat_sees_a_prefix_of_fine_tuning_and_the_control_none_of_it(multiple: int):
    _, ft, same = chain(TESTBED, "reqat-t", "MXFP4-W4A16", multiple)
    _, control_ft, different = chain(TESTBED, "ft-qat-different", "MXFP4-W4A16", multiple, artifact="table4")
    assert ft.id == control_ft.id and ft.data == same.data == different.data
    assert isinstance(ft.settings, TrainSettings) and isinstance(same.settings, TrainSettings)
    assert isinstance(different.settings, TrainSettings)
    first, prefix, rest = ft.settings.traces, same.settings.traces, different.settings.traces
    assert prefix.skip_tokens == first.skip_tokens == 0 and prefix.tokens <= first.tokens
    assert rest.skip_tokens == first.tokens and rest.tokens == prefix.tokens


def test_q_is_qfit_for_nvfp4_and_the_block_rotation_for_mxfp4():
    nvfp4 = chain(TESTBED, "reqat-tq", "NVFP4-W4A4KV4", 3)
    assert [s.kind for s in nvfp4] == ["base", "finetune", "qfit", "qat"]
    mxfp4 = chain(TESTBED, "reqat-tq", "MXFP4-W4A4", 3)
    assert [s.kind for s in mxfp4] == ["base", "finetune", "qat"] and mxfp4[-1].precision.rotation == 32
    assert chain(TESTBED, "reqat-t", "MXFP4-W4A4", 3)[-1].precision.rotation is None
    assert nvfp4[-1].precision.rotation is None
    assert nvfp4[1].precision.name == "BF16" and nvfp4[2].precision.name == "NVFP4-W4A4KV4"
    for cell in TESTBED.cells:
        evaluation = TESTBED.evaluation(cell.evaluation)
        last = TESTBED.stage(evaluation.stage)
        if last.kind == "qat":
            assert last.precision.rotation == evaluation.precision.rotation
            assert last.precision.kv_element == evaluation.precision.kv_element


def test_keys_and_values_are_e1m2_where_qfit_is_and_nowhere_else():
    seen = set()
    for cell in TESTBED.cells:
        evaluation = TESTBED.evaluation(cell.evaluation)
        if not evaluation.precision.name.endswith("KV4"):
            continue
        fitted = any(s.kind == "qfit" for s in TESTBED.lineage(evaluation.stage)) and cell.recipe != "qfit-e2m1"
        if cell.recipe == "reqat-t-e1m2":  # the control of Figure 10, whose point it is
            assert not fitted and evaluation.precision.kv_element == "E1M2"
            continue
        assert evaluation.precision.kv_element == ("E1M2" if fitted else "E2M1"), cell
        seen.add((cell.recipe, fitted))
    assert {("ptq", False), ("qat", False), ("reqat-t", False), ("reqat-tqs", True)} <= seen


def test_tqs_differs_from_tq_in_the_objective_alone():
    tq, tqs = (chain(TESTBED, r, "NVFP4-W4A4KV4", 2) for r in ("reqat-tq", "reqat-tqs"))
    assert [s.id for s in tq[:-1]] == [s.id for s in tqs[:-1]]
    a, b = tq[-1].model_dump(), tqs[-1].model_dump()
    terms = b["settings"]["training"].pop("objective")
    assert [t["name"] for t in a["settings"]["training"].pop("objective")] == ["nll"]
    assert [(t["name"], t["weight"]) for t in terms] == [("nll", 1.0), ("sem", 0.1)]
    assert a == b


def test_a_setting_renames_its_stage_and_what_stands_on_it_and_nothing_else():
    changed = make(train={"qat": {"lr": 5e-4}})
    for kind in ("data", "base", "finetune", "qfit", "ptq"):
        assert {i for i, s in TESTBED.needed.items() if s.kind == kind} == {
            i for i, s in changed.needed.items() if s.kind == kind
        }
    assert not {i for i, s in TESTBED.needed.items() if s.kind == "qat"} & set(changed.needed)
    assert len(changed.stages) == len(TESTBED.stages)
    deeper = make(train={"finetune": {"lr": 5e-4}})
    alike = {i for i in TESTBED.needed if i in deeper.needed}
    assert {TESTBED.stages[i].kind for i in alike} == {
        "data",
        "base",
        "qat",
        "ptq",
    }  # QAT and GPTQ straight from the base
    assert all(TESTBED.stages[i].parent in TESTBED.bases.values() for i in alike if i.startswith(("qat", "ptq")))


@pytest.mark.parametrize(
    "change",
    [
        {"title": "other words"},
        {"resources": {"threads": 2, "train_memory_mb": 1}},
        {"models": {"testbed": {"artifacts": LOADED["testbed"]["models"]["testbed"]["artifacts"][::-1]}}},
        {"training_seeds": [0]},
        {"data": {"families": {}}},
    ],
)
def test_what_cannot_change_a_number_renames_nothing(change: dict):
    changed = make(**change)
    assert set(changed.stages) == set(TESTBED.stages) and set(changed.evaluations) == set(TESTBED.evaluations)


def test_evaluation_settings_rename_evaluations_alone():
    changed = make(evaluation={"n": 7})
    assert set(changed.stages) == set(TESTBED.stages) and not set(changed.evaluations) & set(TESTBED.evaluations)


def test_pinned_base_is_known_by_its_weights():
    other = plan(tier(), CATALOGUE, pinned={"testbed": "1" * 64})
    assert not {i for i, s in other.needed.items()} & set(TESTBED.needed)
    assert other.scratch == TESTBED.scratch


def test_order_of_families_means_nothing():
    one, two = (make(data={"families": dict(order)}) for order in ([("a", {}), ("b", {})], [("b", {}), ("a", {})]))
    assert set(one.stages) == set(two.stages)


def test_tiers_share_stages_where_their_settings_agree():
    same = {key: TESTBED.tier.model_dump(mode="json")[key] for key in ("models", "data", "train", "qfit", "ptq")}
    overnight = make("overnight", **same)
    assert set(TESTBED.stages) < set(overnight.stages)  # the claim rows' other seeds are more
    assert not set(TESTBED.evaluations) & set(overnight.evaluations)  # other numbers of problems


def test_claim_rows_have_their_extra_seeds_at_one_total():
    made = make("overnight")
    claim = made.tier.claim_seeds
    for cell in [
        c
        for c in made.cells
        if c.artifact == "table1" and c.precision in claim.precisions and c.recipe in claim.recipes
    ]:
        seeds = {
            c.training_seed
            for c in made.cells
            if (c.artifact, c.recipe, c.precision, c.multiple) == ("table1", cell.recipe, cell.precision, cell.multiple)
        }
        assert seeds == ({0, 1, 2} if cell.multiple == made.tier.budget.claim_total else {0})
    one, two = (chain(made, "reqat-tqs", "NVFP4-W4A4KV4", 3, seed=seed) for seed in (0, 1))
    assert one[0].id == two[0].id and not {s.id for s in one[1:]} & {s.id for s in two[1:]}


def test_store_that_is_too_small_is_refused_before_anything_runs():
    with pytest.raises(ReqatError, match=r"ft-qat-different.*600000.*500000.*data\.tokens"):
        make(
            data={"tokens": 500_000},
            models={"testbed": {"artifacts": ["table4"]}},
            only={"recipes": ["ft-qat-different"]},
        )


def test_paper_tier_follows_the_paper():
    made = make("paper")
    assert {c.total_tokens for c in made.cells if c.artifact == "table1" and c.multiple} == {140e6, 210e6, 280e6, 350e6}
    assert {c.total_tokens for c in made.cells if c.artifact == "table5"} == {280e6}
    assert {c.total_tokens for c in made.cells if c.artifact == "table2" and c.multiple} == {350e6}
    for stage in made.needed.values():
        if isinstance(stage.settings, TrainSettings):
            training, traces = stage.settings.training, stage.settings.traces
            schedule = (training.lr, training.min_lr_ratio, training.warmup, training.weight_decay, training.clip)
            assert schedule == (1e-5, 0.01, 0.03, 0, 1)
            batch = (training.rows_per_batch, training.accumulation, training.row_tokens)
            assert batch == (1, 16, 25_000)  # the paper: 8 devices of 2
            base = made.stage(list(made.lineage(stage.id))[-1].id).settings
            assert isinstance(base, BaseSettings)
            if base.name == "R1-Llama-8B":
                assert traces.tokens == 70e6  # several epochs over one subset
            else:
                assert traces.epochs == 1  # one epoch of a growing set


def test_no_path_of_this_machine_is_in_a_plan():
    for name in TIERS:
        assert str(ROOT) not in str(make(name).dump())


def test_defaults_are_what_they_were():
    """Identities leave defaults out, so a changed default would silently give old work a new meaning.

    A new field is welcome, at a default that keeps the old behaviour. If this fails, put the default back and add an
    option for the new behaviour instead.
    """
    for model, defaults in DEFAULTS.items():
        now = model(**({"name": "sem"} if model is SEMTerm else {})).model_dump(mode="json")
        assert {key: now[key] for key in defaults} == defaults


NLL = {"name": "nll", "weight": 1.0}
CALIBRATION = {"sequences": 64, "sequence_tokens": 256}
DEFAULTS: dict[type[Strict], dict[str, object]] = {
    Training: {
        "lr": 0.001,
        "min_lr_ratio": 0.01,
        "warmup": 0.03,
        "weight_decay": 0.0,
        "betas": [0.9, 0.95],
        "clip": 1.0,
        "rows_per_batch": 24,
        "accumulation": 1,
        "row_tokens": 256,
        "autocast": "bf16",
        "gradient_checkpointing": False,
        "attention": "rows",
        "objective": [NLL],
    },
    SEMTerm: {"weight": 0.1, "percentile": 0.75, "binary": False},
    Calibration: CALIBRATION,
    QFitSettings: {"scale": True, "shift": True, "grid": 20, "variant": "paper", "calibration": CALIBRATION},
    PTQSettings: {"method": "gptq", "options": {}, "calibration": CALIBRATION},
    Decoding: {"greedy": False, "temperature": 0.6, "top_p": 0.95, "max_new_tokens": 256, "batch_rows": 256},
    PrecisionSpec: {"name": "BF16", "kv_element": None, "rotation": None, "global_scale": None},
}


def test_missing_pinned_base_is_no_plan_of_another(tmp_path: Path):
    (tmp_path / "config").symlink_to(ROOT / "config")
    assert load("testbed", Paths(root=tmp_path)).bases != TESTBED.bases


def test_rows_decode_in_their_own_way_on_the_same_stages():
    greedy = [c for c in TESTBED.cells if c.artifact == "table15" and c.condition == "decoding=greedy"]
    sampled = [c for c in TESTBED.cells if c.artifact == "table15" and c.condition == "decoding=sampled"]
    assert len(greedy) == len(sampled) == 7
    usual = TESTBED.tier.evaluation
    for a, b in zip(sampled, greedy, strict=True):
        a, b = TESTBED.evaluation(a.evaluation), TESTBED.evaluation(b.evaluation)
        assert a.stage == b.stage and a.precision == b.precision and a.problems == b.problems
        assert a.decoding == usual.decoding and a.seeds == tuple(usual.seeds)
        assert b.decoding == usual.decoding.model_copy(update={"greedy": True}) and b.seeds == tuple(usual.seeds[:1])


def test_an_artifact_that_decodes_otherwise_renames_nothing():
    """Its cells bring evaluations of their own and no stage: what was measured before it stays measured."""
    artifacts = [name for name in LOADED["testbed"]["models"]["testbed"]["artifacts"] if name != "table15"]
    usual = {"recipes": sorted(r for r in CATALOGUE.recipes if not r.startswith("ft-epochs"))}
    every, without = make(only=usual), make(only=usual, models={"testbed": {"artifacts": artifacts}})
    assert set(without.stages) == set(every.stages)
    added = set(every.evaluations) - set(without.evaluations)
    assert set(without.evaluations) < set(every.evaluations)
    assert added == {c.evaluation for c in every.cells if c.condition == "decoding=greedy"}


@pytest.mark.parametrize("options", [{"temperature": 0}, {"top_p": 1.5}, {"greed": True}])
def test_decoding_of_rows_is_checked(options: dict):
    with pytest.raises(ReqatError, match=next(iter(options))):
        parse(Rows, {"recipes": ["ft"], "precisions": ["BF16"], "decoding": options}, "test")


def taught(teacher: str | None) -> tuple[Plan, list[Stage]]:
    """ReQAT-T with a term of distillation and this teacher, in a tier with another model: the plan, and its chain."""
    recipe = CATALOGUE.recipe("reqat-t")
    given = {} if teacher is None else {"teacher": teacher}
    steps = [recipe.steps[0], recipe.steps[1].model_copy(update={"objective": (QADTerm(name="qad"),), **given})]
    recipes = {**CATALOGUE.recipes, "reqat-t": recipe.model_copy(update={"steps": steps})}
    other = {"teacher": {"source": "path", "reference": "large", "artifacts": []}}
    made = plan(tier(models=other), CATALOGUE.model_copy(update={"recipes": recipes}), pinned={"testbed": "0" * 64})
    return made, chain(made, "reqat-t", "MXFP4-W4A4", 3)


def test_a_teacher_is_a_stage_that_the_plan_knows_and_needs():
    (_, default), (_, parent), (_, finetuned), (plan_base, base), (plan_other, other) = (
        taught(name) for name in (None, "parent", "finetuned", "base", "teacher")
    )
    assert default == parent == finetuned and default[-1].teacher is None  # it starts from what fine-tuning made
    assert base[-1].inputs["teacher"] == base[0].id and base[-1].id != default[-1].id
    assert other[-1].teacher == plan_other.bases["teacher"] in plan_other.needed
    assert [stage.id for stage in base[:-1]] == [stage.id for stage in default[:-1]]
    assert Plan.restore(plan_base.dump(), "plan") == plan_base
    with pytest.raises(ReqatError, match="techer.*teacher"):
        taught("techer")


def test_a_gradient_rule_renames_its_stage_and_the_default_nothing():
    settings = TrainSettings(training=Training(), traces=Selection(tokens=1))
    ids = [
        Stage(kind="qat", settings=settings.model_copy(update={"training": Training(**given)})).id
        for given in ({}, {"gradient": {"rule": "ste"}}, {"gradient": {"rule": "clipped"}})
    ]
    assert ids[0] == ids[1] != ids[2]


@pytest.mark.parametrize(
    ("step", "named"),
    [
        ({"step": "finetune", "gradient": {"rule": "clipped"}}, "gradient"),
        ({"step": "qat", "teacher": "base", "objective": [{"name": "nll"}, {"name": "sem"}]}, "teacher"),
        ({"step": "qat", "gradient": {"rule": "clipped", "limit": float("nan")}}, "limit"),
        ({"step": "qat", "objective": [{"name": "tsld", "weight": float("inf")}]}, "weight"),
    ],
)
def test_what_a_step_would_not_use_or_could_not_is_refused(step: dict, named: str):
    with pytest.raises(ReqatError, match=named):
        parse(TrainStep, step, "test")


def test_layers_left_alone_are_part_of_a_precision_and_none_of_them_renames_nothing():
    plain, left = PrecisionSpec(name="MXFP4-W4A4"), PrecisionSpec(name="MXFP4-W4A4", skip=("*.down_proj",))
    assert digest(plain) == digest(PrecisionSpec(name="MXFP4-W4A4", skip=None)) != digest(left)
    assert left.for_prepare() == {**left.options(), "skip": ["*.down_proj"]} and "skip" not in plain.for_prepare()
    assert PrecisionSpec(name="BF16", skip=("*.down_proj",)) == PrecisionSpec()  # nothing to leave alone
    # Figure 11's control is trained and graded alike, on the same fine-tuning as what it is compared with.
    here = make(models={"testbed": {"artifacts": ["figure11"]}})
    cells = {cell.recipe: here.evaluation(cell.evaluation) for cell in here.cells}
    stage = here.stage(cells["reqat-t-down-bf16"].stage)
    assert stage.precision.skip == cells["reqat-t-down-bf16"].precision.skip == ("*.down_proj",)
    assert {here.stage(e.stage).parent for e in cells.values()} == {stage.parent}
    assert len({here.stage(e.stage).settings for e in cells.values()}) == 1


@pytest.mark.parametrize(
    ("skip", "steps", "named"),
    [
        ([], [], "skip"),
        (["*.down_proj", " "], [], "skip.*down_proj"),
        (["*.down_proj", "*.down_proj"], [], "stands twice"),
        (["*.down_proj"], [{"step": "ptq", "method": "gptq"}], "ptq step quantizes every layer"),
    ],
)
def test_patterns_of_layers_are_checked(skip: list[str], steps: list[dict], named: str):
    with pytest.raises(ReqatError, match=named):
        parse(Recipe, {"method": "m", "steps": steps, "precision": {"MXFP4": {"skip": skip}}}, "test")
