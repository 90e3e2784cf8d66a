"""The quantizer of one attention layer: keys and values, and where asked the other operands of both products.

Keys come after RoPE. The Q-FIT shift (ReQAT section 4) is subtracted from them before quantizing and never added back:
it moves every logit of a query by the same amount, which softmax does not see. Both keys and values are quantized in
blocks along head_dim. Queries are rotated as keys are, and quantized where the precision says so; so are probabilities,
in blocks along the keys that they weigh, after dropout. The basis of the keys
(:mod:`reqat.quant.basis`: measured factors, then the precision's ``kv_signs``) comes after the shift and before the
rotation.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from reqat.config.errors import ReqatError
from reqat.formats.subnormals import subnormals_kept
from reqat.models.adapters import cached_attentions
from reqat.quant import Basis, MeasuredState, Precision, Quantizer, block_hadamard


class KVQuantizer(MeasuredState):
    """``key`` and ``value`` quantizers and the shift buffer [G, D] (float32, or None) of one layer."""

    shift: Tensor | None

    def __init__(self, precision: Precision, kv_heads: int, head_dim: int, name: str) -> None:
        super().__init__()
        rotation = precision.kv_rotation if precision.keys is not None else None
        clamp = precision.clamp
        self.key = Quantizer(precision.keys, rotation=rotation, name=f"{name} keys", clamp=clamp)
        self.value = Quantizer(precision.values, name=f"{name} values", clamp=clamp)
        self.queries = Quantizer(precision.queries, name=f"{name} queries", clamp=clamp)
        self.probabilities = Quantizer(precision.probabilities, name=f"{name} probabilities", clamp=clamp)
        self.along_tokens = False
        self.name = name
        self.shape = (kv_heads, head_dim)
        signs = precision.kv_signs if precision.keys is not None else None
        self.basis = Basis(head_dim, self.key.name or name, signs)
        self.register_measured("shift")

    @property
    def scales_over_tokens(self) -> bool:
        """Whether keys that were never written (a static cache's zeros, which the shift moves) would change a scale."""
        fmt = self.key.format
        return fmt is not None and (fmt.global_scale == "dynamic" or fmt.per_tensor) and self.shift is not None

    def set_shift(self, shift_GD: Tensor | None) -> None:
        """Set the Q-FIT shift, one value a KV head and channel. Raises ReqatError as `checked` does."""
        if shift_GD is None:
            self.shift = None
            return
        self.shift = self.checked("shift", shift_GD).detach().to(self.device, torch.float32, copy=True)

    def checked(self, name: str, value: Tensor) -> Tensor:
        """A shift [G, D]. Raises ReqatError for another shape, NaN or infinity."""
        if tuple(value.shape) != self.shape:
            raise ReqatError(
                f"{self.name}: shift of shape {tuple(value.shape)}, but the layer has {self.shape[0]} KV heads of "
                f"head_dim {self.shape[1]}"
            )
        if not torch.isfinite(value).all():
            raise ReqatError(f"{self.name}: the shift holds NaN or infinity")
        return value

    def query(self, query_BHTD: Tensor) -> Tensor:
        """The query in the basis of the quantized keys, quantized itself if the precision says so."""
        if self.key.format is not None:
            query_BHTD, rotation = self.basis.of_weight(query_BHTD), self.key.rotation
            query_BHTD = query_BHTD if rotation is None else block_hadamard(query_BHTD, rotation)
        return query_BHTD if self.queries.format is None else self.queries(_widened(query_BHTD))

    def weights(self, probabilities_BHTS: Tensor) -> Tensor:
        """The probabilities, quantized if the precision says so; a block may reach beyond the last key, into zeros."""
        quantizer = self.probabilities
        return probabilities_BHTS if quantizer.format is None else _padded(quantizer, probabilities_BHTS)

    def forward(self, key_BGSD: Tensor, value_BGSD: Tensor) -> tuple[Tensor, Tensor]:
        """Quantized keys and values; straight-through gradients."""
        if self.key.format is not None:
            key_BGSD = _widened(key_BGSD)
            if self.shift is not None:
                with subnormals_kept(key_BGSD):
                    key_BGSD = key_BGSD - self.shift[:, None, :].to(key_BGSD)
            key_BGSD = self.key(self.basis(key_BGSD))
        if self.value.format is not None:
            value_BGSD = _widened(value_BGSD)
            if self.along_tokens:
                value_BGSD = _padded(self.value, value_BGSD.transpose(-1, -2)).transpose(-1, -2)
            else:
                value_BGSD = self.value(value_BGSD)
        return key_BGSD, value_BGSD


def kv_quantizers(model: PreTrainedModel) -> list[KVQuantizer]:
    """The KV quantizer of each layer of a prepared model (at BF16 too), in order; none where nothing is cached.

    Raises ReqatError if the model was not prepared.
    """
    found = [getattr(attention.module, "reqat_kv", None) for _, attention in cached_attentions(model)]
    quantizers = [kv for kv in found if isinstance(kv, KVQuantizer)]
    if len(quantizers) != len(found):
        raise ReqatError("the model was not prepared: call prepare(model, precision) first")
    return quantizers


def quantize_values_along_tokens(model: PreTrainedModel) -> None:
    """Let a prepared model quantize values in blocks along the tokens that the product with probabilities sums over,
    as MX's matrix product would, and not along head_dim, as a cache keeps them. For whole sequences without a cache.

    Raises ReqatError as :func:`kv_quantizers`.
    """
    for kv in kv_quantizers(model):
        kv.along_tokens = True


def _padded(quantizer: Quantizer, x: Tensor) -> Tensor:
    """``x`` quantized along its last axis, whose last block may reach beyond its end, into zeros."""
    length, fmt = x.shape[-1], quantizer.format
    missing = -length % ((fmt.block if fmt is not None else None) or 1)
    return quantizer(F.pad(x, (0, missing)) if missing else x)[..., :length]


def _widened(x: Tensor) -> Tensor:
    # CPU attention runs in float32 anyway; rounding what was quantized to bf16 in between would only cost.
    return x.float() if x.device.type == "cpu" and x.dtype in (torch.bfloat16, torch.float16) else x
