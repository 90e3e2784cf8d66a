"""Output head and embeddings of a packed model: stored as the caller of ``pack`` chose, once where they are tied.

The head's product gives float32 logits from an input that is not rounded, or rounded to int8 a token at a time. The
look-up dequantizes the rows it was asked for. Both read a :class:`~reqat.inference.backend.Table`, made from the
model's own weight by rounding to the nearest: no method calibrates them.
"""

from __future__ import annotations

import warnings

from torch import Tensor, nn
from transformers import PreTrainedModel

from reqat.config.errors import ReqatError
from reqat.config.vocabulary import BLOCKS, ROUNDED, check_embeddings, check_head, stored_as
from reqat.inference.backend import Backend, Table
from reqat.inference.packed_linear import PackedModule


class PackedHead(PackedModule):
    """The output head: ``x @ W.T + b`` in float32 for x [..., K]. Inference only."""

    def __init__(self, head: nn.Linear, table: Table, name: str, stored: str) -> None:
        super().__init__(name)
        self.in_features, self.out_features, self.stored = head.in_features, head.out_features, stored
        self.table, self.bias = table, head.bias
        self.keep(table.tensors())

    def forward(self, x: Tensor) -> Tensor:
        """Logits, float32 [..., N]."""
        y = self.table.times(x.reshape(-1, self.in_features), self.stored.endswith(ROUNDED))
        if self.bias is not None:
            y = y + self.bias.float()
        return y.view(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        """Shape and storage, for ``print(model)``."""
        return f"in_features={self.in_features}, out_features={self.out_features}, {self.stored}"


class PackedEmbedding(PackedModule):
    """The look-up of tokens: rows of W [N, K], in the model's type. Inference only."""

    def __init__(self, embedding: nn.Embedding, table: Table, name: str, stored: str) -> None:
        super().__init__(name)
        self.num_embeddings, self.embedding_dim = embedding.num_embeddings, embedding.embedding_dim
        self.padding_idx, self.stored, self.dtype = embedding.padding_idx, stored, embedding.weight.dtype
        self.table = table
        self.keep(table.tensors())

    def forward(self, input: Tensor) -> Tensor:
        """Rows [..., K] of ``input`` [...]."""
        return self.table.rows_at(input).to(self.dtype)

    def extra_repr(self) -> str:
        """Shape and storage, for ``print(model)``."""
        return f"{self.num_embeddings}, {self.embedding_dim}, {self.stored}"


def check_choice(model: PreTrainedModel, head: str | None, embeddings: str | None) -> None:
    """Raise ReqatError for names that are none, and for a head or embeddings that cannot be stored so."""
    check_head(head)
    check_embeddings(embeddings)
    outer, inner = model.get_output_embeddings(), model.get_input_embeddings()
    if head is not None and type(outer) is not nn.Linear:
        what = "the model has no output head" if outer is None else f"the output head is a {type(outer).__name__}"
        raise ReqatError(f"head={head!r}: {what}, no plain linear layer: leave head= out")
    if embeddings is not None and (type(inner) is not nn.Embedding or inner.max_norm is not None):
        raise ReqatError(
            f"embeddings={embeddings!r}: the model's embedding is a {type(inner).__name__} that does more than look up "
            "rows: leave embeddings= out"
        )
    for option, name, module in (("head", head, outer), ("embeddings", embeddings, inner)):
        block = BLOCKS.get(stored_as(name or ""), 1)
        if name is not None and (columns := module.weight.shape[1]) % block:  # type: ignore[union-attr,index]
            raise ReqatError(
                f"{option}={name!r}: rows of {columns} numbers are no whole blocks of {block}: choose INT8 or BF16"
            )


def pack_vocabulary(model: PreTrainedModel, backend: Backend, head: str | None, embeddings: str | None) -> None:
    """Exchange the head and the embeddings of ``model``, in place, as :func:`reqat.inference.pack` documents it.

    Choices were checked by :func:`check_choice`. Raises ReqatError for one that ``backend`` has no kernel for.
    """
    outer, inner = model.get_output_embeddings(), model.get_input_embeddings()
    tied = isinstance(outer, nn.Linear) and getattr(inner, "weight", None) is outer.weight
    plain = type(inner) is nn.Embedding and inner.max_norm is None
    if tied and head is None and embeddings is not None:
        head = embeddings
    elif tied and head is not None and embeddings is None and plain:
        embeddings = stored_as(head)
    elif head is None and type(outer) is nn.Linear:
        head = backend.own_heads.get(outer.weight.dtype)  # at the speed of memory, rows apart from each other
    tables: dict[str, Table] = {}
    if head is not None:
        assert isinstance(outer, nn.Linear)
        stored = stored_as(head)
        tables[stored] = backend.table(outer.weight, head)
        kept = tables[stored].tensors().get("weight")
        if tied and embeddings is None and kept is not None and kept.dtype == outer.weight.dtype:
            outer.weight.data = kept  # the embedding goes on reading the same memory
        if tied and embeddings not in (None, stored):
            warnings.warn(
                f"head={head!r} and embeddings={embeddings!r} of a model whose head and embeddings are one matrix: it "
                "is stored twice, once each",
                stacklevel=4,  # past pack() and its decorator
            )
        model.set_output_embeddings(PackedHead(outer, tables[stored], _name(model, outer), head))
    if embeddings is not None:
        assert isinstance(inner, nn.Embedding)
        shared = tables.get(embeddings) if tied else None
        table = shared or backend.table(inner.weight, embeddings)
        model.set_input_embeddings(PackedEmbedding(inner, table, _name(model, inner), embeddings))


def _name(model: nn.Module, module: nn.Module) -> str:
    return next(name for name, other in model.named_modules() if other is module)
