"""How much of its teacher's self-attention a quantized encoder has recovered, layer by layer.

Two measures, as in the analysis of KD for QAT of Transformer encoders (arXiv 2211.11014): the divergence between
attention maps, ``KL(teacher || student)`` in nats, a mean over heads and tokens; and the error of the attention block's
output (after projection, residual and norm), its squared norm relative to that of the teacher's output. A student can
recover one without the other: maps multiply values, which are quantized too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from reqat.data import LabelledRows
from reqat.evaluation.classification import ordered
from reqat.models.modes import evaluating
from reqat.training.forward import run_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_WANTED = frozenset({"attentions", "attention_outputs"})
_SMALLEST = 1e-8


@dataclass(frozen=True)
class LayerRecovery:
    """Of one layer: divergence of the maps in nats, relative squared error of the block's output."""

    layer: int
    map_kl_nats: float
    output_error: float


@torch.no_grad()
def attention_recovery(
    student: PreTrainedModel, teacher: PreTrainedModel, rows: LabelledRows, *, rows_per_batch: int = 32
) -> list[LayerRecovery]:
    """Both measures over all tokens of ``rows`` that are not padding, a layer an entry.

    Raises ReqatError for a model that does not give its attention maps, or has no such output.
    """
    kl: list[float] = []
    error: list[float] = []
    square: list[float] = []
    tokens = 0
    with evaluating(student, teacher):
        for _, batch in ordered(rows, rows_per_batch):
            real = batch.segment_ids > 0
            tokens += int(real.sum())
            ours, theirs = (run_model(model, batch, real, _WANTED) for model in (student, teacher))
            layers = zip(
                ours.attentions or (), theirs.attentions or (), ours.attention_outputs or (),
                theirs.attention_outputs or (), strict=True,
            )  # fmt: skip
            for layer, (s_map, t_map, s_out, t_out) in enumerate(layers):
                if layer == len(kl):
                    kl, error, square = [*kl, 0.0], [*error, 0.0], [*square, 0.0]
                s, t = (x.transpose(1, 2)[real].double() for x in (s_map, t_map))  # [N, H, S]
                each = t * (t.clamp(min=_SMALLEST).log() - s.clamp(min=_SMALLEST).log())
                kl[layer] += float(each.sum(-1).mean(-1).sum())
                s, t = (x[real].double() for x in (s_out, t_out))
                error[layer] += float((s - t).square().sum())
                square[layer] += float(t.square().sum())
    return [
        LayerRecovery(i, kl_sum / tokens, errors / squares)
        for i, (kl_sum, errors, squares) in enumerate(zip(kl, error, square, strict=True))
    ]
