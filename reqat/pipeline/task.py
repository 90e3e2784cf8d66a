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

    def options(self, seeds: Sequence[int], decoding: str, quiet: bool, caption: str) -> dict[str, Any]:
        """What `evaluate` is told, besides models and problems."""
        from reqat.evaluation.loading import AUTOCAST
        from reqat.generation import Decoding

        policy = Decoding.parse(decoding)
        return {
            "seeds": policy.effective_seeds(seeds),
            "decoding": policy,
            "max_new_tokens": self.max_new_tokens,
            "batch_rows": self.batch_rows,
            "autocast": AUTOCAST[self.autocast],
            "progress": False if quiet else caption,
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
        model = load_at(folder, precision.name, override=True, **precision.options())
    return model, load_tokenizer(folder)


def same_tokens(a: PreTrainedTokenizerBase, b: PreTrainedTokenizerBase) -> None:
    """Refuse two models whose ids mean different tokens. Raises `ReqatError` naming the first one."""
    ours, theirs = a.get_vocab(), b.get_vocab()
    different = sorted(token for token in ours.keys() | theirs.keys() if ours.get(token) != theirs.get(token))
    if different:
        token = different[0]
        raise ReqatError(
            f"the models have different tokenizers: {token!r} is id {ours.get(token)} in the reference and "
            f"{theirs.get(token)} in the candidate ({len(different)} tokens differ). Take models of one tokenizer."
        )


def weights(folder: str) -> dict[str, str]:
    """sha256 of a model's weight files, by name; empty for a model out of a package."""
    return {path.name: record.sha256(path) for path in sorted(Path(folder).glob("*.safetensors"))}
