"""Recipes: published methods as lists of stages with symbolic token amounts.

A recipe says *what* is done (`finetune` on `total - qat` tokens, then `qat` on `qat` tokens of the same traces), a
tier says *how much* (`qat = 200k`, `total = 2 qat`). An ablation is one more recipe in `config/recipes.yaml`, never
code.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, ValidationInfo, field_validator, model_validator

from reqat.config.base import Count, Seed, Strict
from reqat.config.errors import ReqatError, unknown
from reqat.config.formats import FAMILIES
from reqat.config.precision import FORMATS, GlobalScale, Rotation, Skip, family, resolve, without_skip
from reqat.config.ptq import OPTIONS, checked, rotation_of, with_options
from reqat.config.stage import Gradient, PTQMethod, Term

_TERM = re.compile(r"\s*([+-]?)\s*(?:(\d+(?:\.\d+)?)\s*\*?\s*)?([a-z_]+)?\s*")
AMOUNTS = ("total", "qat", "ft")
OWN = "own"
"""Name of a tier's own problems, among its named sets."""
_MOST_TOKENS = 1e15


def amount(expression: str | int, values: Mapping[str, int]) -> int:
    """Tokens meant by `expression`: sums and differences of `total`, `qat`, `ft` (= total - qat) and numbers, as in
    `total - 2 qat`.

    Raises `ReqatError` if it is not such a sum or not positive.
    """
    text = str(expression).strip()
    position, total = 0, 0.0
    while position < len(text):
        match = _TERM.match(text, position)
        if (
            not match
            or match.end() == position
            or (match[2] is None and match[3] is None)
            or (position and not match[1])
        ):
            raise ReqatError(
                f"cannot read the token amount {text!r}: write sums of {', '.join(AMOUNTS)}, as in 'total - qat'."
            )
        if match[3] and match[3] not in values:
            raise unknown("token amount", match[3], values)
        value = float(match[2] or 1) * (values[match[3]] if match[3] else 1)
        if not value < _MOST_TOKENS:
            raise ReqatError(f"the token amount {text[:80]!r} is beyond {_MOST_TOKENS:g} tokens.")
        total += -value if match[1] == "-" else value
        position = match.end()
    if total < 1:
        raise ReqatError(f"the token amount {text!r} is {total:g} here; it must be positive (values: {dict(values)}).")
    return round(total)


class _Step(Strict):
    formats: list[str] | None = None
    """Do this step only for precisions of these formats (null: for all)."""

    @field_validator("formats")
    @classmethod
    def _known(cls, formats: list[str] | None) -> list[str] | None:
        for name in formats or ():
            if name not in FORMATS:
                raise unknown("format", name, FORMATS)
        return formats


class TrainStep(_Step):
    """A `finetune` or `qat` step."""

    step: Literal["finetune", "qat"]
    tokens: str | int = "total"
    """Size of the run of traces, in `total`, `qat`, `ft`."""
    epochs: Count = 1
    traces: Literal["same", "different"] = "same"
    """`same`: from the front of the store, so that a shorter stage sees a prefix of a longer one's traces;
    `different`: after `ft` tokens, none that fine-tuning saw."""
    objective: tuple[Term, ...] | None = None
    """In place of the tier's objective."""
    teacher: str = "parent"
    """Whose outputs terms of distillation imitate: `parent`, the model that this step starts from; `base`, the one that
    the recipe starts from; `finetuned`, what its last fine-tuning made; or the name of another model of the tier (a
    checkpoint, by `source: path`). Always in full precision."""
    gradient: Gradient | None = None
    """In place of the tier's gradient rule."""

    @model_validator(mode="after")
    def _used(self) -> TrainStep:
        if self.gradient is not None and self.step == "finetune":
            raise ValueError("gradient: a finetune step quantizes nothing; leave it out, or give it to a qat step")
        if (
            self.teacher != "parent"
            and self.objective is not None
            and {t.name for t in self.objective} <= {"nll", "sem"}
        ):
            raise ValueError(
                f"teacher {self.teacher!r}: no term of the objective compares with a teacher; leave it out"
            )
        return self

    @field_validator("tokens")
    @classmethod
    def _readable(cls, tokens: str | int) -> str | int:
        amount(tokens, {"total": 10**9, "qat": 10**6, "ft": 10**9 - 10**6})
        return tokens


class QFitStep(_Step):
    """A `qfit` step."""

    step: Literal["qfit"]
    scale: bool = True
    shift: bool = True
    variant: Literal["paper", "released"] = "paper"


def _options_beside(schema: dict[str, Any]) -> None:
    """Let the schema take every method's options beside the step's own keys."""
    for settings in OPTIONS.values():
        for option, values in settings.model_json_schema()["properties"].items() if settings.model_fields else ():
            schema["properties"].setdefault(option, {k: v for k, v in values.items() if k not in ("default", "title")})


class PTQStep(_Step):
    """A `ptq` step. The method's options (`reqat.config.ptq`) stand beside its name: `{step: ptq, method: gptq,
    act_order: false}`."""

    model_config = ConfigDict(json_schema_extra=_options_beside)

    step: Literal["ptq"]
    method: PTQMethod = "gptq"
    options: dict[str, Any] = Field(default_factory=dict)
    """Of the method. One that is not given is the tier's, where the tier has it, or else the method's default."""

    @model_validator(mode="before")
    @classmethod
    def _beside(cls, data: Any) -> Any:
        if not isinstance(data, Mapping):
            return data
        options = {key: value for key, value in data.items() if key not in cls.model_fields}
        rest = {key: value for key, value in data.items() if key in cls.model_fields}
        return with_options(rest, options)

    @field_validator("options")
    @classmethod
    def _checked(cls, options: dict[str, Any], info: ValidationInfo) -> dict[str, Any]:
        return checked(info.data["method"], options) if "method" in info.data else options


Step = Annotated[TrainStep | QFitStep | PTQStep, Field(discriminator="step")]


class PrecisionOptions(Strict):
    """Options that a recipe puts on precisions of one format."""

    kv_element: Literal["E1M2", "E2M1"] | None = None
    rotation: Rotation | None = None
    kv_rotation: Rotation | Literal["head_dim"] | None = None
    """`head_dim`: over a whole head, whatever its size in the model."""
    kv_signs: Seed | None = None
    global_scale: GlobalScale | None = None
    skip: Skip | None = None


class Recipe(Strict):
    """One method: its label in tables, its steps, and the precision options it implies per format."""

    method: str
    about: str = ""
    steps: list[Step] = Field(default_factory=list)
    precision: dict[str, PrecisionOptions] = Field(default_factory=dict)
    """Format name -> options, for quantized steps and for the evaluation."""

    def fixed_total(self, qat: int) -> int | None:
        """Tokens that it trains on, whatever the budget, where all its amounts are in `qat` (epochs over one subset of
        traces); None where a budget decides, or nothing is trained."""
        trained = [step for step in self.steps if isinstance(step, TrainStep)]
        if not trained or any(re.search("total|ft", str(step.tokens)) for step in trained):
            return None
        return sum(amount(step.tokens, {"qat": qat}) * step.epochs for step in trained)

    def rotation(self, precision: str) -> int | None:
        """Size of the block rotation that its methods add to a precision, or None. They add none where the precision's
        name has one."""
        found = resolve(without_skip(precision)[0])
        of = found.families.get("weights")
        if of is None or found.rotation is not None:
            return None
        methods = [
            step.method
            for step in self.steps
            if isinstance(step, PTQStep) and (step.formats is None or found.family in step.formats)
        ]
        sizes = (rotation_of(method, FAMILIES[of]["block"][0]) for method in methods)
        return next((size for size in sizes if size is not None), None)

    @field_validator("precision")
    @classmethod
    def _formats(cls, precision: dict[str, PrecisionOptions]) -> dict[str, PrecisionOptions]:
        for name in precision:
            if name not in FORMATS:
                raise unknown("format", name, FORMATS)
        return precision

    @model_validator(mode="after")
    def _skips_what_is_trained(self) -> Recipe:
        solved = any(isinstance(step, PTQStep) for step in self.steps)
        for name, options in self.precision.items():
            if solved and options.skip is not None:
                raise ReqatError(
                    f"precision.{name}.skip: a ptq step quantizes every layer; leave skip {options.skip} out."
                )
        return self


class DecodingOptions(Strict):
    """What a block of cells decodes with in place of the tier's; null: as the tier does."""

    greedy: bool | None = None
    temperature: float | None = Field(default=None, gt=0)
    top_p: float | None = Field(default=None, gt=0, le=1)


class Rows(Strict):
    """A block of cells of one artifact: every recipe x precision x total named."""

    recipes: list[str]
    precisions: list[str]
    totals: Literal["all", "claim"] = "all"
    """`all`: each total of the tier; `claim`: the one that claims rest on. It says nothing of a recipe that trains
    nothing, which spends no tokens, and of one with a fixed total (`Recipe.fixed_total`)."""
    problems: list[str] = Field(default_factory=lambda: [OWN], min_length=1)
    """Sets of problems to grade on: of the tier's `evaluation.sets`, or `own`."""
    method: str | None = None
    """Label in place of the recipe's."""
    condition: str = ""
    """What tells the cell apart within its artifact, as `key=value;key=value` (the form of the paper's reported
    numbers)."""
    global_scale: GlobalScale | None = None
    """Evaluate with this mode in place of the tier's."""
    decoding: DecodingOptions = DecodingOptions()
    """Decode like this in place of the tier's."""

    @field_validator("precisions")
    @classmethod
    def _known(cls, precisions: list[str]) -> list[str]:
        for name in precisions:
            family(name)
        return precisions


class Artifact(Strict):
    """One table or figure: a title and the cells it shows."""

    title: str
    rows: list[Rows]


class Catalogue(Strict):
    """`config/recipes.yaml`: all recipes and the artifacts made of them."""

    recipes: dict[str, Recipe]
    artifacts: dict[str, Artifact]

    @model_validator(mode="after")
    def _references(self) -> Catalogue:
        for name, artifact in self.artifacts.items():
            for rows in artifact.rows:
                for recipe in rows.recipes:
                    if recipe not in self.recipes:
                        raise unknown("recipe", recipe, self.recipes, where=f"artifacts.{name}")
        return self

    def recipe(self, name: str) -> Recipe:
        """The recipe called `name`; `ReqatError` with the closest match if there is none."""
        if name not in self.recipes:
            raise unknown("recipe", name, self.recipes)
        return self.recipes[name]
