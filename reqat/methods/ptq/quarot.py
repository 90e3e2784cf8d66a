"""QuaRot (arXiv 2404.00456): rotate everything that is quantized by Hadamard matrices, then GPTQ.

A rotated vector has no outliers. Four rotations, of which the first two cost nothing at run time:

- R1, the residual stream: with the norms' weights folded into the layers behind them, RMSNorm commutes with a rotation
  Q = H diag(+-1), so embeddings become E Q, q, k, v, gate, up and the head W Q, o and down Q^T W.
- R2, values: each head's are rotated by H of head_dim, in v's rows and o's columns. Across heads o's input is rotated
  online (by no matrix where there is none of the number of heads).
- R3, queries and keys: by H of head_dim, online, after RoPE; where keys are quantized.
- R4, the input of down: by H of its size, online.

H of a size m 2^k is Paley's of order m times Sylvester's (:func:`reqat.quant.hadamard_factors`). What is online is a
basis of the layer (:mod:`reqat.quant.basis`): the stored weight of o and down stays that of an ordinary layer.

Then GPTQ without act-order on the rotated weights, whose rows (or blocks) are cut off where the error is least, as the
reference does; inputs are cut off at 0.9 of their extremes, keys and values at 0.95. FP4 inputs, keys and values are
not cut off: their scales are too coarse for it. Unlike the reference, embeddings keep their mean: RMSNorm sees it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from reqat.config.errors import ReqatError
from reqat.config.ptq import QuaRotOptions
from reqat.formats import Format, QuantizedTensor
from reqat.methods.gated import gated_parts, turn_values
from reqat.methods.layerwise import WeightProblem, on_device, solve_weights
from reqat.methods.ptq._grid import searched
from reqat.methods.ptq._method import Method
from reqat.methods.ptq.gptq import gptq_codes, summary
from reqat.methods.scaling import check_full_precision, norm_offset
from reqat.methods.transform import Transform
from reqat.models import kv_quantizers, leave, quant_linears
from reqat.quant import Precision, hadamard_factors, kronecker

DEFAULTS = QuaRotOptions()
_SHARES, _NORM = tuple(1 - i / 100 for i in range(80)), 2.4  # of its search of the weights' scales
_INPUT_CLIP, _CACHE_CLIP = 0.9, 0.95
# Relative change of the logits of a float32 model that rotations may cause by rounding; a wrong one changes all.
_TOLERANCE = 1e-2


@torch.no_grad()
def rotate(
    model: PreTrainedModel,
    precision: Precision,
    input_ids: Tensor,
    *,
    seed: int = DEFAULTS.seed,
    progress: bool = True,
) -> dict[str, Any]:
    """Rotate a full-precision ``model``, in place; what is online takes effect when it is prepared.

    Args:
        model: a decoder built like Llama, Qwen2 or Qwen3, as loaded. Tied embeddings are untied: the head's weights
            hold the last norm's.
        precision: unused: the rotations do not depend on the format.
        input_ids: ``[n, T]`` int64; the first sequence shows whether the model still computes the same.
        seed: of the signs of R1.
        progress: nothing here takes long.

    Raises ReqatError for a model that is quantized, of other parts, or with a norm that rotations do not pass; for a
    hidden size, MLP size or head_dim without a Hadamard matrix; and where the model no longer computes the same.
    """
    check_full_precision(model, "QuaRot")
    parts = gated_parts(model, "QuaRot")
    heads = parts.blocks[0].attention.heads
    embeddings: Any = model.get_input_embeddings()
    hidden = int(embeddings.weight.shape[1])
    R1 = hadamard_factors(hidden)
    R2 = torch.kron(*hadamard_factors(heads.head_dim))
    R4 = hadamard_factors(parts.blocks[0].linears[6].in_features)
    norms = [norm for block in parts.blocks for norm in block.norms[:2]] + [parts.norm]
    offsets = [norm_offset(norm) for norm in norms]
    if None in offsets:
        raise ReqatError(
            "QuaRot folds the weights of norms, and this model has a norm that is not linear in its weight"
        )
    try:
        across: Tensor | None = torch.kron(*hadamard_factors(heads.query_heads))
    except ReqatError:
        across = None
    ids = on_device(model, input_ids[:1])
    before = model(ids).logits.double()

    signs = torch.randint(0, 2, (hidden,), generator=torch.Generator().manual_seed(seed)).double() * 2 - 1

    def turned(w: Tensor) -> Tensor:
        """``w Q``, float64."""
        return kronecker(w.double(), R1[0].to(w.device), R1[1].to(w.device)) * signs.to(w.device)

    _untie(model)
    head: Any = model.get_output_embeddings()
    readers = [group for block in parts.blocks for group in (block.linears[:3], block.linears[4:6])] + [[head]]
    for norm, offset, group in zip(norms, offsets, readers, strict=True):
        gain = norm.weight.double() + offset
        for linear in group:
            linear.weight.copy_(turned(linear.weight.double() * gain))
        norm.weight.fill_(1.0 - offset)  # type: ignore[operator]
    embedding: Any = model.get_input_embeddings()
    embedding.weight.copy_(turned(embedding.weight))
    left: dict[str, Tensor] = {}
    names = {module: name for name, module in model.named_modules()}
    for index, block in enumerate(parts.blocks):
        value, out, down = block.linears[2], block.linears[3], block.linears[6]
        for linear in (out, down):
            linear.weight.copy_(turned(linear.weight.T).T)
            if linear.bias is not None:
                linear.bias.copy_(turned(linear.bias))
        turn_values(value, out, R2, R2)
        left |= {f"layers.{index}.keys_right": R2}
        left |= {} if across is None else {f"{names[out]}.input_left": across}
        left |= {f"{names[down]}.input_left": R4[0], f"{names[down]}.input_right": R4[1]}
    leave(model, {name: factor.float() for name, factor in left.items()})
    moved = float((model(ids).logits.double() - before).norm() / before.norm().clamp(min=1e-30))
    if not moved <= max(_TOLERANCE, 8 * torch.finfo(embedding.weight.dtype).eps ** 0.5):
        raise ReqatError(
            f"QuaRot: the rotated model does not compute the same (off by {moved:.2g}), so this architecture is not "
            "supported; load the model again"
        )
    return {"seed": seed, "heads_mixed": across is not None}


def _untie(model: PreTrainedModel) -> None:
    """Give the head weights of its own."""
    head: Any = model.get_output_embeddings()
    embeddings: Any = model.get_input_embeddings()
    if head.weight is embeddings.weight:
        head.weight = nn.Parameter(head.weight.detach().clone())
        model.config.tie_word_embeddings = False


def solve(
    model: PreTrainedModel,
    input_ids: Tensor,
    *,
    damp: float = DEFAULTS.damp,
    input_clip: float | None = DEFAULTS.input_clip,
    cache_clip: float | None = DEFAULTS.cache_clip,
    progress: bool = True,
) -> dict[str, Any]:
    """Clip the quantizers of a prepared ``model`` and choose the codes of its weights by GPTQ, in place.

    ``input_clip``, ``cache_clip``: shares of the extremes at which inputs, keys and values are cut off; None: 0.9 and
    0.95 of integer formats, 1 of others. Raises ReqatError as GPTQ does, and for shares outside (0, 1].
    """
    for linear in quant_linears(model).values():
        set_clip(linear.input_quantizer, input_clip, _INPUT_CLIP)
    for kv in kv_quantizers(model):
        for quantizer in (kv.key, kv.value):
            set_clip(quantizer, cache_clip, _CACHE_CLIP)

    def solver(problem: WeightProblem) -> QuantizedTensor:
        nearest = problem.nearest
        scaled = searched(
            problem.weight,
            nearest.format,
            _SHARES,
            norm=_NORM,
            global_scale=nearest.global_scale,
            name=problem.name,
        )
        return gptq_codes(problem.with_scales(scaled), act_order=False, damp=damp)

    solved = solve_weights(model, input_ids, solver, label="QuaRot", progress=progress)
    return {"method": "quarot", "damp": damp, **summary(solved, input_ids)}


def set_clip(quantizer: Any, share: float | None, default: float) -> None:
    """Cut a quantizer's tensors off at ``share``; None: at ``default`` if its format is of integers."""
    fmt: Format | None = quantizer.format
    if fmt is None:
        return
    share = (default if fmt.element_type.integer else 1.0) if share is None else share
    quantizer.set_clip(None if share == 1 else torch.tensor([share, share]))


METHOD = Method(
    solve,
    transforms=(
        Transform(rotate, online="rotations of queries and keys, of o across heads, and of the input of down"),
    ),
    settings=QuaRotOptions,
    solver_needs_data=True,
)
