"""Experts: opened into linear layers, quantized one by one, and given back as what they were."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.integrations.moe import use_experts_implementation

from reqat.formats import quantize
from reqat.inference import pack
from reqat.methods import ptq
from reqat.models import calibrate_static, freeze, load_model, prepare, quant_linears, save_model
from reqat.models.adapters import blocks_of
from reqat.models.experts import Experts, fused_experts, routers
from reqat.models.linear import QuantLinear
from reqat.models.pretrained import plain_state
from reqat.quant import Precision, block_hadamard

FAMILIES = ("qwen3_moe", "mixtral")
E, H = 4, 64


def make(kind: str = "qwen3_moe", **changes: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    shape = {
        "hidden_size": H, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 32, "vocab_size": 61, "max_position_embeddings": 64,
        "num_experts": E, "num_local_experts": E, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
        "tie_word_embeddings": False, "eos_token_id": None,
    }  # fmt: skip
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**shape, **changes}))
    for name, parameter in model.named_parameters():
        if "embed" not in name and parameter.ndim > 1:
            parameter.data.mul_(4)
    return model.eval()


def experts_of(model: PreTrainedModel, layer: int = 0) -> Any:
    return model.get_submodule(f"model.layers.{layer}.mlp.experts")


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(0, 61, (3, 14), generator=torch.Generator().manual_seed(1))


def routed(tokens: int = 11, k: int = 2, hidden: int = H) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs of the experts: x, which experts (the last one never), and their weights."""
    torch.manual_seed(5)
    scores = torch.rand(tokens, E - 1)
    return torch.randn(tokens, hidden), scores.topk(k).indices, torch.rand(tokens, k)


def reference(source: Any, precision: Precision, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """Every token through each of its experts, one after the other, quantized by codes."""

    def q(t: Tensor, fmt: Any) -> Tensor:
        t = t if precision.rotation is None else block_hadamard(t, precision.rotation)
        return t if fmt is None else quantize(t, fmt).dequantize()

    def linear(t: Tensor, weight: Tensor) -> Tensor:
        return F.linear(q(t, precision.inputs), q(weight, precision.weights))

    out = torch.zeros_like(x)
    for token, chosen in enumerate(index.tolist()):
        for slot, expert in enumerate(chosen):
            gate, up = linear(x[token : token + 1], source.gate_up_proj[expert]).chunk(2, -1)
            out[token] += weights[token, slot] * linear(F.silu(gate) * up, source.down_proj[expert])[0]
    return out


@pytest.mark.parametrize("kind", FAMILIES)
@pytest.mark.parametrize("name", ["NVFP4-W4A4", "MXFP4-W4A4:rotation=32", "NVFP4-W4A16", "NVFP4-W16A4"])
def test_experts_are_quantized_one_by_one(kind: str, name: str) -> None:
    model = make(kind).double()
    source = copy.deepcopy(experts_of(model))
    prepare(model, name)
    opened = experts_of(model)
    assert sum(isinstance(module, QuantLinear) for module in opened.modules()) == 2 * E
    x, index, weights = routed()
    x, weights = x.double(), weights.double()
    expected = reference(source, Precision.parse(name), x, index, weights)
    torch.testing.assert_close(opened(x, index, weights), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(freeze(model).get_submodule("model.layers.0.mlp.experts")(x, index, weights), expected)


@use_experts_implementation(is_transposed=True, has_bias=True)
class Turned(nn.Module):
    """Experts [E, K, N] with biases and a gating of its own."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.num_experts = E
        self.gate_up_proj = nn.Parameter(torch.randn(E, H, 64))
        self.gate_up_proj_bias = nn.Parameter(torch.randn(E, 64))
        self.down_proj = nn.Parameter(torch.randn(E, 32, H))
        self.down_proj_bias = nn.Parameter(torch.randn(E, H))

    def _apply_gate(self, gate_up: Tensor) -> Tensor:
        return gate_up[..., ::2].clamp(max=1) * gate_up[..., 1::2].tanh()

    def forward(self, *args: Any) -> Tensor:
        raise NotImplementedError


@use_experts_implementation(has_gate=False)
class Ungated(nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        self.num_experts, self.act_fn = E, nn.ReLU()
        self.up_proj = nn.Parameter(torch.randn(E, 32, H))
        self.down_proj = nn.Parameter(torch.randn(E, H, 32))

    def forward(self, *args: Any) -> Tensor:
        raise NotImplementedError


@pytest.mark.parametrize("kind", [*FAMILIES, "turned", "ungated"])
def test_opened_experts_are_what_they_were(kind: str) -> None:
    """Values, gradients, and the state dict there and back; the experts read the memory that was there."""
    torch.manual_seed(0)
    config = AutoConfig.for_model("mixtral", hidden_size=H)
    config._experts_implementation = "batched_mm"
    made = {"turned": Turned, "ungated": Ungated}
    source: Any = made[kind](config) if kind in made else experts_of(make(kind))
    inputs = routed()
    expected = source(*inputs)
    expected.square().sum().backward()
    holder = nn.Module()
    holder.experts = source
    before = {f"model.experts.{name}": value.clone() for name, value in source.state_dict().items()}
    grads = {f"model.experts.{name}": value.grad for name, value in source.named_parameters()}
    (found,) = fused_experts(holder, "model")
    addresses = {name: weight.data_ptr() for name, weight in found.weights().items()}
    opened = found.open()
    assert holder.experts is opened and addresses == {
        f"model.experts.{name}": module.weight.data_ptr()
        for name, module in opened.named_modules()
        if isinstance(module, nn.Linear)
    }
    out = opened(*inputs)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)
    out.square().sum().backward()
    gradients = {
        f"model.experts.{name}": torch.zeros_like(p) if p.grad is None else p.grad
        for name, p in opened.named_parameters()
    }
    opened.fuse(gradients, "model.experts.")
    state = {f"model.experts.{name}": value for name, value in opened.state_dict().items()}
    assert not state.keys() & before.keys()
    opened.fuse(state, "model.experts.")
    assert state.keys() == before.keys() == gradients.keys()
    for name, value in before.items():
        assert torch.equal(state[name], value), name
        torch.testing.assert_close(gradients[name], grads[name], rtol=1e-3, atol=1e-3)
    with torch.no_grad():
        for parameter in opened.parameters():
            parameter.zero_()
    holder.load_state_dict({name.removeprefix("model."): value for name, value in before.items()})
    assert torch.equal(opened(*inputs), out)
    assert torch.equal(opened(torch.zeros(0, H), inputs[1][:0], inputs[2][:0]), torch.zeros(0, H))


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_mixture_trains_and_its_checkpoint_is_everyones(tmp_path: Path, kind: str, ids: Tensor) -> None:
    model = make(kind).train()
    plain = copy.deepcopy(model)
    save_model(plain, None, tmp_path / "plain")
    report = prepare(model, "NVFP4-W4A4KV4")
    assert list(quant_linears(model)) == [entry.name for entry in report.quantized]
    model(ids, labels=ids, use_cache=False).loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name
    assert {k: v.shape for k, v in plain_state(model).items()} == {k: v.shape for k, v in plain.state_dict().items()}

    out = freeze(model)(ids).logits
    save_model(model, None, tmp_path / "m")
    names = [set(load_file(tmp_path / folder / "model.safetensors")) for folder in ("plain", "m")]
    assert names[0] == names[1]
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    linears = quant_linears(model)
    for expert in range(E):
        codes = linears[f"model.layers.1.mlp.experts.{expert}.down_proj"].quantized
        assert codes is not None
        assert torch.equal(experts_of(dense, 1).down_proj[expert], codes.dequantize())
    again = load_model(tmp_path / "m")
    prepare(again, "NVFP4-W4A4KV4")
    assert torch.equal(again(ids).logits, out)
    changed = load_model(tmp_path / "m")
    experts_of(changed).down_proj.data[2] += 0.1
    with pytest.raises(ValueError, match=r"layers\.0\.mlp\.experts\.2\.down_proj"):
        prepare(changed, "NVFP4-W4A4KV4")


def test_the_report_says_what_stays(ids: Tensor) -> None:
    model = make()
    report = prepare(model, "NVFP4-W4A4", skip=["*.experts.3.*"])
    reasons = {entry.name: entry.reason for entry in report.skipped}
    assert "routers are never quantized" in reasons["model.layers.0.mlp.gate"]
    assert reasons["model.layers.1.mlp.experts.3.gate_up_proj"] == "skipped on request"
    weights = sum(p.numel() for p in make().model.layers.parameters() if p.ndim > 1)
    left = 2 * E * H
    assert (report.block_weights, report.left) == (weights, left)
    assert report.share == pytest.approx(1 - (left + 2 * (64 * H + H * 32)) / weights)
    assert report.warning is None and f"share     {report.share:.2%}" in str(report)
    assert torch.isfinite(model(ids).logits).all()


def test_weights_that_nothing_quantizes_are_a_warning() -> None:
    model = make()
    for layer in range(2):
        experts_of(model, layer).has_post_expert_norm = True
    with pytest.warns(UserWarning, match=r"\d+\.\d% of the weights.*layers\.\*\.mlp\.experts\.gate_up_proj"):
        report = prepare(model, "NVFP4-W4A4")
    assert report.warning is not None and f"WARNING   {report.warning}" in str(report)
    assert not any(isinstance(module, Experts) for module in model.modules())
    model = make()
    assert prepare(model, "NVFP4-KV4").warning is None  # no layer is to be quantized
    assert not any(isinstance(module, Experts) for module in model.modules())


def test_routers_are_told_from_layers_of_their_size() -> None:
    """A shared expert may be as wide as there are experts; its matrices are layers."""
    model = make("qwen2_moe", shared_expert_intermediate_size=E * 8, num_experts=E * 8, num_local_experts=E * 8)
    layer = model.model.layers[0]
    assert {id(weight) for weight in routers(layer)} == {
        id(layer.mlp.gate.weight),
        id(layer.mlp.shared_expert_gate.weight),
    }
    names = {site.name for site in blocks_of(model)[0].sites()}
    assert "model.layers.0.mlp.shared_expert.gate_proj" in names
    assert "model.layers.0.mlp.shared_expert_gate" not in names


def test_one_static_scale_for_the_inputs_of_all_experts(tmp_path: Path, ids: Tensor) -> None:
    model = make()
    prepare(model, "NVFP4-W4A4", global_scale="static")
    assert calibrate_static(model, [ids]) == 2 * (2 + 2)
    scales = [layer.input_quantizer.global_scale for name, layer in quant_linears(model).items() if "experts" in name]
    assert len({float(scale) for scale in scales if scale is not None}) == 4 and None not in scales
    out = model(ids).logits
    save_model(model, None, tmp_path / "m")
    again = load_model(tmp_path / "m")
    prepare(again, "NVFP4-W4A4")
    assert torch.equal(again(ids).logits, out)


def test_gptq_solves_an_expert_for_the_tokens_that_chose_it(ids: Tensor) -> None:
    model = make(num_hidden_layers=1)
    never = E - 1
    gate = model.get_submodule("model.layers.0.mlp.gate")
    gate.register_forward_hook(lambda _m, _args, out: (*out[:2], out[2].clamp(max=never - 1)))
    report, metrics = ptq.quantize("gptq", model, "NVFP4-W4A4", ids, progress=False)
    found = {entry["layer"]: entry for entry in metrics["layers"]}
    assert set(found) == {entry.name for entry in report.quantized} and len(found) == 4 + 2 * E
    for name, entry in found.items():
        if f"experts.{never}." in name:
            assert (entry["tokens"], entry["error"]) == (0, 0)
            linear, dense = quant_linears(model)[name], make(num_hidden_layers=1)
            weight = blocks_of(dense)[0].weights()[name]
            assert linear.quantized is not None
            assert torch.equal(linear.quantized.codes, quantize(weight, linear.quantized.format).codes)
        else:
            # named where they were fewer than the layer's inputs
            assert entry.get("tokens", 10**6) > 0 and entry["error"] < 0.6 * entry["error_nearest"]


def test_transforms_leave_experts_alone_and_say_so(ids: Tensor) -> None:
    for method in ("awq", "smoothquant"):
        model = make()
        before = experts_of(model).gate_up_proj.clone()
        _, metrics = ptq.quantize(method, model, "NVFP4-W4A4", ids, progress=False)
        assert metrics["experts"] == "rounded to nearest"
        codes = quant_linears(model)["model.layers.0.mlp.experts.0.gate_up_proj"].quantized
        assert codes is not None and torch.equal(codes.codes, quantize(before[0], codes.format).codes)
    _, metrics = ptq.quantize("rtn", make(), "NVFP4-W4A4", progress=False)
    assert "experts" not in metrics


@pytest.mark.parametrize("kind", FAMILIES)
@pytest.mark.parametrize("name", ["NVFP4-W4A16", "MXFP4-W4A4KV4:rotation=32"])
def test_a_packed_mixture_computes_the_same(kind: str, name: str, ids: Tensor) -> None:
    model = make(kind)
    prepare(model, name)
    expected = freeze(model)(ids).logits
    inputs = routed()
    first = {n: layer(inputs[0]) for n, layer in quant_linears(model).items() if n.endswith("gate_up_proj")}
    pack(model)
    assert not quant_linears(model)
    for n, out in first.items():
        torch.testing.assert_close(model.get_submodule(n)(inputs[0]), out, rtol=1e-5, atol=1e-5)
    actual = model(ids).logits
    # Where inputs are rounded, a sum that crosses a threshold moves the logits of its token.
    assert float((actual - expected).norm() / expected.norm()) < (1e-5 if "W4A16" in name else 0.1)
    assert model.generate(ids, max_new_tokens=3, do_sample=False).shape == (3, 17)
