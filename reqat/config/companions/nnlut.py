"""NN-LUT (DAC 2022): the nonlinear functions of a Transformer as tables of 16 entries that a small network learns.

GELU, SiLU, exp, 1/x and 1/sqrt(x) are approximated by learned tables, by NLI's optimal breakpoints (arXiv 2602.02988)
and by equally spaced ones, and put into a decoder and into a fine-tuned encoder, unquantized and in four bits. How far
is each table off, and what does the model lose?
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from reqat.config.base import Count, Seeds, Size, distinct
from reqat.config.companions import SMOLLM2, Companion
from reqat.config.companions.encoders import CORPORA
from reqat.config.errors import ReqatError, unknown
from reqat.config.precision import resolve

FIT = "fit-"
Function = Literal["gelu", "silu", "exp", "reciprocal", "rsqrt"]


class Settings(Companion):
    """Tables of functions, and models with tables in place of their functions."""

    kind: Literal["nnlut"] = "nnlut"
    functions: Annotated[tuple[Function, ...], AfterValidator(distinct)] = (
        "gelu", "silu", "exp", "reciprocal", "rsqrt"
    )  # fmt: skip
    """Whose tables are compared by themselves."""
    entries: Annotated[tuple[Annotated[int, Field(ge=4, le=256)], ...], AfterValidator(distinct)] = Field(
        default=(16, 32), min_length=1
    )
    """Sizes of tables; models get the first."""
    seeds: Seeds = Field(default=[0, 1, 2], min_length=1)
    """Of the networks' training; the first also of the encoder's."""
    steps: Count = 15_000
    """Of each network's training."""
    candidates: Annotated[int, Field(ge=64, le=4096)] = 256
    """Points among which NLI chooses breakpoints."""
    calibration_steps: Count = 300
    calibration_samples: Size = 2048
    """Inputs of each place in a model that its table learns from."""
    decoder: Literal["smollm2", "tiny"] | None = None
    """`smollm2`, on a text; `tiny`, random weights and tokens, to check; null: none."""
    text: Literal["austen", "brown"] = "austen"
    """That SmolLM2 reads. Brown's licence is commonly read as non-commercial, so it is never the default."""
    windows: Annotated[int, Field(ge=2, le=10**6)] = 10
    window_tokens: Size = 256
    calibration_windows: Size = 4
    """From another part of the text than those that are scored."""
    decoder_precision: str = "NVFP4-W4A4KV4"
    tasks: Annotated[tuple[str, ...], AfterValidator(distinct)] = ()
    """Of MiniLM-L6, as of companion `encoders`, fine-tuned first; those of Brown carry its licence. `generated`: random
    words and weights, to check."""
    layers: Size | None = None
    """Of the encoder, from below; null: all."""
    encoder_precision: str = "NVFP4-W4A4"
    train_sequences: Count = 1500
    test_sequences: Count = 400
    calibration_sequences: Count = 64
    max_tokens: Size = 64
    rows_per_batch: Size = 32
    epochs: Count = 1
    lr: float = Field(default=1e-4, gt=0, le=1)

    @model_validator(mode="after")
    def _sound(self) -> Settings:
        for precision in (self.decoder_precision, self.encoder_precision):
            resolve(precision)
        for task in self.tasks:
            if task not in CORPORA:
                raise unknown("task", task, CORPORA, where="tasks")
        if self.calibration_sequences > self.train_sequences:
            raise ReqatError(
                f"calibration_sequences {self.calibration_sequences} are taken from the {self.train_sequences} of "
                "train_sequences; lower it"
            )
        return self

    def parts(self) -> tuple[str, ...]:
        """A function each, the decoder, and the encoder on a task each."""
        decoder = (self.decoder,) if self.decoder else ()
        return (*(f"{FIT}{function}" for function in self.functions), *decoder, *self.tasks)

    def sources(self) -> tuple[str, ...]:
        """Of all parts."""
        return tuple(dict.fromkeys(name for part in self.parts() for name in self.sources_of(part)))

    def sources_of(self, part: str) -> tuple[str, ...]:
        """Of a function none; of a decoder its text, of an encoder its corpus."""
        if part == "smollm2":
            return (SMOLLM2, self.text)
        corpus = CORPORA.get(part)
        return ("minilm", corpus) if corpus is not None else ()
