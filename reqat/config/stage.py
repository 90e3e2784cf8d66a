"""Stages and evaluations: the nodes of the plan, each named by the digest of its settings and of the stages it stands
on.

A `Stage` takes the directory of its parent (a model) and of its trace store, and makes a model. Because its id covers
its settings, its precision, its parent's id and its data's id, a fine-tuning from which twenty variants branch has
one id and is trained once.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationInfo,
    field_validator,
    model_validator,
)

from reqat.config.base import Count, Families, Seed, Size, Strict, digest, distinct, plain
from reqat.config.catalogue import GRADIENT_RULES, OBJECTIVE_TERMS, PTQ_METHODS
from reqat.config.errors import ReqatError, unknown
from reqat.config.precision import CACHE, LINEAR, PrecisionSpec, Role
from reqat.config.ptq import settled, with_options

Kind = Literal["data", "base", "finetune", "qfit", "qat", "ptq"]
DIGEST_LENGTH = 12


def _objective_term(name: str) -> str:
    if name not in OBJECTIVE_TERMS:
        raise unknown("objective term", name, OBJECTIVE_TERMS)
    return name


class NLLTerm(Strict):
    """Negative log-likelihood of the trace."""

    name: Literal["nll"]
    weight: float = 1.0


class SEMTerm(Strict):
    """Selective entropy minimization (ReQAT section 3.3)."""

    name: Literal["sem"]
    weight: float = Field(default=0.1, ge=0)
    percentile: float = Field(default=0.75, gt=0, le=1)
    binary: bool = False
    tau: Literal["minibatch", "released"] = "minibatch"
    """A percentile of all that an optimizer step sees, as the paper's text says, or the order statistic of one
    micro-batch that its released code takes."""


class QADTerm(Strict):
    """Forward KL to the BF16 teacher, the stage's own parent unless another is named (arXiv 2601.20088)."""

    name: Literal["qad"]
    weight: float = Field(default=1.0, ge=0)


class _Open(BaseModel):
    """Settings of a class that is not imported here: any key, but values that JSON can represent."""

    model_config = ConfigDict(extra="allow", frozen=True, allow_inf_nan=False)

    @model_validator(mode="after")
    def _plain(self) -> Self:
        plain(self.model_extra)
        return self


class OtherTerm(_Open):
    """Any other term of `reqat.methods.terms`; settings besides its weight are arguments of its class."""

    name: Annotated[str, AfterValidator(_objective_term)]
    weight: float = 1.0


def _kind_of_term(value: Any) -> str:
    name = value.get("name") if isinstance(value, dict) else getattr(value, "name", None)
    return name if name in ("nll", "sem", "qad") else "other"


Term = Annotated[
    Annotated[NLLTerm, Tag("nll")]
    | Annotated[SEMTerm, Tag("sem")]
    | Annotated[QADTerm, Tag("qad")]
    | Annotated[OtherTerm, Tag("other")],
    Discriminator(_kind_of_term),
]
"""One summand of the objective. A new one is a file of `reqat/methods/terms/`; its own model here is needed only for
settings that are to be checked before torch is imported."""


def _gradient_rule(name: str) -> str:
    if name not in GRADIENT_RULES:
        raise unknown("gradient rule", name, GRADIENT_RULES)
    return name


class Gradient(_Open):
    """How gradients pass through the rounding of a QAT stage; settings besides are arguments of the rule's class."""

    rule: Annotated[str, AfterValidator(_gradient_rule)] = "ste"
    """A rule of `reqat.quant.gradients`."""
    roles: tuple[Role, ...] = (*LINEAR, *CACHE)
    """Which tensors have it; the others go straight through."""


class TraceSource(Strict):
    """What a trace store of somebody's own traces is made of (`reqat.data.sources`)."""

    name: str = ""
    """Of the file, or `owner/name@COMMIT` of a data set of the hub. A tier leaves it out: it is its `source`."""
    sha256: str | None = None
    """Of the file. Of a tier's it is taken when the plan is made."""
    messages: str | None = None
    prompt: str | None = None
    response: str | None = None
    """Columns that were named; null: the usual ones."""
    row_tokens: Size | None = None
    """Longest trace; null: the longest there is, within what the model reads."""
    over_long: Literal["drop", "truncate"] = "drop"


class DataSettings(Strict):
    """A trace store: at least `tokens` tokens of verified traces over problems of `families`, and the tokenizer that
    counted them."""

    families: Families = Field(default_factory=dict)
    """Task family -> options of its generator. Kept in the order of their names, so that order cannot change what a
    digest means."""
    shares: dict[str, Size] = Field(default_factory=dict)
    """Task family -> traces of it in a round of all families; one that is not named has one."""
    split: Literal["train", "validation", "test"] = "train"
    tokens: Count
    """Smallest size of the store in tokens as trained on (prompt, response, markers)."""
    seed: Seed = 0
    tokenizer: Literal["build", "model"] = "build"
    """`build`: the words of the families, one token a digit; `model`: the tokenizer of the parent stage's model."""
    source: str = "generated"
    """`generated` by the families, or the name of a file of traces in the data folder (JSONL or Parquet: prompt and
    response, or messages)."""
    own: TraceSource | None = None
    """Of a `source` that is a file: its digest, its columns, and what becomes of rows that are too long."""

    @field_validator("families")
    @classmethod
    def _ordered(cls, families: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
        return dict(sorted(families.items()))

    @model_validator(mode="after")
    def _has_source(self) -> DataSettings:
        if self.source == "generated" and not self.families:
            raise ReqatError("families: name at least one task family, or a `source` file of traces.")
        if self.source == "generated" and self.own is not None:
            raise ReqatError(
                "own: it describes a `source` that is a file, and these traces are generated; leave it out."
            )
        for name in self.shares:
            if name not in self.families:
                raise unknown("task family", name, self.families, where="shares")
        return self


class Architecture(Strict):
    """Shape of a decoder trained from scratch."""

    family: Literal["llama", "qwen2"] = "llama"
    """`qwen2`: queries, keys and values have biases, as in R1-Distill-Qwen."""
    key_bias: float = Field(default=0.0, ge=0, le=100)
    """Standard deviation of the key biases at the start (`qwen2`). Published models have large ones, which are what
    makes outliers of keys; from zero, a small model does not grow them in a short training."""
    hidden_size: Size
    layers: Size
    heads: Size
    kv_heads: Size
    mlp: Size
    tie_embeddings: bool = True
    max_position_embeddings: Size = 1024

    @model_validator(mode="after")
    def _divisible(self) -> Architecture:
        if self.hidden_size % self.heads or self.heads % self.kv_heads:
            raise ReqatError(
                f"hidden_size {self.hidden_size} must be a multiple of heads {self.heads}, and heads of kv_heads "
                f"{self.kv_heads}."
            )
        if self.key_bias and self.family != "qwen2":
            raise ReqatError(f"key_bias {self.key_bias}: the keys of family {self.family!r} have no bias; take qwen2.")
        return self


class Optimization(Strict):
    """Hyper-parameters of the training loop. Each is defined, with its default and its range, here and nowhere else."""

    optimizer: Literal["adamw", "sgd"] = "adamw"
    """`sgd` is stochastic gradient descent with Nesterov's momentum, as convolutional networks are trained."""

    lr: float = Field(default=1e-3, gt=0, le=1e3)
    min_lr_ratio: float = Field(default=0.01, ge=0, le=1)
    schedule: Literal["cosine", "linear"] = "cosine"
    """How the rate falls after warming up."""
    warmup: float = Field(default=0.03, ge=0, lt=1)
    """Share of the steps spent warming up."""
    weight_decay: float = Field(default=0.0, ge=0)
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.95)
    """Of `adamw`."""
    momentum: float = Field(default=0.9, gt=0, lt=1)
    """Of `sgd`."""
    clip: float | None = Field(default=1.0, gt=0)
    rows_per_batch: Size = 24
    """Packed rows in one micro-batch."""
    accumulation: Size = 1
    autocast: Literal["none", "bf16", "auto"] = "bf16"
    """Numbers of the matrix products: float32, bfloat16, or bfloat16 where the device has instructions for it."""
    gradient_checkpointing: bool = False
    attention: Literal["rows", "traces"] = "rows"
    """A packed row under one mask, or each of its traces by itself, without the products that the mask throws away: the
    same numbers up to rounding, and in long rows of short traces a fraction of the work."""


class Training(Optimization):
    """What one run of the training loop is given, except which tokens it sees. Only NLL unless told otherwise."""

    row_tokens: Size = 256
    """Length of a packed row."""
    objective: tuple[Term, ...] = (NLLTerm(name="nll"),)
    gradient: Gradient = Gradient()
    """Of a `qat` stage."""


class Selection(Strict):
    """Which traces of the ordered store a training stage sees, and how often."""

    tokens: Count
    """Size of the chosen run of traces; `tokens * epochs` is the stage's budget."""
    skip_tokens: int = Field(default=0, ge=0, le=10**12)
    """Traces that hold the first `skip_tokens` tokens of the store are left out."""
    epochs: Count = 1

    @property
    def budget_tokens(self) -> int:
        """Tokens trained on."""
        return self.tokens * self.epochs


class TrainSettings(Strict):
    """Settings of a `finetune` or `qat` stage."""

    kind: Literal["train"] = "train"
    training: Training
    traces: Selection
    seed: Seed = 0
    """Order of the rows (and any other randomness of the loop)."""
    share_global_scale: bool = False
    """Of a `qat` stage: weights that engines join (q, k, v; gate, up) have one global scale."""


class BaseSettings(Strict):
    """Where the base model comes from: trained `scratch`, the `pinned` checkpoint, a model in an installed `package`,
    or a local `path`."""

    kind: Literal["base"] = "base"
    source: Literal["scratch", "pinned", "package", "path"]
    name: str
    """What tables call the model."""
    reference: str | None = None
    """`package`: its name; `path`: folder under the models folder; `pinned`: sha256 of the weights."""
    architecture: Architecture | None = None
    training: Training | None = None
    traces: Selection | None = None
    seed: Seed = 0

    @model_validator(mode="after")
    def _complete(self) -> BaseSettings:
        scratch = (self.architecture, self.training, self.traces)
        if self.source == "scratch" and None in scratch:
            raise ReqatError("a base from scratch needs architecture, training and traces.")
        if self.source != "scratch" and any(scratch):
            raise ReqatError(f"a base from {self.source!r} takes no architecture, training or traces.")
        return self


class Calibration(Strict):
    """Sequences that a stage looks at without training: packed from the front of the trace store."""

    sequences: Size = 64
    sequence_tokens: Size = 256


class QFitSettings(Strict):
    """Settings of a `qfit` stage: calibrate pre-RoPE scale and post-RoPE shift, fold them into the model (ReQAT
    section 3.4)."""

    kind: Literal["qfit"] = "qfit"
    scale: bool = True
    shift: bool = True
    grid: Size = 20
    variant: Literal["paper", "released"] = "paper"
    calibration: Calibration = Calibration()


def _ptq_method(name: str) -> str:
    if name not in PTQ_METHODS:
        raise unknown("PTQ method", name, PTQ_METHODS)
    return name


PTQMethod = Annotated[str, AfterValidator(_ptq_method), Field(json_schema_extra={"enum": list(PTQ_METHODS)})]
"""A method of `reqat.methods.ptq`."""


# What every `ptq` stage stated before options were a method's own, where nothing was asked for.
_STATED = {"act_order": True, "damp": 0.01, "alpha": None}


class PTQSettings(Strict):
    """Settings of a `ptq` stage. `rtn` stands for completeness: an evaluation at a precision rounds to nearest by
    itself."""

    kind: Literal["ptq"] = "ptq"
    method: PTQMethod = "gptq"
    options: dict[str, Any] = Field(default_factory=dict)
    """Of the method (`reqat.config.ptq`), those that are not its defaults."""
    calibration: Calibration = Calibration()
    share_global_scale: bool = False
    """Weights that engines join (q, k, v; gate, up) get one global scale."""

    @model_validator(mode="before")
    @classmethod
    def _earlier(cls, data: Any) -> Any:
        """Plans of earlier versions have three options of any method beside it."""
        if not isinstance(data, Mapping) or not _STATED.keys() & data.keys():
            return data
        stated = {key: data[key] for key in _STATED if key in data and data[key] != _STATED[key]}
        rest = {key: value for key, value in data.items() if key not in _STATED}
        return with_options(rest, stated)

    @field_validator("options")
    @classmethod
    def _settled(cls, options: dict[str, Any], info: ValidationInfo) -> dict[str, Any]:
        return settled(info.data["method"], options) if "method" in info.data else options


class DataStageSettings(DataSettings):
    """Settings of a `data` stage."""

    kind: Literal["data"] = "data"


Settings = Annotated[
    DataStageSettings | BaseSettings | TrainSettings | QFitSettings | PTQSettings, Field(discriminator="kind")
]


class Stage(Strict):
    """One node of the plan that makes a model (or, for `data`, a trace store).

    `parent` is the id of the stage whose model it starts from, `data` of the trace store it reads; None where there
    is none. `teacher` is that of the model whose outputs it imitates, where the objective asks for one; None: the
    parent's.
    """

    kind: Kind
    settings: Settings
    precision: PrecisionSpec = PrecisionSpec()
    parent: str | None = None
    data: str | None = None
    teacher: str | None = None

    @cached_property
    def id(self) -> str:
        """`kind-` and twelve hex digits of the sha256 over settings, precision, parent, data and teacher."""
        return f"{self.kind}-{digest(self, DIGEST_LENGTH)}"

    @property
    def inputs(self) -> dict[str, str]:
        """Role (`parent`, `data`, `teacher`) -> id of the stage whose directory fills it."""
        roles = ("parent", "data", "teacher")
        return {role: id for role in roles if (id := getattr(self, role)) is not None}

    @property
    def seed(self) -> int | None:
        """The stage's own seed, where it has one."""
        return getattr(self.settings, "seed", None)

    @property
    def budget_tokens(self) -> int:
        """Tokens that this stage trains on (not those of its parents)."""
        traces = getattr(self.settings, "traces", None)
        return traces.budget_tokens if traces is not None else 0


class Decoding(Strict):
    """How responses are drawn."""

    greedy: bool = False
    temperature: float = Field(default=0.6, gt=0)
    top_p: float = Field(default=0.95, gt=0, le=1)
    max_new_tokens: Size = 256
    batch_rows: Size = 256
    autocast: Literal["none", "bf16"] = "none"


BenchmarkName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")]


class Benchmark(Strict):
    """A file of problems with answers, `name`.jsonl in the data folder (`reqat.tasks.benchmarks`)."""

    name: BenchmarkName
    sha256: str
    """Of the file: other problems are another evaluation."""


class ProblemSet(Strict):
    """The problems of an evaluation: the first `n` distinct ones of a split, in equal shares of the families; or the
    first `n` of a benchmark."""

    families: Families = Field(default_factory=dict)
    benchmark: Benchmark | None = None
    """In place of families; split and seed then say nothing."""
    split: Literal["validation", "test"] = "test"
    n: Count
    seed: Seed = 1

    @field_validator("families")
    @classmethod
    def _ordered(cls, families: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
        return dict(sorted(families.items()))

    @model_validator(mode="after")
    def _some(self) -> ProblemSet:
        if bool(self.families) == (self.benchmark is not None):
            raise ReqatError("families: name at least one task family, or a benchmark, and not both.")
        return self


class Evaluation(Strict):
    """One node of the plan that grades a model: a stage's model at a precision on problems, once per sampling seed."""

    stage: str
    """Id of the stage whose model is evaluated."""
    precision: PrecisionSpec
    problems: ProblemSet
    decoding: Decoding
    seeds: Annotated[tuple[Seed, ...], AfterValidator(distinct)] = Field(min_length=1)
    """Sampling seeds; greedy decoding uses one."""
    calibration: Calibration | None = None
    """For static global scales: the sequences of `data` whose largest values set them."""
    data: str | None = None

    @property
    def inputs(self) -> dict[str, str]:
        """Role (`parent`, `data`) -> id of the stage whose directory fills it."""
        return {"parent": self.stage} | ({"data": self.data} if self.data is not None else {})

    @cached_property
    def id(self) -> str:
        """`evaluation-` and twelve hex digits of the sha256 over everything above."""
        return f"evaluation-{digest(self, DIGEST_LENGTH)}"

    def shards(self, most: int) -> dict[str, Evaluation]:
        """The evaluation in at most `most` parts, each of some of its sampling seeds: id (`evaluation-...-1of4`) ->
        part. None at all where that is one part.

        A response depends on its problem and its seed alone, so the parts together are the whole, whatever their
        number, which is therefore in no id but theirs.
        """
        n = min(most, len(self.seeds))
        if n == 1:
            return {}
        fields = {name: getattr(self, name) for name in Evaluation.model_fields}
        return {f"{self.id}-{i + 1}of{n}": Evaluation(**fields | {"seeds": self.seeds[i::n]}) for i in range(n)}
