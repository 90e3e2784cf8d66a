"""Output head and embeddings of a packed model, stored as ``pack(head=..., embeddings=...)`` says."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from reqat.config.errors import ReqatError
from reqat.config.vocabulary import HEADS, STORED, stored_as
from reqat.formats import get_format, quantize
from reqat.inference import memory, pack
from reqat.inference.packed_decoder import NativeDecoder
from reqat.inference.vocabulary import PackedEmbedding, PackedHead
from reqat.models import freeze, prepare
from reqat_kernels.native import instruction_set

Tiny = Callable[..., PreTrainedModel]
NATIVE = instruction_set() != "torch"
# Bits of a number, with its scale; bytes of a row's end are padded to whole tiles of 16 rows.
BITS = {"BF16": 16, "INT8": 8, "NVFP4": 4.5, "MXFP4": 4.25}


def prepared(tiny: Tiny, **changes: Any) -> PreTrainedModel:
    model = tiny("llama", **changes)
    prepare(model, "NVFP4-W4A4KV4", global_scale="row")
    return freeze(model)


def stored(weight: Tensor, name: str) -> Tensor:
    """What a matrix is after it was stored so: the oracle, by fake quantization in plain PyTorch's formats."""
    if name == "BF16":
        return weight.bfloat16().float()
    return quantize(weight.float(), get_format("INT8-row" if name == "INT8" else name)).dequantize()


def logits(model: PreTrainedModel, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model(ids, use_cache=False).logits


@pytest.mark.parametrize("head", HEADS)
def test_a_head_multiplies_its_stored_weight(tiny: Tiny, head: str) -> None:
    plain, packed = prepared(tiny), pack(prepared(tiny), head=head)
    module = packed.get_output_embeddings()
    assert isinstance(module, PackedHead)
    assert type(packed.get_input_embeddings()) is nn.Embedding
    weight = stored(plain.get_output_embeddings().weight.detach(), stored_as(head)).double()
    for rows in (1, 3, 8):
        x = torch.randn(2, rows, 64, generator=torch.Generator().manual_seed(rows))
        y = module(x)
        assert y.dtype == torch.float32 and y.shape == (2, rows, 61)
        if head.endswith("A8"):  # a symmetric int8 a token
            scale = x.abs().amax(-1, keepdim=True) / 127
            x = (x / scale).round() * scale
        # (K + 8) roundings of the sum, and of x where it was rounded by another division than the kernel's
        bound = (64 + 8) * 2.0**-23 * (x.double().abs() @ weight.abs().T)
        assert ((y.double() - x.double() @ weight.T).abs() <= bound).all()


@pytest.mark.parametrize("name", STORED)
def test_embeddings_are_the_stored_rows(tiny: Tiny, ids: Tensor, name: str) -> None:
    plain, packed = prepared(tiny), pack(prepared(tiny), embeddings=name)
    module = packed.get_input_embeddings()
    assert isinstance(module, PackedEmbedding)
    assert torch.equal(packed.get_output_embeddings().weight, plain.get_output_embeddings().weight)
    assert torch.equal(module(ids), stored(plain.get_input_embeddings().weight.detach(), name)[ids])


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_tied_matrices_are_stored_once(tiny: Tiny, ids: Tensor, head: str, dtype: torch.dtype) -> None:
    model = tiny("llama", tie_word_embeddings=True, vocab_size=64).to(dtype)
    prepare(model, "NVFP4-W4A4KV4", global_scale="row")
    weight = model.get_input_embeddings().weight.detach().clone()
    before = memory(freeze(model)).other_bytes - weight.nbytes
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pack(model, head=head)
    outer, inner = model.get_output_embeddings(), model.get_input_embeddings()
    assert isinstance(outer, PackedHead) and isinstance(inner, PackedEmbedding) and outer.table is inner.table
    model.tie_weights()  # as lm-eval does with every model: nothing is left to tie
    assert model.get_output_embeddings() is outer and model.get_input_embeddings() is inner
    assert torch.equal(inner(ids), stored(weight, stored_as(head))[ids].to(dtype))
    taken = memory(model).other_bytes - before
    scales = 4 * 64 if stored_as(head) == "INT8" else 0
    assert BITS[stored_as(head)] * 64 * 64 / 8 + scales <= taken <= BITS[stored_as(head)] * 64 * 64 / 8 + scales + 64


def test_two_choices_for_a_tied_matrix_store_it_twice_and_say_so(tiny: Tiny, ids: Tensor) -> None:
    model = prepared(tiny, tie_word_embeddings=True)
    weight = model.get_input_embeddings().weight.detach().clone()
    with pytest.warns(UserWarning, match="MXFP4.*BF16"):
        pack(model, head="MXFP4", embeddings="BF16")
    assert model.get_output_embeddings().table is not model.get_input_embeddings().table
    assert torch.equal(model.get_input_embeddings()(ids), stored(weight, "BF16")[ids])


def test_a_choice_for_tied_embeddings_is_the_heads(tiny: Tiny) -> None:
    model = pack(prepared(tiny, tie_word_embeddings=True), embeddings="NVFP4")
    assert model.get_output_embeddings().table is model.get_input_embeddings().table


@pytest.mark.parametrize("head", HEADS)
def test_decoding_gives_the_tokens_of_the_model_with_these_weights(tiny: Tiny, ids: Tensor, head: str) -> None:
    """The oracle is the packed model whose dense head and embeddings hold what the tables hold."""
    expected, packed = prepared(tiny), pack(prepared(tiny), head=head, embeddings=stored_as(head))
    with torch.no_grad():
        for module in (expected.get_output_embeddings(), expected.get_input_embeddings()):
            module.weight.copy_(stored(module.weight, stored_as(head)))
    pack(expected)
    if NATIVE:
        assert isinstance(packed.get_decoder().forward, NativeDecoder)
    a, b = logits(expected, ids), logits(packed, ids)
    rounding = 0.02 if head.endswith("A8") else 1e-5
    assert (a - b).abs().max() <= rounding * a.abs().max()

    def greedy(model: PreTrainedModel) -> Tensor:
        asked = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
        return model.generate(ids, **asked)[:, 14:]

    same = (greedy(expected) == greedy(packed)).all(1)
    assert same.all() or (head.endswith("A8") and same.sum() >= 1)


def test_a_bias_of_the_head_is_added(tiny: Tiny) -> None:
    model = prepared(tiny)
    own = model.get_output_embeddings()
    own.bias = nn.Parameter(torch.linspace(-1, 1, 61))
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    want = x @ stored(own.weight.detach(), "INT8").T + own.bias.detach()
    torch.testing.assert_close(pack(model, head="INT8").get_output_embeddings()(x), want)


def test_bad_choices_name_the_value_and_the_remedy(tiny: Tiny) -> None:
    with pytest.raises(ReqatError, match="'NVFP8'.*NVFP4"):
        pack(prepared(tiny), head="NVFP8")
    with pytest.raises(ReqatError, match="'NVFP4-A8'.*NVFP4"):
        pack(prepared(tiny), embeddings="NVFP4-A8")
    odd = tiny("llama", hidden_size=48)
    prepare(odd, "NVFP4-W4A4KV4", global_scale="row")
    with pytest.raises(ReqatError, match="'MXFP4'.*48.*32.*INT8"):
        pack(odd, head="MXFP4")
    model = prepared(tiny)
    model.lm_head = nn.Sequential(model.lm_head)
    with pytest.raises(ReqatError, match="'INT8'.*Sequential"):
        pack(model, head="INT8")
    packed = pack(prepared(tiny), head="INT8")
    with pytest.raises(ReqatError, match="packed already"):
        pack(packed, head="NVFP4")
    assert pack(packed) is packed


def test_it_stays_where_it_is(tiny: Tiny) -> None:
    packed = pack(prepared(tiny), head="NVFP4", embeddings="INT8")
    for module in (packed.get_output_embeddings(), packed.get_input_embeddings()):
        with pytest.raises(ReqatError, match="packed"):
            module.to("meta")
        with pytest.raises(ReqatError, match="packed"):
            copy.deepcopy(module)
        with pytest.raises(ReqatError, match="packed"):
            module.state_dict()
