"""One-sided blocks: by brute force, and without a change to what the model computes."""

from __future__ import annotations

import copy

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from reqat.evaluation.block_signs import block_signs, one_sided_blocks
from reqat.formats import get_format, quantize_dequantize
from reqat.models import kv_quantizers, prepare, quantize_values_along_tokens
from reqat.models.attention import reqat_attention

SHAPE = {
    "vocab_size": 40, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1,
}  # fmt: skip


def tiny() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SHAPE)).eval()


def test_blocks_are_counted_by_their_definition() -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((300, 8)) * rng.choice([-1, 1, 0.3], (300, 1)) + rng.choice([0, 2, -3], (300, 1))
    x[::7] = 0
    x[1] = [1, -2, 0, 0, 0, 0, 0, 0]  # exactly twice: not more
    wanted = [0, 0]
    for block in x:
        ends = sorted((max(block.max(), 0.0), max(-block.min(), 0.0)))
        wanted[0] += ends[1] > 0
        wanted[1] += ends[1] > 2 * ends[0]
    assert one_sided_blocks(torch.from_numpy(x)) == tuple(wanted) and 0 < wanted[1] < wanted[0] < 300


def test_a_model_is_seen_as_it_is() -> None:
    model, ids = tiny(), torch.randint(0, 40, (2, 32))
    plain = model(ids).logits
    formats = {"MXFP4": get_format("MXFP4")}
    watched = copy.deepcopy(model)
    prepare(watched, "MXFP4-W4A4Q4KV4P4")
    quantize_values_along_tokens(watched)
    seen = block_signs(watched, ids, formats)
    assert {s.role for s in seen} == {"weights", "inputs", "queries", "keys", "probabilities", "values"}
    assert {s.layer for s in seen} == {0, 1}
    (down,) = (s for s in seen if s.name == "model.layers.1.mlp.down_proj.weight")
    weight = model.model.layers[1].mlp.down_proj.weight.detach()
    assert (down.blocks, down.one_sided) == one_sided_blocks(weight.reshape(-1, 32))
    error = (quantize_dequantize(weight, "MXFP4") - weight).double().square().sum()
    assert down.errors["MXFP4"] == float(error) and down.square == float(weight.double().square().sum())
    torch.testing.assert_close(watched(ids).logits, plain, rtol=1e-4, atol=1e-5)


def test_values_are_rounded_along_the_tokens_that_are_summed_over() -> None:
    model = tiny()
    prepare(model, "AMXFP4-W4A4Q4KV4P4")
    quantize_values_along_tokens(model)
    module, (kv, _) = model.model.layers[0].self_attn, kv_quantizers(model)
    query, key, value = torch.randn(1, 2, 40, 32), torch.randn(1, 1, 40, 32), torch.randn(1, 1, 40, 32)
    out, _ = reqat_attention(module, query, key, value, None)

    fmt = get_format("AMXFP4")
    q, k = (quantize_dequantize(x, fmt) for x in (query, key))
    v = quantize_dequantize(value, fmt, axis=-2, pad=True)
    scores = (q @ k.transpose(-1, -2)) / 32**0.5
    scores = scores.masked_fill(torch.ones(40, 40).triu(1).bool(), -torch.inf)
    maps = quantize_dequantize(torch.softmax(scores, -1), fmt, pad=True)
    torch.testing.assert_close(out, (maps @ v).transpose(1, 2), rtol=1e-5, atol=1e-6)
    assert kv.along_tokens
