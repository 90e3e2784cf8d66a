"""One forward pass of a model on a batch, with what terms look at besides the logits.

Decoder, encoder or classifier of images makes two differences. A decoder's mask hides later tokens and other traces of
a packed row, an encoder's hides padding, and images are read whole. And what makes logits of hidden states is the
language-model head, or a classifier. In all, the N positions with a label have logits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from reqat.config.errors import ReqatError
from reqat.data import AnyBatch, Batch, ImageBatch
from reqat.models.adapters import adapter_of, blocks_of
from reqat.models.attention import ATTENTION, dense_mask, probabilities, segment_mask
from reqat.training.objective import LAYERWISE


@dataclass(frozen=True)
class Outputs:
    """What one forward pass gave: ``hidden`` [N, D], which the head sees at the positions with a label, and of the rest
    (:class:`~reqat.training.objective.TermContext`) what was asked for."""

    hidden: Tensor
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    attention_scores: tuple[Tensor, ...] | None = None
    attention_outputs: tuple[Tensor, ...] | None = None


def is_encoder(model: PreTrainedModel) -> bool:
    """Whether ``model`` has a classifier in place of a language-model head."""
    return model.get_output_embeddings() is None


def head_of(model: PreTrainedModel) -> Callable[[Tensor], Tensor]:
    """What makes logits [N, classes] of hidden states [N, D]. Raises UnsupportedModelError for a model without."""
    return adapter_of(model).head(model) if is_encoder(model) else model.get_output_embeddings()


def run_model(
    model: PreTrainedModel, batch: AnyBatch, keep: Tensor, wanted: frozenset[str] = frozenset(), who: str = "model"
) -> Outputs:
    """Run ``model`` without its head on ``batch``; the N positions are those where ``keep`` ``[B, T]`` (of images
    ``[B]``) holds.

    ``wanted``: fields of :class:`Outputs`. Raises ReqatError where the model does not give them, and for token types
    that an encoder does not have.
    """
    if isinstance(batch, ImageBatch):
        return _of_images(model, batch, keep, wanted, who)
    scores = "attention_scores" in wanted
    asked = {"hidden_states"} & wanted | ({"attentions"} if scores or "attentions" in wanted else set())
    inputs: dict[str, Any] = {f"output_{name}": True for name in sorted(asked)}
    if scores:
        inputs["attention_scores"] = True  # of our attention function; its softmax are the maps
    encoder = is_encoder(model)
    body = model.base_model if encoder else model.get_decoder()
    inputs |= _encoder_inputs(model, batch) if encoder else _decoder_inputs(model, batch)
    with _block_outputs(model, "attention_outputs" in wanted) as block_outputs:
        found = body(input_ids=batch.input_ids, **inputs)
    given = {name: getattr(found, name, None) for name in asked}
    if scores:
        _check_scores(model, who)
        given["attention_scores"] = given.pop("attentions")
    if "attention_outputs" in wanted:
        given["attention_outputs"] = tuple(block_outputs)
    layers = int(model.config.num_hidden_layers)
    for name, tensors in given.items():
        if not tensors or len(tensors) != layers + (name == "hidden_states") or any(t is None for t in tensors):
            remedy = ""
            if name.startswith("attention") and name != "attention_outputs":
                how = model.config._attn_implementation
                remedy = f"; its attention {how!r} may not: call prepare(model, 'BF16')"
            raise ReqatError(
                f"a term of the objective needs {name}, and the {who} ({type(model).__name__}) does not give one a "
                f"layer{remedy}"
            )
    if scores and "attentions" in wanted:
        given["attentions"] = tuple(map(probabilities, given["attention_scores"] or ()))
    return Outputs(found.last_hidden_state[keep], **given)


def response_logits(model: PreTrainedModel, batch: AnyBatch, keep: Tensor) -> Tensor:
    """Logits ``[N, V]`` at the positions where ``keep`` ``[B, T]`` holds; the head runs on those alone."""
    return head_of(model)(run_model(model, batch, keep).hidden)


def _of_images(model: PreTrainedModel, batch: ImageBatch, keep: Tensor, wanted: frozenset[str], who: str) -> Outputs:
    for need in sorted(wanted & set(LAYERWISE)):
        raise ReqatError(
            f"a term of the objective needs {need}, which the {who} ({type(model).__name__}), a classifier of images, "
            "does not give: leave the term out"
        )
    return Outputs(features_of(model)(batch.pixels)[keep])


def features_of(model: PreTrainedModel) -> Callable[[Tensor], Tensor]:
    """What makes features [B, D], of which the head makes logits, of images [B, C, H, W]. Raises ReqatError for a model
    without, as :class:`reqat.models.resnet.ResNet` has it."""
    features = getattr(model, "features", None)
    if features is None:
        raise ReqatError(
            f"{type(model).__name__} does not say what its classifier sees (a method `features`), so it cannot be "
            "trained on images; take reqat.models.resnet.ResNet"
        )
    return features  # type: ignore[no-any-return]


def _decoder_inputs(model: PreTrainedModel, batch: Batch) -> dict[str, Any]:
    # Another attention function, of a model that was not prepared, knows dense masks alone.
    by_trace = batch.apart and model.config._attn_implementation == ATTENTION
    mask = (segment_mask if by_trace else dense_mask)(batch.segment_ids)
    return {"attention_mask": mask, "position_ids": batch.position_ids, "use_cache": False}


def _encoder_inputs(model: PreTrainedModel, batch: Batch) -> dict[str, Any]:
    inputs: dict[str, Any] = {"attention_mask": (batch.segment_ids > 0).long()}
    if batch.token_types is None or not bool(batch.token_types.any()):
        return inputs
    known = int(getattr(model.config, "type_vocab_size", 0) or 0)
    if int(batch.token_types.max()) >= known:
        raise ReqatError(
            f"the batch has pairs of texts, and the encoder ({type(model).__name__}) has {known} token types, where 2 "
            "are needed to tell them apart: take another encoder, or a task of single texts"
        )
    return inputs | {"token_type_ids": batch.token_types}


def _check_scores(model: PreTrainedModel, who: str) -> None:
    if model.config._attn_implementation != ATTENTION:
        raise ReqatError(
            f"a term of the objective needs attention_scores, which attention {model.config._attn_implementation!r} of "
            f"the {who} does not give: call prepare(model, 'BF16')"
        )


@contextmanager
def _block_outputs(model: PreTrainedModel, wanted: bool) -> Iterator[list[Tensor]]:
    """The outputs of the self-attention blocks after residual and norm, of what runs within the ``with``. Raises
    ReqatError where the architecture has none."""
    found: list[Tensor] = []
    handles: list[Any] = []
    try:
        for block in blocks_of(model) if wanted else []:
            output = None if block.attention is None else block.attention.output
            if output is None:
                raise ReqatError(
                    f"a term of the objective needs attention_outputs, and {block.name} has no norm after the residual "
                    "of its attention, as BERT has: leave the term out"
                )
            handles.append(output.register_forward_hook(lambda _, __, out: found.append(out)))
        yield found
    finally:
        for handle in handles:
            handle.remove()
