"""TSLD (NeurIPS 2023, arXiv 2308.06744): token-scaled logit distillation for ternary language models.

A language model teaches its own ternary copy. Ground truth beside the teacher's logits makes the copy overfit; TSLD
scales the distillation of each token by the teacher's own loss there instead of treating tokens alike. The companion
trains a small decoder on a text, then its ternary copies by each loss, and reports the best evaluation perplexity, as
the paper does.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from reqat.config.base import Count, Families, Seeds, Size, distinct
from reqat.config.companions import TESTBED, Companion
from reqat.config.errors import ReqatError
from reqat.config.precision import resolve
from reqat.config.stage import Architecture

Loss = Literal["gt", "logit", "logit+gt", "tsld", "l2l"]


class Settings(Companion):
    """Training of a teacher on a text, then QAT of its copy by each loss."""

    kind: Literal["tsld"] = "tsld"
    text: Literal["austen", "brown", "traces", "generated"] = "austen"
    """Running text, on which a teacher is trained from scratch (Brown's licence is commonly read as non-commercial, so
    it is never the default); `traces`: verified solutions of arithmetic problems, whose teacher is the testbed's pinned
    base; `generated`: random words, to check."""
    problems: Families = {
        "chain_sum": {"min_terms": 3, "max_terms": 7, "min_digits": 1, "max_digits": 1},
        "leg_counting": {"min_animals": 2, "max_animals": 4},
    }
    """Of `traces`: of the kind that the pinned base has learned."""
    vocabulary: Size = 1024
    """Byte pairs, learned from the training text."""
    architecture: Architecture = Architecture(
        hidden_size=128, layers=4, heads=4, kv_heads=4, mlp=384, max_position_embeddings=256
    )
    seeds: Seeds = Field(default=[42, 52, 62], min_length=1)
    losses: Annotated[tuple[Loss, ...], AfterValidator(distinct)] = Field(
        default=("logit", "logit+gt", "tsld", "l2l"), min_length=1
    )
    """`gt`: likelihood of the text alone; `l2l`: logits, hidden states and attention scores."""
    precision: str = "TERNARY-row-W2A16"
    """Of the students: TWN with a scale an output channel."""
    learned_scale: bool = False
    """Scales gamma mean|w| with learned gamma, in place of TWN's."""
    numbers: Literal["float32", "bfloat16"] = "float32"
    """Of the students' weights, optimizer and products; the teacher's training is float32."""
    block_tokens: Size = 128
    """Of a row: a block of text, or some traces."""
    teacher_blocks: Count = 4000
    """Blocks of text that the teacher reads, `teacher_epochs` times."""
    student_blocks: Count = 400
    """Those of them (or traces) that the students read, `epochs` times: few, so that they can overfit."""
    test_blocks: Count = 100
    """Or traces."""
    held_out: Literal["test", "validation"] = "test"
    """Where `test_blocks` come from. `test`: a novel, or texts, that nobody trains on. `validation`: blocks of the text
    to train on that the teacher does not read, for choosing settings without a look at the test. Of `traces`, the split
    of the problems."""
    answered: int = Field(default=0, ge=0, le=10**6)
    """Problems of `traces`, of the held-out split, that teacher and students answer at the end of their training
    (greedily); 0: none."""
    answer_tokens: Size = 200
    """Longest answer."""
    teacher_epochs: Count = 1
    epochs: Count = 10
    evaluations: Size = 10
    """Of a student over its training; the best one counts."""
    teacher_rows: Size = 16
    rows_per_batch: Size = 4
    """Blocks in a step of a student; the weight of TSLD, a sum over them, grows with it."""
    teacher_lr: float = Field(default=2e-3, gt=0, le=1)
    lr: float = Field(default=1e-3, gt=0, le=1)
    rates: dict[Loss, Annotated[float, Field(gt=0, le=1)]] = {}
    """Of losses whose own best rate, on `held_out: validation`, is another than `lr`."""

    @model_validator(mode="after")
    def _sound(self) -> Settings:
        resolve(self.precision)
        if idle := [loss for loss in self.rates if loss not in self.losses]:
            raise ReqatError(f"rates: no student is trained by {', '.join(idle)}; name it in losses, or leave it out.")
        if self.answered and self.text != "traces":
            raise ReqatError(f"answered: {self.text!r} has no problems to answer; take text: traces, or leave it out.")
        return self

    def rate_of(self, loss: str) -> float:
        """The learning rate of the student that is trained by a loss."""
        return {str(name): rate for name, rate in self.rates.items()}.get(loss, self.lr)

    def parts(self) -> tuple[str, ...]:
        """A seed each: its teacher, and all students of it."""
        return tuple(f"seed{seed}" for seed in self.seeds)

    def sources(self) -> tuple[str, ...]:
        """The text."""
        return {"generated": (), "traces": (TESTBED,)}.get(self.text, (self.text,))
