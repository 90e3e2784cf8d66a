"""Ternary BERT: operands of attention, embeddings, the pooler and the clamp, against arithmetic written out here."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import BertConfig, BertForSequenceClassification, BertForTokenClassification, PreTrainedModel

from reqat.config.errors import ReqatError
from reqat.inference import pack
from reqat.models import load_model, prepare, quant_linears, save_model
from reqat.models.adapters import adapter_of, blocks_of
from reqat.quant import Precision, Quantizer

TERNARY = "TERNARY-tensor-W2+TERNARY-row-E2+INT8-tensor-A8Q8KV8P8:clamp=2.5"


def bert(kind: type[PreTrainedModel] = BertForTokenClassification) -> PreTrainedModel:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=61, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48,
        max_position_embeddings=16, num_labels=5, initializer_range=0.3,
    )  # fmt: skip
    return kind(config).eval()


@pytest.fixture
def inputs() -> dict[str, Tensor]:
    ids = torch.randint(3, 61, (3, 9), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    return {"input_ids": ids, "attention_mask": mask, "token_type_ids": (ids > 30).long()}


def ternary(w: np.ndarray) -> np.ndarray:
    """TWN of the numbers in ``w`` together."""
    w = np.clip(w.astype(np.float64), -2.5, 2.5)
    large = np.abs(w) > 0.7 * np.abs(w).mean()
    return np.sign(w) * large * np.abs(w)[large].mean()


def int8(x: np.ndarray) -> np.ndarray:
    x = np.clip(x.astype(np.float64), -2.5, 2.5)
    step = np.abs(x).max() / 127
    return np.round(x / step) * step


@pytest.mark.parametrize("kind", [BertForTokenClassification, BertForSequenceClassification])
def test_without_rounding_our_attention_is_transformers(kind: type[PreTrainedModel], inputs: dict[str, Tensor]) -> None:
    plain, ours = bert(kind), bert(kind)
    plain.set_attn_implementation("eager")
    prepare(ours, "INT8-tensor-Q8P8")
    for module in ours.modules():
        if isinstance(module, Quantizer):
            module.format = None
    theirs = plain(**inputs, output_attentions=True, output_hidden_states=True)
    found = ours(**inputs, output_attentions=True, output_hidden_states=True)
    torch.testing.assert_close(found.logits, theirs.logits)
    for name in ("attentions", "hidden_states"):
        torch.testing.assert_close(found[name], theirs[name])
    scores = ours.base_model(**inputs, output_attentions=True, attention_scores=True).attentions
    for score, maps in zip(scores, theirs.attentions, strict=True):
        torch.testing.assert_close(score.softmax(-1), maps)
    keep = inputs["attention_mask"].bool() if kind is BertForTokenClassification else torch.zeros(3, 9).bool()
    keep[:, 0] = True
    head = adapter_of(ours).head(ours)
    logits = theirs.logits[keep] if kind is BertForTokenClassification else theirs.logits
    torch.testing.assert_close(head(found.hidden_states[-1][keep]), logits)


def test_attention_with_8_bit_operands_is_that_of_rounded_ones(inputs: dict[str, Tensor]) -> None:
    model = bert(BertForSequenceClassification)
    prepare(model, TERNARY)
    seen: dict[str, np.ndarray] = {}
    attention = blocks_of(model)[0].attention
    assert attention is not None and attention.output is not None
    for name in ("query", "key", "value"):
        layer = getattr(attention.module, name)
        layer.register_forward_hook(lambda _, __, out, name=name: seen.update({name: out.detach().numpy()}))
    attention.module.register_forward_pre_hook(lambda _, args: seen.update(x=args[0].detach().numpy()))
    attention.module.register_forward_hook(lambda _, __, out: seen.update(out=out[0].detach().numpy()))
    model(**inputs)
    rounded = int8(seen["x"])
    for name in ("query", "key", "value"):
        layer = getattr(attention.module, name)
        weight, bias = ternary(layer.weight.detach().numpy()), layer.bias.detach().numpy()
        np.testing.assert_allclose(seen[name], rounded @ weight.T + bias, atol=1e-5)
    q, k, v = (int8(seen[n]).reshape(3, 9, 2, 16).transpose(0, 2, 1, 3) for n in ("query", "key", "value"))
    scores = q @ k.swapaxes(-1, -2) / math.sqrt(16)
    scores = np.where(inputs["attention_mask"].numpy()[:, None, None].astype(bool), scores, -np.inf)
    maps = np.exp(scores - scores.max(-1, keepdims=True))
    maps = int8(maps / maps.sum(-1, keepdims=True))
    expected = (maps @ v).transpose(0, 2, 1, 3).reshape(3, 9, 32)
    error = np.abs(seen["out"] - expected)
    assert (
        np.median(error) < 1e-6 and error.max() < 0.02 * np.abs(expected).max()
    )  # few fall on the other side of a tie


def test_rows_of_the_embedding_are_ternary_and_the_rest_is_not(inputs: dict[str, Tensor]) -> None:
    model = bert(BertForSequenceClassification)
    table = model.get_input_embeddings().weight.detach().numpy()
    report = prepare(model, TERNARY)
    found = model.get_input_embeddings()(inputs["input_ids"]).detach().numpy()
    for row, word in zip(found.reshape(-1, 32), inputs["input_ids"].flatten(), strict=True):
        np.testing.assert_allclose(row, ternary(table[word]), rtol=1e-6)
    assert "bert.pooler.dense" in quant_linears(model) and "classifier" not in quant_linears(model)
    assert {entry.name for entry in report.skipped} == {
        "bert.embeddings.position_embeddings", "bert.embeddings.token_type_embeddings", "classifier",
    }  # fmt: skip


def test_a_clamp_holds_numbers_and_stops_their_gradient() -> None:
    quantizer = Quantizer(Precision.parse("INT8-tensor-A8").inputs, clamp=2.5)
    x = torch.tensor([[-9.0, -2.0, 0.3, 2.4, 2.6]], requires_grad=True)
    y = quantizer(x)
    y.sum().backward()
    np.testing.assert_allclose(y.detach().numpy(), int8(x.detach().numpy()), rtol=1e-6)
    assert x.grad is not None and x.grad.tolist() == [[0, 1, 1, 1, 0]]
    assert torch.equal(quantizer.codes(x.detach()).dequantize(), y.detach())


def test_it_survives_saving(tmp_path: Path, inputs: dict[str, Tensor]) -> None:
    model = bert(BertForSequenceClassification)
    prepare(model, TERNARY)
    expected = model(**inputs).logits
    save_model(model, None, tmp_path / "model")
    again = load_model(tmp_path / "model")
    prepare(again, TERNARY)
    assert torch.equal(again(**inputs).logits, expected)


def test_gradients_reach_everything_that_is_quantized(inputs: dict[str, Tensor]) -> None:
    model = bert()
    prepare(model, TERNARY)
    model(**inputs).logits.square().sum().backward()
    assert all(
        p.grad is not None and bool(p.grad.any()) for name, p in model.named_parameters() if "key.bias" not in name
    )


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ReqatError, match="embeddings"):
        Precision.parse("TERNARY-tensor-E2")
    with pytest.raises(ReqatError, match="queries"):
        Precision.parse("NVFP4-Q4", global_scale="static")
    with pytest.raises(ReqatError, match="clamp"):
        Precision.parse("INT8-tensor-A8", clamp=-1)
    model = bert()
    prepare(model, TERNARY)
    with pytest.raises(ReqatError, match="clamp.*take TERNARY-tensor-W2\\+INT8-tensor-A8KV8"):
        pack(copy.deepcopy(model))
    with pytest.raises(ReqatError, match="no classifier"):
        adapter_of(model.base_model).head(model.base_model)
