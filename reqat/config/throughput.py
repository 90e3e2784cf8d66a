"""Settings of the throughput benchmark: `config/throughput.yaml`, one section for each tier.

A file of its own, outside the tiers: how fast a kernel is changes no trained weight, so none of this may enter the
digest that names a stage. The benchmark has its own name, the digest of its own section.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from reqat.config.base import Size, Strict, digest, distinct, parse
from reqat.config.errors import ReqatError
from reqat.config.files import read_yaml
from reqat.config.precision import family

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
    ring_bytes: int = Field(default=0, ge=0, le=10**12)
    """Bytes that rotating copies of weights may take, one copy at least; 0: twice what makes data cold, measured, as
    far as memory allows."""
    memory_mb: int = Field(default=4000, ge=LEAST_MEMORY_MB, le=10**9, exclude=True)
    """Megabytes (10^6 bytes) of memory that it may take, all of its processes together; less is taken where less is
    free. Measures nothing, so it is not in the benchmark's name; each record says what was allowed and taken."""
    burst_ms: float = Field(default=2.0, gt=0)

    @property
    def id(self) -> str:
        """Names the benchmark's folder."""
        return f"throughput-{digest(self, 12)}"


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
