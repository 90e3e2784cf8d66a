"""Trainer, TRL and PEFT on models that transformers loaded through reqat, and pipelines."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments, pipeline

import reqat
from reqat.config.errors import ReqatError
from reqat.data.tokenizer import build_tokenizer
from reqat.hf import ReqatConfig, quantized_lora
from reqat.models import QuantLinear, calibrate_static, kv_quantizers, load_model, quant_linears

Folder = Callable[..., Path]
KV4 = "NVFP4-W4A4KV4"
NO_PEFT = "PEFT is not installed: pip install peft"
NO_TRL = "TRL and datasets are not installed: pip install trl datasets"


def load(path: Path, *args: Any, **kwargs: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(path, *args, **kwargs)


def quantized(path: Path, precision: str = KV4, **options: Any) -> Any:
    return load(path, quantization_config=ReqatConfig(precision, **options))


def logits(model: Any, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model.eval()(ids).logits


def trainer(model: Any, ids: Tensor, folder: Path, steps: int, **settings: Any) -> Trainer:
    arguments: dict[str, Any] = {
        "output_dir": str(folder),
        "max_steps": steps,
        "save_steps": 1,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "use_cpu": True,
        "report_to": [],
        "disable_tqdm": True,
        "seed": 0,
    }
    rows = [{"input_ids": row, "labels": row} for row in ids]
    return Trainer(model=model, args=TrainingArguments(**{**arguments, **settings}), train_dataset=rows)


# Trainer


@pytest.mark.slow
def test_trainer_saves_and_resumes(folder: Folder, tmp_path: Path, ids: Tensor) -> None:
    def measured() -> Any:
        model = quantized(folder(), global_scale="static")
        for kv in kv_quantizers(model):
            kv.set_shift(torch.linspace(-1, 1, 64).reshape(2, 32))
        calibrate_static(model, [ids])
        return model

    first = trainer(measured(), ids, tmp_path / "run", 2)
    first.train()
    trained: Any = first.model
    expected = logits(trained, ids)
    assert not torch.equal(expected, logits(measured(), ids))
    # A checkpoint is a folder like any other.
    last = load(tmp_path / "run/checkpoint-2")
    assert torch.equal(logits(last, ids), expected)
    assert all(torch.equal(a, b) for a, b in zip(last.parameters(), trained.parameters(), strict=True))
    # Resumed from the checkpoint's own folder: scales and shift are there.
    resumed = trainer(load(tmp_path / "run/checkpoint-1"), ids, tmp_path / "run", 2)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run/checkpoint-1"))
    again: Any = resumed.model
    assert torch.equal(logits(again, ids), expected)


@pytest.mark.slow
def test_bfloat16_and_gradient_checkpointing(folder: Folder, tmp_path: Path, ids: Tensor) -> None:
    """In bfloat16 as in float32 up to its rounding; checkpointing changes no bit."""

    def losses(**settings: Any) -> list[float]:
        run = trainer(quantized(folder()), ids, tmp_path / "run", 2, save_strategy="no", logging_steps=1, **settings)
        run.train()
        return [entry["loss"] for entry in run.state.log_history if "loss" in entry]

    plain = losses()
    assert losses(gradient_checkpointing=True) == plain
    half = losses(bf16=True, gradient_checkpointing=True)
    assert half == losses(bf16=True) and half != plain
    assert half == pytest.approx(plain, rel=0.05)


def test_a_frozen_model_is_not_trained(folder: Folder, tmp_path: Path, ids: Tensor) -> None:
    model = quantized(folder())
    assert model.hf_quantizer.is_qat_trainable
    reqat.freeze(model)
    assert not model.hf_quantizer.is_qat_trainable
    with pytest.raises(ValueError, match="adapters"):  # transformers'
        trainer(model, ids, tmp_path / "run", 1)


@pytest.mark.slow
@pytest.mark.parametrize("packing", [False, True])
def test_trl(folder: Folder, tmp_path: Path, ids: Tensor, packing: bool) -> None:
    trl = pytest.importorskip("trl", reason=NO_TRL)
    datasets = pytest.importorskip("datasets", reason=NO_TRL)
    tokenizer = build_tokenizer(["The answer is 1 + 1 = 2."])
    model = quantized(folder(vocab_size=len(tokenizer)))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    rows = [{"prompt": f"{i} + 1 =", "completion": f" The answer is {i + 1}."} for i in range(8)]
    settings = trl.SFTConfig(
        output_dir=str(tmp_path / "run"),
        max_steps=2,
        per_device_train_batch_size=2,
        max_length=32,
        packing=packing,
        bf16=False,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        save_strategy="no",
    )
    run = trl.SFTTrainer(
        model=model, processing_class=tokenizer, train_dataset=datasets.Dataset.from_list(rows), args=settings
    )
    assert run.train().training_loss > 0
    assert all(not torch.equal(p, before[name]) for name, p in model.named_parameters() if p.ndim > 1)


# Pipelines


def test_a_pipeline_from_a_folder(folder: Folder, tmp_path: Path) -> None:
    tokenizer = build_tokenizer(["The answer is 1 + 1 = 2."])
    model = quantized(folder(vocab_size=len(tokenizer)))
    model.save_pretrained(tmp_path / "saved")
    tokenizer.save_pretrained(tmp_path / "saved")
    generate = pipeline("text-generation", model=str(tmp_path / "saved"), device="cpu")
    assert len(quant_linears(generate.model)) == 14
    asked = {"max_new_tokens": 4, "do_sample": False}
    both = generate(["1 + 1 =", "the answer"], batch_size=1, **asked)
    ids = tokenizer("1 + 1 =", return_tensors="pt").input_ids
    out = model.generate(ids, attention_mask=torch.ones_like(ids), pad_token_id=0, **asked)
    assert both[0][0]["generated_text"].endswith(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True))


# PEFT


def adapter(**settings: Any) -> Any:
    peft = pytest.importorskip("peft", reason=NO_PEFT)
    chosen = {"r": 4, "target_modules": ["q_proj", "up_proj", "down_proj"], "init_lora_weights": False}
    return peft.LoraConfig(task_type="CAUSAL_LM", **{**chosen, **settings})


@pytest.mark.parametrize("precision", [KV4, "MXFP4-W4A4:rotation=32"])
@pytest.mark.parametrize("safe", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_quantized_lora_merges_to_itself(
    folder: Folder, tmp_path: Path, ids: Tensor, precision: str, safe: bool, dtype: torch.dtype
) -> None:
    peft = pytest.importorskip("peft", reason=NO_PEFT)
    torch.manual_seed(1)
    model = peft.get_peft_model(quantized(folder(dtype=dtype), precision), quantized_lora(adapter()))
    with model.disable_adapter():
        base = logits(model, ids)
    assert torch.equal(base, logits(quantized(folder(dtype=dtype), precision), ids))
    before = logits(model, ids)
    assert not torch.equal(before, base)
    model.save_pretrained(tmp_path / "adapter")
    merged = model.merge_and_unload(safe_merge=safe)
    assert torch.equal(logits(merged, ids), before)
    merged.save_pretrained(tmp_path / "merged")
    assert torch.equal(logits(load(tmp_path / "merged"), ids), before)
    assert torch.equal(logits(reqat.freeze(merged), ids), before)
    # The adapter alone, loaded again beside the dense folder.
    config = quantized_lora(peft.LoraConfig.from_pretrained(tmp_path / "adapter"))
    again = peft.PeftModel.from_pretrained(
        quantized(folder(dtype=dtype), precision), tmp_path / "adapter", config=config
    )
    assert torch.equal(logits(again, ids), before)


def test_a_quantized_lora_that_is_not_finite(folder: Folder, ids: Tensor) -> None:
    peft = pytest.importorskip("peft", reason=NO_PEFT)
    model = peft.get_peft_model(quantized(folder()), quantized_lora(adapter()))
    layer = next(module for module in model.modules() if hasattr(module, "lora_B"))
    with torch.no_grad():
        layer.lora_B["default"].weight.fill_(float("inf"))
    with pytest.raises(ReqatError, match="q_proj.*default"):
        model.merge_and_unload(safe_merge=True)
    assert layer.get_base_layer().weight.isfinite().all()


def test_gradients_of_a_quantized_lora_are_those_of_the_merged_weight(folder: Folder, ids: Tensor) -> None:
    """By the chain rule: dA = B^T dW s, dB = dW A^T s, with dW of the merged model."""
    peft = pytest.importorskip("peft", reason=NO_PEFT)
    torch.manual_seed(1)
    model = peft.get_peft_model(quantized(folder()), quantized_lora(adapter()))
    model(input_ids=ids, labels=ids).loss.backward()
    found = {
        name.replace("base_model.model.", "").rpartition(".lora_")[0]: module
        for name, module in model.named_modules()
        if name.endswith("lora_A")
    }
    layers = {name: model.get_submodule(f"base_model.model.{name}") for name in found}
    kept = {
        name: (
            layer.lora_A["default"].weight.detach().clone(),
            layer.lora_B["default"].weight.detach().clone(),
            layer.lora_A["default"].weight.grad.clone(),
            layer.lora_B["default"].weight.grad.clone(),
            layer.scaling["default"],
        )
        for name, layer in layers.items()
    }
    assert len(kept) == 6
    assert all(p.grad is None for name, p in model.named_parameters() if "lora_" not in name)
    merged = model.merge_and_unload().requires_grad_(True)
    merged(input_ids=ids, labels=ids).loss.backward()
    for name, (a, b, da, db, scale) in kept.items():
        dw = merged.get_submodule(name).weight.grad
        torch.testing.assert_close(da, scale * b.T @ dw, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(db, scale * dw @ a.T, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_trainer_with_a_quantized_lora(folder: Folder, tmp_path: Path, ids: Tensor) -> None:
    peft = pytest.importorskip("peft", reason=NO_PEFT)
    model = peft.get_peft_model(quantized(folder()), quantized_lora(adapter(init_lora_weights=True)))
    dense = model.base_model.model.model.layers[0].mlp.up_proj.base_layer.weight.detach().clone()
    run = trainer(model, ids, tmp_path / "run", 8, logging_steps=1)
    run.train()
    losses = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    assert torch.equal(model.base_model.model.model.layers[0].mlp.up_proj.base_layer.weight, dense)
    assert (tmp_path / "run/checkpoint-8/adapter_model.safetensors").is_file()


def test_pefts_own_lora_stays_beside_the_layer(folder: Folder, tmp_path: Path, ids: Tensor) -> None:
    """Merging it before freezing takes effect and is another function: the update is rounded with the weight."""
    peft = pytest.importorskip("peft", reason=NO_PEFT)
    torch.manual_seed(1)
    model = peft.get_peft_model(quantized(folder()), adapter())
    beside = logits(model, ids)
    merged = model.merge_and_unload()
    inside = logits(merged, ids)
    assert not torch.allclose(beside, inside, rtol=1e-3, atol=1e-3)
    merged.save_pretrained(tmp_path / "merged")
    assert torch.equal(logits(load(tmp_path / "merged"), ids), inside)


@pytest.mark.parametrize("reloaded", [False, True])
def test_a_lora_beside_a_frozen_model_is_never_merged(
    folder: Folder, tmp_path: Path, ids: Tensor, reloaded: bool
) -> None:
    peft = pytest.importorskip("peft", reason=NO_PEFT)
    torch.manual_seed(1)
    model = reqat.freeze(quantized(folder()))
    if reloaded:
        model.save_pretrained(tmp_path / "frozen")  # type: ignore[operator]
        model = load(tmp_path / "frozen")
    frozen = logits(model, ids)
    beside = peft.get_peft_model(model, adapter())
    expected = logits(beside, ids)
    beside.save_pretrained(tmp_path / "adapter")  # the adapter alone
    with beside.disable_adapter():
        assert torch.equal(logits(beside, ids), frozen)
    merged = beside.merge_and_unload()
    for use in (lambda: merged(ids), lambda: merged.save_pretrained(tmp_path / "merged")):
        with pytest.raises(ReqatError, match="before freeze"):
            use()
    assert not (tmp_path / "merged").exists()
    if reloaded:  # nothing was lost: folder and adapter are as they were
        again = peft.PeftModel.from_pretrained(load(tmp_path / "frozen"), tmp_path / "adapter")
        assert torch.equal(logits(again, ids), expected)


@pytest.mark.slow
def test_trainer_with_a_lora_beside_a_frozen_model(folder: Folder, tmp_path: Path, ids: Tensor) -> None:
    peft = pytest.importorskip("peft", reason=NO_PEFT)
    model = reqat.freeze(quantized(folder()))
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    beside = peft.get_peft_model(model, adapter(init_lora_weights=True))
    run = trainer(beside, ids, tmp_path / "run", 8, logging_steps=1)
    run.train()
    losses = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    kept = {name.replace(".base_layer", ""): p for name, p in model.named_parameters() if "lora_" not in name}
    assert kept.keys() == weights.keys() and all(torch.equal(p, weights[name]) for name, p in kept.items())


def test_transformers_own_adapters(folder: Folder, tmp_path: Path, ids: Tensor) -> None:
    """``add_adapter`` saves the adapter alone; ``from_pretrained`` of it loads the model that it belongs to."""
    pytest.importorskip("peft", reason=NO_PEFT)
    torch.manual_seed(1)
    reqat.freeze(quantized(folder())).save_pretrained(tmp_path / "frozen")  # type: ignore[operator]
    model = load(tmp_path / "frozen")
    model.add_adapter(adapter())
    expected = logits(model, ids)
    model.save_pretrained(tmp_path / "adapter")
    names = {file.name for file in (tmp_path / "adapter").iterdir()}
    assert "adapter_model.safetensors" in names and "model.safetensors" not in names
    again = load(tmp_path / "adapter")
    assert len(quant_linears(again)) == 14
    assert torch.equal(logits(again, ids), expected)


def test_a_quantized_lora_needs_a_weight_that_may_change(folder: Folder, ids: Tensor) -> None:
    peft = pytest.importorskip("peft", reason=NO_PEFT)
    frozen = reqat.freeze(quantized(folder()))
    with pytest.raises(ReqatError, match="frozen.*before freeze"):
        peft.get_peft_model(frozen, quantized_lora(adapter()))
    # Frozen afterwards: the merge is refused before anything is changed.
    model = peft.get_peft_model(quantized(folder()), quantized_lora(adapter()))
    reqat.freeze(model.get_base_model())
    weights = [layer.weight.clone() for layer in model.modules() if isinstance(layer, QuantLinear)]
    for use in (lambda: model(ids), lambda: model.merge_and_unload(), lambda: model.merge_adapter()):
        with pytest.raises(ReqatError, match="frozen"):
            use()
    now = [layer.weight for layer in model.modules() if isinstance(layer, QuantLinear)]
    assert all(torch.equal(a, b) for a, b in zip(weights, now, strict=True))


def test_adapters_that_are_more_than_a_change_of_the_weight() -> None:
    peft = pytest.importorskip("peft", reason=NO_PEFT)
    for settings in ({"lora_dropout": 0.1}, {"use_dora": True}, {"lora_bias": True}):
        with pytest.raises(ReqatError, match=next(iter(settings))):
            quantized_lora(adapter(**settings))
    with pytest.raises(ReqatError, match="LoraConfig"):
        quantized_lora(peft.IA3Config())


def test_a_lora_before_quantization(folder: Folder, tmp_path: Path, ids: Tensor) -> None:
    """Trained and merged on the dense model, then quantized: the ordinary order."""
    peft = pytest.importorskip("peft", reason=NO_PEFT)
    torch.manual_seed(1)
    dense = peft.get_peft_model(load(folder()), adapter()).merge_and_unload()
    dense.save_pretrained(tmp_path / "merged")
    expected = load_model(tmp_path / "merged")
    reqat.prepare(expected, KV4)
    assert torch.equal(logits(quantized(tmp_path / "merged"), ids), logits(expected, ids))
