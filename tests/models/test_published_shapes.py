"""Published models as their ``config.json`` describes them: one layer at its real size, without numbers, and a model in
small that keeps proportions and flags, in several files, with every RoPE scaling that they come with."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

import reqat.models.hub as hub
from reqat.config.errors import ReqatError
from reqat.methods import qfit
from reqat.models import load_model, prepare, quant_linears, save_model
from reqat.models.adapters import Attention, HeadShape, cached_attentions
from reqat.models.experts import Experts
from reqat.models.folder import CONFIG
from reqat.models.outline import outline
from reqat.models.prepare import check_geometry
from reqat.quant import Precision

DOCUMENT = Path(__file__).parents[2] / "docs" / "families.md"
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip


def values(kind: str, hidden: int, inner: int, heads: tuple[int, int], positions: int, **more: Any) -> dict[str, Any]:
    """What we take of a published ``config.json``, in its spelling."""
    return {
        "model_type": kind, "hidden_size": hidden, "intermediate_size": inner, "num_attention_heads": heads[0],
        "num_key_value_heads": heads[1], "max_position_embeddings": positions, "tie_word_embeddings": False,
        "rope_theta": 1e6, "rope_scaling": None, **more,
    }  # fmt: skip


TIED, WIDE = {"tie_word_embeddings": True}, {"head_dim": 128}


def window(size: int) -> dict[str, Any]:
    """Of a sliding window that is named and not used."""
    return {"sliding_window": size, "use_sliding_window": False}


PUBLISHED: dict[str, dict[str, Any]] = {
    "SmolLM2-135M": values("llama", 576, 1536, (9, 3), 8192, **TIED, rope_theta=1e5),
    "SmolLM2-1.7B": values("llama", 2048, 8192, (32, 32), 8192, **TIED, rope_theta=1.3e5),
    "Qwen2.5-0.5B": values("qwen2", 896, 4864, (14, 2), 32768, **TIED, **window(32768)),
    "Qwen2.5-7B": values("qwen2", 3584, 18944, (28, 4), 131072, **window(131072)),
    "R1-Distill-Qwen-1.5B": values("qwen2", 1536, 8960, (12, 2), 131072, **window(4096), rope_theta=1e4),
    "R1-Distill-Qwen-14B": values("qwen2", 5120, 13824, (40, 8), 131072, **window(131072)),
    "Qwen3-0.6B": values("qwen3", 1024, 3072, (16, 8), 40960, **TIED, **WIDE),
    "Qwen3-4B": values("qwen3", 2560, 9728, (32, 8), 40960, **TIED, **WIDE),
    "Qwen3-8B": values("qwen3", 4096, 12288, (32, 8), 40960, **WIDE),
    "Llama-3-8B": values("llama", 4096, 14336, (32, 8), 8192, rope_theta=5e5),
    "Llama-3.1-8B": values("llama", 4096, 14336, (32, 8), 131072, rope_theta=5e5, rope_scaling=LLAMA3),
    "Llama-3.2-1B": values("llama", 2048, 8192, (32, 8), 131072, **TIED, head_dim=64, rope_theta=5e5,
                           rope_scaling=LLAMA3 | {"factor": 32.0}),
    "R1-Distill-Llama-8B": values("llama", 4096, 14336, (32, 8), 131072, rope_theta=5e5, rope_scaling=LLAMA3),
    "Mixtral-8x7B": values("mixtral", 4096, 14336, (32, 8), 32768, num_local_experts=8, num_experts_per_tok=2,
                           sliding_window=None),
    "Qwen1.5-MoE-A2.7B": values("qwen2_moe", 2048, 5632, (16, 16), 8192, num_experts=60, num_experts_per_tok=4,
                                moe_intermediate_size=1408, shared_expert_intermediate_size=5632,
                                norm_topk_prob=False, decoder_sparse_step=1),
    "Qwen3-30B-A3B": values("qwen3_moe", 2048, 6144, (32, 4), 40960, **WIDE, num_experts=128, num_experts_per_tok=8,
                            moe_intermediate_size=768, norm_topk_prob=True, decoder_sparse_step=1),
}  # fmt: skip
ROPES: dict[str, dict[str, Any]] = {
    "linear": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0},
    "dynamic": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0},
    "yarn": {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 2.0, "original_max_position_embeddings": 16},
    "llama3": LLAMA3 | {"rope_theta": 500000.0, "original_max_position_embeddings": 16},
}


def head_dim(published: dict[str, Any]) -> int:
    return published.get("head_dim") or published["hidden_size"] // published["num_attention_heads"]


def experts(published: dict[str, Any]) -> int:
    return published.get("num_experts") or published.get("num_local_experts") or 0


def in_small(published: dict[str, Any]) -> dict[str, Any]:
    """Two layers of it, heads of 16: as many query heads a key head, and heads as much wider than the model."""
    kv = min(published["num_key_value_heads"], 2)
    heads = kv * published["num_attention_heads"] // published["num_key_value_heads"]
    width = published["num_attention_heads"] * head_dim(published)
    small = {
        **published, "hidden_size": heads * 16 * published["hidden_size"] // width, "intermediate_size": 96,
        "num_attention_heads": heads, "num_key_value_heads": kv, "num_hidden_layers": 2, "vocab_size": 61,
        "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    small |= {key: 16 for key in ("head_dim",) if key in published}
    small |= {key: 32 for key in ("moe_intermediate_size", "shared_expert_intermediate_size") if key in published}
    small |= {
        key: 2 * published["num_experts_per_tok"] for key in ("num_experts", "num_local_experts") if key in published
    }
    return small


def built(config: dict[str, Any]) -> PreTrainedModel:
    torch.manual_seed(0)
    kind = config["model_type"]
    rest = {key: value for key, value in copy.deepcopy(config).items() if key != "model_type"}  # it writes into it
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **rest)).eval()


def make(kind: str, **changes: Any) -> PreTrainedModel:
    small = in_small(values(kind, 64, 96, (4, 2), 64))
    plain = {key: value for key, value in small.items() if key not in ("rope_theta", "rope_scaling")}
    return built(plain | changes)


def particular(published: dict[str, Any], attentions: list[Attention], model: PreTrainedModel) -> str:
    """What is particular about a model, as the document has it: of what was built, not of the table above."""
    first = attentions[0]
    rope = model.config.rope_parameters
    scaled = "" if rope["rope_type"] == "default" else f"RoPE scaling `{rope['rope_type']}` by {rope['factor']:g}"
    found = {
        "biases of q, k, v": first.key.bias is not None,
        "QK norm": first.norms is not None,
        "heads wider than the model": first.query.out_features > first.query.in_features,
        "no grouped queries": first.heads.query_heads == first.heads.kv_heads,
        scaled: scaled,
        f"{published.get('num_experts_per_tok')} of {experts(published)} experts": experts(published),
        "a shared expert": "shared_expert_intermediate_size" in published,
    }
    return ", ".join(what for what, true in found.items() if true) or "-"


IDS = torch.randint(3, 61, (2, 24), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_layer_at_its_real_size_is_as_the_document_says_and_divides_into_blocks(name: str) -> None:
    published = PUBLISHED[name]
    with torch.device("meta"):
        model = built(published | {"num_hidden_layers": 1})
    attentions = [attention for _, attention in cached_attentions(model)]
    heads = HeadShape(published["num_attention_heads"], published["num_key_value_heads"], head_dim(published))
    assert [attention.heads for attention in attentions] == [heads]
    for precision in ("NVFP4-W4A4KV4", "MXFP4-W4A4KV4:rotation=32", "AMXFP4-W4A4KV4"):
        check_geometry(model, Precision.parse(precision), [])
    assert model.config.rope_parameters["rope_theta"] == published["rope_theta"]
    row = (
        f"| {name} | `{published['model_type']}` | {published['hidden_size']} | {heads.query_heads}, {heads.kv_heads} "
        f"of {heads.head_dim} | {'tied' if published['tie_word_embeddings'] else 'untied'} | "
        f"{particular(published, attentions, model)} |"
    )
    assert row in DOCUMENT.read_text(encoding="utf-8").splitlines()


def test_the_document_has_no_other_models() -> None:
    rows = re.findall(r"^\| ([^|]+) \| `\w+` \| \d+ \|", DOCUMENT.read_text(encoding="utf-8"), re.M)
    assert rows == list(PUBLISHED)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_checkpoint_of_several_files_is_trained_saved_and_read_again(name: str, tmp_path: Path) -> None:
    published, given = PUBLISHED[name], tmp_path / "given"
    built(in_small(published)).to(torch.bfloat16).save_pretrained(given, max_shard_size="20KB")
    assert len(list(given.glob("*.safetensors"))) > 2
    config = json.loads((given / CONFIG).read_text())  # in the spelling that published files have
    config = {key: value for key, value in config.items() if key not in ("rope_parameters", "layer_types")}
    spelt = {key: published[key] for key in ("rope_theta", "rope_scaling", "sliding_window") if key in published}
    config |= {"torch_dtype": config.pop("dtype"), **spelt}
    (given / CONFIG).write_text(json.dumps(config))
    assert outline(given, "NVFP4-W4A4KV4").config.model_type == published["model_type"]
    model = load_model(given)
    assert all(p.dtype == torch.float32 for p in model.parameters())
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert tied == published["tie_word_embeddings"]
    assert model.config.rope_parameters["rope_theta"] == published["rope_theta"]
    assert model.config.rope_parameters["rope_type"] == (published["rope_scaling"] or {}).get("rope_type", "default")
    assert prepare(model, "NVFP4-W4A4KV4").share > 0.99
    assert sum(isinstance(module, Experts) for module in model.modules()) == (2 if experts(published) else 0)
    model(IDS, labels=IDS).loss.backward()
    assert all(p.grad is not None for layer in quant_linears(model).values() for p in layer.parameters(recurse=False))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter -= 0.01 * parameter.grad
    save_model(model, None, tmp_path / "trained")
    again = load_model(tmp_path / "trained")
    prepare(again, "NVFP4-W4A4KV4")
    assert torch.equal(again(IDS).logits, model(IDS).logits)


@pytest.mark.parametrize("name", PUBLISHED)
def test_q_fit_leaves_the_function_as_it_is(name: str) -> None:
    model = built(in_small(PUBLISHED[name])).double()
    model.config._experts_implementation = "batched_mm"  # grouped products are not made in float64
    attention = cached_attentions(model)[0][1]
    with torch.no_grad():
        expected = model(IDS).logits
        found = qfit.calibrate(model, "NVFP4-KV4:kv_element=E1M2", IDS, grid=2, progress=False)
        layers, kv, width = found.scale.shape
        half = torch.rand(layers, 1 if attention.norms else kv, width // 2, generator=torch.Generator().manual_seed(3))
        half = half.mul(3).sub(1.5).exp().expand(layers, kv, -1)  # strong ones in place of those chosen
        scaled = attention.key_norm if attention.norms else attention.key
        before = scaled.weight.clone()
        qfit.fold(model, dataclasses.replace(found, scale=torch.cat([half, half], -1)))
        assert not torch.equal(scaled.weight, before)
        torch.testing.assert_close(model(IDS).logits, expected, rtol=1e-4, atol=1e-5)  # norms compute in float32


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
