"""KD for QAT of Transformer encoders (EMNLP 2022, arXiv 2211.11014): ternary weights, 8-bit activations.

A fine-tuned encoder teaches its own ternary copy. Beside its logits and hidden states, which part of its self-attention
should the copy imitate: the scores (TernaryBERT), the maps that the softmax makes of them, the output of the attention
block, or maps and output together? The companion trains each and measures accuracy and what was recovered of attention.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from reqat.config.base import Count, Seeds, Size, distinct
from reqat.config.companions import Companion
from reqat.config.errors import ReqatError, unknown
from reqat.config.precision import resolve

GENERATED = "generated"
CORPORA: dict[str, str | None] = {
    "brown_tagging": "brown",
    "brown_succession": "brown",
    "spam_assassin": "spam-assassin",
    GENERATED: None,
}
"""Task of `reqat.tasks.labelled` -> the source that it is made of; `generated`: random words, to check."""
Baseline = Literal["hidden", "score"]
HIDDEN: Baseline = "hidden"
SCORE: Baseline = "score"
_Share = Annotated[float, Field(ge=0, le=10)]


class Settings(Companion):
    """Fine-tuning of a teacher, then QAT of its ternary copy by each loss."""

    kind: Literal["encoders"] = "encoders"
    model: Literal["minilm", "tiny"] = "minilm"
    """`minilm`, MiniLM-L6 with its released weights; `tiny`, random weights, to check."""
    layers: Size | None = None
    """Of the model, from below; null: all."""
    tasks: Annotated[tuple[str, ...], AfterValidator(distinct)] = Field(min_length=1)
    """`brown_tagging` and `brown_succession` read the Brown corpus, whose licence is commonly read as non-commercial:
    no task is the default."""
    seeds: Seeds = Field(default=[42, 52, 62], min_length=1)
    """Of the teacher's and the students' training, and of the choice of sentences."""
    baselines: Annotated[tuple[Literal["hidden", "score"], ...], AfterValidator(distinct)] = ("hidden", "score")
    """`hidden`: logits and hidden states alone; `score`: and the MSE of attention scores (TernaryBERT), with which the
    others are compared."""
    mixes: tuple[tuple[_Share, _Share], ...] = ((1.0, 0.0), (0.0, 1.0), (1.0, 1.0))
    """Coefficients of the attention-map and of the attention-output loss, beside logits and hidden states. The paper
    sweeps one from 0.1 to 0.9 with the other at 1."""
    precision: str = "TERNARY-tensor-W2+TERNARY-row-E2+INT8-tensor-A8Q8KV8P8:clamp=2.5"
    """Of the students."""
    train_sequences: Count = 2000
    test_sequences: Count = 1000
    recovery_sequences: Count = 200
    """Of those for the test, on which attention is compared with the teacher's."""
    held_out: Literal["test", "validation"] = "test"
    """Whose `test_sequences` are graded. `validation`: those of every eighth text that is there to train on, and of
    which nothing is trained on then, for choosing settings without a look at the test."""
    max_tokens: Size = 64
    rows_per_batch: Size = 32
    teacher_epochs: Count = 2
    epochs: Count = 3
    teacher_lr: float = Field(default=1e-4, gt=0, le=1)
    lr: float = Field(default=2e-5, gt=0, le=1)
    warmup: float = Field(default=0.1, ge=0, lt=1)
    weight_decay: float = Field(default=0.01, ge=0)

    @model_validator(mode="after")
    def _sound(self) -> Settings:
        resolve(self.precision)
        if SCORE not in self.baselines:
            raise ReqatError("baselines: the losses are compared with 'score'; name it.")
        distinct(self.mixes)
        if any(not any(mix) for mix in self.mixes):
            raise ReqatError("mixes: [0, 0] has no attention loss; it is the baseline 'hidden'.")
        for task in self.tasks:
            if task not in CORPORA:
                raise unknown("task", task, CORPORA, where="tasks")
        generated = [task == GENERATED for task in self.tasks]
        if any(generated) != (self.model == "tiny") or any(generated) != all(generated):
            raise ReqatError("tasks: 'generated' is for model 'tiny', which has no tokenizer, and the others are not.")
        return self

    def parts(self) -> tuple[str, ...]:
        """A task and seed each: its teacher, and all students of it."""
        return tuple(f"{task}-seed{seed}" for task in self.tasks for seed in self.seeds)

    def sources(self) -> tuple[str, ...]:
        """Of all tasks."""
        return tuple(dict.fromkeys(name for part in self.parts() for name in self.sources_of(part)))

    def sources_of(self, part: str) -> tuple[str, ...]:
        """The model and the corpus of the part's task."""
        corpus = CORPORA[task_and_seed(part)[0]]
        return ("minilm", corpus) if corpus is not None else ()


def task_and_seed(part: str) -> tuple[str, int]:
    """What a part's name says."""
    task, _, seed = part.rpartition("-seed")
    return task, int(seed)


def mix_name(c_map: float, c_out: float) -> str:
    """What a mix of losses is called: `map`, `output`, `map+output`, `map+0.5 output`."""
    parts = [name if c == 1 else f"{c:g} {name}" for c, name in ((c_map, "map"), (c_out, "output")) if c]
    return "+".join(parts)
