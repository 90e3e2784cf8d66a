"""Table 11: hyper-parameters, as the tier has them, beside the paper's."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pandas as pd

from analysis.report import paper
from analysis.report.cells import Results
from analysis.report.document import EMPTY, Column, Table, Text, tokens
from reqat.config.stage import SEMTerm, TrainSettings

if TYPE_CHECKING:
    from reqat.config.stage import Training
    from reqat.config.tier import Model, Tier

NAME = "table11"
NEEDS = "trained"

# The paper's column; what it does not say is not here.
PAPER = {
    "optimizer": "AdamW",
    "learning rate": "1e-05",
    "schedule": "cosine to 1% of it",
    "warm-up": "3% of the steps",
    "weight decay": "0",
    "gradient clipping": "1",
    "sequences a step": "16",
    "tokens a sequence": "25000",
    "arithmetic": "bf16",
    "gradient checkpointing": "yes",
    "QAT tokens": "70M",
    "total tokens": "140M, 210M, 280M, 350M",
    "SEM weight": "0.1",
    "SEM percentile": "0.75",
    "Q-FIT grid": "20 x 20",
    "Q-FIT calibration": "256 x 512 tokens",
    "RoPE theta": "1000000",
    "decoding": "T 0.6, top-p 0.95, at most 32768 tokens",
    "evaluation": "8 seeds",
}


def of_training(t: Training) -> dict[str, str]:
    """The rows that a kind of training has of its own."""
    return {
        "optimizer": "AdamW" if t.optimizer == "adamw" else "SGD, Nesterov",
        "learning rate": f"{t.lr:g}",
        "schedule": f"{t.schedule} to {100 * t.min_lr_ratio:g}% of it",
        "warm-up": f"{100 * t.warmup:g}% of the steps",
        "weight decay": f"{t.weight_decay:g}",
        **(
            {"betas": ", ".join(f"{beta:g}" for beta in t.betas)}
            if t.optimizer == "adamw"
            else {"momentum": f"{t.momentum:g}"}
        ),
        "gradient clipping": "none" if t.clip is None else f"{t.clip:g}",
        "sequences a step": str(t.rows_per_batch * t.accumulation),
        "tokens a sequence": str(t.row_tokens),
        "arithmetic": "float32" if t.autocast == "none" else t.autocast,
        "gradient checkpointing": "yes" if t.gradient_checkpointing else "no",
        **({"attention": "trace by trace"} if t.attention == "traces" else {}),
    }


def of_tier(results: Results) -> dict[str, str]:
    """The rows that hold for the tier as a whole."""
    plan, tier = results.plan, results.plan.tier
    trained = [stage.settings for stage in plan.needed.values() if isinstance(stage.settings, TrainSettings)]
    terms = [term for settings in trained for term in settings.training.objective if isinstance(term, SEMTerm)]
    budget, how = tier.budget, tier.evaluation
    grid, calibration = tier.qfit.grid, tier.qfit.calibration
    totals = [multiple * budget.qat_tokens for multiple in budget.totals]
    return {
        "QAT tokens": tokens(budget.qat_tokens),
        "total tokens": ", ".join(tokens(total) for total in totals),
        **({"SEM weight": _several(t.weight for t in terms)} if terms else {}),
        **({"SEM percentile": _several(t.percentile for t in terms)} if terms else {}),
        "Q-FIT grid": f"{grid} x {grid}",
        "Q-FIT calibration": f"{calibration.sequences} x {calibration.sequence_tokens} tokens",
        "RoPE theta": ", ".join(dict.fromkeys(rope_theta(model) for model in tier.models.values())),
        "decoding": f"T {how.decoding.temperature:g}, top-p {how.decoding.top_p:g}, at most "
        f"{how.decoding.max_new_tokens} tokens",
        "evaluation": f"{len(how.seeds)} seeds",
    }


def own_rates(results: Results) -> dict[str, dict[str, str]]:
    """Head of a column -> the rows of recipes of the plan whose QAT has a learning rate of its own."""
    plan, train = results.plan, results.plan.tier.train
    found: dict[str, dict[str, str]] = {}
    for cell in plan.cells:
        if cell.recipe not in train.rates:
            continue
        trained = [stage.kind for stage in plan.since_base(plan.evaluation(cell.evaluation).stage)]
        if "qat" in trained:  # at BF16 the recipe has no such stage
            from_base = "finetune" not in trained and train.qat_from_base is not None
            rows = found.setdefault("QAT from the base" if from_base else "QAT", {})
            rows[f"learning rate of {cell.recipe}"] = f"{train.rates[cell.recipe]:g}"
    return found


def rope_theta(model: Model) -> str:
    """The base of the rotary embedding: of a model built here that of transformers' configuration, else the model's."""
    if model.scratch is None:
        return "the model's own"
    from transformers import AutoConfig

    family = getattr(model.scratch.architecture, "family", "llama")
    return f"{AutoConfig.for_model(family).rope_parameters['rope_theta']:.0f}"


def kinds(tier: Tier) -> dict[str, Training]:
    """Head of a column -> the training that it shows."""
    train = tier.train
    found = {"fine-tuning": train.finetune, "QAT": train.qat}
    return found if train.qat_from_base is None else found | {"QAT from the base": train.qat_from_base}


def build(results: Results, artifact: str = NAME) -> Table:
    """Paper Table 11: hyper-parameters of each kind of training, of Q-FIT, SEM and decoding."""
    tier, shared = results.plan.tier, of_tier(results)
    own = own_rates(results)
    columns = {head: of_training(training) | own.get(head, {}) | shared for head, training in kinds(tier).items()}
    for name in ("SEM weight", "SEM percentile"):
        columns["fine-tuning"].pop(name, None)
    usual = [*of_training(tier.train.qat), *shared, *PAPER]
    at = 1 + usual.index("learning rate")
    names = list(dict.fromkeys([*usual[:at], *(name for rows in own.values() for name in rows), *usual[at:]]))
    section, rows = [], []
    for name in names:
        values = [column.get(name, EMPTY) for column in columns.values()]
        theirs = PAPER.get(name, EMPTY)
        section.append((Text(name[0].upper() + name[1:]), *(Text(value) for value in values), Text(theirs)))
        rows += [
            {"source": "configuration", "tier": tier.name, "parameter": name, "stage": head, "value": value}
            for head, value in zip(columns, values, strict=True)
            if value != EMPTY
        ]
        if theirs != EMPTY:
            rows.append({"source": "paper", "tier": "", "parameter": name, "stage": "", "value": theirs})
    return Table(
        artifact,
        "Hyper-parameters",
        "What the tier trains and evaluates with, read from its configuration, and what the paper says it used. A "
        "recipe that has a line takes its own learning rate in QAT. "
        "Sequences here are packed: one row of the stated length holds several traces.",
        (f"Tier {tier.name}: {tier.title}.", *paper.notes("table11")),
        (
            Column("Parameter", align="l"),
            *(Column(head, "Ours", "c") for head in columns),
            Column("fine-tuning and QAT", "Paper", "c"),
        ),
        (tuple(section),),
        pd.DataFrame(rows),
    )


def _several(values: object) -> str:
    return ", ".join(f"{value:g}" for value in sorted(set(values)))  # type: ignore[call-overload]
