"""The comparisons that the paper makes, and those of them that a plan has both sides of. They are tested in
:mod:`analysis.report.verdicts`; this module reads plans alone, so that the DAG can ask it.

A side of a comparison is a recipe at a precision, whatever artifact shows it: a claim is tested wherever a plan grades
both sides on the same problems, decoded as the tier decodes. So a new artifact brings its claims with it, and a plan
without one has no row for them. What does not hang on the plan is how many comparisons p-values are adjusted for:
`family_at` says which claims can be compared at a precision, whether a plan has their cells or not.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from typing import TYPE_CHECKING, Literal, NamedTuple

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


FORMER = {"reqat-t": "qfit-none"}
"""Recipe -> its name in older plans, where the name of today stood for other keys and values (`Side.kv`)."""


@dataclass(frozen=True)
class Side:
    """A recipe at any precision (None; as second side: at the first one's), or at those that a pattern matches."""

    recipe: str
    precision: str | None = None
    kv: str | None = None
    """Element that its keys and values must have, where the claim is about that; None: whatever the recipe says."""


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
    problems: tuple[str, ...] = (OWN,)
    """The sets of problems that both are graded on, all together: the tier's own, or named ones."""
    beyond: str | None = None
    """Set of problems on which the same difference is subtracted: what a loses more on the one than on the other."""
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
    first, second = (Side(recipe, at, "E1M2" if parts[recipe][0] else "E2M1") for recipe in (a, b))
    return Claim(name, first, second, Printed("table5", row(a), row(b)))


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
        Side(recipe, REFERENCE_PRECISION, "E2M1"),
        Side("reqat-tq", REFERENCE_PRECISION, "E1M2"),
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
        name, _side(a), _side(b), Printed("table7", rows[0], rows[1], metrics=("LiveCodeBench",)), problems=("code",)
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
    _table1("PTQ below the BF16 base", "ptq", "base", every_budget=False),
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
    Claim(
        "E1M2 alone above ReQAT-T",
        Side("reqat-t-e1m2", REFERENCE_PRECISION, "E1M2"),
        Side("reqat-t", kv="E2M1"),
        stated=1,
    ),
    Claim(
        "Q-FIT above E1M2 alone",
        Side("reqat-tq", REFERENCE_PRECISION, "E1M2"),
        Side("reqat-t-e1m2", kv="E1M2"),
        stated=1,
    ),
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
        every_budget=True,
        problems=("edition-1", "edition-2", "edition-3"),
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


Cells = tuple["Cell", ...]
"""Of one artifact, one a training seed."""


@dataclass(frozen=True)
class Comparison:
    """A claim at one precision and budget of a plan: the cells of both sides on each set of problems; with
    `Claim.beyond`, those of both sides on the other problems, too."""

    claim: Claim
    model: str
    precision: str
    multiple: int | None
    """Total budget in QAT budgets, of `a` where the two differ; None: neither side trains."""
    a: tuple[Cells, ...]
    b: tuple[Cells, ...]
    beyond: tuple[Cells, Cells] | None = None


def comparisons(plan: Plan) -> list[Comparison]:
    """Every claim that the plan has both sides of, in the order of `CLAIMS` and then of the plan's cells."""
    groups = _groups(plan)
    return [found for claim in CLAIMS for label in plan.tier.models for found in _of(claim, label, plan.tier, groups)]


def of_other_elements(plan: Plan) -> list[Claim]:
    """Claims about the element of keys and values whose two sides the plan has, with other elements alone."""
    groups, there = _groups(plan), {found.claim.name for found in comparisons(plan)}

    def with_any(claim: Claim) -> Claim:
        return replace(claim, a=replace(claim.a, kv=None), b=replace(claim.b, kv=None))

    return [
        claim
        for claim in CLAIMS
        if claim.name not in there
        and any(True for label in plan.tier.models for _ in _of(with_any(claim), label, plan.tier, groups))
    ]


def has_claims(plan: Plan) -> bool:
    """Whether the plan tests claims: it grades test problems (on validation problems, rates are chosen), and has both
    sides of at least one claim of which one is trained."""
    return plan.tier.evaluation.split == "test" and any(found.multiple is not None for found in comparisons(plan))


def primary(claim: Claim, precision: str, multiple: int | None, total: int) -> bool:
    """Whether a comparison is a primary one of the protocol; `total` is the one that claims rest on."""
    return claim.main and precision == REFERENCE_PRECISION and multiple == total


def family_at(precision: str, tier: Tier, model: str) -> Iterator[Claim]:
    """The claims that the protocol has as context at a precision, one a budget: whether the plan has them or not."""
    total = tier.claim_total(model)
    for claim in CLAIMS:
        a, b = claim.a.precision, claim.b.precision
        if a == BF16:  # a comparison's precision is that of the side that has four bits
            a = b
        if not (fnmatch(precision, a) if a is not None else precision != BF16):
            continue
        totals = {total, *tier.budget.totals} if claim.every_budget else {total}
        yield from (claim for multiple in totals if not primary(claim, precision, multiple, total))


class _Key(NamedTuple):
    model: str
    problems: str
    recipe: str
    precision: str
    multiple: int | None
    kv: str


def _groups(plan: Plan) -> dict[_Key, Cells]:
    """The cells of one artifact that differ in their training seed alone: of the artifact that has the most seeds."""
    found: dict[_Key, dict[tuple[str, str, str], list[Cell]]] = {}
    for cell in plan.cells:
        asked = plan.evaluation(cell.evaluation)
        problems = _problems(cell, asked, plan.tier)
        if problems is not None:
            kv = asked.precision.kv_element or "E2M1"
            key = _Key(cell.model, problems, cell.recipe, cell.precision, cell.multiple, kv)
            found.setdefault(key, {}).setdefault((cell.artifact, cell.method, cell.condition), []).append(cell)
    most: dict[_Key, Cells] = {}
    for key, groups in found.items():
        sizes = [len(cells) for cells in groups.values()]
        most[key] = tuple(list(groups.values())[sizes.index(max(sizes))])
    return most


def _problems(cell: Cell, asked: Evaluation, tier: Tier) -> str | None:
    """The name of the set of problems that a cell is graded on; None if its evaluation does not decode and quantize as
    the tier does, or is of the tier's own problems in part."""
    how = tier.evaluation
    if asked.decoding != how.decoding or asked.precision.global_scale not in (None, how.global_scale):
        return None
    if cell.problems != OWN:
        return cell.problems
    of = asked.problems.benchmark  # its digest is of when the plan was made
    wanted, _ = tier.problem_set(digests={f"{of.name}.jsonl": of.sha256} if of is not None else {})
    return OWN if asked.problems == wanted else None


def _of(claim: Claim, label: str, tier: Tier, groups: dict[_Key, Cells]) -> Iterator[Comparison]:
    total = tier.claim_total(label)

    def keys(side: Side) -> list[_Key]:
        names = {side.recipe, FORMER.get(side.recipe)} if side.kv is not None else {side.recipe}
        return [
            key
            for key in groups
            if (key.model, key.problems) == (label, claim.problems[0])
            and key.recipe in names
            and (side.precision is None or fnmatch(key.precision, side.precision))
            and side.kv in (None, key.kv)
        ]

    for key_a in keys(claim.a):
        for key_b in keys(claim.b):
            if claim.b.precision is None and key_b.precision != key_a.precision:
                continue
            totals = [key.multiple for key in (key_a, key_b) if key.multiple is not None]
            if claim.equal_budget and (len(set(totals)) > 1 or not (claim.every_budget or {*totals} <= {total})):
                continue
            precision = key_a.precision if key_a.precision != BF16 else key_b.precision
            wanted = [[key._replace(problems=name) for name in claim.problems] for key in (key_a, key_b)]
            more = [key._replace(problems=claim.beyond) for key in (key_a, key_b) if claim.beyond is not None]
            if not all(key in groups for key in (*wanted[0], *wanted[1], *more)):
                continue
            a, b = (tuple(groups[key] for key in side) for side in wanted)
            beyond = (groups[more[0]], groups[more[1]]) if more else None
            yield Comparison(claim, label, precision, next(iter(totals), None), a, b, beyond)
