"""Which tables and figures a plan asks for. Reads the plan alone and imports neither pandas nor matplotlib: the DAG
asks while it is parsed.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

    from reqat.config.plan import Cell, Plan
    from reqat.config.studies import PlannedStudy
    from reqat.config.throughput import Throughput

BF16 = "BF16"
REFERENCE_PRECISION = "NVFP4-W4A4KV4"  # where the claims rest
TABLE_SUFFIXES, FIGURE_SUFFIXES = ("csv", "md", "tex"), ("png", "pdf")
# Figure -> the artifact whose cells it draws (None: any with a Q-FIT stage).
FIGURES: dict[str, str | None] = {
    "figure1b": "figure1",
    "figure1c": "figure1",
    "table1-dots": "table1",
    "losses": "table1",
    "qfit": None,
}
# Made of the throughput benchmark (config/throughput.yaml) alone, on tiers that have one.
THROUGHPUT_FIGURES = ("figure6",)
# Made of studies (config/studies.yaml): file stem -> the kinds of study that it needs, all of them.
STUDY_TABLES: dict[str, tuple[str, ...]] = {"studies": (), "reset": ("reset",)}
STUDY_FIGURES: dict[str, tuple[str, ...]] = {
    "figure2": ("pair", "routing", "noise"),
    "figure4": ("dynamics",),
    "figure7": ("gradients",),
    "figure8": ("routing",),
    "figure9": ("pair",),
}
THROUGHPUT_KERNELS = (
    "linear",
    "attention",
    "fake_quantize",
    "sem_loss",
    "decode",
    "train_step",
    "entropy",
    "agreement",
)


@dataclass(frozen=True)
class Claim:
    """A comparison that the paper makes. `a` and `b` are (precision or None for "at hand", method, condition)."""

    name: str
    artifact: str
    a: tuple[str | None, str, str]
    b: tuple[str | None, str, str]
    parity: bool = False  # the paper says "as good as", not "better than"
    main: bool = True  # one of the five that the paper rests on; the others are context


CLAIMS = (
    Claim("ReQAT-TQS reaches BF16 FT", "table1", (None, "ReQAT-TQS", ""), (BF16, "FT", ""), parity=True),
    Claim("ReQAT-TQS above QAT", "table1", (None, "ReQAT-TQS", ""), (None, "QAT", "")),
    Claim("ReQAT-T above QAT", "table1", (None, "ReQAT-T", ""), (None, "QAT", "")),
    Claim("ReQAT-TQ above ReQAT-T", "table1", (None, "ReQAT-TQ", ""), (None, "ReQAT-T", "")),
    Claim("same traces above different", "table4", (None, "FT+QAT", "aligned=yes"), (None, "FT+QAT", "aligned=no")),
    Claim("FT+PTQ below BF16 FT", "table1", (None, "FT+PTQ", ""), (BF16, "FT", ""), main=False),
    Claim("QAT above FT+PTQ", "table1", (None, "QAT", ""), (None, "FT+PTQ", ""), main=False),
    Claim("ReQAT-TQS above ReQAT-TQ", "table1", (None, "ReQAT-TQS", ""), (None, "ReQAT-TQ", ""), main=False),
)


def has_claims(plan: Plan) -> bool:
    """Whether the plan has both sides of at least one claim."""
    sides = {(c.artifact, c.model, c.precision, c.method, c.condition, c.multiple) for c in plan.cells}

    def both(claim: Claim, model: str, precision: str, multiple: int | None) -> bool:
        return all(
            (claim.artifact, model, part[0] or precision, part[1], part[2], multiple) in sides
            for part in (claim.a, claim.b)
        )

    return any(
        both(claim, model, precision, multiple)
        for claim in CLAIMS
        for _, model, precision, _, _, multiple in sides
        if precision != BF16 and multiple is not None
    )


def table_names(plan: Plan) -> list[str]:
    """File stems of the plan's tables: one an artifact, `table6` (other columns of the cells of `table2`), the claims
    last (where it has any). `figure1` is drawn, not tabled.
    """
    tabled = [name for name in plan.artifacts if name != "figure1"]
    by_length = ["table6"] if "table2" in tabled else []
    return [*tabled, *by_length, *(["claims"] if has_claims(plan) else [])]


def throughput_names(bench: Throughput | None) -> tuple[list[str], list[str]]:
    """File stems of the tables and of the figures that a benchmark makes; none where a tier has no benchmark."""
    if bench is None:
        return [], []
    kernels = [name for name in THROUGHPUT_KERNELS if getattr(bench, name)]
    return [*(f"throughput-{name.replace('_', '-')}" for name in kernels), "figure6-error", "figure6-memory"], [
        *THROUGHPUT_FIGURES
    ]


def study_names(studies: Mapping[str, PlannedStudy]) -> tuple[list[str], list[str]]:
    """File stems of the tables and of the figures that a tier's studies make; none where it has no study."""
    if not studies:
        return [], []
    kinds = {study.kind for study in studies.values()}
    tables, figures = (
        [name for name, needed in names.items() if kinds.issuperset(needed)] for names in (STUDY_TABLES, STUDY_FIGURES)
    )
    return tables, figures


def figure_names(plan: Plan) -> dict[str, tuple[str, str]]:
    """File stem -> (figure, model label). A second model with the same artifact has its label in the stem:
    `figure1b-<model>`.
    """
    out = {}
    for figure in FIGURES:
        models = [m for m in plan.tier.models if can_draw(plan, figure, m)]
        for i, model in enumerate(models):
            out[figure if i == 0 else f"{figure}-{re.sub(r'[^A-Za-z0-9.]+', '-', model).strip('-')}"] = (figure, model)
    return out


def can_draw(plan: Plan, figure: str, model: str) -> bool:
    """Whether the plan has the cells that a figure draws, for a model."""
    if figure == "qfit":
        return qfit_cell(plan, model) is not None
    cells = [c for c in plan.cells if c.artifact == FIGURES[figure] and c.model == model and c.precision != BF16]
    return any(c.multiple is not None for c in cells) if figure == "losses" else bool(cells)


def qfit_cell(plan: Plan, model: str) -> tuple[str, Cell] | None:
    """The Q-FIT stage (scale and shift) whose map stands for the tier, and a cell that it serves: ReQAT at the claim
    budget if there is one.
    """
    claim = plan.tier.budget.claim_total
    cells = sorted(
        (c for c in plan.cells if c.model == model and c.multiple is not None),
        key=lambda c: (
            c.multiple != claim,
            c.precision != REFERENCE_PRECISION,
            c.method not in ("ReQAT-TQ", "ReQAT-TQS"),
            c.training_seed,
        ),
    )
    for cell in cells:
        for stage in plan.lineage(plan.evaluation(cell.evaluation).stage):
            s = stage.settings
            if s.kind == "qfit" and s.scale and s.shift and s.variant == "paper":
                return stage.id, cell
    return None
