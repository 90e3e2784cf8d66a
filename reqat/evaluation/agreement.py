"""Agreement of a packed model with its fake-quantized counterpart: greedy responses of both, token by token.

The packed model rounds the same numbers to the same codes; only the order in which float32 sums are taken differs. That
can tip the choice between two nearly equal logits, or push an activation across a rounding threshold, which changes
one code and, from there on, everything after it. How often that alone happens is measured, not argued: the twin once
more with its sums in float64, same codes, is a control. If packing added any other difference, packed and twin would
part more often than twin and control do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from reqat.config.errors import ReqatError
from reqat.config.policy import Decoding
from reqat.generation.batches import generate
from reqat.inference import pack
from reqat.models import freeze, load_model, prepare


@dataclass(frozen=True)
class Agreement:
    """Of ``prompts`` greedy responses: how many are the twin's to the last token, packed and in float64 (``control``).

    ``same_tokens`` and ``control_same_tokens``: tokens before the first difference, over all responses; ``tokens``:
    all tokens of the twin's.
    """

    prompts: int
    same: int
    control_same: int
    tokens: int
    same_tokens: int
    control_same_tokens: int

    def metrics(self) -> dict[str, Any]:
        """For a record."""
        return {f"agreement_{name}": value for name, value in asdict(self).items()}


def agreement(
    path: str,
    tokenizer: PreTrainedTokenizerBase | None,
    prompts: Sequence[Sequence[int]],
    precision: str,
    *,
    max_new_tokens: int,
    batch_rows: int | None = None,
    progress: bool = False,
    **options: Any,
) -> Agreement:
    """Generate greedily with the twin, the packed model and the control; float32 weights from ``path``.

    Args:
        path: as for :func:`reqat.models.load_model`.
        prompts: token ids.
        precision, options: as for :func:`reqat.models.prepare`. With ``global_scale="dynamic"`` rows of a batch share
            their scales, and one difference spreads to all; ``row`` keeps them apart.
        max_new_tokens: a response's most tokens.

    Raises ReqatError without prompts.
    """
    if not prompts:
        raise ReqatError("agreement needs at least one prompt")

    def responses(model: PreTrainedModel, label: str) -> list[tuple[int, ...]]:
        found = generate(
            model,
            tokenizer,
            prompts,
            seeds=[0] * len(prompts),
            row_keys=[str(index) for index in range(len(prompts))],
            decoding=Decoding.greedy(),
            max_new_tokens=max_new_tokens,
            batch_rows=batch_rows,
            progress=label if progress else False,
        )
        return [generation.all_ids for generation in found]

    def twin(dtype: torch.dtype) -> PreTrainedModel:
        model = load_model(path, dtype=dtype)
        prepare(model, precision, **options)
        return freeze(model)

    ours = responses(pack(twin(torch.float32)), "packed")
    expected = responses(twin(torch.float32), "fake-quantized")
    control = responses(twin(torch.float64), "fake-quantized, float64")
    shared, shared_control = (
        [_common(a, b) for a, b in zip(expected, other, strict=True)] for other in (ours, control)
    )
    return Agreement(
        len(prompts),
        sum(a == b for a, b in zip(expected, ours, strict=True)),
        sum(a == b for a, b in zip(expected, control, strict=True)),
        sum(map(len, expected)),
        sum(shared),
        sum(shared_control),
    )


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the common beginning."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
