"""Models: loading and saving, quantized layers in place of linear ones, the four-bit key/value cache."""

from __future__ import annotations

from reqat.models.attention import ATTENTION, softmax_attention
from reqat.models.cache import Fp4Cache
from reqat.models.gradient import gradient_rules, has_learned_scales, set_gradient
from reqat.models.kv import KVQuantizer, kv_quantizers, quantize_values_along_tokens
from reqat.models.limits import (
    attention_window,
    check_length,
    check_token_ids,
    embedding_rows,
    end_ids,
    forget_lengths,
    position_limit,
)
from reqat.models.linear import QuantLinear, quant_linears, weights_quantized_once
from reqat.models.loading import load_model, load_tokenizer
from reqat.models.prepare import (
    Report,
    calibrate_static,
    freeze,
    precision_of,
    prepare,
    share_global_scales,
    sharing_global_scales,
)
from reqat.models.saving import save_model
from reqat.models.sidecar import carried, leave

__all__ = [
    "ATTENTION",
    "Fp4Cache",
    "KVQuantizer",
    "QuantLinear",
    "Report",
    "attention_window",
    "calibrate_static",
    "carried",
    "check_length",
    "check_token_ids",
    "embedding_rows",
    "end_ids",
    "forget_lengths",
    "freeze",
    "gradient_rules",
    "has_learned_scales",
    "kv_quantizers",
    "leave",
    "load_model",
    "load_tokenizer",
    "position_limit",
    "precision_of",
    "prepare",
    "quant_linears",
    "quantize_values_along_tokens",
    "save_model",
    "set_gradient",
    "share_global_scales",
    "sharing_global_scales",
    "softmax_attention",
    "weights_quantized_once",
]
