"""What storing the output head and the embeddings in fewer bits does to a packed model.

The reference is the same packed model with both in bfloat16; everything else of the two is equal, to the bit, so that
any difference is that of head and embeddings. Measured on given rows of tokens: how often the most likely next token is
the reference's, the forward divergence ``KL(reference || model)`` of the next-token distributions, and the perplexity;
and on problems of a task, greedy responses that are right. Reference and all choices read a batch side by side.

Everything is of raw logits at temperature 1, in nats and float64; a row is one observation of the standard errors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from reqat.config.errors import ReqatError
from reqat.config.policy import Decoding
from reqat.evaluation.forcing import Row, batches_by_length, forced_logits
from reqat.evaluation.grading import evaluate
from reqat.evaluation.held_out import compared
from reqat.evaluation.loading import load_at
from reqat.inference import memory, pack
from reqat.models import check_length, check_token_ids
from reqat.models.modes import evaluating
from reqat.tasks import Problem

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

REFERENCE = ("BF16", "BF16")
_BATCH_BYTES = 256 * 2**20  # of one model's logits in float32
Choice = tuple[str | None, str | None]
"""``head`` and ``embeddings`` of :func:`reqat.pack`."""


@dataclass(frozen=True)
class Compared:
    """A choice against the reference.

    ``weight_bytes``, ``reference_weight_bytes``: of the whole model. Of ``tokens`` next tokens in ``rows`` rows:
    ``same_argmax`` have the reference's most likely token; mean divergence in nats, both perplexities, and the mean
    difference of the negative log-likelihoods in nats, with standard errors over rows. Of ``problems`` greedy
    responses: right ones of both, and ``same_responses`` that are the reference's to the last token. None where
    nothing of the kind was measured.
    """

    head: str | None
    embeddings: str | None
    weight_bytes: int
    reference_weight_bytes: int
    rows: int = 0
    tokens: int = 0
    same_argmax: int | None = None
    kl_nats: float | None = None
    kl_nats_se: float | None = None
    perplexity: float | None = None
    reference_perplexity: float | None = None
    nll_change_nats: float | None = None
    nll_change_nats_se: float | None = None
    problems: int = 0
    correct: int | None = None
    reference_correct: int | None = None
    same_responses: int | None = None


def compare_heads(
    path: str,
    tokenizer: PreTrainedTokenizerBase,
    precision: str,
    choices: Sequence[Choice],
    *,
    rows: Sequence[Row] = (),
    problems: Sequence[Problem] = (),
    max_new_tokens: int = 1,
    batch_rows: int | None = None,
    say: Callable[[str], object] = lambda _: None,
    **options: Any,
) -> list[Compared]:
    """One :class:`Compared` for each of ``choices``, of the model in ``path`` in float32.

    Args:
        precision, options: as for :func:`reqat.models.prepare`; global scales ``row`` or ``static``, or rows of a batch
            would share theirs.
        rows: (token ids read, token ids that are predicted), neither empty.
        problems: answered greedily with at most ``max_new_tokens`` tokens, ``batch_rows`` at a time.

    Raises ReqatError without rows and problems, and as ``pack`` does for a choice.
    """
    if not rows and not problems:
        raise ReqatError("comparing heads needs rows of tokens or problems: give one of them")

    def packed(choice: Choice) -> PreTrainedModel:
        loaded = load_at(path, precision, gpu=False, **options)
        return pack(loaded, head=choice[0], embeddings=choice[1])

    say("the reference, head and embeddings in BF16")
    models = [packed(choice) for choice in (REFERENCE, *choices)]
    sizes = [memory(model).total_bytes for model in models]
    likely = _likelihoods(models, rows, say) if rows else None
    graded = None
    if problems:
        graded = []
        for model, (head, embeddings) in zip(models, (REFERENCE, *choices), strict=True):
            say(f"{len(problems)} problems with head {head}, embeddings {embeddings}")
            graded.append(
                evaluate(
                    model, tokenizer, problems, seeds=[0], decoding=Decoding.greedy(), max_new_tokens=max_new_tokens,
                    batch_rows=batch_rows,
                )
            )  # fmt: skip
    found = []
    for i, (head, embeddings) in enumerate(choices, 1):
        parts: dict[str, Any] = {}
        if likely is not None:
            parts |= _summary(likely[0], likely[i])
        if graded is not None:
            mine, theirs = graded[i], graded[0]
            parts |= {
                "problems": len(problems),
                "correct": int(mine.correct.sum()),
                "reference_correct": int(theirs.correct.sum()),
                "same_responses": sum(a == b for a, b in zip(mine.response or (), theirs.response or (), strict=True)),
            }
        found.append(Compared(head, embeddings, sizes[i], sizes[0], **parts))
    return found


@torch.no_grad()
def _likelihoods(
    models: Sequence[PreTrainedModel], rows: Sequence[Row], say: Callable[[str], object]
) -> NDArray[np.float64]:
    """Sums over each row's tokens, [models, rows, 4]: negative log-likelihood, divergence from the first model, tokens
    whose most likely follower is that of the first model, tokens."""
    sizes = [len(prompt) + len(continuation) - 1 for prompt, continuation in rows]
    for i, (prompt, continuation) in enumerate(rows):
        check_token_ids(models[0], (*prompt, *continuation), f"row {i}")
        check_length(models[0].config, sizes[i], f"row {i}")
    sums = np.zeros((len(models), len(rows), 4))
    fitting = max(1, _BATCH_BYTES // (4 * int(models[0].config.vocab_size)))
    done = 0
    with evaluating(*models):
        for batch in batches_by_length(sizes, fitting):
            chosen = [rows[i] for i in batch]
            lengths = [len(continuation) for _, continuation in chosen]
            theirs_NV = torch.cat([logits for _, logits, _ in forced_logits(models[0], chosen, None)])
            for m, model in enumerate(models):
                parts = []
                for first, logits_NV, tokens_N in forced_logits(model, chosen, None):
                    reference_NV = theirs_NV[first : first + len(logits_NV)]
                    nll_N, kl_N = compared(reference_NV, logits_NV, tokens_N)
                    same_N = logits_NV.argmax(-1) == reference_NV.argmax(-1)
                    parts.append(torch.stack([nll_N, kl_N, same_N.double(), torch.ones_like(nll_N)], -1))
                for i, part in zip(batch, torch.cat(parts).split(lengths), strict=True):
                    sums[m, i] = part.sum(0).numpy()
            done += sum(lengths)
            say(f"{done} of {sum(len(continuation) for _, continuation in rows)} tokens")
    return sums


def _summary(theirs: NDArray[np.float64], mine: NDArray[np.float64]) -> dict[str, Any]:
    tokens = mine[:, 3].sum()
    change = mine[:, 0] - theirs[:, 0]
    return {
        "rows": len(mine),
        "tokens": int(tokens),
        "same_argmax": int(mine[:, 2].sum()),
        "kl_nats": float(mine[:, 1].sum() / tokens),
        "kl_nats_se": _ratio_error(mine[:, 1], mine[:, 3]),
        "perplexity": math.exp(mine[:, 0].sum() / tokens),
        "reference_perplexity": math.exp(theirs[:, 0].sum() / tokens),
        "nll_change_nats": float(change.sum() / tokens),
        "nll_change_nats_se": _ratio_error(change, mine[:, 3]),
    }


def _ratio_error(sums: NDArray[np.float64], counts: NDArray[np.float64]) -> float | None:
    """Standard error of ``sum(sums) / sum(counts)`` over rows, linearized; None of a single row."""
    n = len(sums)
    if n < 2:
        return None
    residuals = sums - counts * (sums.sum() / counts.sum())
    return float(math.sqrt(n / (n - 1) * np.square(residuals).sum()) / counts.sum())


def metrics(found: Sequence[Compared]) -> list[dict[str, Any]]:
    """For a record."""
    return [asdict(one) for one in found]
