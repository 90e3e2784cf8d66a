"""What a format cannot hold is refused before anything is written, and the remedy is named."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import BertConfig, BertForMaskedLM, PreTrainedModel

import reqat
from reqat.config.errors import ReqatError
from reqat.export import EXPORTERS, export_model
from reqat.models import freeze, load_model, prepare, quant_linears, save_model
from tests.models.test_peft import LoRA

Tiny = Callable[..., PreTrainedModel]
ENGINES = sorted(name for name, exporter in EXPORTERS.items() if exporter.families is not None)


def refused(model: Any, folder: Path, format: str, *words: str, **options: Any) -> None:
    before = sorted(folder.parent.iterdir())
    with pytest.raises(ReqatError) as error:
        export_model(model, None, folder, format, **options)
    for word in words:
        assert word in str(error.value)
    assert sorted(folder.parent.iterdir()) == before


@pytest.mark.parametrize("format", ENGINES)
@pytest.mark.parametrize(
    ("precision", "words"),
    [
        ("MXFP4-W4A16:rotation=32", ("otat",)),
        ("NVFP4-W4A16:element=E1M2", ("E1M2",)),
        ("INT4-g32-W4A16", ("INT4-g32", "NVFP4")),
        ("AMXFP4-W4A4", ("AMXFP4",)),
        ("NVFP4-W4+MXFP4-A4", ("NVFP4", "MXFP4")),
        ("NVFP4-KV4", ("no weights", "W4A16")),
        ("NVFP4-W4A5", ("W4A4",)),
    ],
)
def test_precisions(tiny: Tiny, tmp_path: Path, format: str, precision: str, words: tuple[str, ...]) -> None:
    if format == "modelopt" and precision.startswith("MXFP4"):
        words = ("MXFP4", "NVFP4")
    refused(tiny(), tmp_path / "out", format, *words, precision=precision)


@pytest.mark.parametrize("format", [*ENGINES, "reqat"])
def test_a_model_that_is_not_quantized_needs_a_precision(tiny: Tiny, tmp_path: Path, format: str) -> None:
    refused(tiny(), tmp_path / "out", format, "--precision")
    model = tiny()
    prepare(model, "BF16")
    refused(model, tmp_path / "out", format, "--precision")


def test_modelopt_holds_no_mxfp4(tiny: Tiny, tmp_path: Path) -> None:
    refused(tiny(), tmp_path / "out", "modelopt", "MXFP4", precision="MXFP4-W4A16")


@pytest.mark.parametrize("format", ENGINES)
def test_mixtures_of_experts_and_encoders(tiny: Tiny, tmp_path: Path, format: str) -> None:
    experts = tiny("qwen3_moe", num_experts=4, num_experts_per_tok=2, moe_intermediate_size=64)
    refused(experts, tmp_path / "out", format, "experts", "--format reqat", precision="NVFP4-W4A16")
    encoder = BertForMaskedLM(
        BertConfig(vocab_size=61, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)
    )
    refused(encoder, tmp_path / "out", format, "bert", "--format reqat", precision="NVFP4-W4A16")
    export_model(tiny("qwen3_moe", num_experts=4, num_experts_per_tok=2, moe_intermediate_size=64), None,
                 tmp_path / "ours", "reqat", precision="NVFP4-W4A16")  # fmt: skip


@pytest.mark.parametrize("format", ENGINES)
def test_what_a_model_computes_beyond_its_precision(tiny: Tiny, ids: Tensor, tmp_path: Path, format: str) -> None:
    def prepared() -> tuple[PreTrainedModel, Any]:
        model = tiny()
        prepare(model, "NVFP4-W4A4", global_scale="static" if format != "gguf" else "row")
        return model, next(iter(quant_linears(model).values()))

    model, layer = prepared()
    layer.input_quantizer.set_clip(torch.tensor([0.9, 0.9]))
    refused(model, tmp_path / "out", format, "clipped", "rtn", calibration=[ids])
    model, layer = prepared()
    layer.basis.set(None, torch.eye(64)[torch.randperm(64)])
    refused(model, tmp_path / "out", format, "basis", "rtn", calibration=[ids])
    model, layer = prepared()
    layer.input_quantizer.gradient.register_parameter("gamma", torch.nn.Parameter(torch.ones(())))
    refused(model, tmp_path / "out", format, "learned", "rtn", calibration=[ids])


def test_adapters(tiny: Tiny, tmp_path: Path) -> None:
    model = tiny()
    mlp = model.model.layers[1].mlp
    mlp.up_proj = LoRA(mlp.up_proj)
    refused(model, tmp_path / "out", "compressed-tensors", "LoRA", "merge", precision="NVFP4-W4A16")


def test_layers_that_engines_join(tiny: Tiny, tmp_path: Path) -> None:
    half = {"precision": "NVFP4-W4A16", "skip": ["*.layers.0.self_attn.k_proj"]}
    refused(tiny(), tmp_path / "out", "compressed-tensors", "k_proj", "skip", **half)
    export_model(tiny(intermediate_size=128), None, tmp_path / "gguf", "gguf", **half)  # llama.cpp joins none
    model = tiny()
    prepare(model, "NVFP4-W4A16")
    freeze(model)
    refused(model, tmp_path / "out", "modelopt", "q_proj", "--share-global-scale")


def test_blocks_that_do_not_divide(tiny: Tiny, tmp_path: Path) -> None:
    refused(
        tiny(intermediate_size=72), tmp_path / "out", "compressed-tensors", "down_proj", "skip", precision="NVFP4-W4A16"
    )
    refused(tiny(), tmp_path / "out", "gguf", "model.layers.0.mlp.down_proj.weight", "64", precision="NVFP4-W4A16")
    skipped = export_model(tiny(), None, tmp_path / "out", "gguf", precision="NVFP4-W4A16", skip=["*.mlp.down_proj"])
    assert skipped.layers == 12


def test_a_global_scale_of_weights_that_no_engine_has(tiny: Tiny, tmp_path: Path) -> None:
    for name in ("compressed-tensors", "modelopt", "gguf"):
        refused(
            tiny(), tmp_path / "out", name, "weights.global_scale", precision="NVFP4-W4A16:weights.global_scale=row"
        )


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}}, "yarn"),
        ({"family": "olmo2"}, "olmo2"),
        ({"family": "qwen2"}, "hidden_size 64"),
    ],
)
def test_models_that_gguf_is_not_written_for(tiny: Tiny, tmp_path: Path, changes: dict[str, Any], word: str) -> None:
    refused(tiny(**changes), tmp_path / "out", "gguf", word, precision="MXFP4-W4A16")


def test_layers_whose_global_scale_llama_cpp_leaves_out(tiny: Tiny, tmp_path: Path) -> None:
    wanted: dict[str, Any] = {"precision": "NVFP4-W4A16"}
    model = tiny("qwen2", hidden_size=128, intermediate_size=128)
    refused(model, tmp_path / "out", "gguf", "mlp", "--skip '*.mlp.*'", **wanted)
    model = tiny("qwen2", hidden_size=128, intermediate_size=128)
    assert export_model(model, None, tmp_path / "out", "gguf", skip=["*.mlp.*"], **wanted).layers == 8


def test_nothing_existing_is_overwritten_unasked(tiny: Tiny, tmp_path: Path) -> None:
    wanted = {"precision": "MXFP4-W4A16"}
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    refused(tiny(), tmp_path / "mine", "compressed-tensors", "mine", **wanted)
    refused(tiny(), tmp_path / "mine", "compressed-tensors", "mine", overwrite=True, **wanted)
    assert (tmp_path / "mine" / "notes.txt").read_text() == "mine"
    export_model(tiny(), None, tmp_path / "out", "compressed-tensors", **wanted)
    refused(tiny(), tmp_path / "out", "compressed-tensors", "--force", **wanted)
    export_model(tiny(), None, tmp_path / "out", "modelopt", precision="NVFP4-W4A16", overwrite=True)
    assert (tmp_path / "out" / "hf_quant_config.json").is_file()
    with pytest.raises(ReqatError, match="quantized already.*exported from"):  # no base for another export
        load_model(tmp_path / "out")


def test_unknown_formats_and_packed_or_otherwise_prepared_models(tiny: Tiny, tmp_path: Path) -> None:
    refused(tiny(), tmp_path / "out", "ggml", "'gguf'", precision="MXFP4-W4A16")
    model = tiny()
    prepare(model, "NVFP4-W4A4")  # a scale a row, which no file can hold
    refused(model, tmp_path / "out", "compressed-tensors", "static", "load it again")
    model = tiny()
    prepare(model, "MXFP4-W4A4")
    reqat.pack(model)
    refused(model, tmp_path / "out", "compressed-tensors", "packed")


def test_options_of_a_saved_folder_are_held(tiny: Tiny, tmp_path: Path) -> None:
    model = tiny()
    prepare(model, "MXFP4-W4A16:scale_rule=even")
    freeze(model)
    save_model(model, None, tmp_path / "m")
    loaded = load_model(tmp_path / "m")
    refused(loaded, tmp_path / "out", "compressed-tensors", "scale_rule", precision="MXFP4-W4A16:scale_rule=floor")
    assert export_model(loaded, None, tmp_path / "out", "compressed-tensors").precision.weights.scale_rule == "even"
