"""A packed model's decoder that takes one token a row, or a few, in a single native call.

Which decoders qualify is found by what they are, as everywhere in this package, and then by trial: the decoder's own
modules and the native call take the same few tokens through one layer, and only if the results agree is the native call
used. A decoder of any other build goes on through its modules, and so does any call that asks for something else than
a few tokens over a filled packed cache, hidden states or attention weights for example. Several tokens a row are those
that speculation guesses; with ``row`` and ``static`` global scales each gets the same bits as in a step of its own.

Forward hooks on modules inside the decoder see what goes through modules: prompts, and not the tokens after them. In a
bfloat16 model the modules round after each operation and the native call after each layer, so they are about as far
from each other as either is from the same model in float32.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPast

from reqat.config.errors import ReqatError
from reqat.inference.packed_cache import PackedCache, PackedCacheLayer
from reqat.inference.packed_linear import PackedLinear
from reqat.models.adapters import GatedBlock, GatedDecoder, adapter_of
from reqat.models.kv import KVQuantizer
from reqat.models.limits import attention_window
from reqat_kernels.native.decode import MOST_ROWS, NativeStack, available
from reqat_kernels.native.decode_check import LayerWeights

# The trial's tolerance, of the largest output. Both sides round the same inputs, so they differ by float summation; a
# rounding threshold crossed by it moves one code of one input, which is far below what a wrong order of parts does.
_TOLERANCE = 0.02


class NativeDecoder:
    """Takes the place of a decoder's ``forward``: native where it can be, the decoder's own otherwise."""

    def __init__(self, parts: GatedDecoder, stack: NativeStack) -> None:
        self.parts, self.stack = parts, stack
        self.own = parts.module.forward

    def __call__(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Any = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """The decoder's output, and its new token in the cache; arguments are those of the decoder."""
        given = input_ids if inputs_embeds is None else inputs_embeds
        states = None
        if given is not None and not any(_asks(*argument) for argument in kwargs.items()):
            rows, tokens = given.shape[:2]
            states = self._states(past_key_values, rows, tokens, attention_mask, position_ids)
        if states is None:
            return self.own(
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                past_key_values=past_key_values,
                inputs_embeds=inputs_embeds,
                use_cache=use_cache,
                **kwargs,
            )
        embeddings = self.parts.module.get_input_embeddings()(input_ids) if inputs_embeds is None else inputs_embeds
        last = self._decode(embeddings, attention_mask, position_ids, states)
        return BaseModelOutputWithPast(last_hidden_state=last, past_key_values=past_key_values)

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise ReqatError(
            "a packed model holds addresses of its own memory and cannot be copied or pickled: copy or save the frozen "
            "model, then pack"
        )

    def _states(
        self, cache: Any, rows: int, tokens: int, mask: Any, position_ids: Tensor | None
    ) -> list[PackedCacheLayer] | None:
        """The layers of the cache, with room for the new tokens; None where the native call cannot take them."""
        config, norm = self.parts.module.config, self.parts.norm.weight
        if (
            type(cache) is not PackedCache
            or not 0 < rows * tokens <= MOST_ROWS
            or norm.dtype not in (torch.float32, torch.bfloat16)
            or (torch.is_grad_enabled() and norm.requires_grad)
            or getattr(config, "output_hidden_states", False)
            or getattr(config, "output_attentions", False)
            or not getattr(config, "return_dict", True)
        ):
            return None
        states: Any = cache.layers[: len(self.stack)]
        if not all(layer.is_initialized for layer in states):
            return None
        length = states[0].length
        if mask is not None and (not isinstance(mask, Tensor) or mask.shape != (rows, length + tokens)):
            return None
        if position_ids is not None and position_ids.shape not in ((rows, tokens), (1, tokens)):
            return None
        for layer in states:
            layer.reserve(tokens, rows)
        return states

    @torch.no_grad()
    def _decode(
        self, embedded_BTC: Tensor, mask_BS: Tensor | None, position_ids: Tensor | None, states: list[PackedCacheLayer]
    ) -> Tensor:
        length, tokens = states[0].length, embedded_BTC.shape[1]
        if position_ids is None:
            position_ids = torch.arange(length, length + tokens, dtype=torch.long, device=embedded_BTC.device)[None]
        cos_BTD, sin_BTD = (part.float() for part in self.parts.rotary(embedded_BTC, position_ids))
        if mask_BS is not None:
            mask_BS = mask_BS.bool()
            mask_BS = None if bool(mask_BS.all()) else mask_BS.contiguous()
        x_BTC = embedded_BTC.to(torch.float32, copy=True).contiguous()
        failed = self.stack.step(
            x_BTC,
            cos_BTD.contiguous(),
            sin_BTD.contiguous(),
            [(layer.packed_keys, layer.packed_values) for layer in states],  # type: ignore[misc]
            length,
            mask_BS,
            half=embedded_BTC.dtype == torch.bfloat16,
        )
        if failed is not None:
            layer, part = failed
            name = self.parts.blocks[layer].name
            raise ReqatError(f"{name}: its {part} holds NaN or infinity; the model has diverged on this input")
        for cached in states:
            cached.length += tokens
        out: Tensor = self.parts.norm(x_BTC.to(embedded_BTC.dtype))
        return out


def _asks(name: str, value: Any) -> bool:
    """Whether an argument asks the decoder for more than its last hidden state."""
    if name == "return_dict":
        return value is False
    return value is not None and value is not False


def native_decoder(model: Any) -> bool:
    """Let the model's decoder take single tokens natively if it qualifies; returns whether it does."""
    sliding = attention_window(model.config) is not None  # the modules' attention holds it to its window
    parts = adapter_of(model).gated(model) if available() and not sliding else None
    weights = [] if parts is None else [_weights(block) for block in parts.blocks]
    known = [layer for layer in weights if layer is not None]
    if parts is None or len(known) != len(weights):
        return False
    if not _agrees(model, NativeDecoder(parts, NativeStack(known[:1]))):
        return False
    parts.module.forward = NativeDecoder(parts, NativeStack(known))
    return True


def _weights(block: GatedBlock) -> LayerWeights | None:
    """What the native call needs of a layer; None if one of its parts is of a kind that it does not know."""
    linears, norms, heads = block.linears, block.norms, block.attention.heads
    eps = {getattr(norm, "variance_epsilon", None) for norm in norms if norm is not None}
    kv = getattr(block.attention.module, "reqat_kv", None)
    if (
        not all(isinstance(linear, PackedLinear) for linear in linears)
        or len(eps) != 1
        or None in eps
        or not isinstance(kv, KVQuantizer)
        or kv.key.rotation is not None
        or not _is_silu(block.activation)
    ):
        return None
    inputs = [linear.input_quantizer for linear in linears]
    if any(quantizer.rotation != inputs[0].rotation for quantizer in inputs):
        return None
    return LayerWeights(
        linears=[(linear.packed, linear.bias) for linear in linears],
        norms=[None if norm is None else norm.weight for norm in norms],
        eps=float(eps.pop()),  # type: ignore[arg-type]
        heads=(heads.query_heads, heads.kv_heads, heads.head_dim),
        inputs=inputs[0].format,
        global_scales=[inputs[i].global_scale for i in (0, 3, 4, 6)],
        rotation=inputs[0].rotation or 0,
        shift=kv.shift,
        scaling=block.attention.scaling,
    )


def _is_silu(activation: Any) -> bool:
    return isinstance(activation, nn.SiLU) or type(activation).__name__ == "SiLUActivation"


@torch.no_grad()
def _agrees(model: Any, native: NativeDecoder) -> bool:
    """Whether native call and modules give the same for one token after three others, on two rows, one padded."""
    generator = torch.Generator().manual_seed(0)
    # Float32 whatever the model's type, so that rounding between its modules does not blur the comparison.
    prompt, token = (
        torch.randn(2, T, native.stack.hidden, generator=generator, dtype=torch.float32, device="cpu") for T in (3, 1)
    )
    mask = torch.tensor([[1, 1, 1, 1], [0, 1, 1, 1]], dtype=torch.long, device="cpu")
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    results = []
    with native.parts.first_block_alone():
        for function in (native.own, native):
            cache = PackedCache(model)
            for x, first, call in ((prompt, 0, native.own), (token, 3, function)):
                out = call(
                    inputs_embeds=x,
                    attention_mask=mask[:, : first + x.shape[1]],
                    position_ids=positions[:, first : first + x.shape[1]],
                    past_key_values=cache,
                    use_cache=True,
                )
            results.append(out.last_hidden_state)
    return bool((results[0] - results[1]).abs().max() <= _TOLERANCE * results[0].abs().max())
