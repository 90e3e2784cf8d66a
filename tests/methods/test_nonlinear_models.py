"""Tables in models: with exact functions in their places nothing changes; what is hidden stays hidden; calibration."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForTokenClassification, PreTrainedModel

from reqat.config.errors import ReqatError
from reqat.methods.nonlinear import FUNCTIONS, METHODS, VERSIONS, Function, Seen, calibrated, nn_lut, observe, replace
from reqat.methods.nonlinear._calibrate import learned_from
from reqat.methods.nonlinear._layers import Lookup, TableNorm, TableSoftmax, function_of
from reqat.models import prepare
from reqat.models.adapters import UnsupportedModelError

EXACT = {name: function.exact for name, function in FUNCTIONS.items()}
# Per model: lookups of the activation, of norms (blocks and outside), of softmax; all in two layers.
MODELS: dict[str, tuple[Any, dict[str, int]]] = {
    "llama": (AutoModelForCausalLM, {"silu": 2, "rsqrt": 5, "exp": 2, "reciprocal": 2}),
    "qwen3": (AutoModelForCausalLM, {"silu": 2, "rsqrt": 9, "exp": 2, "reciprocal": 2}),
    "gemma": (AutoModelForCausalLM, {"gelu": 2, "rsqrt": 5, "exp": 2, "reciprocal": 2}),
    "qwen2_moe": (AutoModelForCausalLM, {"silu": 4, "rsqrt": 5, "exp": 2, "reciprocal": 2}),
    "bert": (AutoModelForTokenClassification, {"gelu": 2, "rsqrt": 5, "exp": 2, "reciprocal": 2}),
    "distilbert": (AutoModel, {"gelu": 2, "rsqrt": 5, "exp": 2, "reciprocal": 2}),
}


def make(kind: str) -> PreTrainedModel:
    size = {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 1, "head_dim": 16, "vocab_size": 61, "num_experts": 2, "num_experts_per_tok": 1,
        "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16, "decoder_sparse_step": 1,
    }  # fmt: skip
    if kind == "distilbert":
        size = {"vocab_size": 61, "dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 2}
    elif kind == "bert":
        size = {key: size[key] for key in list(size)[:4]} | {"vocab_size": 61}
    torch.manual_seed(0)
    model = MODELS[kind][0].from_config(AutoConfig.for_model(kind, **size))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


def padded() -> dict[str, Tensor]:
    ids = torch.arange(24).reshape(2, 12) % 61
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[0, :4] = 0  # on the left, as decoders have it
    return {"input_ids": ids, "attention_mask": mask}


@torch.no_grad()
def answer(model: PreTrainedModel) -> Tensor:
    out = model(**padded())[0]
    return out[padded()["attention_mask"] > 0]


@pytest.mark.parametrize("kind", MODELS)
def test_exact_functions_change_nothing_and_undo_gives_back_all(kind: str) -> None:
    model = make(kind)
    names, before, state = {name for name, _ in model.named_modules()}, answer(model), set(model.state_dict())
    by_tanh = {"gelu": partial(F.gelu, approximate="tanh")} if kind == "gemma" else {}
    done = replace(model, EXACT | by_tanh)
    counts = MODELS[kind][1]
    assert {f: sum(it.function == f for it in done.lookups.values()) for f in counts} == counts
    assert len(done.lookups) == sum(counts.values())
    assert set(model.state_dict()) == state
    torch.testing.assert_close(answer(model), before, rtol=2e-4, atol=2e-5)
    done.set({name: lambda x, f=f: f(0.9 * x) for name, f in EXACT.items()})
    assert float((answer(model) - before).abs().max()) > 1e-3  # so it does go through the lookups
    done.undo()
    assert torch.equal(answer(model), before) and {name for name, _ in model.named_modules()} == names


@pytest.mark.parametrize(("kind", "precision"), [("llama", "NVFP4-W4A4KV4"), ("bert", "INT8-tensor-W8A8Q8KV8P8")])
def test_quantized_models_keep_their_precision(kind: str, precision: str) -> None:
    model = make(kind)
    prepare(model, precision)
    before = answer(model)
    done = replace(model, EXACT)
    # A last bit before a rounding may decide it.
    torch.testing.assert_close(answer(model), before, rtol=0.05, atol=0.05 * float(before.abs().max()))
    done.undo()
    assert torch.equal(answer(model), before)


def test_functions_that_are_not_named_stay_exact() -> None:
    model = make("bert")
    done = replace(model, {"exp": EXACT["exp"], "gelu": EXACT["gelu"]})
    assert {it.function for it in done.lookups.values()} == {"exp", "gelu"}
    assert set(done.kept.values()) == {"no table of rsqrt"} and len(done.kept) == 5


def test_generation_with_a_cache_goes_through_the_tables() -> None:
    model, ids = make("llama"), torch.arange(7)[None]
    tables = {n: VERSIONS["fp32"](METHODS["linear"](FUNCTIONS[n], 64), FUNCTIONS[n]) for n in ("silu", "exp")}
    replace(model, tables)
    out = model.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0)
    with torch.no_grad():
        assert torch.equal(model(out[:, :-1]).logits[:, 6:].argmax(-1), out[:, 7:])


# --- the operations ---------------------------------------------------------------------------------------------------


def lookup(name: str) -> Lookup:
    return Lookup(name, VERSIONS["fp32"](METHODS["linear"](FUNCTIONS[name], 12), FUNCTIONS[name]))


def test_softmax_is_its_formula_and_hides_what_masks_hide() -> None:
    exp, reciprocal = lookup("exp"), lookup("reciprocal")
    scores = torch.randn(2, 3, 9, generator=torch.Generator().manual_seed(0)) * 3
    scores[0, 0, 4:] = -torch.inf
    scores[0, 1, :2] = torch.finfo(torch.float32).min
    scores[1, 2] = -torch.inf
    p = TableSoftmax(exp, reciprocal)(scores)
    for where in np.ndindex(2, 3):
        s = scores[where]
        seen = s > -1e30
        assert bool((p[where][~seen] == 0).all())
        if bool(seen.any()):
            e = exp(s[seen] - s[seen].max())
            torch.testing.assert_close(p[where][seen], e * reciprocal(e.sum()), rtol=1e-5, atol=1e-7)
    exact = TableSoftmax(Lookup("exp", torch.exp), None)(scores[:1])
    torch.testing.assert_close(exact, torch.softmax(scores[:1], -1))


@pytest.mark.parametrize("norm", [nn.LayerNorm(16, eps=1e-6), nn.RMSNorm(16, eps=1e-6)], ids=["layer", "rms"])
@pytest.mark.parametrize("size", [1e-3, 0.1, 5.0, 300.0, 1e5])
@pytest.mark.parametrize("scaling", ["full", "below"])
def test_norms_are_their_formula_with_scaled_inputs(norm: nn.Module, size: float, scaling: str) -> None:
    x = torch.randn(5, 16, generator=torch.Generator().manual_seed(1)) * size + size
    seen: list[Tensor] = []
    table = TableNorm(norm, Lookup("rsqrt", lambda v: (seen.append(v), torch.rsqrt(v))[1]), scaling)
    torch.testing.assert_close(table(x), norm(x), rtol=1e-5, atol=1e-6)
    squares = (x - x.mean(-1, keepdim=True) if isinstance(norm, nn.LayerNorm) else x).square().mean(-1) + 1e-6
    if scaling == "below":
        expected = torch.where(squares < 1, squares * 1024, squares)
    else:
        expected = squares * 1024.0 ** -torch.floor(torch.log2(squares) / 10)
        assert bool(((seen[0] >= 1) & (seen[0] < 1024)).all())
    torch.testing.assert_close(seen[0][:, 0], expected, rtol=1e-5, atol=0)
    half = TableNorm(norm, Lookup("rsqrt", torch.rsqrt))(x.bfloat16())
    assert half.dtype == torch.bfloat16


def test_activations_are_known_by_their_values() -> None:
    for module, name in ((nn.GELU(), "gelu"), (nn.GELU(approximate="tanh"), "gelu"), (nn.SiLU(), "silu")):
        assert function_of(module) == name
    for other in (nn.ReLU(), nn.Tanh(), nn.Identity(), nn.Mish()):
        assert function_of(other) is None


def test_a_norm_of_another_form_is_refused() -> None:
    class Norm(nn.RMSNorm):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).abs()

    with pytest.raises(UnsupportedModelError, match="Norm"):
        TableNorm(Norm(8, eps=1e-5), lookup("rsqrt"))


def test_what_cannot_be_replaced_is_refused_and_nothing_changed() -> None:
    model = make("llama")
    before = answer(model)
    with pytest.raises(ReqatError, match="tanhh"):
        replace(model, {"tanhh": torch.tanh})
    with pytest.raises(ReqatError, match="gelu"):
        replace(model, {"gelu": EXACT["gelu"]})  # it has SiLU
    with pytest.raises(ReqatError, match="above"):
        replace(model, EXACT, scaling="above")
    with pytest.raises(ReqatError):
        replace(nn.Linear(2, 2), EXACT)  # type: ignore[arg-type]
    norm, eps = model.model.norm, model.model.norm.variance_epsilon  # type: ignore[union-attr]
    del norm.variance_epsilon  # the last operation that is replaced: those before it are given back
    with pytest.raises(UnsupportedModelError, match="Norm"):
        replace(model, EXACT)
    norm.variance_epsilon = eps
    assert torch.equal(answer(model), before)
    replace(model, EXACT)
    with pytest.raises(ReqatError, match="already"):
        replace(model, EXACT)


# --- calibration ------------------------------------------------------------------------------------------------------


def test_observed_inputs_are_those_of_the_operations() -> None:
    model, want = make("bert"), {}
    name, module = next((n, m) for n, m in model.named_modules() if function_of_name(n))
    handle = module.register_forward_pre_hook(lambda _m, args: want.setdefault("x", args[0]))
    answer(model)
    handle.remove()
    done = replace(model, EXACT)
    kept = {n: it.evaluate for n, it in done.lookups.items()}
    seen = observe(model, done, lambda: (answer(model), answer(model)), samples=64)
    assert {n: it.evaluate for n, it in done.lookups.items()} == kept
    at, x = seen[f"{name}: gelu"], want["x"]
    assert at.count == 2 * x.numel() and len(at.samples) == 64
    assert at.low == pytest.approx(float(x.min()), rel=1e-4) and at.high == pytest.approx(float(x.max()), rel=1e-4)
    assert float((at.samples[:, None] - x.flatten()).abs().min(1)[0].max()) < 1e-4
    exps = [it for n, it in seen.items() if n.endswith(": exp")]
    assert all(it.high == 0 and it.count == 2 * 2 * (12 * 12 + 12 * 8) for it in exps)  # hidden keys are no inputs
    with pytest.raises(ReqatError, match="data"):
        observe(model, done, lambda: None)


def function_of_name(name: str) -> bool:
    return name.endswith("0.intermediate.intermediate_act_fn")


def test_calibration_lowers_the_error_at_what_is_seen() -> None:
    function = FUNCTIONS["gelu"]
    model = make("bert")
    network = nn_lut.trained(function, 15, steps=300)
    done = replace(model, {"gelu": VERSIONS["fp32"](network.table(), function)})
    seen = observe(model, done, lambda: answer(model))
    own = calibrated({"gelu": network}, seen, VERSIONS["fp32"], steps=100, lr=1e-3)
    assert set(own) == set(done.lookups)
    for name, evaluate in own.items():
        before, after = (mean_error(e, function, seen[name].samples) for e in (done.lookups[name].evaluate, evaluate))
        assert after < before
    done.set(own)
    assert all(it.evaluate is own[name] for name, it in done.lookups.items())


def mean_error(evaluate: Any, function: Function, x: Tensor) -> float:
    return float((evaluate(x) - function(x)).abs().mean())


def place(function: Function, x: Tensor) -> Seen:
    return Seen(function, x, len(x), float(x.min()), float(x.max()))


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("lr", [1e-4, 1e-2, 1.0, 1e30])
def test_calibration_never_raises_the_error_at_what_it_learns_from(name: str, lr: float) -> None:
    function = FUNCTIONS[name]
    network = nn_lut.trained(function, 15, steps=100, batch=256)
    span, g = function.high - function.low, torch.Generator().manual_seed(0)
    seen = {
        "wide": place(function, function.low + span * torch.rand(200, generator=g)),
        "narrow": place(function, function.low + span * (0.4 + 0.01 * torch.rand(200, generator=g))),
        "one number": place(function, torch.full((200,), function.low + 0.3 * span)),
        "beyond the range": place(function, function.high + torch.rand(200, generator=g)),
    }
    own = calibrated({name: network}, seen, VERSIONS["fp32"], steps=20, batch=64, lr=lr)
    assert set(own) == set(seen)
    start = VERSIONS["fp32"](network.table(), function)
    for at, evaluate in own.items():
        x = learned_from(seen[at])
        assert len(x) == 400 and float(x.min()) == seen[at].low and float(x.max()) == seen[at].high
        # A network and its table differ by a rounding.
        assert mean_error(evaluate, function, x) <= mean_error(start, function, x) * (1 + 1e-4) + 1e-6


def test_calibration_does_not_give_up_rare_inputs() -> None:
    """Mean squares of a decoder: those of first tokens are few, and far from the others."""
    function, g = FUNCTIONS["rsqrt"], torch.Generator().manual_seed(0)
    often, rare = 20 + 20 * torch.rand(500, generator=g), 250 + 250 * torch.rand(50, generator=g)
    seen = {"norm": Seen(function, often, 10**6, 20.0, 500.0)}  # rare ones are not among the samples
    network = nn_lut.trained(function, 15, steps=600, batch=256)
    own = calibrated({"rsqrt": network}, seen, VERSIONS["fp32"], batch=256)["norm"]
    by_frequency = nn_lut.train(function, network, often, g, steps=300, batch=256, lr=1e-4)
    assert mean_error(own, function, often) < mean_error(network, function, often)
    assert mean_error(own, function, rare) < mean_error(by_frequency, function, rare) / 2
    assert mean_error(own, function, rare) < 2 * mean_error(network, function, rare)


def test_networks_that_are_trained_side_by_side_learn_each_on_its_own() -> None:
    function, g = FUNCTIONS["silu"], torch.Generator().manual_seed(0)
    x, starts = torch.stack([torch.full((50,), -2.0), torch.full((50,), 3.0)]), nn_lut.initial(function, 6, g)
    both = nn_lut.Network(*(w.repeat(2, 1) for w in (starts.inner, starts.bias, starts.outer)))
    together = nn_lut.train(function, both, x, g, steps=30, batch=8, lr=1e-2)
    for i in range(2):  # all samples of one are the same, so it does not matter which are drawn
        alone = nn_lut.train(function, starts, x[i], g, steps=30, batch=8, lr=1e-2)
        for part in ("inner", "bias", "outer"):
            torch.testing.assert_close(getattr(together, part)[i], getattr(alone, part))
