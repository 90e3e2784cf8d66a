"""Where the gradient goes: its square at the input embedding of each response token, and how sure the model was there.

A token's share of the training signal is ``||g_t||^2``, ``g_t`` the gradient of the loss at the embedding that the
model reads at position ``t`` (ReQAT Figure 7). If low-entropy tokens carry most of it, QAT is busy with the very
decisions that four bits break. Position ``t`` is where the model reads token ``t`` and predicts token ``t + 1``: the
gradient at the embedding and the entropy of the prediction share the index, and the tokens that count are the
positions whose prediction the loss counts.

A :class:`GradientProbe` rides along in :func:`reqat.training.train` as its observer. It differentiates the loop's own
loss, by a forward pass of its own, at the embeddings alone: no ``.grad`` is written, the random state is put back, and
the training comes out bit for bit as it would without.

Shapes: B rows, T positions, N response positions (in the order of ``labels != IGNORE``), D hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from reqat.config.errors import ReqatError
from reqat.data import AnyBatch
from reqat.data.packing import IGNORE

# Logits of the entropies are computed for as many positions at a time as fit in this, in float64.
_LOGITS_BYTES = 64 * 2**20


@dataclass(frozen=True)
class TokenGradients:
    """The N response positions of one micro-batch.

    ``square_N`` is ``||g_t||^2`` (float64; of the loss summed over tokens, so only ratios mean something),
    ``entropy_N`` the entropy in nats of the prediction made there (float64), ``trace_N`` the packed trace that the
    position belongs to (int64, numbered from 0 within the micro-batch).
    """

    square_N: Tensor
    entropy_N: Tensor
    trace_N: Tensor


def token_gradients(model: PreTrainedModel, batch: AnyBatch, loss: Callable[[], Tensor]) -> TokenGradients:
    """Squared gradients and entropies at the response positions of ``batch`` under ``loss``.

    Args:
        model: as it stands in training; its parameters, their ``.grad``, its mode and the random state stay as they
            are.
        batch: the micro-batch that ``loss`` reads, on the model's device.
        loss: runs ``model`` on ``batch`` once and returns the scalar, summed over response tokens.

    Raises ``ReqatError`` where a gradient or an entropy is not finite.
    """
    keep_BT = batch.labels != IGNORE
    seen: dict[str, Tensor] = {}

    def at_embedding(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        seen["embedding"] = output.detach().requires_grad_(True)
        return seen["embedding"]

    def at_head(module: nn.Module, args: Any, output: Any) -> None:
        seen["hidden"] = output.last_hidden_state.detach()

    device = batch.labels.device
    hooks = [
        model.get_input_embeddings().register_forward_hook(at_embedding),
        model.get_decoder().register_forward_hook(at_head),
    ]
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []), torch.enable_grad():
            total = loss()
            (gradient_BTD,) = torch.autograd.grad(total, [seen["embedding"]])
    finally:
        for hook in hooks:
            hook.remove()
    square_N = gradient_BTD.double().square().sum(-1)[keep_BT]
    entropy_N = _entropies(model, seen["hidden"][keep_BT])
    if not bool(torch.isfinite(square_N).all() and torch.isfinite(entropy_N).all()):
        raise ReqatError("a gradient at an embedding, or an entropy, is not finite; has the run diverged?")
    return TokenGradients(square_N.cpu(), entropy_N.cpu(), batch.traces(keep_BT).cpu())


@torch.no_grad()
def _entropies(model: PreTrainedModel, hidden_ND: Tensor) -> Tensor:
    """Entropy in nats of the predictions made from hidden states, [N] float64, by chunks.

    Logits are of the head's own type; only what follows is in float64, where ``log p`` of a token that holds all but
    1e-9 of the mass is still not 0.
    """
    head = model.get_output_embeddings()
    out = []
    for part_ND in hidden_ND.split(max(1, _LOGITS_BYTES // (8 * model.config.vocab_size))):
        log_prob_NV = torch.log_softmax(head(part_ND.to(head.weight.dtype)).double(), dim=-1)
        out.append(-(log_prob_NV.exp() * log_prob_NV).sum(-1))
    return torch.cat(out)


class GradientProbe:
    """An observer of the loop that looks at the first micro-batch of every ``every``-th step, before its update.

    Args:
        every: steps from one look to the next; step 0 is looked at.
        take: called with the step (from 0) and its :class:`TokenGradients`.
    """

    def __init__(self, every: int, take: Callable[[int, TokenGradients], object]) -> None:
        if every < 1:
            raise ReqatError(f"every must be one step or more, got {every}")
        self.every, self.take = every, take
        self._last = -1

    def __call__(self, model: PreTrainedModel, batch: AnyBatch, step: int, loss: Callable[[], Tensor]) -> None:
        """See :class:`reqat.training.loop.Observer`."""
        if step % self.every or step == self._last:
            return
        self._last = step
        self.take(step, token_gradients(model, batch, loss))
