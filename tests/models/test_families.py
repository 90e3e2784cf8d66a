"""Each family of models that the package says it knows: tiny random models of the real architecture's parts."""

from __future__ import annotations

import ast
import copy
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
)

import reqat.models.adapters
from reqat.config.errors import ReqatError
from reqat.methods import ptq, qfit
from reqat.models import Fp4Cache, freeze, kv_quantizers, load_model, prepare, quant_linears, save_model
from reqat.models.adapters import ADAPTERS, UnsupportedModelError, adapter_of, blocks_of
from reqat.models.experts import Experts

LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 2.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 2.0, "original_max_position_embeddings": 32}
MOE = {
    "num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32, "decoder_sparse_step": 1,
}  # fmt: skip
TIED = {"tie_word_embeddings": True}
DECODERS: dict[str, dict[str, Any]] = {
    "llama": {"rope_parameters": LLAMA3},
    "mistral": {"sliding_window": None},
    "qwen2": {"rope_parameters": YARN, **TIED},
    "qwen3": TIED,
    "gemma": TIED,
    "olmo2": {"num_attention_heads": 2, "num_key_value_heads": 2},
    "granite": TIED,
    "smollm3": TIED,
    "mixtral": MOE,
    "qwen2_moe": MOE,
    "qwen3_moe": MOE,
}
ENCODERS = ("bert", "roberta", "distilbert", "vit")
NVFP4, MXFP4 = "NVFP4-W4A4KV4", "MXFP4-W4A4KV4"


def make(kind: str, factory: Any = AutoModelForCausalLM, **changes: Any) -> PreTrainedModel:
    """Two layers; weights that are not so small that attention would be uniform."""
    size = {
        "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 32, "vocab_size": 61, "max_position_embeddings": 64,
        "tie_word_embeddings": False, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None,
    }  # fmt: skip
    if kind == "distilbert":
        size = {"vocab_size": 61, "dim": 64, "hidden_dim": 96, "n_layers": 2, "n_heads": 4}
    if kind in ("bert", "roberta", "vit"):
        size = {key: size[key] for key in list(size)[:4]}
        size |= {"image_size": 8, "patch_size": 4} if kind == "vit" else {"vocab_size": 61}
    torch.manual_seed(0)
    model = factory.from_config(AutoConfig.for_model(kind, **{**size, **changes}))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
            elif "embed" not in name:
                parameter.mul_(3)
    return model.eval()


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(3, 61, (3, 10), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def check_cache(model: PreTrainedModel, ids: Tensor) -> None:
    """With a cache it computes and generates what it does without. In float64: a token alone is summed in another order
    than among others, which in float32 would flip a rounding here and there."""
    cache = Fp4Cache(model, ids.shape[1])
    steps = [model(part, past_key_values=cache, use_cache=True).logits for part in ids.split([7, 1, 1, 1], dim=1)]
    torch.testing.assert_close(torch.cat(steps, 1), model(ids, use_cache=False).logits, rtol=1e-5, atol=1e-5)
    texts = [model.generate(ids, max_new_tokens=3, do_sample=False, use_cache=cached) for cached in (True, False)]
    assert torch.equal(*texts) and texts[0].shape == (3, 13)


def saved_and_loaded(model: PreTrainedModel, folder: Path, precision: str) -> PreTrainedModel:
    save_model(model, None, folder)
    loaded = load_model(folder)
    assert type(loaded) is type(model)
    prepare(loaded, precision)
    return loaded


@pytest.mark.parametrize("precision", [NVFP4, MXFP4])
@pytest.mark.parametrize("kind", DECODERS)
def test_a_decoder(tmp_path: Path, ids: Tensor, kind: str, precision: str) -> None:
    model = make(kind, **DECODERS[kind])
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # of weights that nothing quantizes
        report = prepare(model, precision)
    assert report.share > 0.99 and report.kv_layers == 2
    loss = model(ids, labels=ids, use_cache=False).loss
    loss.backward()
    assert all(p.grad is not None for layer in quant_linears(model).values() for p in layer.parameters(recurse=False))
    check_cache(copy.deepcopy(model).double(), ids)
    whole = model(ids, use_cache=False).logits
    if precision == NVFP4:
        loaded = saved_and_loaded(model, tmp_path / "dense", precision)
        assert torch.equal(loaded(ids, use_cache=False).logits, whole)
    assert torch.equal(freeze(model)(ids, use_cache=False).logits, whole)
    assert torch.equal(saved_and_loaded(model, tmp_path / "codes", precision)(ids, use_cache=False).logits, whole)


@pytest.mark.parametrize("kind", DECODERS)
def test_post_training_methods_on_a_decoder(ids: Tensor, kind: str) -> None:
    outputs = {}
    for method in ("rtn", "gptq"):
        model = make(kind, **DECODERS[kind])
        _, metrics = ptq.quantize(method, model, NVFP4, ids, progress=False)
        outputs[method] = model(ids).logits
    assert metrics["error"] < 0.5 * metrics["error_nearest"]
    assert {entry["layer"] for entry in metrics["layers"]} == set(quant_linears(model))
    prepared = make(kind, **DECODERS[kind])
    prepare(prepared, NVFP4)
    assert torch.equal(outputs["rtn"], prepared(ids).logits) and not torch.equal(outputs["rtn"], outputs["gptq"])


def test_q_fit_with_one_norm_over_all_heads(ids: Tensor) -> None:
    model = make("olmo2", **DECODERS["olmo2"]).double()
    expected = model(ids).logits
    before = model.model.layers[0].self_attn.q_norm.weight.clone()
    qfit.fold(model, qfit.calibrate(model, "NVFP4-KV4:kv_element=E1M2", ids, grid=3, progress=False))
    assert not torch.equal(before, model.model.layers[0].self_attn.q_norm.weight)
    torch.testing.assert_close(model(ids).logits, expected, rtol=1e-4, atol=1e-4)  # norms compute in float32


def encoder(kind: str) -> tuple[PreTrainedModel, Callable[[PreTrainedModel], Tensor], Tensor | None]:
    """A model, its outputs on some inputs, and token ids to calibrate with."""
    if kind == "vit":
        pixels = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
        return make(kind, AutoModel), lambda model: model(pixel_values=pixels).pooler_output, None
    ids = torch.randint(3, 61, (3, 10), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, 7:] = 0
    return (
        make(kind, AutoModelForSequenceClassification),
        lambda model: model(input_ids=ids, attention_mask=mask).logits,
        ids,
    )


@pytest.mark.parametrize("precision", ["NVFP4-W4A4", "MXFP4-W4A4:rotation=32"])
@pytest.mark.parametrize("kind", ENCODERS)
def test_an_encoder(tmp_path: Path, kind: str, precision: str) -> None:
    model, run, ids = encoder(kind)
    plain = run(model)
    report = prepare(model, precision)
    pooled = kind in ("bert", "vit")
    assert report.share == 1 and len(report.quantized) == 2 * 6 + pooled and kv_quantizers(model) == []
    sharing = [layer.input_quantizer for layer in quant_linears(model).values()]
    assert len(set(map(id, sharing))) == 2 * 4 + pooled  # query, key and value read one tensor
    out = run(model)
    assert 0 < float((out - plain).norm().detach() / plain.norm().detach()) < 1
    out.square().sum().backward()
    assert all(p.grad is not None for layer in quant_linears(model).values() for p in layer.parameters(recurse=False))
    assert torch.equal(run(saved_and_loaded(model, tmp_path / "dense", precision)), out)
    assert torch.equal(run(freeze(model)), out)
    assert torch.equal(run(saved_and_loaded(model, tmp_path / "codes", precision)), out)
    if ids is not None:
        _, metrics = ptq.quantize("gptq", encoder(kind)[0], precision, ids, progress=False)
        assert metrics["error"] < 0.5 * metrics["error_nearest"] and len(metrics["layers"]) == 12


def test_an_encoder_keeps_no_cache(ids: Tensor) -> None:
    model, *_ = encoder("bert")
    with pytest.raises(ReqatError, match="'bert'.*global_scale=row"):
        prepare(model, NVFP4, global_scale="static")
    with pytest.raises(ReqatError, match="'bert'.*keeps none"):
        qfit.calibrate(model, "NVFP4-KV4", ids, progress=False)
    assert not quant_linears(model)


@pytest.mark.parametrize(
    ("kind", "factory", "changes", "says"),
    [
        ("gpt2", AutoModelForCausalLM, {}, "not as decoder.*`.layers`.*not as encoder"),
        ("phi3", AutoModelForCausalLM, {"pad_token_id": 0}, "0 modules with separate q_proj"),
        ("gpt_oss", AutoModelForCausalLM, MOE, "sinks"),
        ("gemma2", AutoModelForCausalLM, {}, "soft cap of 50"),
        ("bert", AutoModelForCausalLM, {"is_decoder": True}, "both directions"),
        ("bart", AutoModel, {"d_model": 64, "encoder_layers": 1, "decoder_layers": 1}, "decoder as well"),
        (
            "deepseek_v3",
            AutoModelForCausalLM,
            {**MOE, "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "kv_lora_rank": 16, "q_lora_rank": 16},
            "latent attention",
        ),
    ],
)
def test_what_is_missing_is_named(kind: str, factory: Any, changes: dict[str, Any], says: str) -> None:
    with torch.device("meta"):
        model = factory.from_config(AutoConfig.for_model(kind, **changes, num_hidden_layers=1, vocab_size=61))
    with pytest.raises(UnsupportedModelError, match=f"{kind}'.*{says}"):
        blocks_of(model)


def facts(model: PreTrainedModel) -> str:
    """What is particular about a prepared model, as the table has it."""
    blocks = blocks_of(model)
    rope = getattr(model.config, "rope_parameters", None) or {}
    found = {
        "QK norm": any(block.attention is not None and block.attention.norms for block in blocks),
        "RoPE scaling": rope.get("rope_type", "default") != "default",
        "biases": any(site.module.bias is not None for block in blocks for site in block.sites()),
        "tied head": getattr(model.config, "tie_word_embeddings", False) and adapter_of(model).kind == "decoder",
        "experts": any(isinstance(module, Experts) for module in model.modules()),
    }
    return ", ".join(what for what, true in found.items() if true) or "-"


def test_the_table_of_families_is_what_was_tried() -> None:
    rows = re.findall(r"^\| [^|]+ \| `(\w+)` \| (\w+) \| ([^|]+) \|$", reqat.models.adapters.__doc__ or "", re.M)
    assert [kind for kind, *_ in rows] == [*DECODERS, *ENCODERS]
    for kind, adapter, what in rows:
        model = make(kind, **DECODERS[kind]) if kind in DECODERS else encoder(kind)[0]
        prepare(model, "NVFP4-W4A4")
        assert adapter_of(model) is ADAPTERS[adapter]
        assert facts(model) == what, kind


@pytest.mark.parametrize("kind", ["llama", "qwen3", "qwen2_moe", "bert"])
def test_nonlinearities_of_a_block(kind: str) -> None:
    model = make(kind, **DECODERS[kind]) if kind in DECODERS else make(kind, AutoModel)
    found = blocks_of(model)[0].nonlinearities()
    kinds = [entry.kind for entry in found]
    assert kinds.count("softmax") == 1
    assert kinds.count("norm") == {"llama": 2, "qwen3": 4, "qwen2_moe": 2, "bert": 2}[kind]
    assert kinds.count("activation") == {"llama": 1, "qwen3": 1, "qwen2_moe": 2, "bert": 1}[kind]
    assert all(model.get_submodule(entry.name) is entry.module for entry in found)
    assert not any(isinstance(entry.module, nn.Linear) for entry in found)


def test_nothing_but_adapters_knows_the_names_of_layers() -> None:
    """Texts of docstrings and messages may; attributes and strings that are such a name may not."""
    names = {*"qkvo", "gate", "up", "down"}
    layers = {f"{name}_proj" for name in names} | {"self_attn", "q_norm", "k_norm", "input_layernorm", "embed_tokens"}
    root = Path(reqat.models.adapters.__file__).parents[2]
    found = []
    for file in root.rglob("*.py"):
        # transformers' experts interface names its parameters by itself.
        if file.parent.name == "adapters" or file.name == "experts.py":
            continue
        for node in ast.walk(ast.parse(file.read_text())):
            word = node.attr if isinstance(node, ast.Attribute) else getattr(node, "value", None)
            if isinstance(word, str) and word in layers:
                found.append(f"{file.relative_to(root)}:{node.lineno}: {word}")
    assert found == []
