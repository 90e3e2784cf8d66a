"""Settings of the throughput benchmark: `config/throughput.yaml`, one section for each tier.

A file of its own, outside the tiers: how fast a kernel is changes no trained weight, so none of this may enter the
digest that names a stage. The benchmark has its own name, the digest of its own section.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from reqat.config.base import Size, Strict, digest, distinct, parse
from reqat.config.errors import ReqatError, unknown
from reqat.config.files import read_yaml
from reqat.config.precision import family
from reqat.config.vocabulary import check_embeddings, check_head

FILE = "throughput.yaml"
LEAST_MEMORY_MB = 2000
MOST_THREADS = 4096


def _model(name: str) -> str:
    if name.strip() in ("", "package:"):
        raise ReqatError(f"model {name!r}: write pinned, a folder, or package:NAME.")
    return name


def _precision(name: str) -> str:
    family(name)
    return name


ModelName = Annotated[str, AfterValidator(_model)]
PrecisionName = Annotated[str, AfterValidator(_precision)]
HeadName = Annotated[str, AfterValidator(check_head)]
EmbeddingsName = Annotated[str, AfterValidator(check_embeddings)]


NumbersOfThreads = Annotated[
    list[Annotated[int, Field(gt=0, le=MOST_THREADS)]], Field(min_length=1), AfterValidator(distinct)
]
"""Rows for each; those that this machine has no CPUs for are left out, and named."""


class LinearBench(Strict):
    """The matrix product: every M with every N = K."""

    m: list[Size] = Field(min_length=1)
    nk: list[Size] = Field(min_length=1)
    rounds: Size = 30
    threads: NumbersOfThreads = [1]


class AttentionBench(Strict):
    """Decode attention: every batch with every number of tokens in the cache."""

    batches: list[Size] = Field(min_length=1)
    contexts: list[Size] = Field(min_length=1)
    rounds: Size = 15
    threads: NumbersOfThreads = [1]


class FakeQuantizeBench(Strict):
    """Fake quantization of square float32 tensors."""

    sizes: list[Size] = Field(min_length=1)
    rounds: Size = 9


class TableBench(Strict):
    """Piecewise-linear tables of nonlinear functions, and the functions."""

    sizes: list[Annotated[Size, Field(multiple_of=16)]] = Field(min_length=1)
    """Numbers."""
    rounds: Size = 15


class SEMLossBench(Strict):
    """The fused SEM loss with its gradients."""

    shapes: list[Literal["a", "b", "small", "tiny"]] = Field(min_length=1)
    """As in `reqat_kernels.bench.sem_loss`."""
    rounds: Size = 3


class DecodeBench(Strict):
    """Decoding with a whole model through `generate()`."""

    model: ModelName
    """`pinned` (the base checkpoint in results/base), a folder, or `package:NAME`."""
    precision: PrecisionName = "NVFP4-W4A4KV4"
    batches: list[Size] = Field(min_length=1)
    prompt_tokens: Size = 64
    output_tokens: list[Size] = Field(min_length=1)
    """Each a row; all from generations of the longest."""
    prefill_tokens: list[Size] = []
    """Lengths of one prompt that is read alone; each a row."""
    threads: NumbersOfThreads = [1]
    heads: list[HeadName] = []
    """Ways to store our packed model's output head (and embeddings, where they are one matrix); each a row more."""
    rounds: Size = 1


class TrainStepBench(Strict):
    """A QAT step against a BF16 step of the same model."""

    model: ModelName
    """As in `DecodeBench`."""
    precision: PrecisionName = "NVFP4-W4A4KV4"
    rows: Size
    row_tokens: Size
    rounds: Size = 6
    autocast: Literal["none", "bf16", "auto"] = "bf16"
    """As in the settings of a training."""


class AgreementBench(Strict):
    """Greedy responses of the packed model against its fake-quantized twin's (no clock)."""

    model: ModelName
    precision: PrecisionName = "NVFP4-W4A4KV4"
    families: list[str] = Field(min_length=1)
    prompts: Size = 100
    max_new_tokens: Size
    batch_rows: Size | None = None


class HeadChoice(Strict):
    """How a packed model stores its output head and embeddings; None: where they are one matrix, as the other, else as
    the model has it."""

    head: HeadName | None = None
    embeddings: EmbeddingsName | None = None


class HeadsBench(Strict):
    """Packed models by what their head and embeddings are stored in, against both in BF16 (no clock)."""

    model: ModelName
    precision: PrecisionName = "NVFP4-W4A4KV4"
    choices: list[HeadChoice] = Field(min_length=1)
    text: str | None = None
    """A file of running text, or `python`: the language reference that comes with Python; None: no text is read."""
    text_tokens: Size = 4096
    row_tokens: Size = 256
    families: list[str] = []
    """Problems that are answered and graded; none: no problems."""
    prompts: Size = 100
    max_new_tokens: Size = 200
    batch_rows: Size | None = None


class SpeculationBench(Strict):
    """Responses to prompts with prompt lookup and without, one row."""

    model: ModelName
    precision: PrecisionName = "NVFP4-W4A4KV4"
    head: HeadName | None = None
    families: list[str] = Field(min_length=1)
    prompts: Size = 10
    max_new_tokens: Size
    guesses: list[Annotated[int, Field(ge=1, le=63)]] = Field(min_length=1)
    dtype: Literal["float32", "bfloat16"] = "bfloat16"


class EntropyBench(Strict):
    """Generation with and without collecting entropies."""

    model: ModelName
    """As in `DecodeBench`."""
    batch: Size
    prompt_tokens: Size = 64
    output_tokens: int = Field(ge=2, le=2**24)
    rounds: Size = 5


class Throughput(Strict):
    """One tier's benchmark."""

    threads: int = Field(default=1, gt=0, le=MOST_THREADS)
    """Of the sections that state none of their own."""
    linear: LinearBench | None = None
    attention: AttentionBench | None = None
    fake_quantize: FakeQuantizeBench | None = None
    table: TableBench | None = None
    sem_loss: SEMLossBench | None = None
    decode: list[DecodeBench] = []
    train_step: list[TrainStepBench] = []
    entropy: list[EntropyBench] = []
    agreement: list[AgreementBench] = []
    heads: list[HeadsBench] = []
    speculation: list[SpeculationBench] = []
    ring_bytes: int = Field(default=0, ge=0, le=10**12)
    """Bytes that rotating copies of weights may take, one copy at least; 0: twice what makes data cold, measured, as
    far as memory allows."""
    memory_mb: int = Field(default=4000, ge=LEAST_MEMORY_MB, le=10**9, exclude=True)
    """Megabytes (10^6 bytes) of memory that it may take, all of its processes together; less is taken where less is
    free. Measures nothing, so it is not in the benchmark's name; each record says what was allowed and taken."""
    burst_ms: float = Field(default=2.0, gt=0)

    def only(self, names: Sequence[str]) -> Throughput:
        """These sections alone. Raises `ReqatError` for a name that is no section, or of which there is none."""
        have = [name for name in SECTIONS if getattr(self, name)]
        for name in names:
            if name not in have:
                raise unknown("section of the benchmark", name, have, where="--only")
        left = {name: type(self).model_fields[name].get_default() for name in have if name not in names}
        return self.model_copy(update=left)

    @property
    def id(self) -> str:
        """Names the benchmark's folder."""
        return f"throughput-{digest(self, 12)}"


SECTIONS = (
    "linear", "attention", "fake_quantize", "table", "sem_loss", "decode", "train_step", "entropy", "agreement",
    "heads", "speculation",
)  # fmt: skip


class ThroughputFile(Strict):
    """`config/throughput.yaml`: tier -> benchmark. A tier without a section has no Figure 6."""

    tiers: dict[str, Throughput]


def sources(root: Path) -> list[Path]:
    """Files of the code that a benchmark measures: with newer ones its numbers are those of other code."""
    return sorted(
        path
        for folder in ("kernels/reqat_kernels", "reqat/models", "reqat/inference")
        for path in (root / folder).rglob("*")
        if path.suffix in (".py", ".cpp", ".h")
    )


def load_throughput(tier: str, folder: Path) -> Throughput | None:
    """The benchmark of a tier; None if it has none. Raises `ReqatError` on a fault in the file."""
    path = folder / FILE
    if not path.exists():
        return None
    return parse(ThroughputFile, read_yaml(path), f"config/{FILE}").tiers.get(tier)
