"""What graded jobs have in common: problems, how long a response may be, models at a precision."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reqat.config.errors import ReqatError
from reqat.config.precision import PrecisionSpec, family
from reqat.records import record

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from reqat.config.studies import PlannedStudy
    from reqat.config.tier import Tier
    from reqat.tasks import Problem


@dataclass(frozen=True)
class Task:
    """The problems of a tier, and how long a response may be."""

    families: dict[str, dict[str, Any]]
    split: str
    seed: int
    max_new_tokens: int
    batch_rows: int
    autocast: str
    """Of the tier's decoding: `none` or `bf16`."""

    @classmethod
    def of_tier(cls, given: Tier) -> Task:
        """Those that the tier grades its own models on."""
        how = given.evaluation
        families = how.families if how.families is not None else given.data.families
        if not families:
            raise ReqatError(
                f"tier {given.name} is graded on a benchmark, and this asks task families: take another tier."
            )
        return cls(
            dict(sorted(families.items())),
            how.split,
            how.problem_seed,
            how.decoding.max_new_tokens,
            how.decoding.batch_rows,
            how.decoding.autocast,
        )

    @classmethod
    def of_study(cls, study: PlannedStudy) -> Task:
        """Those that a study asks its models."""
        asked, how = study.problems, study.decoding
        assert asked is not None and how is not None
        return cls(asked.families, asked.split, asked.seed, how.max_new_tokens, how.batch_rows, how.autocast)

    def problems(self, n: int, split: str | None = None) -> list[Problem]:
        """The first `n` problems of the split (default: the one that is graded)."""
        from reqat.tasks import problems

        return problems(self.families, split or self.split, n, self.seed)


@dataclass(frozen=True)
class Grading:
    """How a job grades: the first `n` problems of a task, sampled once for each seed under a decoding policy."""

    task: Task
    n: int
    seeds: Sequence[int]
    decoding: str
    held_out: int = 0
    """Validation problems that thresholds are measured on."""
    quiet: bool = False

    def problems(self) -> list[Problem]:
        """The graded problems."""
        return self.task.problems(self.n)

    def validation(self) -> list[Problem]:
        """The held-out problems."""
        return self.task.problems(self.held_out, "validation")

    def options(self, caption: str, decoding: str | None = None, seeds: Sequence[int] | None = None) -> dict[str, Any]:
        """Arguments of `evaluate` besides models and problems; another decoding or other seeds where given.

        Raises ReqatError for a text that is no decoding policy, so it is called once before models are loaded.
        """
        from reqat.evaluation.loading import AUTOCAST
        from reqat.generation import Decoding

        policy = Decoding.parse(self.decoding if decoding is None else decoding)
        return {
            "seeds": policy.effective_seeds(self.seeds if seeds is None else seeds),
            "decoding": policy,
            "max_new_tokens": self.task.max_new_tokens,
            "batch_rows": self.task.batch_rows,
            "autocast": AUTOCAST[self.task.autocast],
            "progress": False if self.quiet else caption,
        }


def load(folder: str | Path, precision: str | PrecisionSpec) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A model at a precision, as evaluations load it, with its tokenizer. By its name alone, it has the options
    that the folder was saved with, or else, for NVFP4, one global scale a row."""
    from reqat.evaluation.loading import load_at
    from reqat.models import load_tokenizer

    if isinstance(precision, str):
        family(precision)  # says what is wrong in one line
        model = load_at(folder, precision)
    else:
        model = load_at(folder, precision.name, override=True, **precision.for_prepare())
    return model, load_tokenizer(folder)


def same_tokens(
    a: PreTrainedTokenizerBase,
    b: PreTrainedTokenizerBase,
    names: tuple[str, str] = ("the reference", "the candidate"),
) -> None:
    """Raises `ReqatError` with the first difference where two models' ids mean different tokens, or end differently."""
    known_a, known_b = a.get_vocab(), b.get_vocab()
    if known_a == known_b:
        if (a.bos_token_id, a.eos_token_id) == (b.bos_token_id, b.eos_token_id):
            return
        what = f"end a response with ids {a.eos_token_id} and {b.eos_token_id}"
    else:
        different = sorted(t for t in known_a.keys() | known_b.keys() if known_a.get(t) != known_b.get(t))
        token = different[0]
        what = (
            f"hold {len(known_a)} and {len(known_b)} tokens; {len(different)} differ, the first is {token!r} with id "
            f"{known_a.get(token)} in one and {known_b.get(token)} in the other"
        )
    raise ReqatError(
        f"{names[0]} and {names[1]} have different tokenizers: they {what}. Compare models that share a tokenizer."
    )


def weights(model: str) -> dict[str, str]:
    """sha256 of the files that hold a model's weights, by name: those of its folder, of its snapshot of the hub, or of
    the package that ships it."""
    from reqat.models.loading import PACKAGE, local_folder, package_gguf

    files = [package_gguf(model)] if model.startswith(PACKAGE) else sorted(local_folder(model).glob("*.safetensors"))
    return {path.name: record.sha256(path) for path in files}
