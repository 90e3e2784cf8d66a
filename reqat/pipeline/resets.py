"""ReSET: the file that a fit is kept in, and decodings graded beside each other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from reqat.config.errors import ReqatError
from reqat.config.files import read_json

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from reqat.evaluation.tau0 import EntropyQuantile
from reqat.pipeline.conditions import Conditions
from reqat.pipeline.task import Grading

SCHEMA = "reqat.reset/1"


BF16 = "bf16"


def fitted_tau0(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, grading: Grading, quantile: float
) -> EntropyQuantile:
    """ReSET's tau0 on the held-out problems, under the decoding and the seeds of `grading`."""
    from reqat.evaluation.tau0 import fit_tau0

    return fit_tau0(model, tokenizer, grading.validation(), quantile=quantile, **grading.options("fitting tau0"))


def is_fit(path: Path) -> bool:
    """Whether `fit-reset` wrote the file."""
    try:
        return read_json(path, "fit", "fit again").get("schema") == SCHEMA
    except ReqatError:
        return False


def read_fit(path: Path) -> str:
    """The policy in a file of `fit-reset`. Raises `ReqatError` where there is none."""
    from reqat.generation import Decoding

    if not path.exists():
        raise ReqatError(f"{path}: no such file; `reqat fit-reset` writes one.")
    try:
        made = read_json(path, "file of `reqat fit-reset`", "fit it again")
        if made["schema"] != SCHEMA:
            raise ReqatError(f"schema {made['schema']!r}, this version reads {SCHEMA!r}; fit it again.")
        return str(Decoding.parse(made["policy"]))
    except ReqatError as error:
        raise error if str(path) in str(error) else ReqatError(f"{path}: {error}") from None
    except (KeyError, TypeError, AttributeError) as error:
        raise ReqatError(f"{path}: not a file of `reqat fit-reset` ({error}); fit it again.") from None


def reset_decodings(decoding: str, fits: Mapping[str, str], controls: Sequence[str]) -> dict[str, str]:
    """Condition -> decoding: the quantized model as it is, with each fitted policy, BF16, then the controls."""
    also = {f"also-{i}": text for i, text in enumerate(controls)}
    return {"quantized": decoding, **fits, BF16: decoding, **also}


def grade_resets(
    conditions: Conditions,
    quantized: PreTrainedModel,
    reference: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    grading: Grading,
    decodings: Mapping[str, str],
) -> None:
    """Grade every decoding: all of the quantized model, but for the condition `bf16`."""
    from reqat.evaluation import evaluate

    problems = grading.problems()
    for name, text in decodings.items():
        model = reference if name == BF16 else quantized
        conditions.grade(name, partial(evaluate, model, tokenizer, problems, **grading.options(name, text)))
