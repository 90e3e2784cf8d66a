"""The memory that a training takes, computed from the model's shape and the settings before anything is started.

A step has two peaks. Where the backward pass begins, all that autograd kept is there, and the logits with their
gradients; where it ends, that is gone and every parameter has a gradient. Weights and the optimizer's moments (AdamW's
two, SGD's one) are there always, in float32. With several batches a step, gradients are there at both.

What autograd keeps of a token in a layer of a Llama- or Qwen-like decoder (`kept_per_token`) is what
`torch.autograd.graph.saved_tensors_hooks` count; a test compares them. With gradient checkpointing that is the layer's
input alone, and one layer at a time is computed again.

With several ranks each keeps a share of weights, gradients and moments (FSDP2) and gathers the weights of a layer
while it computes with them; activations are those of its own rows. Offloaded, the share is in host memory.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from reqat.config.stage import Training
from reqat.config.tier import Shape

GIB = 2**30
MIB = 2**20
_WIDE, _NARROW = 4, 2  # bytes of float32, and of bfloat16 under autocast
#: Logits of a batch up to this are held as they are; of larger ones a chunk of this size at a time, where the loss
#: allows (`reqat_kernels.sem_loss.CHUNK_BYTES`, which may not be imported here; a test compares them).
CHUNK_BYTES = 320 * MIB
# Copies of a batch's logits that are there together, of the term that holds the most: as tensors, which is what a GPU's
# allocator keeps, and in the C library's heap. Of the likelihood log-probabilities, their gradient, the logits'; of SEM
# logits, log-probabilities and two of p log p; of distillation logits and log-probabilities of both models and three of
# their divergence. In the heap freed copies lie beside them: an aligned block does not fit where one of its size was
# freed. The first number a test counts, the second was measured (docs/memory.md).
_COPIES = {"nll": (3, 6), "sem": (4, 9)}
# Of SEM with gradient checkpointing: fewer lie there (measured; why was not found out).
_SEM_CHECKPOINTED = (4, 7)
_DISTILLATION_COPIES = (7, 12)
#: Moments that an optimizer keeps of each parameter.
MOMENTS = {"adamw": 2, "sgd": 1}
#: Resident before a model is loaded: Python, torch, transformers and what they bring.
PROCESS_BYTES = 480 * MIB
# Share of the memory of activations that gradients take over in the C library's heap: blocks that are aligned do not
# fit where a block of their size was freed. Measured on SmolLM2-135M (docs/memory.md).
_REUSED = 0.5
# Layers whose weights are gathered at the same time: the one at work and the next.
_GATHERED = 2


def parameters(shape: Shape) -> int:
    """Number of weights of a Llama- or Qwen-like decoder of that shape."""
    s = shape
    embeddings = s.vocabulary * s.hidden_size * (1 if s.tie_embeddings else 2)
    return s.layers * (_matrices(s) + 2 * s.hidden_size) + embeddings + s.hidden_size


def _matrices(s: Shape) -> int:
    """Weights of the linear layers of one layer."""
    return s.hidden_size * s.head_dim * (2 * s.heads + 2 * s.kv_heads) + 3 * s.hidden_size * s.mlp


def kept_per_token(shape: Shape, *, autocast: bool = False, copied: bool = False) -> int:
    """Bytes that autograd keeps of one token in one layer, without gradient checkpointing.

    In float32: the two residual sums and what the norms make of them (4 hidden sizes), of each norm's and head's sums
    a number. In the type of the products: the inputs of the linear layers, of attention and of the MLP's gate.
    ``copied``: what attention gave and the input of the output projection are two tensors, because the latter is
    rounded, or put together trace by trace.
    """
    s = shape
    queries, keys = s.heads * s.head_dim, s.kv_heads * s.head_dim
    attention = queries + 2 * keys + queries * (2 if copied else 1)
    narrow = 2 * s.hidden_size + attention + 4 * s.mlp
    return _WIDE * (4 * s.hidden_size + 2 + s.heads) + (_NARROW if autocast else _WIDE) * narrow


@dataclass(frozen=True)
class TrainingMemory:
    """Bytes of one process at the peak of a training step, by what they are for.

    ``products``: weights as the products read them, quantized or cast. ``gathered``: weights of other ranks, while a
    layer computes. ``work``: a layer that is computed again. ``process``: of the program itself, on a CPU.
    """

    weights: float
    gradients: float
    moments: float
    products: float
    activations: float
    gathered: float
    work: float
    logits: float
    mask: float
    teacher: float
    process: float
    accumulates: bool
    """Gradients of earlier batches of the step are there when the backward pass begins."""
    products_stay: bool
    """They are kept through the step, not by autograd alone."""
    head_gradient: float
    host: float
    """In host memory, beside these."""

    @property
    def _always(self) -> float:
        return self.weights + self.moments + self.gathered + self.mask + self.teacher + self.process

    @property
    def backward_begins(self) -> float:
        """Bytes where the backward pass of the last batch of a step begins."""
        gradients = self.gradients if self.accumulates else 0.0
        return self._always + gradients + self.products + self.activations + max(self.work, self.logits)

    @property
    def backward_ends(self) -> float:
        """Bytes where it ends: the embedding's gradient is one more tensor before it is added to the head's."""
        return self._always + self.gradients + self.head_gradient + (self.products if self.products_stay else 0.0)

    @property
    def peak(self) -> float:
        """Bytes of the larger of the two, and on a CPU what does not fit into memory that was freed between them."""
        misfits = 0.0
        if self.process and not self.accumulates:
            misfits = self.gradients - _REUSED * min(self.gradients, self.activations)
        return max(self.backward_begins + misfits, self.backward_ends)

    @property
    def parts(self) -> Mapping[str, float]:
        """Name -> bytes, of those that are not 0."""
        named = {
            "weights": self.weights,
            "gradients": self.gradients,
            "moments": self.moments,
            "weights for products": self.products,
            "gathered weights": self.gathered,
            "activations": self.activations,
            "layer at work": self.work,
            "logits": self.logits,
            "attention mask": self.mask,
            "teacher": self.teacher,
            "program": self.process,
        }
        return {name: count for name, count in named.items() if count}

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {shown(count)}" for name, count in self.parts.items())
        return f"{shown(self.peak)} at the peak of a step: {parts}"


def training_memory(
    shape: Shape,
    training: Training,
    *,
    quantized: bool,
    autocast: bool | None = None,
    count: int | None = None,
    response_tokens: int | None = None,
    ranks: int = 1,
    offload: bool = False,
    cpu: bool = False,
) -> TrainingMemory:
    """What each process of a training takes at its peak.

    Args:
        shape: of the model.
        training: settings; `rows_per_batch` rows of `row_tokens` are computed together.
        quantized: whether weights, inputs, keys and values are (QAT).
        autocast: whether products are in bfloat16; by default what `training` says, `auto` being yes.
        count: parameters of the model, where they are not those of `shape` (experts).
        response_tokens: of one batch, at most; by default all of its tokens.
        ranks: processes that share weights, gradients and moments.
        offload: whether each keeps its share in host memory.
        cpu: whether the program itself is in the same memory.
    """
    s, total = shape, parameters(shape) if count is None else count
    tokens = training.rows_per_batch * training.row_tokens
    responses = tokens if response_tokens is None else min(tokens, response_tokens)
    narrow = training.autocast != "none" if autocast is None else autocast
    head = s.vocabulary * s.hidden_size
    linear = max(0, total - head * (1 if s.tie_embeddings else 2))
    layer_tokens = tokens * kept_per_token(s, autocast=narrow, copied=quantized or training.attention == "traces")
    checkpointing, accumulates = training.gradient_checkpointing, training.accumulation > 1

    # Weights for products. One process keeps quantized ones where a step reads them again; of many processes each
    # makes them of what it gathered. Those that autocast casts, checkpointing drops.
    width = _NARROW if narrow else _WIDE
    sharded = ranks > 1 or offload
    stay = quantized and not sharded and (checkpointing or accumulates)
    products = 0.0
    if (quantized or narrow) and (stay or not checkpointing):
        products += width * linear
    elif quantized or narrow:
        products += width * linear / s.layers
    products += _NARROW * head if narrow else 0

    fused = all(term.name in ("nll", "sem") for term in training.objective)
    logits = _WIDE * responses * s.vocabulary
    if fused and logits > CHUNK_BYTES:
        held = CHUNK_BYTES + _WIDE * head  # and the head's gradient, which the loss makes
    else:
        known = _COPIES | ({"sem": _SEM_CHECKPOINTED} if checkpointing else {})
        held = logits * max(known.get(term.name, _DISTILLATION_COPIES)[1 if cpu else 0] for term in training.objective)
    gathered = _WIDE * (_GATHERED * linear / s.layers + head) if sharded else 0.0
    dense = training.attention == "rows"
    share, moments = _WIDE * total / ranks, MOMENTS[training.optimizer]
    return TrainingMemory(
        weights=0.0 if offload else share,
        gradients=0.0 if offload else share,
        moments=0.0 if offload else moments * share,
        products=products,
        activations=float(tokens * s.hidden_size * s.layers * _WIDE if checkpointing else layer_tokens * s.layers),
        gathered=gathered,
        work=float(layer_tokens if checkpointing else 0),
        logits=float(held),
        # Booleans, and what is added to the logits of attention.
        mask=float((1 + _WIDE) * training.rows_per_batch * training.row_tokens**2 if dense else 0),
        # All other terms compare with a teacher; thought to be of the student's size.
        teacher=share if not fused and not offload else 0.0,
        process=PROCESS_BYTES if cpu else 0.0,
        accumulates=accumulates,
        products_stay=stay,
        head_gradient=_head_gradient(s, ranks, offload),
        host=share * (2 + moments + (0 if fused else 1)) if offload else 0.0,
    )


def _head_gradient(shape: Shape, ranks: int, offload: bool) -> float:
    """Bytes of the gradient that a head hands to the embedding that it is tied to."""
    whole = _WIDE * shape.vocabulary * shape.hidden_size
    return 0.0 if not shape.tie_embeddings else whole if offload else whole / ranks


def shown(count: float) -> str:
    """Bytes as people read them."""
    return f"{count / GIB:.1f} GiB" if count >= GIB else f"{count / MIB:.0f} MiB"
