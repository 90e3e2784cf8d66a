"""A model packed for the Triton kernels gives what its frozen fake-quantized twin gives.

With a CUDA device these tests run on it; without one, the same kernels run on CPU tensors in triton's interpreter,
operation by operation, so models are tiny and responses short.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from reqat.config.errors import ReqatError
from reqat.formats import quantize
from reqat.inference import PackedCache, memory, pack
from reqat.inference.backends import backend_for
from reqat.inference.packed_linear import PackedLinear
from reqat.models import Fp4Cache, calibrate_static, freeze, kv_quantizers, prepare
from reqat.models.linear import quant_linears

runtime = pytest.importorskip("reqat_kernels.triton.runtime")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
pytestmark = pytest.mark.skipif(
    not runtime.AVAILABLE or (DEVICE.type == "cpu" and not runtime.INTERPRETED),
    reason="no triton, or no CUDA device and triton was imported before TRITON_INTERPRET=1 was set",
)
needs_cuda = pytest.mark.skipif(DEVICE.type != "cuda", reason="no CUDA device")

Tiny = Callable[..., PreTrainedModel]
U = 2.0**-24
NEW = 3
PRECISIONS: list[tuple[str, dict[str, Any]]] = [
    ("NVFP4-W4A4KV4", {"global_scale": "static", "kv_element": "E1M2"}),
    ("NVFP4-W4A4KV4", {"kv_element": "E1M2"}),
    ("NVFP4-W4A4KV4", {"global_scale": "dynamic"}),
    ("NVFP4-W4A16KV4", {"global_scale": "row"}),
    ("NVFP4-4/6-W4A4KV4", {"global_scale": "row"}),
    ("MXFP4-W4A4KV4", {"rotation": 32}),
]


def twins(
    tiny: Tiny, ids: Tensor, family: str, name: str, layers: int = 1, **options: Any
) -> tuple[PreTrainedModel, PreTrainedModel]:
    """The same frozen model twice, the second one packed for Triton."""
    models = []
    for _ in range(2):
        model = tiny(family, num_hidden_layers=layers).to(DEVICE)
        prepare(model, name, **options)
        for kv in kv_quantizers(model):
            if kv.key.format is not None:
                kv.set_shift(torch.linspace(-1, 1, 64, device=DEVICE).view(2, 32))
        calibrate_static(model, [ids])
        models.append(freeze(model))
    return models[0], pack(models[1], backend="triton")


def greedy(model: PreTrainedModel, ids: Tensor, mask: Tensor, cache: Any = None) -> tuple[Tensor, Tensor]:
    """New tokens [B, NEW] and the logits that chose them [B, NEW, V]."""
    out = model.generate(
        ids,
        attention_mask=mask,
        past_key_values=cache,
        max_new_tokens=NEW,
        min_new_tokens=NEW,
        do_sample=False,
        pad_token_id=0,
        eos_token_id=None,
        return_dict_in_generate=True,
        output_logits=True,
    )
    return out.sequences[:, ids.shape[1] :], torch.stack(out.logits, 1)


@pytest.mark.parametrize("name", ["BF16", "NVFP4", "MXFP4"])
def test_a_head_and_embeddings_in_four_bits(tiny: Tiny, ids: Tensor, name: str) -> None:
    model = tiny("llama", num_hidden_layers=1).to(DEVICE)
    prepare(model, "NVFP4-W4A4KV4", global_scale="row")
    outer, inner = (m.weight.detach().clone() for m in (model.get_output_embeddings(), model.get_input_embeddings()))
    if name == "BF16":
        head, rows = outer.bfloat16().float(), inner.bfloat16().float()
    else:
        head, rows = (quantize(w, name).dequantize() for w in (outer, inner))
    pack(model, backend="triton", head=name, embeddings=name)
    assert torch.equal(model.get_input_embeddings()(ids.to(DEVICE)), rows[ids.to(DEVICE)])
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    bound = 2.0**-7 if name == "BF16" else 72 * U  # bfloat16 is multiplied in that type
    size = x.double().abs() @ head.double().abs().T
    assert ((model.get_output_embeddings()(x) - x.double() @ head.double().T).abs() <= bound * size).all()


@pytest.mark.parametrize("name", ["INT8", "NVFP4-A8"])
def test_a_head_without_a_kernel_is_refused(tiny: Tiny, name: str) -> None:
    model = tiny("llama", num_hidden_layers=1).to(DEVICE)
    prepare(model, "NVFP4-W4A4KV4", global_scale="row")
    with pytest.raises(ReqatError, match=f"{name}.*CPU"):
        pack(model, backend="triton", head=name)
    assert not any(isinstance(module, PackedLinear) for module in model.modules())


@torch.no_grad()
def decode(model: PreTrainedModel, ids: Tensor, cache: Any, steps: list[int], mask: Tensor | None = None) -> Tensor:
    """Logits [B, T, V] of all tokens, given to the model ``steps`` at a time."""
    logits, start = [], 0
    for step in steps:
        end = start + step
        seen = None if mask is None else mask[:, :end]
        positions = None if mask is None else (mask.cumsum(-1) - 1).clamp(min=0)[:, start:end]
        out = model(ids[:, start:end], past_key_values=cache, attention_mask=seen, position_ids=positions)
        logits.append(out.logits)
        start = end
    return torch.cat(logits, 1)


@pytest.fixture
def prompts(ids: Tensor) -> tuple[Tensor, Tensor]:
    """Three prompts of 14, 9 and 13 tokens, padded on the left, and their mask."""
    mask = torch.ones_like(ids)
    mask[1, :5], mask[2, :1] = 0, 0
    return ids.to(DEVICE), mask.to(DEVICE)


@pytest.mark.parametrize(
    ("family", "name", "options"),
    [
        ("llama", "NVFP4-W4A4KV4", {"global_scale": "static"}),
        ("qwen2", "MXFP4-W4A4KV4", {"rotation": 32}),
        ("qwen3", "NVFP4-W4A16KV4", {"global_scale": "row"}),
    ],
)
@pytest.mark.slow
@pytest.mark.long
def test_generate_gives_the_twins_tokens(
    tiny: Tiny, prompts: tuple[Tensor, Tensor], family: str, name: str, options: dict[str, Any]
) -> None:
    """A row whose sums crossed a rounding threshold may go its own way from there on: one of three, and only where its
    twin's two best logits lay closer than a crossing moves them."""
    plain, packed = twins(tiny, prompts[0], family, name, **options)
    expected, logits = greedy(plain, *prompts, Fp4Cache(plain, 14 + NEW))
    ours, _ = greedy(packed, *prompts)
    assert ours.shape == (3, NEW)
    different = [row for row in range(3) if not torch.equal(ours[row], expected[row])]
    assert len(different) <= 1
    for row in different:
        first = int((ours[row] != expected[row]).nonzero()[0])
        best = logits[row, first].topk(2).values
        assert best[0] - best[1] <= 0.05 * logits[row, first].abs().max()


@pytest.mark.parametrize(("name", "options"), PRECISIONS)
def test_a_packed_layer_multiplies_the_twins_codes(tiny: Tiny, ids: Tensor, name: str, options: dict[str, Any]) -> None:
    """One row (GEMV) and nine (GEMM): off the exact product of the twin's rounded numbers by float32 sums alone.

    A sum of K products in float32, in any order, with a division by each global scale and a bias: K + 4 roundings.
    """
    plain, packed = twins(tiny, ids, "qwen2", name, **options)
    dense = quant_linears(plain)
    picked = ("model.layers.0.self_attn.v_proj", "model.layers.0.mlp.down_proj")
    generator = torch.Generator().manual_seed(3)
    for layer in picked:
        linear, twin = packed.get_submodule(layer), dense[layer]
        assert isinstance(linear, PackedLinear)
        K = twin.in_features
        for rows in (1, 9):
            x = torch.randn(rows, K, generator=generator).to(DEVICE)
            with torch.no_grad():
                y = linear(x).double()
                rounded, w = twin.input_quantizer(x).double(), twin.weight.double()
            exact = rounded @ w.T + (0 if twin.bias is None else twin.bias.double())
            magnitude = rounded.abs() @ w.abs().T + (0 if twin.bias is None else twin.bias.double().abs())
            # The dense weight is code * scale / g rounded once to float32: as much again as one rounding.
            assert ((y - exact).abs() <= (K + 5) * U * magnitude).all(), (layer, rows)


def test_odd_multiples_of_sixteen_columns_go_round_the_gemv(tiny: Tiny, ids: Tensor) -> None:
    model = tiny("llama", num_hidden_layers=1, intermediate_size=48).to(DEVICE)
    prepare(model, "NVFP4-W4A4KV4", global_scale="row")
    freeze(model)
    name = "model.layers.0.mlp.down_proj"
    x = torch.randn(2, 48, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    twin = quant_linears(model)[name]
    with torch.no_grad():
        expected = twin(x)
        magnitude = twin.input_quantizer(x).abs() @ twin.weight.abs().T
        pack(model, backend="triton")
        packed = model.get_submodule(name)
        assert isinstance(packed, PackedLinear)
        # Two float32 sums of 48 products and what surrounds them, see above.
        assert ((packed(x) - expected).abs() <= 2 * (48 + 5) * U * magnitude).all()


@pytest.mark.parametrize(("name", "options"), PRECISIONS)
def test_the_cache_holds_the_twins_numbers(tiny: Tiny, ids: Tensor, name: str, options: dict[str, Any]) -> None:
    """Bit for bit, after a prompt, single tokens, rows chosen, tokens cropped, and growth."""
    plain, packed = twins(tiny, ids, "llama", name, **options)
    ours, theirs = PackedCache(packed), Fp4Cache(plain, 40)
    layer, other = ours.layers[0], theirs.layers[0]
    generator = torch.Generator().manual_seed(5)

    def append(rows: int, tokens: int) -> None:
        states = torch.randn(2, rows, 2, tokens, 32, generator=generator).to(DEVICE)
        for cache_layer in (layer, other):
            cache_layer.update(*states)

    append(3, 7)
    append(3, 1)
    assert ours.capacity == 16
    for cache in (ours, theirs):
        cache.select_rows([2, 0])
        cache.crop(-2)
    append(2, 1)
    append(2, 12)
    assert ours.get_seq_length() == 19 <= ours.capacity <= 19 + 64 and ours.capacity % 16 == 0
    keys, values = layer.dequantized(19)
    assert torch.equal(keys, other.keys[:, :, :19]) and torch.equal(values, other.values[:, :, :19])
    assert type(layer.packed_keys).__name__ == "KVSide"


def test_logits_are_as_close_to_float64_as_the_twins(tiny: Tiny, prompts: tuple[Tensor, Tensor]) -> None:
    """Two layers, one and several tokens at a time, left padding, Q-FIT shift.

    The twin in float64 is the oracle; the twin in float32 shows what rounding does to these logits, whatever the norms
    amplify. Packed, there are as many roundings in another order: four times that is an error. (Inputs are not rounded
    to codes here, and no key or value of this seed lies next to a threshold.)
    """
    ids, mask = prompts
    plain, packed = twins(tiny, ids, "llama", "NVFP4-W4A16KV4", layers=2, global_scale="row")
    steps = [9, 1, 2]
    visible = mask[:, :12].bool()
    ours = decode(packed, ids, PackedCache(packed), steps, mask).double()
    theirs = decode(plain, ids, Fp4Cache(plain, 14), steps, mask).double()
    exact = decode(plain.double(), ids, Fp4Cache(plain, 14), steps, mask)
    error, control = ((logits - exact)[visible].abs().max() for logits in (ours, theirs))
    assert 0 < error <= 4 * control < 1e-4 * exact.abs().max(), (float(error), float(control))


def test_memory_is_measured_as_on_a_cpu(tiny: Tiny, ids: Tensor) -> None:
    plain, packed = twins(tiny, ids, "llama", "NVFP4-W4A4KV4", global_scale="static")
    before, after = memory(plain), memory(packed)
    weights = before.linear_bytes // 4
    assert 8 * after.linear_bytes == 4.5 * weights + 8 * 4 * 7  # and seven layers' global scales
    assert after.other_bytes == before.other_bytes
    layers = [module for layer in packed.get_decoder().layers for module in layer.modules()]
    assert not any(isinstance(module, nn.Linear) for module in layers)
    cache = PackedCache(packed, 64)
    cache.layers[0].update(*torch.randn(2, 3, 2, 4, 32, device=DEVICE))
    bf16 = 2 * 3 * 2 * 64 * 32 * 2  # keys and values, rows, heads, tokens, channels, bytes
    assert memory(packed, cache).cache_bytes == cache.nbytes <= bf16 / 3.5


def test_a_rotation_is_fused_and_the_result_stays_close(tiny: Tiny, ids: Tensor) -> None:
    plain, packed = twins(tiny, ids, "llama", "NVFP4-W4A4KV4", global_scale="row", rotation=32)
    name = "model.layers.0.self_attn.o_proj"
    linear, twin = packed.get_submodule(name), quant_linears(plain)[name]
    x = torch.randn(4, 128, generator=torch.Generator().manual_seed(2)).to(DEVICE)
    with torch.no_grad():
        ours, theirs = linear(x), twin(x)
    # A code next to a threshold may differ by a step, of a block's 16; all others agree, so rows agree on average.
    assert (ours - theirs).abs().mean() <= 2e-3 * theirs.abs().mean()


@pytest.mark.filterwarnings("ignore:(divide by zero|overflow|invalid value):RuntimeWarning")
def test_errors_name_the_remedy(tiny: Tiny, ids: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("llama", num_hidden_layers=1)
    prepare(model, "NVFP4-W4A4KV4", global_scale="row")
    with pytest.raises(ReqatError, match="'cuda'.*auto, native, triton"):
        pack(model, backend="cuda")  # type: ignore[arg-type]
    with pytest.raises(ReqatError, match=r"on meta.*model.to\('cpu'\)"):
        backend_for(torch.device("meta"))
    with pytest.raises(ReqatError, match=r"native.*on cuda.*model.to\('cpu'\)"):
        backend_for(torch.device("cuda"), "native")
    assert backend_for(torch.device("cpu")).name == "native" and backend_for(torch.device("cuda")).name == "triton"
    monkeypatch.setattr(runtime, "INTERPRETED", False)
    with pytest.raises(ReqatError, match="CUDA device.*on cpu"):
        pack(model, backend="triton")
    monkeypatch.setattr(runtime, "AVAILABLE", False)
    with pytest.raises(ReqatError, match="pip install 'reqat"):
        backend_for(torch.device("cuda"))
    monkeypatch.undo()
    model = model.to(DEVICE)
    head = model.lm_head
    model.lm_head = nn.Linear(1, 1, device="meta")
    with pytest.raises(ReqatError, match=r"one device.*meta.*model.to\(device\)"):
        pack(model, backend="triton")
    model.lm_head = head
    pack(model, backend="triton")
    with pytest.raises(ReqatError, match="q_proj.*packed.*then pack it"):
        model.to("meta")
    with pytest.raises(ValueError, match=r"self_attn values.*NaN"):
        states = torch.randn(2, 1, 2, 1, 32, device=DEVICE)
        states[1, 0, 0, 0, 5] = torch.nan
        PackedCache(model).layers[0].update(*states)
    with pytest.raises(ValueError, match="self_attn.*NaN"), torch.no_grad():
        model.get_submodule("model.layers.0.self_attn.q_proj")(torch.full((1, 64), torch.inf, device=DEVICE))


def test_a_bfloat16_model(tiny: Tiny, ids: Tensor) -> None:
    """Products and attention end in a rounding to bfloat16, as the twin's do, or before it where the twin attends in
    float32; keys and values next to a threshold then get another code."""
    models = []
    for _ in range(2):
        model = tiny("llama", num_hidden_layers=1).to(DEVICE, torch.bfloat16)
        prepare(model, "NVFP4-W4A16KV4", global_scale="row")
        for kv in kv_quantizers(model):
            kv.set_shift(torch.linspace(-1, 1, 64, device=DEVICE).view(2, 32))
        models.append(freeze(model.bfloat16()))  # the shift too
    plain, packed = models[0], pack(models[1], backend="triton")
    ids = ids.to(DEVICE)
    ours = decode(packed, ids, PackedCache(packed), [9, 1]).float()
    theirs = decode(plain, ids, Fp4Cache(plain, 14), [9, 1]).float()
    assert (ours - theirs).abs().mean() <= 2.0**-5 * theirs.abs().mean()
    assert isinstance(packed.get_output_embeddings(), nn.Linear)  # the native head is for CPUs


@needs_cuda
def test_pack_chooses_triton_on_a_gpu_and_frees_memory(tiny: Tiny) -> None:
    model = tiny("llama", hidden_size=1024, intermediate_size=2048).to(DEVICE)
    prepare(model, "NVFP4-W4A4KV4", global_scale="row")
    freeze(model)
    before = torch.cuda.memory_allocated()
    pack(model)
    assert model._reqat_backend.name == "triton"
    linear = memory(model).linear_bytes
    # Dense float32 weights of the packed layers are gone: 32 bits became 4.5.
    assert before - torch.cuda.memory_allocated() >= 6 * linear
