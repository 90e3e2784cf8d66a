"""What a model can be given, and where its responses end: the answers that transformers gives, each said once.

Ends of a response, positions, sliding windows and the rows of the embedding are read from configurations that
published models fill in differently; every path that feeds or stops a model asks here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from reqat.config.errors import ReqatError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# RoPE of these types reaches `factor` times the positions that the model was trained on. In `default` nothing is
# scaled; `proportional` and `axial` lay frequencies out in another way and reach no further.
_SCALED = {"linear", "dynamic", "yarn", "longrope", "su", "llama3"}


def end_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> tuple[int, ...]:
    """The token ids that end a response, the tokenizer's first; empty where neither side names one.

    The union of the tokenizer's ``eos_token_id``, the model's ``generation_config.eos_token_id`` and its
    ``config.eos_token_id``, each None, an id or a list. Ids that the model has no row for can never be generated and
    are left out.
    """
    found: list[int] = []
    for source in (tokenizer, getattr(model, "generation_config", None), getattr(model, "config", None)):
        value = getattr(source, "eos_token_id", None)
        values = value if isinstance(value, Iterable) else [value]
        found += [int(i) for i in values if i is not None]
    rows = embedding_rows(model)
    return tuple(dict.fromkeys(i for i in found if 0 <= i < rows))


def position_limit(config: Any) -> int | None:
    """Positions that a model of this configuration reaches, RoPE scaling included; None where nothing limits it.

    ``max_position_embeddings``, or, where that is more, the scaling's ``factor`` times the positions it scales
    (``original_max_position_embeddings`` if it is given: Qwen's model cards switch YaRN on by that and leave
    ``max_position_embeddings`` as it was). Of several RoPEs, one a layer type, the smallest reach counts.
    """
    positions = getattr(config, "max_position_embeddings", None)
    if positions is None:
        return None
    scaling = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    if not isinstance(scaling, Mapping):
        return int(positions)
    nested = [entry for entry in scaling.values() if isinstance(entry, Mapping)]
    return min(_reach(int(positions), entry) for entry in nested or [scaling])


def _reach(positions: int, rope: Mapping[str, Any]) -> int:
    factor = rope.get("factor")
    if rope.get("rope_type", rope.get("type")) not in _SCALED or not isinstance(factor, int | float):
        return positions
    return max(positions, int(factor * (rope.get("original_max_position_embeddings") or positions)))


def forget_lengths(model: PreTrainedModel) -> None:
    """Let dynamic RoPE start anew, as in a model just loaded.

    transformers stretches its frequencies to the longest sequence seen and keeps them for all that is longer than the
    original positions, so what a model computes would depend on what it read before.
    """
    rope = getattr(model.get_decoder(), "rotary_emb", None)
    if getattr(rope, "rope_type", None) == "dynamic":
        assert rope is not None
        first = torch.zeros(1, 1, dtype=torch.int64, device=model.device)
        rope(first.float(), first)  # a short sequence puts the original frequencies back


def attention_window(config: Any) -> int | None:
    """Tokens that the layers with sliding attention see; None where no layer slides.

    ``sliding_window`` alone does not say so: Qwen2 and Qwen3 switch it off by ``use_sliding_window``, and
    ``layer_types`` says which layers slide. A sequence of at most so many tokens is attended to in full.
    """
    window = getattr(config, "sliding_window", None)
    if window is None or not getattr(config, "use_sliding_window", True):
        return None
    kinds = getattr(config, "layer_types", None)
    return int(window) if kinds is None or "sliding_attention" in kinds else None


def embedding_rows(model: PreTrainedModel) -> int:
    """Rows of the input embedding: the token ids that the model can read are those below."""
    return int(model.get_input_embeddings().num_embeddings)  # type: ignore[arg-type]


def check_token_ids(
    model: PreTrainedModel,
    ids: Tensor | Sequence[int],
    what: str,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    label: str = "the model",
) -> None:
    """Raise ``ReqatError`` unless the model has an embedding row for each of ``ids`` (any shape, or any whole numbers).

    The message begins with ``what`` the ids are of, and names the id, its token where a tokenizer is at hand, and the
    size of the vocabulary.
    """
    rows = embedding_rows(model)
    if isinstance(ids, Tensor):
        if ids.numel() == 0:
            return
        low, high = (int(i) for i in torch.aminmax(ids))
    elif len(ids) == 0:
        return
    else:
        low, high = min(ids), max(ids)
    if low >= 0 and high < rows:
        return
    bad = low if low < 0 else high
    raise ReqatError(
        f"{what}: token id {bad}{_token(tokenizer, bad)} is unknown to {label}, whose vocabulary has {rows} tokens (0 "
        f"to {rows - 1}); take the tokenizer that belongs to it, or resize its embeddings"
    )


def _token(tokenizer: PreTrainedTokenizerBase | None, token_id: int) -> str:
    if tokenizer is None or not 0 <= token_id < len(tokenizer):
        return ""
    return f" ({tokenizer.convert_ids_to_tokens(token_id)!r})"


def check_length(config: Any, length: int, what: str, *, label: str = "the model") -> None:
    """Raise ``ReqatError`` where ``length`` tokens are more than the model has positions, naming both."""
    limit = position_limit(config)
    if limit is not None and length > limit:
        raise ReqatError(f"{what}: {length} tokens, but {label} has {limit} positions; cut it, or leave it out")
