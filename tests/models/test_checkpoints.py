"""Saving and loading: exact, whole or not there, and nothing taken for what it is not."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import gguf
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from reqat.config.errors import ReqatError
from reqat.models import (
    calibrate_static,
    freeze,
    kv_quantizers,
    load_model,
    load_tokenizer,
    precision_of,
    prepare,
    quant_linears,
    save_model,
)
from reqat.quant import Precision
from tests.campaign.faults import full_disk

Tiny = Callable[..., PreTrainedModel]


def same_state(a: PreTrainedModel, b: PreTrainedModel) -> bool:
    first, second = a.state_dict(), b.state_dict()
    return list(first) == list(second) and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("tied", [False, True])
def test_a_dense_model_comes_back_exactly(tiny: Tiny, family: str, tmp_path: Path, tied: bool) -> None:
    model = tiny(family, tie_word_embeddings=tied)
    prepare(model, "NVFP4-W4A4KV4")
    assert save_model(model, None, tmp_path / "a") == tmp_path / "a"
    loaded = load_model(tmp_path / "a")
    assert same_state(loaded, model) and not loaded.training
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied
    save_model(model, None, tmp_path / "b")
    for file in (tmp_path / "a").iterdir():
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes()
        assert str(tmp_path).encode() not in file.read_bytes()
    save_model(loaded, None, tmp_path / "c")
    assert str(tmp_path) not in (tmp_path / "c" / "config.json").read_text()


@pytest.mark.parametrize(
    "name",
    [
        "NVFP4-W4A4KV4:kv_element=E1M2",
        "MXFP4-W4A4:rotation=32",
        "NVFP4-4/6-W4A16",
        "AMXFP4-W4A4",
        "INT4-row-W4A16",
        "TERNARY-row-W2A16",
        "INT3-row-W3A16",
        "INT8-row-W8A8",
        "TERNARY-tensor-W2+INT8-tensor-A8",
    ],  # fmt: skip
)
def test_quantized_weights_come_back_exactly(tiny: Tiny, tmp_path: Path, ids: Tensor, name: str) -> None:
    model = tiny("llama")
    prepare(model, name)
    for layer in quant_linears(
        model
    ).values():  # as a solver would: codes that rounding the stored weight would not give
        q = layer.quantize_weight()
        q.codes[0, :4] = torch.tensor([1, 2, 3, 9], dtype=torch.uint8) & (2**q.format.bits - 1)
        layer.set_quantized(q)
    freeze(model)
    save_model(model, None, tmp_path / "m", dtype=torch.bfloat16)  # the dense copy is rounded, the codes are not
    loaded = load_model(tmp_path / "m")
    report = prepare(loaded, name)
    assert report.restored == ["14 quantized weights"]
    for layer, other in zip(quant_linears(model).values(), quant_linears(loaded).values(), strict=True):
        assert torch.equal(layer.quantized.codes, other.quantized.codes)  # type: ignore[union-attr]
        assert torch.equal(layer.quantized.scales, other.quantized.scales)  # type: ignore[union-attr]
        assert torch.equal(layer.weight, other.weight) and other.frozen
    save_model(freeze(loaded), None, tmp_path / "again", dtype=torch.bfloat16)
    assert (tmp_path / "again/reqat.safetensors").read_bytes() == (tmp_path / "m/reqat.safetensors").read_bytes()


def test_a_folder_that_says_ceil_means_rceil(tiny: Tiny, tmp_path: Path) -> None:
    model = tiny("llama")
    prepare(model, "MXFP4-W4A4")
    save_model(freeze(model), None, tmp_path / "m")
    about = json.loads((tmp_path / "m/reqat.json").read_text())
    for role in ("weights", "inputs"):
        assert about["precision"][role].pop("scale_rule") == "rceil" and not about["precision"][role].pop("per_tensor")
        about["precision"][role]["scale_rule"] = "ceil"
    about.pop("digest")
    (tmp_path / "m/reqat.json").write_text(json.dumps(about))
    loaded = load_model(tmp_path / "m")
    assert prepare(loaded, "MXFP4-W4A4").restored == ["14 quantized weights"]
    assert str(precision_of(loaded)) == "MXFP4-W4A4" == str(Precision.parse("MXFP4-W4A4:scale_rule=ceil"))


@pytest.mark.parametrize("name", ["NVFP4-W4A16", "MXFP4-W4A16:rotation=32"])
def test_a_frozen_folder_loads_in_plain_transformers(tiny: Tiny, tmp_path: Path, ids: Tensor, name: str) -> None:
    model = tiny("qwen3")
    prepare(model, name)
    freeze(model)
    save_model(model, None, tmp_path / "m")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    assert type(plain.model.layers[0].mlp.up_proj) is torch.nn.Linear
    torch.testing.assert_close(plain(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-4)


def test_codes_of_one_format_are_not_prepared_for_another(tiny: Tiny, tmp_path: Path) -> None:
    model = tiny("llama")
    prepare(model, "NVFP4-W4A16")
    save_model(freeze(model), None, tmp_path / "m")
    loaded = load_model(tmp_path / "m")
    for wrong in ("MXFP4-W4A16", "BF16"):
        with pytest.raises(ValueError, match=f"NVFP4-W4A16.*for {wrong}"):
            prepare(loaded, wrong)
    assert prepare(loaded, "NVFP4-W4A4KV4", global_scale="row").restored == ["14 quantized weights"]


def test_shift_and_static_scales_come_back(tiny: Tiny, tmp_path: Path, ids: Tensor) -> None:
    model = tiny("qwen2")
    prepare(model, "BF16")  # Q-FIT folds into a BF16 model
    for index, kv in enumerate(kv_quantizers(model)):
        kv.set_shift(torch.randn(2, 32, generator=torch.Generator().manual_seed(index)))
    save_model(model, None, tmp_path / "qfit")

    model = load_model(tmp_path / "qfit")
    save_model(model, None, tmp_path / "copy")  # not prepared in between: the sidecar is passed on
    model = load_model(tmp_path / "copy")
    assert prepare(model, "NVFP4-W4A4KV4", global_scale="static").restored == ["2 KV shifts"]
    assert torch.equal(kv_quantizers(model)[1].shift, torch.randn(2, 32, generator=torch.Generator().manual_seed(1)))  # type: ignore[arg-type]
    calibrate_static(model, [ids])
    expected = freeze(model)(ids).logits
    save_model(model, None, tmp_path / "static")
    about = json.loads((tmp_path / "static/reqat.json").read_text())
    assert (about["weights"], about["kv_shift"], about["static_scales"]) == ("quantized", True, True)
    assert "layers.1.kv_shift" in load_file(tmp_path / "static/reqat.safetensors")

    loaded = load_model(tmp_path / "static")
    report = prepare(loaded, "NVFP4-W4A4KV4", global_scale="static")
    assert report.restored == ["2 KV shifts", "12 static scales", "14 quantized weights"]
    assert torch.equal(freeze(loaded)(ids).logits, expected)

    other = load_model(tmp_path / "static")  # other elements have another range: their scale is not taken over
    with pytest.raises(ReqatError, match="keys.element: saved with E2M1, asked for E1M2"):
        prepare(other, "NVFP4-W4A4KV4", global_scale="static", kv_element="E1M2")
    with pytest.raises(ReqatError, match="keys.element: saved with E2M1, asked for E1M2"):
        prepare(other, "NVFP4-W4A4KV4:kv_element=E1M2")
    prepare(other, "NVFP4-W4A4KV4", global_scale="static", kv_element="E1M2", override=True)
    with pytest.raises(ValueError, match="keys: the global scale is static and not calibrated"):
        other(ids)


def test_training_after_qfit_keeps_the_shift(tiny: Tiny, tmp_path: Path) -> None:
    model = tiny("llama")
    prepare(model, "BF16")
    kv_quantizers(model)[0].set_shift(torch.ones(2, 32))
    prepare(model, "NVFP4-W4A4KV4")
    assert torch.equal(kv_quantizers(model)[0].shift, torch.ones(2, 32))  # type: ignore[arg-type]
    save_model(model, None, tmp_path / "m")
    loaded = load_model(tmp_path / "m")
    assert prepare(loaded, "NVFP4-W4A4KV4").restored == ["1 KV shifts"]


def test_qk_norm_weights_of_one_row_a_head_come_back(tiny: Tiny, tmp_path: Path, ids: Tensor) -> None:
    """Q-FIT may widen them (its option for models with QK norm); only this package loads the result."""
    model = tiny("qwen3")
    for layer in model.model.layers:
        for norm, heads in ((layer.self_attn.q_norm, 4), (layer.self_attn.k_norm, 2)):
            norm.weight = torch.nn.Parameter(norm.weight * torch.rand(heads, 1))
    folder = save_model(model, None, tmp_path / "m")
    loaded = load_model(folder)
    assert same_state(loaded, model) and torch.equal(loaded(ids).logits, model(ids).logits)
    with pytest.raises(RuntimeError, match="mismatch"):
        AutoModelForCausalLM.from_pretrained(folder)


def test_missing_and_pickled_and_truncated_checkpoints(tiny: Tiny, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no model folder at"):
        load_model(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="no model folder at"):
        load_tokenizer(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="has no config.json"):
        load_model(tmp_path / "empty")
    save_model(tiny("llama"), None, tmp_path / "trained" / "model")
    with pytest.raises(FileNotFoundError, match=r"did you mean .*trained.model\?"):
        load_model(tmp_path / "trained")
    with pytest.raises(FileNotFoundError, match="'no-such-model'.*installed"):
        load_model("package:no-such-model")
    with pytest.raises(FileNotFoundError, match="ships 0 GGUF files"):
        load_model("package:pytest")

    folder = save_model(tiny("llama"), None, tmp_path / "m")
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    for keep in (len(whole) - 100, 4, 0):
        weights.write_bytes(whole[:keep])
        with pytest.raises(ValueError, match="model.safetensors is truncated"):
            load_model(folder)
    weights.unlink()
    with pytest.raises(FileNotFoundError, match="has no model.safetensors"):
        load_model(folder)
    (folder / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(ValueError, match="pickled weights .pytorch_model.bin"):
        load_model(folder)
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-1.safetensors"}}')
    with pytest.raises(FileNotFoundError, match="model-1.safetensors is missing"):
        load_model(folder)


def test_a_checkpoint_of_another_model(tiny: Tiny, tmp_path: Path) -> None:
    folder = save_model(tiny("llama"), None, tmp_path / "m")
    deeper = save_model(tiny("llama", num_hidden_layers=3), None, tmp_path / "deeper")
    wider = save_model(tiny("llama", intermediate_size=128), None, tmp_path / "wider")
    shallow_config = (folder / "config.json").read_text()
    (deeper / "config.json").write_text(shallow_config)
    with pytest.raises(ValueError, match=r"config.json.*9 tensors unknown .model.layers.2"):
        load_model(deeper)
    (wider / "config.json").write_text(shallow_config)
    with pytest.raises(ValueError, match=r"6 tensors .*\(64, 128\), not \(64, 96\)"):
        load_model(wider)
    state = load_file(folder / "model.safetensors")
    del state["model.norm.weight"]
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="1 tensors missing .model.norm.weight"):
        load_model(folder)


def test_a_damaged_or_foreign_sidecar(tiny: Tiny, tmp_path: Path) -> None:
    model = tiny("llama")
    prepare(model, "NVFP4-W4A16")
    kv_quantizers(model)[1].set_shift(torch.zeros(2, 32))
    folder = save_model(freeze(model), None, tmp_path / "m")
    other = save_model(tiny("llama", num_hidden_layers=1), None, tmp_path / "other")
    tensors, about = folder / "reqat.safetensors", folder / "reqat.json"
    for name in ("reqat.json", "reqat.safetensors"):
        (other / name).write_bytes((folder / name).read_bytes())
    with pytest.raises(ValueError, match="reqat.json.*another model"):
        load_model(other)
    whole = tensors.read_bytes()
    tensors.write_bytes(whole[:-10])
    with pytest.raises(ValueError, match="sidecar .* is damaged"):
        load_model(folder)
    tensors.unlink()
    with pytest.raises(ValueError, match="reqat.safetensors beside"):
        load_model(folder)
    tensors.write_bytes(whole)
    text = about.read_text()
    about.write_text(text[: len(text) // 2])
    with pytest.raises(ValueError, match="reqat.json: not a sidecar"):
        load_model(folder)
    about.write_text(text.replace('"schema": 1', '"schema": 99'))
    with pytest.raises(ValueError, match="schema 99"):
        load_model(folder)


def test_a_full_disk_leaves_nothing_behind_and_the_old_model_intact(tiny: Tiny, tmp_path: Path) -> None:
    model = tiny("llama")
    old = save_model(model, None, tmp_path / "old")
    before = {file.name: file.read_bytes() for file in old.iterdir()}
    for target in (tmp_path / "new", old):
        for limit in (20_000, 100):  # within the weights, within the first small file
            with (
                full_disk(tmp_path, limit),
                pytest.raises(ValueError, match=f"(?i){target}.*free disk space"),
            ):
                save_model(model, None, target, overwrite=True)
    assert [entry.name for entry in tmp_path.iterdir()] == ["old"]
    assert {file.name: file.read_bytes() for file in old.iterdir()} == before


def test_only_a_model_that_we_saved_is_replaced_and_never_the_source(tiny: Tiny, tmp_path: Path) -> None:
    model, folder = tiny("llama"), tmp_path / "m"
    save_model(model, None, folder)
    foreign = tmp_path / "foreign"
    model.save_pretrained(foreign)

    def refused(model: PreTrainedModel, target: Path, **options: bool) -> None:
        before = {path: path.read_bytes() for path in target.iterdir()}
        with pytest.raises(ReqatError, match=target.name):
            save_model(model, None, target, **options)
        assert {path: path.read_bytes() for path in target.iterdir()} == before

    refused(model, folder)
    refused(model, foreign)
    refused(model, foreign, overwrite=True)
    refused(load_model(folder), folder, overwrite=True)
    (folder / "card.md").write_text("mine")
    refused(model, folder, overwrite=True)
    (folder / "card.md").unlink()
    save_model(tiny("llama", num_hidden_layers=1), None, folder, overwrite=True)
    assert load_model(folder).config.num_hidden_layers == 1
    (folder / "model.safetensors").write_bytes(b"trained on by somebody else")
    refused(model, folder, overwrite=True)


def test_an_interrupt_leaves_nothing_behind(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("llama")

    def interrupted(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(type(model), "save_pretrained", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save_model(model, None, tmp_path / "m")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="is a file, not a folder"):
        save_model(model, None, tmp_path / "file")


def test_a_gguf_file_in_an_installed_package(
    tiny: Tiny, tmp_path: Path, ids: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A package that would fail if it were imported; its GGUF file gives the model it was written from."""
    model = tiny("llama", tie_word_embeddings=False, head_dim=16)
    package, info = tmp_path / "tiny_llm", tmp_path / "tiny_llm-1.0.dist-info"
    package.mkdir()
    info.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('imported')\n")
    _write_gguf(model, package / "tiny.gguf")
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: tiny-llm\nVersion: 1.0\n")
    (info / "RECORD").write_text("tiny_llm/__init__.py,,\ntiny_llm/tiny.gguf,,\n")
    monkeypatch.syspath_prepend(tmp_path)

    loaded = load_model("package:tiny-llm")
    assert "tiny_llm" not in sys.modules
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-4)
    whole = (package / "tiny.gguf").read_bytes()
    for damaged in (b"", b"GGML" + whole[4:], whole[:100], whole[: len(whole) // 2], whole[:-1000]):
        (package / "tiny.gguf").write_bytes(damaged)
        with pytest.raises(ReqatError, match=r"tiny\.gguf.*install the package again"):
            load_model("package:tiny-llm")
    folder = save_model(loaded, None, tmp_path / "plain")
    assert "quantization_config" not in (folder / "config.json").read_text()
    assert same_state(load_model(folder), loaded)


def _write_gguf(model: PreTrainedModel, file: Path) -> None:
    """Write a Llama in GGUF's names and its order of RoPE channels (pairs interleaved instead of halves)."""
    config = model.config
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    names = {
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
    }
    top = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    for name, tensor in model.state_dict().items():
        stem = name.removesuffix(".weight")
        if stem in top:
            target = top[stem]
        else:
            _, _, layer, rest = stem.split(".", 3)
            target = f"blk.{layer}.{names[rest]}"
            if rest in ("self_attn.q_proj", "self_attn.k_proj"):
                halves = tensor.view(-1, 2, config.head_dim // 2, tensor.shape[1])
                tensor = halves.transpose(1, 2).reshape(tensor.shape)
        writer.add_tensor(f"{target}.weight", tensor.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
