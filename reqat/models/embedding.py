"""A token embedding whose rows are quantized (ternary BERT, arXiv 2009.12812: one scale a row).

A lookup copies rows, and each row has scales of its own, so the rows that a batch looks up are quantized and not the
whole table: same numbers, and of a vocabulary of 30,000 words a batch needs a few hundred. A head that is tied to the
table reads it as it is. Freezing changes nothing here: the table stays as it was trained, in checkpoints too, and is
quantized at each lookup.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from reqat.quant import Precision, Quantizer


class QuantEmbedding(nn.Embedding):
    """``nn.Embedding`` with the same ``weight`` [V, D] and settings; ids [...] give rows [..., D]."""

    def __init__(self, embedding: nn.Embedding, precision: Precision, name: str) -> None:
        nn.Module.__init__(self)  # not nn.Embedding's: it would allocate and initialize a weight
        self.num_embeddings, self.embedding_dim = embedding.num_embeddings, embedding.embedding_dim
        self.padding_idx, self.max_norm, self.norm_type = embedding.padding_idx, None, embedding.norm_type
        self.scale_grad_by_freq, self.sparse = embedding.scale_grad_by_freq, embedding.sparse
        self.weight = embedding.weight
        self.quantizer = Quantizer(precision.embeddings, name=f"{name} rows", clamp=precision.clamp)
        self.train(embedding.training)

    def forward(self, input: Tensor) -> Tensor:
        """The quantized rows of ``input``."""
        rows = F.embedding(
            input, self.weight, self.padding_idx, scale_grad_by_freq=self.scale_grad_by_freq, sparse=self.sparse
        )
        quantized: Tensor = self.quantizer(rows)
        return quantized
