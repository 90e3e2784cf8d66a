"""``from_pretrained`` with a ReqatConfig is ``prepare``, and what it saves loads by itself."""

from __future__ import annotations

import copy
import json
import pickle
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModel, AutoModelForCausalLM, BertConfig, BertModel, T5Config, T5ForConditionalGeneration

import reqat
from reqat.config.errors import ReqatError
from reqat.hf import ReqatConfig
from reqat.models import calibrate_static, kv_quantizers, load_model, precision_of, quant_linears, save_model
from reqat.quant import Precision

Folder = Callable[..., Path]
KV4 = "NVFP4-W4A4KV4"


def load(path: Path, *args: Any, **kwargs: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(path, *args, **kwargs)


def own(path: Path, precision: str, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    model = load_model(path, dtype=dtype)
    reqat.prepare(model, precision, **options)
    return model


def logits(model: Any, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model(ids).logits


def edit(file: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


# The same model as ours


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral"])
@pytest.mark.parametrize("precision", [KV4, "MXFP4-W4A4:rotation=32"])
def test_it_is_prepare_and_reloads_from_the_folder_alone(
    folder: Folder, tmp_path: Path, ids: Tensor, family: str, precision: str
) -> None:
    path = folder(family)
    expected = logits(own(path, precision), ids)
    assert not torch.equal(expected, logits(load(path), ids))
    model = load(path, quantization_config=ReqatConfig(precision))
    assert torch.equal(logits(model, ids), expected)
    model.save_pretrained(tmp_path / "saved")
    again = load(tmp_path / "saved")
    assert precision_of(again) == Precision.parse(precision)
    assert torch.equal(logits(again, ids), expected)
    # Our own loader takes that folder, too, as the dense model that it is.
    assert precision_of(load_model(tmp_path / "saved")) is None
    assert torch.equal(logits(own(tmp_path / "saved", precision.partition(":")[0]), ids), expected)


@pytest.mark.parametrize("tied", [False, True])
def test_shards_and_tied_heads(folder: Folder, tmp_path: Path, ids: Tensor, tied: bool) -> None:
    path = folder(shard="30KB", tie_word_embeddings=tied)
    assert len(list(path.glob("model-*.safetensors"))) > 2
    model = load(path, quantization_config=ReqatConfig(KV4))
    expected = logits(own(path, KV4), ids)
    assert torch.equal(logits(model, ids), expected)
    reqat.freeze(model)
    model.save_pretrained(tmp_path / "saved", max_shard_size="30KB")
    again = load(tmp_path / "saved")
    assert (again.lm_head.weight is again.model.embed_tokens.weight) == tied
    assert torch.equal(logits(again, ids), expected)
    assert all(linear.frozen for linear in quant_linears(again).values())


@pytest.mark.parametrize(
    ("asked", "dtype"),
    [
        ({}, torch.bfloat16),  # the folder's
        ({"torch_dtype": "auto"}, torch.bfloat16),
        ({"dtype": torch.float32}, torch.float32),
        ({"dtype": "float16"}, torch.float16),
    ],
)
def test_dtypes(folder: Folder, ids: Tensor, asked: dict[str, Any], dtype: torch.dtype) -> None:
    path = folder(dtype=torch.bfloat16)
    model = load(path, quantization_config=ReqatConfig(KV4), **asked)
    assert model.dtype == dtype
    assert torch.equal(logits(model, ids), logits(own(path, KV4, dtype), ids))


@pytest.mark.parametrize("device_map", ["cpu", "auto", {"": "cpu"}])
def test_device_maps_of_one_device(folder: Folder, ids: Tensor, device_map: Any) -> None:
    path = folder()
    model = load(path, quantization_config=ReqatConfig(KV4), device_map=device_map)
    assert torch.equal(logits(model, ids), logits(own(path, KV4), ids))


def test_offloading_is_refused(folder: Folder, tmp_path: Path) -> None:
    path = folder()
    config = ReqatConfig(KV4)
    there = {"model": "cpu", "lm_head": "disk"}
    with pytest.raises(ReqatError, match="disk.*device_map='cpu'"):
        load(path, quantization_config=config, device_map=there, offload_folder=tmp_path / "off")
    with pytest.raises(ReqatError, match="disk"):  # chosen by transformers
        load(
            path,
            quantization_config=config,
            device_map="auto",
            max_memory={"cpu": "100KB"},
            offload_folder=tmp_path / "off",
        )


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
        ("qwen3_moe", {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}),
    ],
)
def test_experts(folder: Folder, tmp_path: Path, ids: Tensor, family: str, changes: dict[str, Any]) -> None:
    path = folder(family, **changes)
    model = load(path, quantization_config=ReqatConfig(KV4))
    expected = logits(own(path, KV4), ids)
    assert len(quant_linears(model)) == 2 * (4 + 4 * 2)  # gate and up of an expert are one weight
    assert torch.equal(logits(model, ids), expected)
    reqat.freeze(model).save_pretrained(tmp_path / "saved")  # type: ignore[operator]
    assert torch.equal(logits(load(tmp_path / "saved"), ids), expected)


def test_an_encoder(tmp_path: Path, ids: Tensor) -> None:
    torch.manual_seed(0)
    shape = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 96}
    BertModel(BertConfig(vocab_size=61, **shape)).eval().save_pretrained(tmp_path / "bert")
    model = AutoModel.from_pretrained(
        tmp_path / "bert", quantization_config=ReqatConfig("NVFP4-W4A4"), attn_implementation="eager"
    )
    expected = own(tmp_path / "bert", "NVFP4-W4A4")(ids).last_hidden_state
    torch.testing.assert_close(model(ids).last_hidden_state, expected)


# What a model measured


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_everything_measured_comes_back(
    folder: Folder, tmp_path: Path, ids: Tensor, frozen: bool, dtype: torch.dtype
) -> None:
    model = load(folder(), quantization_config=ReqatConfig(KV4, global_scale="static", skip=["*.o_proj"]), dtype=dtype)
    with pytest.raises(ReqatError, match="calibrate_static"):
        model(ids)
    for index, kv in enumerate(kv_quantizers(model)):
        kv.set_shift(torch.randn(2, 32, generator=torch.Generator().manual_seed(index)))
        kv.value.set_clip(torch.tensor([0.9, 0.8]))
    calibrate_static(model, [ids])
    if frozen:
        reqat.freeze(model)
    model.save_pretrained(tmp_path / "saved")
    again = load(tmp_path / "saved")
    assert torch.equal(logits(again, ids), logits(model, ids))
    assert len(quant_linears(again)) == 2 * 6
    state, other = model.state_dict(), again.state_dict()
    assert state.keys() == other.keys()
    assert all(torch.equal(state[name], other[name]) for name in state)
    # Saved again from what was loaded, and by our own function.
    again.save_pretrained(tmp_path / "twice")
    save_model(again, None, tmp_path / "ours")
    for place in ("twice", "ours"):
        assert torch.equal(logits(load(tmp_path / place), ids), logits(model, ids))


def test_norms_widened_to_a_row_a_head(folder: Folder, tmp_path: Path, ids: Tensor) -> None:
    model = load(folder("qwen3"), quantization_config=ReqatConfig(KV4))
    for layer in model.model.layers:  # as Q-FIT leaves them
        for norm, heads in ((layer.self_attn.q_norm, 4), (layer.self_attn.k_norm, 2)):
            norm.weight = torch.nn.Parameter(norm.weight.detach() * (1 + torch.rand(heads, 1)))
    model.save_pretrained(tmp_path / "saved")
    assert torch.equal(logits(load(tmp_path / "saved"), ids), logits(model, ids))


def test_a_shared_scale_that_a_dense_weight_would_lose_is_refused(folder: Folder, tmp_path: Path) -> None:
    model = load(folder(), quantization_config=ReqatConfig(KV4))
    reqat.models.share_global_scales(model)
    with pytest.raises(ReqatError, match="freeze"):
        model.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


@pytest.mark.parametrize("how", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_are_whole(folder: Folder, tmp_path: Path, ids: Tensor, how: Any) -> None:
    model = load(folder(), quantization_config=ReqatConfig(KV4))
    other = how(model)
    assert other.hf_quantizer.model is other
    with torch.no_grad():
        other.lm_head.weight.zero_()
    other.save_pretrained(tmp_path / "saved")
    assert not logits(load(tmp_path / "saved"), ids).any() and logits(model, ids).any()


# Folders of `reqat quantize`


def test_a_folder_with_codes_and_no_configuration_of_ours(folder: Folder, tmp_path: Path, ids: Tensor) -> None:
    model = own(folder(), KV4, kv_element="E1M2")
    save_model(reqat.freeze(model), None, tmp_path / "codes")
    expected = logits(model, ids)
    for config in (ReqatConfig(), ReqatConfig(KV4), ReqatConfig(KV4, kv_element="E1M2")):
        loaded = load(tmp_path / "codes", quantization_config=config)
        assert torch.equal(logits(loaded, ids), expected)
        assert config.precision is None or config.precision == KV4  # it may serve for another model
        for layer, other in zip(quant_linears(model).values(), quant_linears(loaded).values(), strict=True):
            assert torch.equal(layer.quantized.codes, other.quantized.codes)  # type: ignore[union-attr]
    with pytest.raises(ReqatError, match="kv.*E1M2|keys.element"):
        load(tmp_path / "codes", quantization_config=ReqatConfig(KV4, kv_element="E2M1"))
    with pytest.raises(ReqatError, match="MXFP4"):
        load(tmp_path / "codes", quantization_config=ReqatConfig("MXFP4-W4A4"))
    assert precision_of(load(tmp_path / "codes")) is None  # nobody asked


def test_a_packed_model_is_not_saved(folder: Folder, tmp_path: Path) -> None:
    model = load(folder(), quantization_config=ReqatConfig(KV4))
    reqat.pack(model)
    assert not model.hf_quantizer.is_trainable
    with pytest.raises(ReqatError, match="before pack"):
        model.save_pretrained(tmp_path / "saved")


def test_a_folder_keeps_its_own_precision(folder: Folder, tmp_path: Path, ids: Tensor) -> None:
    """transformers' rule for every method: the configuration of the folder wins, with a warning."""
    model = load(folder(), quantization_config=ReqatConfig(KV4))
    model.save_pretrained(tmp_path / "saved")
    with pytest.warns(UserWarning, match="from the model will be used"):
        again = load(tmp_path / "saved", quantization_config=ReqatConfig("MXFP4-W4A4"))
    assert precision_of(again) == Precision.parse(KV4)
    assert torch.equal(logits(again, ids), logits(model, ids))


# Batches


def test_by_default_a_row_depends_on_itself_alone(folder: Folder, ids: Tensor) -> None:
    """A row alone is the row of a batch of 4, and a prefix alone is that of a longer text; not so with `dynamic`."""
    path = folder()

    def apart(model: Any) -> tuple[float, float]:
        whole = logits(model, ids)
        scale = float(whole.abs().max())
        rows = max(float((logits(model, ids[i : i + 1]) - whole[i]).abs().max()) for i in range(4))
        prefix = float((logits(model, ids[:, :6]) - whole[:, :6]).abs().max())
        return rows / scale, prefix / scale

    by_default = load(path, quantization_config=ReqatConfig(KV4), dtype=torch.float64)
    static = load(path, quantization_config=ReqatConfig(KV4, global_scale="static"), dtype=torch.float64)
    calibrate_static(static, [ids])
    for model in (by_default, static, own(path, KV4, torch.float64)):
        assert max(apart(model)) < 1e-6
    dynamic = load(path, quantization_config=ReqatConfig(KV4, global_scale="dynamic"), dtype=torch.float64)
    assert min(apart(dynamic)) > 1e-3


def test_generating_with_a_cache_is_reading_the_whole_text(folder: Folder, ids: Tensor) -> None:
    model = load(folder(), quantization_config=ReqatConfig(KV4))
    mask = torch.ones_like(ids)
    out = model.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False, pad_token_id=0)
    alone = model.generate(ids[:1], attention_mask=mask[:1], max_new_tokens=6, do_sample=False, pad_token_id=0)
    assert torch.equal(out[0, : alone.shape[1]], alone[0])
    length = ids.shape[1]
    read = logits(model, out[:1]).argmax(-1)[0, length - 1 : -1]
    until = int((out[0, length:] == 2).nonzero()[0]) + 1 if (out[0, length:] == 2).any() else 6
    assert torch.equal(out[0, length : length + until], read[:until])


# What is refused


def test_configurations() -> None:
    with pytest.raises(ReqatError, match="NVFP4-W4A4KV4"):  # the known ones are named
        ReqatConfig("NVFP5-W4A4KV4")
    with pytest.raises(ReqatError, match="global_scale"):
        ReqatConfig(KV4, global_scal="row")
    with pytest.raises(ReqatError, match="names no precision"):
        ReqatConfig(global_scale="row")
    with pytest.raises(ReqatError, match="list of patterns"):
        ReqatConfig(KV4, skip="*.o_proj")
    for config in (
        ReqatConfig(),
        ReqatConfig(KV4, skip=["*.o_proj"], global_scale="static"),
        ReqatConfig(Precision.parse(KV4), skip=["*.o_proj"]),
    ):
        written = json.loads(config.to_json_string())
        again = ReqatConfig.from_dict(written)
        assert again.to_dict() == config.to_dict()
        assert again.precision is None or Precision.parse(again.precision, **again.options) == Precision.parse(
            config.precision,
            **config.options,  # type: ignore[arg-type]
        )


def test_a_configuration_may_be_a_dictionary(folder: Folder, ids: Tensor) -> None:
    path = folder()
    model = load(path, quantization_config={"quant_method": "reqat", "precision": KV4, "kv_element": "E1M2"})
    assert torch.equal(logits(model, ids), logits(own(path, KV4, kv_element="E1M2"), ids))


def test_what_no_adapter_fits_is_refused_before_weights_are_read(tmp_path: Path) -> None:
    shape = {"d_model": 32, "d_kv": 16, "d_ff": 32, "num_layers": 1, "num_heads": 2, "vocab_size": 61}
    T5ForConditionalGeneration(T5Config(**shape)).save_pretrained(tmp_path / "t5")
    with pytest.raises(ReqatError, match="'t5' is not supported"):
        T5ForConditionalGeneration.from_pretrained(tmp_path / "t5", quantization_config=ReqatConfig("NVFP4-W4A4"))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"head_dim": 24}, "head_dim 24"),
        ({"intermediate_size": 100}, "down_proj.*skip"),
    ],
)
def test_shapes_that_do_not_fit(folder: Folder, changes: dict[str, Any], says: str) -> None:
    with pytest.raises(ReqatError, match=says):
        load(folder(**changes), quantization_config=ReqatConfig(KV4))


def test_other_attention_is_refused(folder: Folder, ids: Tensor) -> None:
    path = folder()
    with pytest.raises(ReqatError, match="eager"):
        load(path, quantization_config=ReqatConfig(KV4), attn_implementation="eager")
    load(path, quantization_config=ReqatConfig(KV4), attn_implementation="sdpa")(ids)


@pytest.mark.parametrize("method", ["gptq", "compressed-tensors", "a-new-one"])
def test_weights_of_another_method(folder: Folder, method: str) -> None:
    path = folder()
    edit(path / "config.json", lambda config: config.update(quantization_config={"quant_method": method, "bits": 4}))
    with pytest.raises(ValueError, match="(?i)" + method.replace("-", ".?")):
        load(path, quantization_config=ReqatConfig(KV4))


def test_weights_that_another_tool_describes_in_a_file_of_its_own(folder: Folder) -> None:
    path = folder()
    (path / "hf_quant_config.json").write_text("{}")
    with pytest.raises(ReqatError, match="modelopt"):
        load(path, quantization_config=ReqatConfig(KV4))


def test_folders_of_a_newer_version_and_damaged_ones(folder: Folder, tmp_path: Path, ids: Tensor) -> None:
    model = load(folder(), quantization_config=ReqatConfig(KV4, global_scale="static"))
    calibrate_static(model, [ids])
    saved = tmp_path / "saved"

    def damaged(file: str, change: Callable[[dict[str, Any]], Any], says: str) -> None:
        model.save_pretrained(saved)
        edit(saved / file, change)
        for read in (load, load_model):
            with pytest.raises(ReqatError, match=says):
                read(saved)

    def described(**changes: Any) -> Callable[[dict[str, Any]], Any]:
        return lambda config: config["quantization_config"].update(changes)

    damaged("config.json", described(schema=2), "schema 2.*update reqat")
    damaged("config.json", described(more=1), "'more'.*update reqat")
    damaged("config.json", described(precision={}), "precision is damaged")
    damaged("config.json", described(skip="x"), "skip is 'x'")
    damaged("config.json", described(precision=Precision.parse(KV4).to_dict()), "different models")
    damaged("reqat.json", lambda about: about.update(schema=2), "schema 2.*update reqat")
    model.save_pretrained(saved)
    (saved / "reqat.json").unlink()
    (saved / "reqat.safetensors").unlink()
    for read in (load, load_model):
        with pytest.raises(ReqatError, match="copy the whole folder"):
            read(saved)
    edit(saved / "config.json", lambda config: config.pop("quantization_config"))
    assert precision_of(load(saved)) is None


def test_edited_weights_beside_codes(folder: Folder, tmp_path: Path) -> None:
    model = load(folder(), quantization_config=ReqatConfig(KV4))
    reqat.freeze(model).save_pretrained(tmp_path / "saved")
    file = tmp_path / "saved/model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.1.mlp.up_proj.weight"] += 0.01
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ReqatError, match="up_proj.weight was changed"):
        load(tmp_path / "saved")


def test_weights_without_a_folder(folder: Folder, tmp_path: Path) -> None:
    model = load(folder(), quantization_config=ReqatConfig(KV4))
    state = load_model(folder()).state_dict()
    with pytest.raises(ReqatError, match="give from_pretrained the folder"):
        type(model).from_pretrained(None, config=model.config, state_dict=state)
    with pytest.raises(ReqatError, match="plain one in place"):
        model.dequantize()


def test_without_reqat_the_folder_is_the_dense_model(folder: Folder, tmp_path: Path, ids: Tensor) -> None:
    """As for whoever does not import reqat.hf."""
    from transformers.quantizers import auto

    path = folder()
    load(path, quantization_config=ReqatConfig(KV4)).save_pretrained(tmp_path / "saved")
    found = auto.AUTO_QUANTIZATION_CONFIG_MAPPING.pop("reqat")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            plain = load(tmp_path / "saved")
    finally:
        auto.AUTO_QUANTIZATION_CONFIG_MAPPING["reqat"] = found
    assert torch.equal(logits(plain, ids), logits(load(path), ids))


def test_a_folder_of_the_hub(folder: Folder, tmp_path: Path, ids: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """From transformers' cache, where the files of a repository lie by commit."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    model = load(folder(), quantization_config=ReqatConfig(KV4, global_scale="static"))
    calibrate_static(model, [ids])
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "cache/models--someone--model"
    model.save_pretrained(repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text(commit)
    again = load("someone/model", cache_dir=tmp_path / "cache")  # type: ignore[arg-type]
    assert torch.equal(logits(again, ids), logits(model, ids))


@pytest.mark.parametrize(
    ("error", "refused"),
    [
        (EntryNotFoundError("404"), False),
        (LocalEntryNotFoundError("no network"), True),
        (ConnectionError("reset by peer"), True),
    ],
)
def test_only_a_sidecar_that_the_hub_does_not_have_may_be_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, refused: bool
) -> None:
    from reqat.hf import quantizer

    def fail(*args: Any, **kwargs: Any) -> None:
        raise error

    monkeypatch.setattr(quantizer, "hf_hub_download", fail)
    monkeypatch.setattr(quantizer, "is_offline_mode", lambda: False)
    folder = tmp_path / "cache/models--someone--model/snapshots" / "0123456789abcdef0123456789abcdef01234567"
    with pytest.raises(ReqatError, match="reqat.json.*HF_TOKEN") if refused else nullcontext():
        quantizer._fetch_sidecar(folder, "someone/model")
