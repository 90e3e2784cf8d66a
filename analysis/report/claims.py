"""The comparisons that the paper makes, and those of them that a plan has both sides of. They are tested in
:mod:`analysis.report.verdicts`; this module reads plans alone, so that the DAG can ask it.

A side of a comparison is a recipe at a precision, whatever artifact shows it: a claim is tested wherever a plan grades
both sides on the same problems, decoded as the tier decodes. So a new artifact brings its claims with it, and a plan
without one has no row for them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from typing import TYPE_CHECKING, Literal

from analysis.report.names import BF16, REFERENCE_PRECISION

if TYPE_CHECKING:
    from reqat.config.plan import Cell, Plan
    from reqat.config.stage import Evaluation
    from reqat.config.tier import Tier

TABLE4_PRECISION = "MXFP4-W4A16"
OWN = "own"
"""The problems that the tier grades on."""
Row = tuple[str | None, str, str]
"""A row of the paper's tables: precision (None: that of the comparison), method, condition, in which `{precision}` is
that of the comparison, too."""


@dataclass(frozen=True)
class Side:
    """A recipe at any precision (None; as second side: at the first one's), or at those that a pattern matches."""

    recipe: str
    precision: str | None = None


@dataclass(frozen=True)
class Printed:
    """Where the paper prints both sides. Several metrics: their mean."""

    artifact: str
    a: Row
    b: Row
    metrics: tuple[str, ...] = ("AIME-120",)
    beyond: str | None = None
    """Metric whose difference is subtracted, as `Claim.beyond`."""


@dataclass(frozen=True)
class Claim:
    """A comparison that the paper makes: the accuracy of `a` minus that of `b`.

    `kind` is what the paper says: that they differ (in the direction of its numbers), that a is as good as b
    (`parity`), or that a brings no gain over b (`no gain`). `main` are the five that the paper rests on; the others are
    context.
    """

    name: str
    a: Side
    b: Side
    printed: Printed | None = None
    kind: Literal["direction", "parity", "no gain"] = "direction"
    main: bool = False
    every_budget: bool = False
    """Tested at every total of the tier, not only at the one that claims rest on."""
    equal_budget: bool = True
    """False: recipes of several epochs, each with a total of its own."""
    problems: str = OWN
    """The problems that both are graded on: the tier's own, or those of a task family."""
    beyond: str | None = None
    """Task family on which the same difference is subtracted: what a loses more on the one than on the other."""
    stated: int = 0
    """The paper's direction where it prints no accuracies: the sign of a - b."""


# Recipe -> method in the paper's Table 1.
_METHODS = {
    "base": "Baseline",
    "ft": "FT",
    "ptq": "PTQ",
    "ft-ptq": "FT+PTQ",
    "qat": "QAT",
    "reqat-t": "ReQAT-T",
    "reqat-tq": "ReQAT-TQ",
    "reqat-tqs": "ReQAT-TQS",
}


def _side(recipe: str) -> Side:
    return Side(recipe, BF16 if recipe in ("base", "ft") else None)


def _table1(name: str, a: str, b: str, **more: object) -> Claim:
    sides = _side(a), _side(b)
    rows = [(side.precision, _METHODS[side.recipe], "") for side in sides]
    return Claim(name, *sides, Printed("table1", rows[0], rows[1]), **({"every_budget": True} | more))  # type: ignore[arg-type]


def _table5(name: str, a: str, b: str) -> Claim:
    parts = {
        "reqat-t": (0, 0, 0),
        "qfit-scale": (1, 1, 0),
        "qfit-shift": (1, 0, 1),
        "qfit-e2m1": (0, 1, 1),
        "reqat-tq": (1, 1, 1),
    }

    def row(recipe: str) -> Row:
        e1m2, scale, shift = parts[recipe]
        return REFERENCE_PRECISION, "ReQAT", f"e1m2={e1m2};pre_rope_scale={scale};post_rope_shift={shift}"

    at = REFERENCE_PRECISION
    return Claim(name, Side(a, at), Side(b, at), Printed("table5", row(a), row(b)))


def _sem(name: str, weight: str) -> Claim:
    rows: list[Row] = [(REFERENCE_PRECISION, "ReQAT", f"qfit=1;sem_lambda={value}") for value in ("0.1", weight)]
    printed = Printed("table16", rows[0], rows[1], metrics=("GSM8K", "MATH-500", "AIME-120"))
    return Claim(
        name, Side("reqat-tqs", REFERENCE_PRECISION), Side(f"reqat-tqs-{weight}", REFERENCE_PRECISION), printed
    )


def _hadamard(name: str, recipe: str) -> Claim:
    rows: list[Row] = [(REFERENCE_PRECISION, "TAQ", f"transform={value}") for value in ("block-hadamard", "qfit")]
    return Claim(
        name,
        Side(recipe, REFERENCE_PRECISION),
        Side("reqat-tq", REFERENCE_PRECISION),
        Printed("table17", rows[0], rows[1]),
    )


def _epochs(k: int) -> Claim:
    rows: list[Row] = [(REFERENCE_PRECISION, "TAQ multi-epoch", f"taq_tokens={70 * n}M") for n in (k, 1)]
    return Claim(
        f"TAQ: no gain of {k} epochs over 1",
        Side(f"ft4-taq{k}", REFERENCE_PRECISION),
        Side("ft4-taq1", REFERENCE_PRECISION),
        Printed("table13", rows[0], rows[1]),
        kind="no gain",
        equal_budget=False,
    )


def _int4(name: str, a: str, b: str, methods: tuple[str, str], b_precision: str | None = None) -> Claim:
    """Against a 4-bit integer method of Table 3, whatever formats we have of it."""
    printed = Printed(
        "table3", ("INT4-row-W4A4KV4", methods[0], ""), (b_precision or "INT4-row-W4A4KV4", methods[1], "")
    )
    return Claim(name, Side(a, "*A4KV4"), Side(b, b_precision), printed)


def _programs(name: str, a: str, b: str) -> Claim:
    rows: list[Row] = [(_side(r).precision, _METHODS[r], "column={precision}") for r in (a, b)]
    return Claim(
        name, _side(a), _side(b), Printed("table7", rows[0], rows[1], metrics=("LiveCodeBench",)), problems="code"
    )


CLAIMS = (
    # The five that the paper rests on
    _table1("ReQAT-TQS reaches BF16 FT", "reqat-tqs", "ft", kind="parity", main=True),
    _table1("ReQAT-TQS above QAT", "reqat-tqs", "qat", main=True),
    _table1("ReQAT-T above QAT", "reqat-t", "qat", main=True),
    _table1("ReQAT-TQ above ReQAT-T", "reqat-tq", "reqat-t", main=True),
    Claim(
        "same traces above different",
        Side("reqat-t"),
        Side("ft-qat-different"),
        Printed("table4", (TABLE4_PRECISION, "FT+QAT", "aligned=yes"), (TABLE4_PRECISION, "FT+QAT", "aligned=no")),
        main=True,
        every_budget=True,
    ),
    # Tables 1 and 4
    _table1("FT+PTQ below BF16 FT", "ft-ptq", "ft"),
    _table1("QAT above FT+PTQ", "qat", "ft-ptq"),
    _table1("ReQAT-TQS above ReQAT-TQ", "reqat-tqs", "reqat-tq"),
    _table1("PTQ below the BF16 base", "ptq", "base"),
    _table1("BF16 FT above the base", "ft", "base", every_budget=False),
    _table1("FT+PTQ above PTQ", "ft-ptq", "ptq", every_budget=False),
    _table1("QAT below BF16 FT", "qat", "ft", every_budget=False),
    _table1("ReQAT-TQ above QAT", "reqat-tq", "qat", every_budget=False),
    Claim(
        "different traces: no gain over QAT",
        Side("ft-qat-different"),
        Side("qat"),
        Printed("table4", (TABLE4_PRECISION, "FT+QAT", "aligned=no"), (TABLE4_PRECISION, "QAT", "aligned=na")),
        kind="no gain",
    ),
    # Distillation (Table 3); the paper leaves TAQ under distillation open
    Claim(
        "QAD below QAT",
        Side("qad"),
        Side("qat"),
        Printed("table3", (TABLE4_PRECISION, "QAD", ""), (TABLE4_PRECISION, "QAT", "")),
    ),
    Claim("QAD after FT against ReQAT-T", Side("ft-qad"), Side("reqat-t")),
    # Parts of Q-FIT (Table 5; of E1M2 alone the paper has a loss, in Figure 10)
    _table5("E1M2 and scale above ReQAT-T", "qfit-scale", "reqat-t"),
    _table5("E1M2 and shift below ReQAT-T", "qfit-shift", "reqat-t"),
    _table5("scale and shift without E1M2 below ReQAT-T", "qfit-e2m1", "reqat-t"),
    _table5("Q-FIT above E1M2 and scale", "reqat-tq", "qfit-scale"),
    _table5("Q-FIT above E1M2 and shift", "reqat-tq", "qfit-shift"),
    _table5("Q-FIT above scale and shift without E1M2", "reqat-tq", "qfit-e2m1"),
    Claim("E1M2 alone above ReQAT-T", Side("reqat-t-e1m2", REFERENCE_PRECISION), Side("reqat-t"), stated=1),
    Claim("Q-FIT above E1M2 alone", Side("reqat-tq", REFERENCE_PRECISION), Side("reqat-t-e1m2"), stated=1),
    # Weight and mask of SEM (Tables 12, 16), Hadamard rotations (Table 17), epochs (Table 13)
    _sem("SEM weight 0.1 above 0.03", "0.03"),
    _sem("SEM weight 0.1 above 0.5", "0.5"),
    Claim(
        "soft mask above binary",
        Side("reqat-tqs"),
        Side("reqat-tqs-binary"),
        Printed(
            "table12",
            ("MXFP4-W4A4", "ReQAT-TQS", "sem_mask=soft"),
            ("MXFP4-W4A4", "ReQAT-TQS", "sem_mask=binary"),
            metrics=("AIME-90",),
        ),
    ),
    _hadamard("block Hadamard below Q-FIT", "reqat-t-hadamard"),
    _hadamard("Hadamard over heads below Q-FIT", "reqat-t-hadamard-head"),
    *(_epochs(k) for k in (2, 3, 4, 5)),
    Claim(
        "one epoch of ReQAT above five of TAQ",
        Side("ft4-reqat", REFERENCE_PRECISION),
        Side("ft4-taq5", REFERENCE_PRECISION),
        Printed(
            "table13",
            (REFERENCE_PRECISION, "ReQAT", "taq_tokens=70M"),
            (REFERENCE_PRECISION, "TAQ multi-epoch", "taq_tokens=350M"),
        ),
        equal_budget=False,
    ),
    # Other baselines (Table 3)
    Claim(
        "FT+AWQ below QAT",
        Side("ft-awq"),
        Side("qat"),
        Printed("table3", (TABLE4_PRECISION, "FT+AWQ", ""), (TABLE4_PRECISION, "QAT", "")),
    ),
    Claim(
        "AWQ: INT4 above MXFP4",
        Side("awq", "*INT4-*W4A16"),
        Side("awq", TABLE4_PRECISION),
        Printed("table3", ("INT4-g128-W4A16", "AWQ", ""), (TABLE4_PRECISION, "AWQ", "")),
    ),
    _int4("QuaRot below FlatQuant", "quarot", "flatquant", ("QuaRot", "FlatQuant")),
    _int4("FT+QuaRot below FT+FlatQuant", "ft-quarot", "ft-flatquant", ("FT+QuaRot", "FT+FlatQuant")),
    _int4("FlatQuant below QAT", "flatquant", "qat", ("FlatQuant", "QAT"), REFERENCE_PRECISION),
    _int4("FT+FlatQuant below QAT", "ft-flatquant", "qat", ("FT+FlatQuant", "QAT"), REFERENCE_PRECISION),
    # Other tasks (Tables 7 and 14)
    _programs("on programs: PTQ below the BF16 base", "ptq", "base"),
    _programs("on programs: ReQAT-TQS above QAT", "reqat-tqs", "qat"),
    Claim(
        "PTQ costs reasoning more than knowledge",
        Side("ptq"),
        Side("base", BF16),
        Printed("table14", (None, "PTQ", ""), (BF16, "Baseline", ""), beyond="MMLU"),
        beyond="facts",
    ),
)


@dataclass(frozen=True)
class Comparison:
    """A claim at one precision and budget of a plan: the cells of both sides, one a training seed; with
    `Claim.beyond`, those of both sides on the other problems, too."""

    claim: Claim
    model: str
    precision: str
    multiple: int | None
    """Total budget in QAT budgets, of `a` where the two differ; None: neither side trains."""
    a: tuple[Cell, ...]
    b: tuple[Cell, ...]
    beyond: tuple[tuple[Cell, ...], tuple[Cell, ...]] | None = None


def comparisons(plan: Plan) -> list[Comparison]:
    """Every claim that the plan has both sides of, in the order of `CLAIMS` and then of the plan's cells."""
    groups = _groups(plan)
    return [found for claim in CLAIMS for label in plan.tier.models for found in _of(claim, label, plan.tier, groups)]


def has_claims(plan: Plan) -> bool:
    """Whether the plan tests claims: it grades test problems (on validation problems, rates are chosen), and has both
    sides of at least one claim of which one is trained."""
    return plan.tier.evaluation.split == "test" and any(found.multiple is not None for found in comparisons(plan))


_Key = tuple[str, str, str, str, int | None]  # model, problems, recipe, precision, multiple


def _groups(plan: Plan) -> dict[_Key, tuple[Cell, ...]]:
    """The cells of one artifact that differ in their training seed alone: of the artifact that has the most seeds."""
    found: dict[_Key, dict[tuple[str, str, str], list[Cell]]] = {}
    for cell in plan.cells:
        problems = _problems(plan.evaluation(cell.evaluation), plan.tier)
        if problems is not None:
            key = (cell.model, problems, cell.recipe, cell.precision, cell.multiple)
            found.setdefault(key, {}).setdefault((cell.artifact, cell.method, cell.condition), []).append(cell)
    most: dict[_Key, tuple[Cell, ...]] = {}
    for key, groups in found.items():
        sizes = [len(cells) for cells in groups.values()]
        most[key] = tuple(list(groups.values())[sizes.index(max(sizes))])
    return most


def _problems(asked: Evaluation, tier: Tier) -> str | None:
    """`OWN`, or the one task family that an evaluation is of; None if it does not decode and quantize as the tier does,
    or mixes other families."""
    how = tier.evaluation
    if asked.decoding != how.decoding or asked.precision.global_scale not in (None, how.global_scale):
        return None
    p, families = asked.problems, how.families if how.families is not None else tier.data.families
    if (p.families, p.split, p.n, p.seed) == (dict(sorted(families.items())), how.split, how.n, how.problem_seed):
        return OWN
    return next(iter(p.families)) if len(p.families) == 1 else None


def _of(claim: Claim, label: str, tier: Tier, groups: dict[_Key, tuple[Cell, ...]]) -> Iterator[Comparison]:
    claim_total = tier.models[label].claim_total or tier.budget.claim_total

    def side(side: Side, problems: str) -> list[_Key]:
        return [
            key
            for key in groups
            if key[:3] == (label, problems, side.recipe) and (side.precision is None or fnmatch(key[3], side.precision))
        ]

    for key_a in side(claim.a, claim.problems):
        for key_b in side(claim.b, claim.problems):
            if claim.b.precision is None and key_b[3] != key_a[3]:
                continue
            totals = [key[4] for key in (key_a, key_b) if key[4] is not None]
            if claim.equal_budget and (len(set(totals)) > 1 or not (claim.every_budget or {*totals} <= {claim_total})):
                continue
            precision = key_a[3] if key_a[3] != BF16 else key_b[3]
            beyond = None
            if claim.beyond is not None:
                others = tuple((label, claim.beyond, *key[2:]) for key in (key_a, key_b))
                if not all(other in groups for other in others):
                    continue
                beyond = groups[others[0]], groups[others[1]]  # type: ignore[index]
            yield Comparison(claim, label, precision, next(iter(totals), None), groups[key_a], groups[key_b], beyond)
