"""What transformers and Trainer do with a model on their own: saved, reloaded, converted, trained.

Each either computes the same function afterwards, or is refused before anything is lost.
"""

from __future__ import annotations

import copy
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from reqat.config.errors import ReqatError
from reqat.inference import pack
from reqat.inference.packed_linear import PackedLinear
from reqat.models import calibrate_static, freeze, kv_quantizers, load_model, prepare, quant_linears, save_model
from reqat.models.pretrained import plain_state

Tiny = Callable[..., PreTrainedModel]
ROTATED = "MXFP4-W4A4:rotation=32"
KV4 = "NVFP4-W4A4KV4"


def dense_twin(model: PreTrainedModel, tiny: Tiny) -> PreTrainedModel:
    """A plain model with the weights that ``model`` multiplies with, written out here from the codes."""
    plain = tiny("llama", tie_word_embeddings=model.config.tie_word_embeddings)
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            source: Any = model.get_submodule(name.rpartition(".")[0])
            weight = model.get_parameter(name)
            if name.endswith("proj.weight") and source.quantized is not None:
                weight = source.quantized.dequantize(torch.float32)
                if source.rotation:
                    blocks = weight.reshape(-1, source.rotation).double()
                    weight = (blocks @ sylvester(source.rotation)).reshape(weight.shape).float()
            parameter.copy_(weight)
    return plain


def sylvester(n: int) -> Tensor:
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < n:
        matrix = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64), matrix)
    return matrix / n**0.5


def calibrated(tiny: Tiny, ids: Tensor, **changes: Any) -> PreTrainedModel:
    """A prepared model with everything that is measured: static scales and a shift."""
    model = tiny("llama", **changes)
    prepare(model, KV4, global_scale="static")
    for index, kv in enumerate(kv_quantizers(model)):
        kv.set_shift(torch.randn(2, 32, generator=torch.Generator().manual_seed(index)))
    calibrate_static(model, [ids])
    return model


@pytest.mark.parametrize("name", [ROTATED, KV4, "MXFP4-W4A16:rotation=32"])
@pytest.mark.parametrize("how", ["prepared", "frozen", "tied", "sharded", "state_dict"])
def test_save_pretrained_writes_what_everyone_loads(
    tiny: Tiny, tmp_path: Path, ids: Tensor, name: str, how: str
) -> None:
    model = tiny("llama", tie_word_embeddings=how == "tied")
    options = {"kv_element": "E2M1", "global_scale": "row"} if name == KV4 else {}
    prepare(model, name, **options)
    if how != "prepared":
        freeze(model)
    expected = model(ids).logits
    arguments: dict[str, Any] = {"sharded": {"max_shard_size": "20KB"}, "state_dict": {}}.get(how, {})
    if how == "state_dict":
        arguments["state_dict"] = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    model.save_pretrained(tmp_path / "m", **arguments)

    config = json.loads((tmp_path / "m/config.json").read_text())
    assert not any("attn_implementation" in key for key in config)
    plain, info = AutoModelForCausalLM.from_pretrained(tmp_path / "m", output_loading_info=True)
    assert not any(info[what] for what in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    torch.testing.assert_close(plain(ids).logits, dense_twin(model, tiny)(ids).logits, rtol=1e-5, atol=1e-5)

    again = load_model(tmp_path / "m")
    prepare(again, name)  # the name alone: options are the folder's
    if how != "prepared":
        freeze(again)
    assert torch.equal(again(ids).logits, expected)
    for layer, other in zip(quant_linears(model).values(), quant_linears(again).values(), strict=True):
        if layer.quantized is not None and other.quantized is not None:
            assert torch.equal(layer.quantized.codes, other.quantized.codes)
        assert torch.equal(layer.weight, other.weight)


def test_save_pretrained_and_save_model_write_the_same_files(tiny: Tiny, tmp_path: Path, ids: Tensor) -> None:
    model = freeze(calibrated(tiny, ids))
    model.save_pretrained(tmp_path / "a")
    save_model(model, None, tmp_path / "b")
    # The list of its files, by which save_model knows a folder of its own, is no part of the model.
    names = sorted(file.name for file in (tmp_path / "b").iterdir() if not file.name.startswith("."))
    assert sorted(file.name for file in (tmp_path / "a").iterdir()) == names and "reqat.safetensors" in names
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    # Not prepared in between: the sidecar is passed on.
    load_model(tmp_path / "a").save_pretrained(tmp_path / "c")
    assert (tmp_path / "c/reqat.safetensors").read_bytes() == (tmp_path / "a/reqat.safetensors").read_bytes()
    # A folder that held another model keeps none of its sidecar, nor the list of its weights.
    other = tiny("llama")
    prepare(other, "BF16")
    other.save_pretrained(tmp_path / "a")
    for name in ("reqat.json", "reqat.safetensors", "model.safetensors.index.json"):
        assert (tmp_path / "b" / name).exists() and not (tmp_path / "a" / name).exists()


@pytest.mark.parametrize("shards", [1, 3])
def test_an_engine_reads_the_weights_and_not_the_sidecar(tiny: Tiny, tmp_path: Path, ids: Tensor, shards: int) -> None:
    """vLLM and SGLang take every safetensors file of a folder, or of those the ones that its index names."""
    model, plain = freeze(calibrated(tiny, ids)), tiny("llama")
    size = sum(tensor.numel() * tensor.element_size() for tensor in plain.state_dict().values())
    model.save_pretrained(tmp_path, max_shard_size=size * 2 // 5 if shards > 1 else "1GB")
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    listed = set(index["weight_map"].values())
    assert len(listed) == shards and (tmp_path / "reqat.safetensors").is_file()
    read: dict[str, Tensor] = {}
    for file in tmp_path.glob("*.safetensors"):
        if file.name in listed:
            found = load_file(file)
            assert all(index["weight_map"][name] == file.name for name in found)
            read |= found
    plain.load_state_dict(read)  # strict
    assert index["metadata"]["total_size"] == sum(t.numel() * t.element_size() for t in read.values())
    assert torch.equal(plain(ids).logits, type(plain).from_pretrained(tmp_path)(ids).logits)


def test_a_packed_model_is_refused_and_leaves_no_folder(tiny: Tiny, tmp_path: Path) -> None:
    model = tiny("llama")
    prepare(model, KV4)
    pack(model)
    for save in (
        lambda: model.save_pretrained(tmp_path / "m"),
        lambda: save_model(model, None, tmp_path / "m"),
        lambda: model.state_dict(),
        lambda: model.load_state_dict(tiny("llama").state_dict()),
    ):
        with pytest.raises(ReqatError, match="before pack|then pack"):
            save()
    assert not (tmp_path / "m").exists()
    with pytest.raises(ReqatError, match="load it again"):
        prepare(model, "NVFP4-W4A4")


def test_what_would_leave_the_sidecar_behind_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    model = tiny("llama")
    prepare(model, KV4)
    for argument, remedy in (("push_to_hub", "model.push_to_hub"), ("distributed_checkpoint", "without it")):
        with pytest.raises(ReqatError, match=remedy):
            model.save_pretrained(tmp_path / "m", **{argument: True})
    assert not (tmp_path / "m").exists()


# State dicts


@pytest.mark.parametrize("frozen", [False, True])
def test_a_state_dict_brings_back_everything_measured(tiny: Tiny, ids: Tensor, frozen: bool) -> None:
    model = calibrated(tiny, ids)
    if frozen:
        freeze(model)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    other = tiny("llama")
    prepare(other, KV4, global_scale="static")
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(0.5)
    other.load_state_dict(state)  # strict
    assert torch.equal(other(ids).logits, model(ids).logits)
    assert all(layer.frozen == frozen for layer in quant_linears(other).values())
    plain = tiny("llama")
    plain.load_state_dict(plain_state(model))
    torch.testing.assert_close(plain(ids).logits, dense_twin(model, tiny)(ids).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", [ROTATED, "NVFP4-W4A4", "MXFP4-W16A4"])
def test_a_frozen_model_takes_its_own_state_dict_and_no_other(tiny: Tiny, ids: Tensor, name: str) -> None:
    model = tiny("llama")
    prepare(model, name, rotation=32)
    freeze(model)
    expected = model(ids).logits
    state = model.state_dict()
    model.load_state_dict(state)
    assert torch.equal(model(ids).logits, expected)
    model.load_state_dict(plain_state(model))  # a plain checkpoint of the same weights
    assert torch.equal(model(ids).logits, expected)
    with pytest.raises(ReqatError, match=r"q_proj\.weight.*frozen.*before freeze"):
        model.load_state_dict(tiny("llama").state_dict())


def test_measured_state_that_does_not_fit_is_refused(tiny: Tiny, ids: Tensor) -> None:
    state = calibrated(tiny, ids).state_dict()
    row = tiny("llama")
    prepare(row, KV4, global_scale="row")
    with pytest.raises(ReqatError, match="q_proj input: .*row global scales.*global_scale='static'"):
        row.load_state_dict(state)
    static = tiny("llama")
    prepare(static, KV4, global_scale="static")
    with pytest.raises(RuntimeError, match="Missing key"):  # as for any buffer
        calibrated(tiny, ids).load_state_dict(plain_state(static))
    key = next(name for name in state if name.endswith(".reqat_kv.key.global_scale"))
    for bad, what in ((torch.tensor(-1.0), "positive"), (torch.tensor(1.0).bfloat16(), "bfloat16")):
        with pytest.raises(ReqatError, match=what):
            static.load_state_dict({**state, key: bad})
    shift = key.replace("key.global_scale", "shift")
    with pytest.raises(ReqatError, match="shift of shape"):
        static.load_state_dict({**state, shift: torch.zeros(1, 32)})


# Conversions


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_conversion_leaves_measured_state_as_it_is(tiny: Tiny, ids: Tensor, dtype: torch.dtype) -> None:
    model = tiny("llama")
    with torch.no_grad():
        model.model.layers[0].self_attn.v_proj.weight.mul_(0.002)  # values whose scale is beyond float16
    prepare(model, KV4, global_scale="static")
    kv_quantizers(model)[0].set_shift(torch.randn(2, 32))
    calibrate_static(model, [ids])
    before = {name: buffer.clone() for name, buffer in model.named_buffers() if "scale" in name or "shift" in name}
    assert max(float(scale.max()) for scale in before.values()) > 65504

    expected = tiny("llama")
    expected.load_state_dict(plain_state(model))
    expected.to(dtype)  # converted first, and then given the float32 scales
    prepare(expected, KV4, global_scale="static")
    for mine, theirs in zip(model.modules(), expected.modules(), strict=True):
        for name, value in vars(mine).get("_buffers", {}).items():
            if name in ("global_scale", "shift"):
                setattr(theirs, name, value)
    model.to(dtype)
    after = dict(model.named_buffers())
    assert all(torch.equal(after[name], value) and after[name].dtype == torch.float32 for name, value in before.items())
    assert torch.equal(model(ids).logits, expected(ids).logits)
    inputs = [layer.input_quantizer.global_scale for layer in quant_linears(freeze(model)).values()]
    packed = pack(model)
    kept = [m.input_quantizer.global_scale for m in packed.modules() if isinstance(m, PackedLinear)]
    assert len(kept) == len(inputs)
    assert all(
        a is not None and torch.equal(a, b) and a.dtype == torch.float32 for a, b in zip(kept, inputs, strict=True)
    )


@pytest.mark.parametrize("name", ["NVFP4-W4A4", "NVFP4-4/6-W4A4", "NVFP4-W4A16"])
def test_in_bfloat16_packed_and_fake_quantized_differ_by_rounding(tiny: Tiny, ids: Tensor, name: str) -> None:
    """A dequantized NVFP4 number, code times two scales, has no bfloat16; fake quantization rounds it and kernels do
    not. Then neither may be nearer to float32 than the other by more than chance, and both sum alike in float32."""
    far: dict[str, float] = {}
    logits: dict[tuple[str, torch.dtype], Tensor] = {}
    for dtype in (torch.float32, torch.bfloat16):
        model = tiny("llama").to(torch.bfloat16).to(dtype)
        prepare(model, name, **({} if name.endswith("A16") else {"global_scale": "row"}))
        logits["fake", dtype] = freeze(model)(ids, use_cache=False).logits.float()
        with torch.no_grad():
            logits["packed", dtype] = pack(model)(ids, use_cache=False).logits.float()
    exact = logits["fake", torch.float32]
    torch.testing.assert_close(logits["packed", torch.float32], exact, rtol=1e-4, atol=1e-4)
    for kind in ("fake", "packed"):
        far[kind] = float((logits[kind, torch.bfloat16] - exact).norm() / exact.norm())
    assert far["packed"] < 1.25 * far["fake"]


def test_copies_and_pickles_are_whole(tiny: Tiny, tmp_path: Path, ids: Tensor) -> None:
    model = freeze(calibrated(tiny, ids))
    expected = model(ids).logits
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    pickled = torch.load(file, weights_only=False)  # made two lines above
    for number, twin in enumerate((copy.deepcopy(model), pickled)):
        assert torch.equal(twin(ids).logits, expected)
        with torch.no_grad():
            twin.lm_head.weight.zero_()
        twin.save_pretrained(tmp_path / str(number))  # itself, not what it was copied from
        assert not load_file(tmp_path / str(number) / "model.safetensors")["lm_head.weight"].any()
    assert torch.equal(model(ids).logits, expected)


def test_what_transformers_does_to_embeddings_and_checkpointing(tiny: Tiny, tmp_path: Path, ids: Tensor) -> None:
    model = tiny("llama", tie_word_embeddings=True).train()
    prepare(model, KV4, global_scale="row")
    expected = model(ids, use_cache=False).logits
    model.gradient_checkpointing_enable()
    assert torch.equal(model(ids, use_cache=False).logits, expected)
    model.resize_token_embeddings(70)
    model.tie_weights()
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert torch.equal(model(ids, use_cache=False).logits[..., :61], expected)
    model.save_pretrained(tmp_path / "m")
    loaded = load_model(tmp_path / "m")
    prepare(loaded, KV4)
    assert torch.equal(loaded(ids, use_cache=False).logits[..., :61], expected.detach())


# Trainer


@pytest.mark.slow  # importing Trainer takes seconds
def test_trainer_saves_and_resumes_and_everyone_loads(tiny: Tiny, tmp_path: Path, ids: Tensor) -> None:
    pytest.importorskip("accelerate")
    from transformers import Trainer, TrainingArguments

    rows = [{"input_ids": row, "labels": row} for row in ids.repeat(4, 1)]

    def trainer(steps: int) -> Trainer:
        model = calibrated(tiny, ids)
        arguments = TrainingArguments(
            output_dir=str(tmp_path / "run"),
            max_steps=steps,
            save_steps=1,
            per_device_train_batch_size=3,
            learning_rate=1e-2,
            lr_scheduler_type="constant",
            use_cpu=True,
            report_to=[],
            disable_tqdm=True,
            seed=0,
        )
        return Trainer(model=model, args=arguments, train_dataset=rows)

    first = trainer(2)
    first.train()
    first.save_model(str(tmp_path / "final"))
    model: Any = first.model
    expected = model.eval()(ids).logits

    resumed = trainer(2)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run/checkpoint-1"))
    again: Any = resumed.model
    assert torch.equal(again.eval()(ids).logits, expected)

    for folder in ("final", "run/checkpoint-2"):
        plain, info = AutoModelForCausalLM.from_pretrained(tmp_path / folder, output_loading_info=True)
        assert not any(info[what] for what in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        assert torch.equal(plain(ids).logits, dense_twin(model, tiny)(ids).logits)
        loaded = load_model(tmp_path / folder)
        assert prepare(loaded, KV4).restored == ["2 KV shifts", "12 static scales"]
        assert torch.equal(loaded(ids).logits, expected)
        assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), model.parameters(), strict=True))


# Options of a saved folder


def test_prepare_takes_the_options_of_the_folder_or_says_what_differs(tiny: Tiny, tmp_path: Path, ids: Tensor) -> None:
    model = tiny("llama")
    skip = ["*.down_proj"]
    prepare(model, KV4, kv_element="E2M1", global_scale="row", kv_rotation=32, kv_signs=9, skip=skip)
    save_model(model, None, tmp_path / "m")
    expected = model(ids).logits

    same: tuple[tuple[str, dict[str, Any]], ...] = (
        (KV4, {}),
        (KV4.lower(), {}),
        (KV4, {"global_scale": "row"}),
        (KV4, {"skip": skip}),
    )
    for name, options in same:
        loaded = load_model(tmp_path / "m")
        report = prepare(loaded, name, **options)
        assert torch.equal(loaded(ids).logits, expected)
        assert report.skip == tuple(skip) and prepare(loaded, KV4) is report
    conflicts: tuple[tuple[str, dict[str, Any]], ...] = (
        ("global_scale", {"global_scale": "dynamic"}),
        ("keys.element", {"kv_element": "E1M2"}),
        ("kv_rotation", {"kv_rotation": None}),
        ("kv_signs", {"kv_signs": 8, "kv_rotation": 32}),
        ("rotation", {"rotation": 16}),
        ("skip", {"skip": []}),
    )
    for what, options in conflicts:
        loaded = load_model(tmp_path / "m")
        with pytest.raises(ReqatError, match=f"{what}: .*override=True"):
            prepare(loaded, KV4, **options)
        assert not quant_linears(loaded)
        report = prepare(loaded, KV4, override=True, **options)
        assert any(line.startswith(what) or what in line for line in report.differs)
    loaded = load_model(tmp_path / "m")
    with pytest.warns(UserWarning, match="keys.*NVFP4.*unquantized"):
        assert "differs   from the checkpoint" in str(prepare(loaded, "NVFP4-W4A4"))
