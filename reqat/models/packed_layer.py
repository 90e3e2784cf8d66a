"""Decoder layers of a packed model that take one token a row in a single native call.

Which layers qualify is found by what they are, as everywhere in this package, and then by trial: the layer's own
modules and the native call decode the same few tokens, and only if the results agree is the native call used. A layer
of any other build goes on through its modules.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from reqat.models.architecture import DecoderLayer, HeadShape
from reqat.models.kv import KVQuantizer
from reqat.models.linear import InputQuantizer
from reqat.models.packed_cache import PackedCache, PackedCacheLayer
from reqat.models.packed_linear import PackedLinear
from reqat_kernels.native.decode import MOST_ROWS, LayerWeights, NativeLayer, available

_LINEARS = (
    "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
    "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
)  # fmt: skip
_NORMS = ("input_layernorm", "post_attention_layernorm")
_HEAD_NORMS = ("self_attn.q_norm", "self_attn.k_norm")
# The trial's tolerance, of the largest output. Both sides round the same inputs, so they differ by float summation; a
# rounding threshold crossed by it moves one code of one input, which is far below what a wrong order of parts does.
_TOLERANCE = 0.02


class _Rotary:
    """Rotary embeddings of the new token as the native call wants them, made once for all layers."""

    def __init__(self) -> None:
        self._source: Any = None
        self._parts: tuple[Tensor, Tensor] | None = None

    def __call__(self, position: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        if self._parts is None or self._source is not position:
            cos, sin = (part[:, 0].float().contiguous() for part in position)
            self._source, self._parts = position, (cos, sin)
        return self._parts


class NativeForward:
    """Takes the place of a layer's ``forward``: native where it can be, the layer's own otherwise."""

    def __init__(self, layer: nn.Module, native: NativeLayer, index: int, name: str, rotary: _Rotary) -> None:
        self.layer, self.native, self.index, self.name, self.rotary = layer, native, index, name, rotary
        self.own = layer.forward

    def __call__(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The layer's output, and its new token in the cache; arguments are those of the layer."""
        cache: Any = kwargs.get("past_key_values")
        position: Any = kwargs.get("position_embeddings")
        plain = (
            type(cache) is PackedCache
            and position is not None
            and not args
            and hidden_states.shape[1] == 1
            and len(hidden_states) <= MOST_ROWS
            and hidden_states.dtype in (torch.float32, torch.bfloat16)
            and not (torch.is_grad_enabled() and hidden_states.requires_grad)
        )
        states = cache.layers[self.index] if plain else None
        if not isinstance(states, PackedCacheLayer) or not states.is_initialized:
            return self.own(hidden_states, *args, **kwargs)
        states.reserve(1, len(hidden_states))
        assert states.packed_keys is not None and states.packed_values is not None
        x_BC = hidden_states[:, 0].to(torch.float32, copy=True)
        cos_BD, sin_BD = self.rotary(position)
        mask = kwargs.get("attention_mask")
        if mask is not None and mask.dtype != torch.bool:
            mask = mask.float()
        failed = self.native.step(
            x_BC, cos_BD, sin_BD, states.packed_keys, states.packed_values, states.length, mask
        )  # fmt: skip
        if failed is not None:
            raise ValueError(f"{self.name}: its {failed} holds NaN or infinity; the model has diverged on this input")
        states.length += 1
        return x_BC.to(hidden_states.dtype)[:, None]


def native_layers(model: Any, layers: list[DecoderLayer], heads: HeadShape) -> int:
    """Let every layer that qualifies decode natively; returns how many do."""
    if not available():
        return 0
    count = 0
    rotary = _Rotary()
    agreed: bool | None = None
    for layer in layers:
        weights = _weights(layer.module, heads)
        if weights is None:
            continue
        forward = NativeForward(layer.module, NativeLayer(weights), layer.index, layer.name, rotary)
        if agreed is None:
            agreed = _agrees(model, forward, heads)
        if not agreed:
            return 0
        layer.module.forward = forward  # type: ignore[method-assign]
        count += 1
    return count


def _weights(layer: nn.Module, heads: HeadShape) -> LayerWeights | None:
    modules = dict(layer.named_modules())
    linears = [modules.get(name) for name in _LINEARS]
    if not all(isinstance(linear, PackedLinear) for linear in linears):
        return None
    norms = [modules.get(name) for name in (*_NORMS, *_HEAD_NORMS)]
    given = [norm for norm in norms if norm is not None]
    eps = {getattr(norm, "variance_epsilon", None) for norm in given}
    attention: Any = layer.self_attn
    mlp: Any = layer.mlp
    kv = getattr(attention, "reqat_kv", None)
    activation = getattr(mlp, "act_fn", None)
    inputs = [linear.input_quantizer for linear in linears]  # type: ignore[union-attr]
    first = inputs[0]
    known = {"", "self_attn", "mlp", "mlp.act_fn", *_LINEARS, *_NORMS, *_HEAD_NORMS}
    extra = [
        name
        for name, module in modules.items()
        if name not in known and not isinstance(module, KVQuantizer | InputQuantizer) and ".reqat_kv" not in name
    ]
    if (
        extra
        or norms[0] is None
        or norms[1] is None
        or (norms[2] is None) != (norms[3] is None)
        or len(eps) != 1
        or None in eps
        or not isinstance(kv, KVQuantizer)
        or kv.key.rotation is not None
        or not (isinstance(activation, nn.SiLU) or type(activation).__name__ == "SiLUActivation")
        or any(quantizer.rotation != first.rotation for quantizer in inputs)
    ):
        return None
    return LayerWeights(
        linears=[(linear.packed, linear.bias) for linear in linears],  # type: ignore[union-attr, misc]
        norms=[None if norm is None else norm.weight for norm in norms],  # type: ignore[misc]
        eps=float(eps.pop()),  # type: ignore[arg-type]
        heads=(heads.query_heads, heads.kv_heads, heads.head_dim),
        inputs=first.format,
        global_scales=[inputs[i].global_scale for i in (0, 3, 4, 6)],
        rotation=first.rotation or 0,
        shift=kv.shift,
        scaling=float(attention.scaling),
    )


@torch.no_grad()
def _agrees(model: Any, forward: NativeForward, heads: HeadShape) -> bool:
    """Whether native call and modules give the same for one token after three others, on two rows."""
    generator = torch.Generator().manual_seed(0)
    hidden = forward.native._layer.hidden
    results = []
    # Float32 whatever the model's type, so that rounding between its modules does not blur the comparison.
    prompt, token = (torch.randn(2, T, hidden, generator=generator) for T in (3, 1))
    rotary = model.get_decoder().rotary_emb
    for function in (forward.own, forward):
        cache = PackedCache(model)
        for x, first in ((prompt, 0), (token, 3)):
            T = x.shape[1]
            position = rotary(x, torch.arange(first, first + T)[None].expand(2, T))
            mask = None
            if T > 1:
                mask = torch.ones(T, T, dtype=torch.bool).tril()[None, None]
            call = forward.own if T > 1 else function
            out = call(x, attention_mask=mask, position_embeddings=position, past_key_values=cache, use_cache=True)
            out = out if isinstance(out, Tensor) else out[0]
        results.append(out - token)
    return bool((results[0] - results[1]).abs().max() <= _TOLERANCE * results[0].abs().max())
