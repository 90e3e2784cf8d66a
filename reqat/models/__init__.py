"""Models: loading and saving, quantized layers in place of linear ones, the four-bit key/value cache."""

from __future__ import annotations

import logging

# transformers imports torchao wherever it is installed (our tests compare with it), and torchao warns about GPU
# libraries that it cannot load on a CPU. Nothing here uses it.
for _noisy in ("torchao", "torch.utils._pytree"):
    logging.getLogger(_noisy).setLevel(logging.ERROR)

from reqat.models.attention import ATTENTION, softmax_attention  # noqa: E402
from reqat.models.cache import Fp4Cache  # noqa: E402
from reqat.models.gradient import gradient_rules, has_learned_scales, set_gradient  # noqa: E402
from reqat.models.kv import KVQuantizer, kv_quantizers, quantize_values_along_tokens  # noqa: E402
from reqat.models.limits import (  # noqa: E402
    attention_window,
    check_length,
    check_token_ids,
    embedding_rows,
    end_ids,
    forget_lengths,
    position_limit,
)
from reqat.models.linear import QuantLinear, quant_linears, weights_quantized_once  # noqa: E402
from reqat.models.loading import load_model, load_tokenizer  # noqa: E402
from reqat.models.prepare import (  # noqa: E402
    Report,
    calibrate_static,
    freeze,
    precision_of,
    prepare,
    share_global_scales,
    sharing_global_scales,
)
from reqat.models.saving import save_model  # noqa: E402
from reqat.models.sidecar import carried, leave  # noqa: E402

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
