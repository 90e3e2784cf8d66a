"""Published families of reasoning models as they lie on disk: their shapes in small, in several files, tied and untied
heads, and every RoPE scaling that they come with."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

import reqat.models.hub as hub
from reqat.config.errors import ReqatError
from reqat.models import load_model, prepare, quant_linears, save_model
from reqat.models.outline import outline

LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip
# Of the documentation's table; sizes are small, their proportions those of the family.
FAMILIES: dict[str, dict[str, Any]] = {
    "SmolLM2": {"kind": "llama", "num_attention_heads": 3, "num_key_value_heads": 1, "hidden_size": 96,
                "tie_word_embeddings": True, "rope_parameters": {"rope_type": "default", "rope_theta": 100000.0}},
    "Qwen2.5": {"kind": "qwen2", "tie_word_embeddings": True,
                "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0}},
    "R1-Distill-Qwen": {"kind": "qwen2", "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
    "Qwen3": {"kind": "qwen3", "tie_word_embeddings": True, "head_dim": 64,
              "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0}},
    "Llama 3": {"kind": "llama", "rope_parameters": LLAMA3},
    "R1-Distill-Llama": {"kind": "llama", "rope_parameters": LLAMA3},
}  # fmt: skip
ROPES: dict[str, dict[str, Any]] = {
    "linear": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0},
    "dynamic": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0},
    "yarn": {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 2.0, "original_max_position_embeddings": 16},
    "llama3": LLAMA3,
}


def make(kind: str, **changes: Any) -> PreTrainedModel:
    shape: dict[str, Any] = {
        "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 61, "max_position_embeddings": 64, "tie_word_embeddings": False,
        "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**shape, **changes})).eval()


IDS = torch.randint(3, 61, (2, 24), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", FAMILIES)
def test_a_checkpoint_of_several_files_is_trained_saved_and_read_again(name: str, tmp_path: Path) -> None:
    plain = make(**FAMILIES[name])
    plain.to(torch.bfloat16).save_pretrained(tmp_path / "given", max_shard_size="40KB")
    assert len(list((tmp_path / "given").glob("*.safetensors"))) > 2
    assert outline(tmp_path / "given", "NVFP4-W4A4KV4").config.model_type == FAMILIES[name]["kind"]
    model = load_model(tmp_path / "given")
    assert all(p.dtype == torch.float32 for p in model.parameters())
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert tied == FAMILIES[name].get("tie_word_embeddings", False)
    prepare(model, "NVFP4-W4A4KV4")
    model(IDS, labels=IDS).loss.backward()
    assert all(p.grad is not None for layer in quant_linears(model).values() for p in layer.parameters(recurse=False))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter -= 0.01 * parameter.grad
    save_model(model, None, tmp_path / "trained")
    again = load_model(tmp_path / "trained")
    prepare(again, "NVFP4-W4A4KV4")
    assert torch.equal(again(IDS).logits, model(IDS).logits)


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("rope", ROPES)
def test_every_rope_scaling_computes_what_transformers_does(rope: str, kind: str) -> None:
    with torch.no_grad():
        expected = make(kind, rope_parameters=ROPES[rope])(IDS).logits
        model = make(kind, rope_parameters=ROPES[rope])
        prepare(model, "BF16")
        torch.testing.assert_close(model(IDS).logits, expected, rtol=1e-5, atol=1e-5)


def test_a_model_of_the_hub_needs_a_commit_and_a_network_or_its_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ReqatError, match="owner/tiny.*@COMMIT"):
        load_model("owner/tiny")
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    for moving in ("main", "v1.0", "0123abc"):
        with pytest.raises(ReqatError, match=f"owner/tiny@{moving}: .*owner/tiny@COMMIT"):
            load_model(f"owner/tiny@{moving}")
    commit = "0123456789abcdef0123456789abcdef01234567"
    with pytest.raises(ReqatError, match=f"owner/tiny@{commit}: no such folder here.*Without a network"):
        load_model(f"owner/tiny@{commit}")
    model = make("llama")
    folder = tmp_path / "cache" / "models--owner--tiny"
    model.save_pretrained(folder / "snapshots" / commit)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(commit)
    assert torch.equal(load_model(f"owner/tiny@{commit}")(IDS).logits, model(IDS).logits)
    with pytest.raises(ReqatError, match="owner/tiny@COMMIT"):  # though the cache has it
        load_model("owner/tiny@main")
    assert not [pattern for pattern in hub.READ if os.path.splitext(pattern)[1] in (".py", ".bin", ".pt", ".pth")]
