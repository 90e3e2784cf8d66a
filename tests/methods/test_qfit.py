"""Q-FIT: the fold changes nothing in full precision, the grid is the naive one, and keys really quantize better."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from safetensors import safe_open
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from reqat.config.errors import MissingFileError, ReqatError
from reqat.formats import quantize_dequantize
from reqat.methods.qfit import AttentionError, QFitResult, calibrate, fold, pair_scale
from reqat.models import freeze, kv_quantizers, load_model, prepare, save_model
from reqat.quant import Precision, block_hadamard, with_signs

KV4 = "NVFP4-KV4:kv_element=E1M2"
CASES = [("llama", "shared"), ("qwen2", "shared"), ("qwen3", "shared"), ("qwen3", "widened")]


def random_result(result: QFitResult, *, share: bool, pairs: bool = True) -> QFitResult:
    """The same result with strong random scales and shifts in place of the chosen ones."""
    g = torch.Generator().manual_seed(3)
    L, G, D = result.scale.shape
    half = torch.rand(L, 1 if share else G, D // 2, generator=g).mul(3).sub(1.5).exp().expand(L, G, D // 2)
    other = half if pairs else half.flip(-1)
    return dataclasses.replace(result, scale=torch.cat([half, other], -1), shift=torch.randn(L, G, D, generator=g) * 3)


def logits_with_shift_but_no_rounding(model, ids):
    """Full-precision logits on the path of quantized keys: the shift is subtracted, only the rounding is left out."""
    prepare(model, KV4)
    for kv in kv_quantizers(model):
        kv.key.forward = kv.value.forward = lambda x: x
    with torch.no_grad():
        return model(ids).logits


@pytest.mark.parametrize(("family", "qk_norm"), CASES)
def test_fold_preserves_the_function(tiny, float64_norms, ids, family, qk_norm):
    model = float64_norms(tiny(family, dtype=torch.float64))
    with torch.no_grad():
        before = model(ids).logits
    result = random_result(
        calibrate(model, KV4, ids, grid=2, qk_norm=qk_norm, progress=False), share=(family, qk_norm) == CASES[2]
    )
    fold(model, result)
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, before, rtol=0, atol=1e-12)
    shifted = logits_with_shift_but_no_rounding(model, ids)
    assert all(kv.shift.abs().max() > 1 for kv in kv_quantizers(model))
    torch.testing.assert_close(shifted, before, rtol=0, atol=1e-12)


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_the_two_halves_of_a_rope_pair_must_share_their_scale(tiny, float64_norms, ids, family):
    """The control of the test above: scales that differ within a pair do change the function."""
    model = float64_norms(tiny(family, dtype=torch.float64))
    with torch.no_grad():
        before = model(ids).logits
    fold(model, random_result(calibrate(model, KV4, ids, grid=1, progress=False), share=False, pairs=False))
    with torch.no_grad():
        assert (model(ids).logits - before).abs().max() > 1e-3


def naive_error(model, ids, a, b, *, precision, variant="paper", share=False):
    """E(a, b) of layer 0 by the formulas as they stand, in float64 but for the quantizers."""
    layer, attention = model.model.layers[0], model.model.layers[0].self_attn
    n, T = ids.shape
    D = attention.head_dim
    with torch.no_grad():
        hidden = layer.input_layernorm(model.model.embed_tokens(ids))
        q, k, v = (p(hidden).view(n, T, -1, D) for p in (attention.q_proj, attention.k_proj, attention.v_proj))
        if hasattr(attention, "q_norm"):
            q, k = attention.q_norm(q), attention.k_norm(k)
        q, k, v = (x.transpose(1, 2).double() for x in (q, k, v))
        cos, sin = (c.double() for c in model.model.rotary_emb(hidden, torch.arange(T)[None]))
        group = q.shape[1] // k.shape[1]
        s0 = k.abs().amax((0, 2)).unflatten(-1, (2, D // 2)).amax(1).repeat(1, 2)
        s = (s0.amax(0, keepdim=True).expand_as(s0) if share else s0) ** a
        q_scaled, k_scaled = q * s.repeat_interleave(group, 0)[:, None], k / s[:, None]
        q_tilde, k_tilde = apply_rotary_pos_emb(q_scaled, k_scaled, cos, sin)
        mean = (k_tilde if variant == "paper" else k_scaled).mean((0, 2))
        m = (b * mean)[:, None]
        if precision.kv_rotation:
            q_tilde, k_moved = (
                block_hadamard(with_signs(x, precision.kv_signs), precision.kv_rotation) for x in (q_tilde, k_tilde - m)
            )
            k_hat = quantize_dequantize(k_moved.float(), precision.keys)
        else:
            k_hat = quantize_dequantize((k_tilde - m).float(), precision.keys)
        v_hat = quantize_dequantize(v.float(), precision.values)

        def attend(q, k, v):
            k, v = (x.double().repeat_interleave(group, 1) for x in (k, v))
            logits = q @ k.transpose(2, 3)
            if variant == "paper":
                logits = (logits / D**0.5).masked_fill(torch.ones(T, T).triu(1).bool(), -torch.inf)
            return logits.softmax(-1) @ v

        reference = attend(*apply_rotary_pos_emb(q, k, cos, sin), v)
        return float((reference - attend(q_tilde, k_hat, v_hat)).square().mean())


@pytest.mark.parametrize("variant", ["paper", "released"])
@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("llama", {"kv_element": "E1M2", "global_scale": "dynamic"}),
        ("qwen2", {"kv_element": "E1M2"}),
        ("qwen3", {"kv_element": "E1M2", "kv_rotation": 32}),
        ("llama", {"kv_rotation": 16, "kv_signs": 1}),
        ("llama", {}),
    ],
)
def test_error_map_is_the_naive_one(tiny, ids, family, options, variant):
    model = tiny(family)
    precision = Precision.parse("NVFP4-KV4", **options)
    result = calibrate(model, precision, ids, grid=3, variant=variant, progress=False)
    assert result.alphas == result.betas == (0, 1 / 3, 2 / 3)
    options = {"precision": precision, "variant": variant, "share": family == "qwen3"}
    naive = [[naive_error(model, ids, a, b, **options) for b in result.betas] for a in result.alphas]
    torch.testing.assert_close(result.errors[0], torch.tensor(naive, dtype=torch.float64), rtol=1e-4, atol=0)


@pytest.mark.parametrize(
    ("scale", "shift", "shape"), [(True, False, (4, 1)), (False, True, (1, 4)), (False, False, (1, 1))]
)
def test_ablations_are_edges_of_the_full_grid(tiny, ids, scale, shift, shape):
    model = tiny("llama")
    full = calibrate(model, KV4, ids, grid=4, progress=False)
    part = calibrate(model, KV4, ids, grid=4, scale=scale, shift=shift, progress=False)
    assert part.errors.shape == (2, *shape)
    torch.testing.assert_close(part.errors, full.errors[:, : shape[0], : shape[1]], rtol=0, atol=0)
    assert scale or (part.scale == 1).all()
    assert shift or (part.shift == 0).all()


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_the_choice_is_the_first_best_and_never_worse_than_nothing(tiny, ids, family):
    result = calibrate(tiny(family), KV4, ids, grid=6, progress=False)
    for layer, (i, j) in enumerate(result.choice):
        flat = result.errors[layer].flatten().tolist()
        assert i * 6 + j == flat.index(min(flat))
        assert result.error_after[layer] <= result.error_before[layer] == flat[0]


def test_nothing_to_gain_means_nothing_is_done(tiny, ids):
    model = tiny("llama")
    for layer in model.model.layers:
        torch.nn.init.zeros_(layer.self_attn.k_proj.weight)
    result = calibrate(model, KV4, ids, grid=3, progress=False)
    assert result.choice == ((0, 0), (0, 0)) and (result.scale == 1).all() and (result.shift == 0).all()


def test_keys_with_outlier_channels_quantize_better(tiny, ids):
    """Outlier channels before RoPE, and a mean: the error of keys (as queries see them) and of attention drop."""
    model = tiny("qwen2")
    for layer in model.model.layers:
        attention = layer.self_attn
        with torch.no_grad():
            rows = attention.k_proj.weight.view(2, 32, -1)
            rows[:, [3, 14, 19, 30]] *= 12.0
            attention.q_proj.weight.view(4, 32, -1)[:, [3, 14, 19, 30]] /= 12.0
            attention.k_proj.bias.mul_(4)
    keys = []

    def key_error(model):
        """Mean squared error of layer 0's keys in the basis of the original queries, over their variance."""
        kv = kv_quantizers(model)[0]
        keys.clear()
        handle = kv.key.register_forward_hook(lambda _m, args, out: keys.append((args[0], out)))
        with torch.no_grad():
            model(ids)
        handle.remove()
        return keys[0]

    plain, fitted = tiny("qwen2"), tiny("qwen2")
    plain.load_state_dict(model.state_dict())
    fitted.load_state_dict(model.state_dict())
    result = calibrate(model, KV4, ids, grid=10, progress=False)
    fold(fitted, result)
    prepare(plain, KV4)
    prepare(fitted, KV4)
    x, x_hat = key_error(plain)
    y, y_hat = key_error(fitted)
    s = result.scale[0][:, None]
    unscaled = y * s + (result.shift[0][:, None] * s)
    torch.testing.assert_close(unscaled, x, rtol=0, atol=2e-4)  # the same keys, seen through the fold
    outlier = torch.zeros(32, dtype=torch.bool)
    outlier[[3, 14, 19, 30]] = True
    before, after = (x_hat - x).square().mean((0, 1, 2)), ((y_hat - y) * s).square().mean((0, 1, 2))
    assert result.alpha[0] > 0
    assert after[~outlier].mean() < 0.5 * before[~outlier].mean()
    # What remains of the attention error is mostly the values', which Q-FIT does not touch.
    assert result.error_after[0] < 0.5 * result.error_before[0]
    assert all(a < b for a, b in zip(result.error_after, result.error_before, strict=True))


def test_folded_model_meets_the_error_that_calibration_promised(tiny, ids):
    """Attention outputs of the prepared model, layer 0, against full precision: E at the chosen point."""
    model, folded = tiny("qwen2"), tiny("qwen2")
    result = calibrate(model, KV4, ids, grid=5, progress=False)
    fold(folded, result)
    outputs = []
    for m, precision in ((model, "BF16"), (folded, KV4)):
        prepare(m, precision)
        o_proj = m.model.layers[0].self_attn.o_proj
        handle = o_proj.register_forward_pre_hook(lambda _m, args: outputs.append(args[0]))
        with torch.no_grad():
            m(ids)
        handle.remove()
    measured = float((outputs[0] - outputs[1]).square().mean())
    assert measured == pytest.approx(result.error_after[0], rel=1e-3)
    assert result.error_after[0] < result.error_before[0]


def test_query_positions_can_be_thinned_out():
    g = torch.Generator().manual_seed(1)
    q, k, v, k_hat, v_hat = (torch.randn(3, h, 40, 16, generator=g) for h in (4, 2, 2, 2, 2))
    k_hat, v_hat = k + 0.1 * k_hat, v + 0.1 * v_hat

    def outputs(k, v):
        k, v = (x.double().repeat_interleave(2, 1) for x in (k, v))
        logits = (q.double() @ k.transpose(2, 3) / 4).masked_fill(torch.ones(40, 40).triu(1).bool(), -torch.inf)
        return logits.softmax(-1) @ v

    squares = (outputs(k, v) - outputs(k_hat, v_hat)).square()
    for queries, positions in [(None, range(40)), (40, range(40)), (99, range(40)), (8, range(4, 40, 5)), (1, [39])]:
        error = AttentionError(q, k, v, v_hat, torch.zeros(2, 16), scaling=0.25, queries=queries)
        expected = float(squares[:, :, list(positions)].mean())
        assert error(k_hat, 0.0) == pytest.approx(expected, rel=1e-5)


def test_logits_that_overflow_the_stand_in_maximum_are_computed_again():
    g = torch.Generator().manual_seed(2)
    q, k, v = (torch.randn(2, 2, 70, 16, generator=g) for _ in range(3))
    wild = torch.randn(2, 2, 70, 16, generator=g) * 100  # logits of several hundred, far from the reference's

    def outputs(k):
        logits = (q.double() @ k.double().transpose(2, 3)).masked_fill(torch.ones(70, 70).triu(1).bool(), -torch.inf)
        return logits.softmax(-1) @ v.double()

    error = AttentionError(q, k, v, v, torch.zeros(2, 16), scaling=1.0)
    expected = float((outputs(k) - outputs(wild)).square().mean())
    assert error(wild, 0.0) == pytest.approx(expected, rel=1e-4)
    assert error(k, 0.0) < 1e-10  # and the next candidate is none the worse for it


@pytest.mark.parametrize("offset", [-95.0, -40.0, 40.0, 80.0])
def test_logits_far_from_the_stand_in_maximum_lose_no_precision(offset):
    """All logits of a query moved by one number: softmax does not see it, whether or not exp() would be subnormal."""
    g = torch.Generator().manual_seed(6)
    q = torch.cat([torch.randn(2, 2, 40, 15, generator=g), torch.ones(2, 2, 40, 1)], -1)
    k, v = (torch.randn(2, 2, 40, 16, generator=g) for _ in range(2))
    moved = k.clone()
    moved[..., -1] += offset
    assert AttentionError(q, k, v, v, torch.zeros(2, 16), scaling=1.0)(moved, 0.0) < 1e-10


def test_the_shift_is_invisible_to_the_error():
    g = torch.Generator().manual_seed(4)
    q, k, v = (torch.randn(2, h, 33, 16, generator=g) for h in (4, 2, 2))
    mean = torch.randn(2, 16, generator=g) * 100
    error = AttentionError(q, k, v, v, mean, scaling=0.25)
    passes, counted = error._sum, []
    error._sum = lambda own_maximum: counted.append(own_maximum) or passes(own_maximum)
    assert error(k - 0.5 * mean[:, None], 0.5) < 1e-8
    assert counted == [False]  # told of the shift, the stand-in for the maximum follows it
    assert error(k - 0.5 * mean[:, None], 0.0) < 1e-8
    assert counted == [False, False, True]


def test_pair_scale_is_the_larger_half_of_each_pair():
    key = torch.zeros(1, 2, 3, 8)
    key[0, 0, 1, 2], key[0, 0, 2, 6], key[0, 1, 0, 1] = -5.0, 3.0, 7.0
    s0 = pair_scale(key)
    eps = s0[0, 0].item()
    assert 0 < eps < 1e-3
    assert s0[0].tolist() == [eps, eps, 5.0, eps, eps, eps, 5.0, eps]
    assert s0[1].tolist() == [eps, 7.0, eps, eps, eps, 7.0, eps, eps]
    assert pair_scale(key, share_heads=True).tolist() == [[eps, 7.0, 5.0, eps, eps, 7.0, 5.0, eps]] * 2


def test_calibration_leaves_the_model_alone(tiny, ids):
    model = tiny("qwen3").train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    calibrate(model, KV4, ids, grid=2, progress=False)
    assert model.training and all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_result_round_trips_and_its_metrics_are_json(tiny, ids, tmp_path):
    result = calibrate(tiny("llama"), KV4, ids, grid=3, progress=False)
    result.save(tmp_path / "qfit.safetensors")
    again = QFitResult.load(tmp_path / "qfit.safetensors")
    for field in dataclasses.fields(QFitResult):
        a, b = getattr(result, field.name), getattr(again, field.name)
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b, field.name
    metrics = json.loads(json.dumps(result.metrics()))
    assert len(metrics["error_map"]) == 2 and len(metrics["error_map"][0]) == 3
    assert metrics["error_map"][1][0][0] == pytest.approx(metrics["error_before"][1], rel=1e-5)
    (tmp_path / "cut").write_bytes((tmp_path / "qfit.safetensors").read_bytes()[:100])
    with pytest.raises(ValueError, match="not a whole Q-FIT result"):
        QFitResult.load(tmp_path / "cut")


def _about(**changes):
    return lambda about, tensors: about.update(changes)


def _tensor(name, change):
    return lambda about, tensors: tensors.update({name: change(tensors[name]).contiguous()})


@pytest.mark.parametrize(
    "damage",
    [
        _about(kind="other"),
        _about(variant="third"),
        _about(qk_norm=None),
        _about(precision=4),
        _about(alphas="0.5"),
        _about(alphas=[0.0]),
        _about(betas=["half", 0.5]),
        _about(choice=[[0, 0]]),
        _about(choice=[[0, 9], [0, 0]]),
        _about(choice=[[0, 0.5], [0, 0]]),
        _about(choice=[0, 0]),
        _about(seconds=[1.0]),
        lambda about, tensors: about.pop("seconds"),
        lambda about, tensors: tensors.pop("shift"),
        _tensor("errors", lambda t: t[:1]),
        _tensor("errors", lambda t: t.float()),
        _tensor("errors", lambda t: t * torch.nan),
        _tensor("scale", lambda t: t[:, :, :-1]),
        _tensor("scale", lambda t: -t),
        _tensor("shift", lambda t: t * torch.inf),
        _tensor("shift", lambda t: t.half()),
    ],
)
def test_a_damaged_result_is_refused_by_name(damage, tmp_path):
    from safetensors.torch import save_file

    shape = (2, 1, 16)
    QFitResult(
        "NVFP4-KV4", "paper", "none", (0.0, 0.5), (0.0, 0.5), torch.ones(2, 2, 2, dtype=torch.float64),
        ((0, 1), (1, 0)), torch.ones(shape), torch.zeros(shape), (0.1, 0.2),
    ).save(tmp_path / "whole")  # fmt: skip
    assert QFitResult.load(tmp_path / "whole").choice == ((0, 1), (1, 0))
    with safe_open(tmp_path / "whole", "pt") as file:
        about = json.loads(file.metadata()["reqat"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    damage(about, tensors)
    save_file(tensors, tmp_path / "damaged", {"reqat": json.dumps(about)})
    with pytest.raises(ReqatError, match="damaged.*calibrate again"):
        QFitResult.load(tmp_path / "damaged")
    with pytest.raises(MissingFileError, match="absent"):
        QFitResult.load(tmp_path / "absent")


def test_scale_and_shift_survive_the_checkpoint(tiny, ids, tmp_path):
    model = tiny("llama")
    fold(model, calibrate(model, KV4, ids, grid=4, progress=False))
    save_model(model, None, tmp_path / "model")
    again = load_model(tmp_path / "model")
    prepare(model, KV4)
    prepare(again, KV4)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, again(ids).logits)


def test_bad_input_is_refused(tiny, ids):
    model = tiny("llama")
    for precision, options, message in [
        ("NVFP4-W4A4", {}, "does not quantize keys"),
        (KV4, {"grid": 0}, "at least 1 point"),
        (KV4, {"variant": "papr"}, "unknown Q-FIT variant 'papr'"),
        (KV4, {"qk_norm": "wide"}, "unknown qk_norm 'wide'"),
        (KV4, {"queries": 0}, "at least 1 query position"),
    ]:
        with pytest.raises(ValueError, match=message):
            calibrate(model, precision, ids, progress=False, **options)
    with pytest.raises(ValueError, match="token id 61 .*61 tokens"):
        calibrate(model, KV4, torch.tensor([[0, 61]]), progress=False)
    with pytest.raises(ValueError, match=r"\[sequences, tokens\]"):
        calibrate(model, KV4, ids[0], progress=False)
    result = calibrate(model, KV4, ids, grid=1, progress=False)
    with pytest.raises(ValueError, match="another model"):
        fold(tiny("qwen3"), result)
    with pytest.raises(ValueError, match="another model"):
        fold(model, dataclasses.replace(result, scale=result.scale[:1]))
    prepare(model, KV4)
    with pytest.raises(ValueError, match="KV cache of model.layers.0"):
        calibrate(model, KV4, ids, progress=False)
    model = tiny("llama")
    prepare(model, "NVFP4-W4A4KV4")
    with pytest.raises(ValueError, match="NVFP4.*calibrate before prepare"):
        calibrate(model, KV4, ids, progress=False)
    with pytest.raises(ValueError, match="is frozen"):
        fold(freeze(model), result)
