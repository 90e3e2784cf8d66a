"""Models as they are measured: on the accelerator before their weights are quantized, the same weights as by hand."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from reqat.data.tokenizer import build_tokenizer
from reqat.evaluation.loading import load_at
from reqat.models import freeze, load_model, prepare, save_model
from reqat.models.linear import QuantLinear, quant_linears
from reqat.models.prepare import precision_of, report_of
from reqat.quant import Precision

Tiny = Callable[..., LlamaForCausalLM]


@pytest.fixture
def folder(tiny: Tiny, tmp_path: Path) -> Path:
    tokenizer = build_tokenizer(["one two"])
    save_model(tiny(vocab_size=len(tokenizer)), tokenizer, tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("precision", ["BF16", "NVFP4-W4A4KV4"])
def test_it_is_the_prepared_and_frozen_model(folder: Path, precision: str) -> None:
    model = load_model(folder)
    prepare(model, precision)
    expected = freeze(model).state_dict()
    found = load_at(folder, precision)
    assert not found.training and not any(p.requires_grad for p in found.parameters())
    assert found.state_dict().keys() == expected.keys()
    for name, value in found.state_dict().items():
        assert torch.equal(value, expected[name]), name


def test_without_a_precision_it_is_the_one_that_the_model_was_saved_at(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_model(folder)
    prepare(model, "NVFP4-W4A4KV4", kv_element="E1M2", skip=["*.down_proj"])
    save_model(model, None, tmp_path / "saved")
    monkeypatch.setattr("reqat.models.loading.hub_folder", lambda _: tmp_path / "saved")
    for source in (tmp_path / "saved", f"owner/name@{'0' * 40}"):
        found = report_of(load_at(source, None))
        assert found is not None and found.skip == ("*.down_proj",)
        assert found.precision == Precision.parse("NVFP4-W4A4KV4", kv_element="E1M2")
    with pytest.warns(UserWarning, match="W4A16"):
        other = report_of(load_at(tmp_path / "saved", "NVFP4-W4A16"))
    assert other is not None and other.skip == ("*.down_proj",), "these layers were never quantized"
    assert precision_of(load_at(folder, None)) == Precision()


@pytest.mark.parametrize("there", [True, False])
def test_it_moves_to_the_gpu_before_weights_are_quantized(
    folder: Path, there: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    quantize = QuantLinear.freeze
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
    monkeypatch.setattr(torch.nn.Module, "cuda", lambda self: order.append("moved"))

    def noted(self: Any) -> None:
        order.append("quantized")
        quantize(self)

    monkeypatch.setattr(QuantLinear, "freeze", noted)
    linears = quant_linears(load_at(folder, "NVFP4-W4A4KV4"))
    assert order == ["moved"] * there + ["quantized"] * len(linears)
