"""A step of decoding in fixed buffers: no wait of the host, nothing frozen that changes, the numbers of the other step.

With a CUDA device these tests run on it and record real graphs. Without one, the same step runs in triton's
interpreter; what a graph would freeze is then found by comparing all that two steps hand to kernels and operations.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel

from reqat.config.errors import ReqatError
from reqat.config.policy import Decoding
from reqat.generation import batches
from reqat.generation.batches import Generation, generate
from reqat.inference import PackedCache, pack
from reqat.inference.backend import checked_at_end
from reqat.inference.decode_step import DecodeStep, reason_against
from reqat.models import calibrate_static, freeze, kv_quantizers, prepare

runtime = pytest.importorskip("reqat_kernels.triton.runtime")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
pytestmark = [
    pytest.mark.skipif(
        not runtime.AVAILABLE or (DEVICE.type == "cpu" and not runtime.INTERPRETED),
        reason="no triton, or no CUDA device and triton was imported before TRITON_INTERPRET=1 was set",
    ),
    pytest.mark.filterwarnings("ignore:(divide by zero|overflow|invalid value):RuntimeWarning"),
]
on_gpu = pytest.mark.skipif(DEVICE.type != "cuda", reason="no CUDA device")

Tiny = Callable[..., PreTrainedModel]
#: Precision, its options, and whether two of the three prompts are padded.
SETTINGS: list[tuple[str, dict[str, Any], bool]] = [
    ("NVFP4-W4A4KV4", {"global_scale": "static", "kv_element": "E1M2"}, True),
    ("NVFP4-W4A4KV4", {"global_scale": "row"}, False),
    ("NVFP4-W4A16KV4", {"global_scale": "row", "rotation": 32}, True),
    ("MXFP4-W4A4KV4", {"rotation": 32}, False),
]
STEPS = torch.tensor([[3, 50, 7], [11, 5, 60], [0, 2, 33]])  # tokens [steps, rows]


def packed_model(tiny: Tiny, ids: Tensor, name: str, layers: int = 1, **options: Any) -> PreTrainedModel:
    model = tiny("llama", num_hidden_layers=layers).to(DEVICE)
    prepare(model, name, **options)
    for kv in kv_quantizers(model):
        if kv.key.format is not None:
            kv.set_shift(torch.linspace(-1, 1, 64, device=DEVICE).view(2, 32))
    calibrate_static(model, [ids.to(DEVICE)])
    return pack(freeze(model), backend="triton")


@torch.no_grad()
def filled(model: PreTrainedModel, ids: Tensor, padded: bool) -> tuple[PackedCache, Tensor, Tensor | None]:
    """A cache of 24 places with three prompts of nine tokens, their next positions [B, 1], and the mask [B, 1, 1, 24]
    that hides the padding of two of them."""
    ids = ids[:, :9].to(DEVICE)
    cache = PackedCache(model, 24)
    visible = torch.ones(3, 24, dtype=torch.bool, device=DEVICE)
    if padded:
        visible[1, :4], visible[2, :1] = False, False
    mask = visible[:, :9].long() if padded else None
    position = None if mask is None else (mask.cumsum(-1) - 1).clamp(min=0)
    model(ids, attention_mask=mask, position_ids=position, past_key_values=cache, use_cache=True)
    return cache, visible[:, :9].sum(-1, keepdim=True), visible[:, None, None] if padded else None


def stepped(model: PreTrainedModel, ids: Tensor, padded: bool, records: bool = False) -> tuple[DecodeStep, PackedCache]:
    cache, position, mask = filled(model, ids, padded)
    return DecodeStep(model, cache, position, mask, records=records), cache


@torch.no_grad()
def eager(model: PreTrainedModel, ids: Tensor, padded: bool) -> tuple[Tensor, PackedCache]:
    """Logits [steps, B, V] of the model called as it is."""
    cache, position, mask = filled(model, ids, padded)
    logits = []
    for step, tokens in enumerate(STEPS.to(DEVICE)):
        seen = None if mask is None else mask[..., : 10 + step]
        out = model(
            tokens[:, None], attention_mask=seen, position_ids=position + step, past_key_values=cache, use_cache=True
        )
        logits.append(out.logits[:, -1].float())
    return torch.stack(logits), cache


@pytest.mark.parametrize(("name", "options", "padded"), SETTINGS)
def test_fixed_buffers_give_the_numbers_of_the_model_as_it_is(
    tiny: Tiny, ids: Tensor, name: str, options: dict[str, Any], padded: bool
) -> None:
    model = packed_model(tiny, ids, name, **options)
    expected, other = eager(model, ids, padded)
    with checked_at_end(model):
        step, cache = stepped(model, ids, padded, records=DEVICE.type == "cuda")
        logits = torch.stack([step(tokens) for tokens in STEPS.to(DEVICE)])
    assert step.recorded == (DEVICE.type == "cuda")
    assert cache.get_seq_length() == other.get_seq_length() == 12
    if DEVICE.type == "cpu":  # one split of the cache either way: the same sums in the same order
        assert torch.equal(logits, expected)
    else:
        assert (logits - expected).abs().max() <= 1e-3 * expected.abs().max()
    for mine, theirs in zip(cache.layers, other.layers, strict=True):
        for a, b in zip(mine.dequantized(12), theirs.dequantized(12), strict=True):
            # A rounding threshold lies between a few numbers of another order of summation.
            assert (a != b).float().mean() <= (0 if DEVICE.type == "cpu" else 0.02)


# -- no host waits ----------------------------------------------------------------------------------------------------

_READS = {
    "tolist", "numpy", "item", "__bool__", "__int__", "__float__", "__index__", "__contains__", "__array__", "cpu",
    "nonzero", "argwhere", "is_nonzero", "equal", "allclose", "masked_select", "unique", "tensor", "from_numpy",
}  # fmt: skip
_READING_OPS = {
    torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero, torch.ops.aten.is_nonzero, torch.ops.aten.equal,
    torch.ops.aten.masked_select, torch.ops.aten._unique2, torch.ops.aten.unique_consecutive,
}  # fmt: skip


class HostRead(Exception):
    pass


class Watched(TorchFunctionMode):
    """Fails where the host reads a tensor or makes one of numbers of its own."""

    paused = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        uploads = name == "as_tensor" and not isinstance(args[0], Tensor)
        if not self.paused and (name in _READS or uploads):
            raise HostRead(name)
        return func(*args, **(kwargs or {}))


class Operations(TorchDispatchMode):
    """The same below torch's Python functions; keeps each operation with those of its arguments that are no tensors."""

    def __init__(self, watched: Watched) -> None:
        super().__init__()
        self.watched, self.seen = watched, list[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not self.watched.paused:
            if func.overloadpacket in _READING_OPS:
                raise HostRead(str(func))
            self.seen.append(f"{func}{plain(args)}{plain(kwargs or {})}")
        return func(*args, **(kwargs or {}))


def plain(arguments: Any) -> Any:
    """Arguments with the shapes and types of tensors in their place."""
    if isinstance(arguments, Tensor):
        return (tuple(arguments.shape), arguments.stride(), arguments.dtype)
    if isinstance(arguments, dict):
        return {name: plain(value) for name, value in arguments.items()}
    return [plain(value) for value in arguments] if isinstance(arguments, list | tuple) else arguments


@contextmanager
def no_host_reads(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Raise for what makes the host wait; the list fills with all operations and kernels, and their plain arguments."""
    watched = Watched()
    with watched, Operations(watched) as operations:
        if DEVICE.type == "cuda":
            torch.cuda.set_sync_debug_mode("error")
            try:
                yield operations.seen
            finally:
                torch.cuda.set_sync_debug_mode("default")
            return
        from triton.runtime.interpreter import GridExecutor

        launch = GridExecutor.__call__

        def noted(self: Any, *args: Any, **kwargs: Any) -> None:  # the interpreter itself reads all it is given
            operations.seen.append(f"{self.fn.__name__} {self.grid} {plain(args)} {plain(kwargs)}")
            watched.paused = True
            try:
                launch(self, *args, **kwargs)
            finally:
                watched.paused = False

        with monkeypatch.context() as patch:
            patch.setattr(GridExecutor, "__call__", noted)
            yield operations.seen


@pytest.mark.parametrize("read", ["item", "bool", "tolist", "nonzero", "upload"])
def test_the_watch_sees_each_way_to_wait(read: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.arange(3, device=DEVICE)
    calls: dict[str, Callable[[], Any]] = {
        "item": lambda: x[0].item(),
        "bool": lambda: 1 if x[1] else 0,
        "tolist": x.tolist,
        "nonzero": x.nonzero,
        "upload": lambda: torch.tensor([1.0], device=DEVICE),
    }
    with pytest.raises((HostRead, RuntimeError)), no_host_reads(monkeypatch):
        calls[read]()


@pytest.mark.parametrize(("name", "options", "padded"), SETTINGS)
def test_no_step_makes_the_host_wait_or_hands_on_what_changes(
    tiny: Tiny, ids: Tensor, name: str, options: dict[str, Any], padded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All that changes from step to step lies in tensors that stay where they are."""
    model = packed_model(tiny, ids, name, **options)
    tokens = STEPS.to(DEVICE)
    with checked_at_end(model):
        step, cache = stepped(model, ids, padded)
        step(tokens[0])
        state = [step.token_B1, step.position_B1, step.places.next_B, step.places.lengths_B]
        for layer in cache.layers:
            for side in (layer.packed_keys, layer.packed_values):
                state += [side.codes, side.scales, *([] if side.global_scale is None else [side.global_scale])]
        addresses = [x.data_ptr() for x in state]
        found = []
        for each in tokens[1:3]:
            with no_host_reads(monkeypatch) as seen:
                step(each)
            found.append(seen)
        assert len(found[0]) > 20
        assert found[0] == found[1]
        sides = [side for layer in cache.layers for side in (layer.packed_keys, layer.packed_values)]
        now = [step.token_B1, step.position_B1, step.places.next_B, step.places.lengths_B]
        for side in sides:
            now += [side.codes, side.scales, *([] if side.global_scale is None else [side.global_scale])]
        assert [x.data_ptr() for x in now] == addresses
    assert step.places.next_B.tolist() == [12] * 3 and step.places.lengths_B.tolist() == [13] * 3
    assert step.position_B1.flatten().tolist() == ([12, 8, 11] if padded else [12] * 3)


@torch.no_grad()
def test_nor_does_the_model_called_as_it_is(tiny: Tiny, ids: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    model = packed_model(tiny, ids, "NVFP4-W4A4KV4", global_scale="row")
    with checked_at_end(model):
        cache, position, _ = filled(model, ids, False)
        token = STEPS[0, :, None].to(DEVICE)
        with no_host_reads(monkeypatch):
            model(token, position_ids=position, past_key_values=cache, use_cache=True)


@torch.no_grad()
def test_outside_of_a_block_each_call_of_the_model_looks_once(
    tiny: Tiny, ids: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    from reqat_kernels.triton.finite import FiniteFlag

    model = packed_model(tiny, ids, "NVFP4-W4A4KV4", global_scale="row")
    looks = []
    check = FiniteFlag.check
    monkeypatch.setattr(FiniteFlag, "check", lambda flag: (looks.append(flag), check(flag)))
    model(ids.to(DEVICE))
    assert len(looks) == 1
    linear = model.get_submodule("model.layers.0.self_attn.q_proj")
    linear(torch.ones(1, 64, device=DEVICE))  # a part called by itself looks at once
    assert len(looks) == 2


# -- NaN and infinity -------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_the_first_tensor_that_is_not_finite_is_named_at_the_end(tiny: Tiny, ids: Tensor) -> None:
    model = packed_model(tiny, ids, "NVFP4-W4A4KV4", layers=2, global_scale="row")
    weight = model.get_submodule("model.layers.0.post_attention_layernorm").weight
    good = weight.clone()
    reached = []
    with pytest.raises(ValueError, match=r"layers\.0\.mlp.*NaN"), checked_at_end(model):
        step, _ = stepped(model, ids, False)
        step(STEPS[0].to(DEVICE))
        weight[3] = torch.inf
        step(STEPS[1].to(DEVICE))
        weight.copy_(good)
        reached.append(step(STEPS[2].to(DEVICE)))
    assert reached
    model(ids.to(DEVICE))  # the model goes on
    weight[3] = torch.nan
    with pytest.raises(ValueError, match=r"layers\.0\.mlp.*NaN"):
        model(ids.to(DEVICE))
    with pytest.raises(ValueError, match=r"layers\.0\.mlp.*NaN") as told, checked_at_end(model):
        model(ids.to(DEVICE))
        raise RuntimeError("of it")  # an error that NaN may have caused does not hide it
    assert isinstance(told.value.__context__, RuntimeError)


def test_a_full_cache_takes_no_token(tiny: Tiny, ids: Tensor) -> None:
    model = packed_model(tiny, ids, "MXFP4-W4A4KV4")
    with checked_at_end(model):
        step, cache = stepped(model, ids, False)
        for layer in cache.layers:
            layer.length = 24
        with pytest.raises(ReqatError, match="holds 24 tokens"):
            step(STEPS[0].to(DEVICE))


# -- where it is used -------------------------------------------------------------------------------------------------


def test_what_speaks_against_it_is_said(tiny: Tiny, ids: Tensor) -> None:
    model = packed_model(tiny, ids, "NVFP4-W4A4KV4", global_scale="row")
    cache = PackedCache(model, 24)
    reason = reason_against(model, cache)
    assert reason is not None and "checked_at_end" in reason
    with checked_at_end(model):
        assert reason_against(model, cache) is None
        for other, what in (
            ((model, PackedCache(model)), "capacity"),
            ((tiny("llama"), cache), "not packed"),
            ((packed_model(tiny, ids, "NVFP4-4/6-W4A4KV4", global_scale="row"), cache), "inputs in NVFP4-4/6"),
            ((packed_model(tiny, ids, "NVFP4-W4A16KV4", global_scale="dynamic"), cache), "keys in"),
        ):
            found = reason_against(*other)
            assert found is not None and what in found, (found, what)
        rope = tiny("llama", rope_scaling={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}).to(DEVICE)
        prepare(rope, "NVFP4-W4A4KV4", global_scale="row")
        found = reason_against(pack(freeze(rope), backend="triton"), cache)
        assert found is not None and "RoPE" in found


def answers(model: PreTrainedModel, **options: Any) -> list[Generation]:
    prompts = [[5, 9, 3], [7, 7, 7, 2, 1], [5, 9, 3], [30, 31]]
    return generate(
        model,
        None,
        prompts,
        seeds=[0, 0, 1, 0],
        row_keys=["a", "b", "a", "c"],
        decoding=Decoding(),
        max_new_tokens=4,
        eos_id=options.pop("eos_id", ()),
        **options,
    )


@pytest.mark.slow
def test_generate_takes_fixed_steps(tiny: Tiny, ids: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of several lengths, dropped as they end; the same tokens as step by step."""
    model = packed_model(tiny, ids, "NVFP4-W4A4KV4", global_scale="row")
    monkeypatch.setattr(batches, "_wants_fixed_steps", lambda model: False)
    free = answers(model)
    ends = {free[0].token_ids[1], free[3].token_ids[2]}
    expected = answers(model, eos_id=tuple(ends))
    taken = []
    call = DecodeStep.__call__
    monkeypatch.setattr(batches, "_wants_fixed_steps", lambda model: True)
    monkeypatch.setattr(DecodeStep, "__call__", lambda step, tokens: (taken.append(id(step)), call(step, tokens))[1])
    assert answers(model, eos_id=tuple(ends)) == expected
    assert len(set(taken)) >= 2  # anew after rows were dropped


def test_generate_says_why_it_takes_no_fixed_steps(tiny: Tiny, ids: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    model = packed_model(tiny, ids, "NVFP4-4/6-W4A4KV4", global_scale="row")
    monkeypatch.setattr(batches, "_wants_fixed_steps", lambda model: True)
    with pytest.warns(UserWarning, match="CUDA graph: inputs in NVFP4-4/6"):
        answers(model)


def test_generate_tells_what_was_not_finite(tiny: Tiny, ids: Tensor) -> None:
    model = packed_model(tiny, ids, "NVFP4-W4A4KV4", global_scale="row")
    with torch.no_grad():
        model.get_submodule("model.layers.0.input_layernorm").weight[0] = torch.nan
    with pytest.raises(ValueError, match=r"layers\.0\.self_attn.*NaN"):
        answers(model)


# -- on a GPU ---------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@on_gpu
def test_a_recorded_step_replays_and_follows_its_buffers(tiny: Tiny, ids: Tensor) -> None:
    """Ten replays, against the step that is launched anew each time; and no host wait among them."""
    model = packed_model(tiny, ids, "NVFP4-W4A4KV4", global_scale="static")
    tokens = torch.randint(0, 61, (12, 3), generator=torch.Generator().manual_seed(3)).to(DEVICE)
    results = []
    for records in (False, True):
        with checked_at_end(model):
            step, _ = stepped(model, ids, True, records=records)
            logits = [step(each) for each in tokens[:2]]
            torch.cuda.set_sync_debug_mode("error")
            try:
                logits += [step(each) for each in tokens[2:]]
            finally:
                torch.cuda.set_sync_debug_mode("default")
        assert step.recorded == records
        results.append(torch.stack(logits))
    assert torch.equal(*results)


@pytest.mark.gpu
@on_gpu
def test_a_replayed_step_notes_nan(tiny: Tiny, ids: Tensor) -> None:
    model = packed_model(tiny, ids, "NVFP4-W4A4KV4", global_scale="row")
    weight = model.get_submodule("model.layers.0.input_layernorm").weight
    with pytest.raises(ValueError, match=r"layers\.0\.self_attn.*NaN"), checked_at_end(model):
        step, _ = stepped(model, ids, False, records=True)
        for each in STEPS.to(DEVICE):
            step(each)
        assert step.recorded
        weight.data[0] = torch.nan  # read by the graph where it always was
        step(STEPS[0].to(DEVICE))


@pytest.mark.gpu
@on_gpu
def test_generate_records(tiny: Tiny, ids: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    model = packed_model(tiny, ids, "NVFP4-W4A4KV4", global_scale="row")
    recorded = []
    record = DecodeStep._record
    monkeypatch.setattr(DecodeStep, "_record", lambda step: (record(step), recorded.append(step.recorded)))
    assert [len(answer.token_ids) for answer in answers(model)] == [4] * 4
    assert recorded == [True]
