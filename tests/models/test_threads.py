"""Threads that share one model, each over a cache of its own, and calls that take turns within a thread."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from reqat.config.policy import Decoding
from reqat.generation import generate
from reqat.inference import pack
from reqat.inference.packed_cache import PackedCache
from reqat.models import Fp4Cache, calibrate_static, freeze, prepare, quant_linears, weights_quantized_once
from reqat.models.modes import evaluating
from reqat_kernels.native import instruction_set

Tiny = Callable[..., PreTrainedModel]
ROOT = Path(__file__).resolve().parents[2]
NATIVE = instruction_set() != "torch"
PRECISIONS: list[tuple[str, dict[str, Any]]] = [
    ("NVFP4-W4A4KV4", {"global_scale": "row"}),
    ("NVFP4-W4A4KV4", {"global_scale": "static"}),
    ("NVFP4-W4A16KV4", {"global_scale": "row"}),
    ("MXFP4-W4A4KV4", {"rotation": 32}),
]
IDS = [f"{name} {' '.join(map(str, options.values()))}" for name, options in PRECISIONS]


@pytest.fixture(autouse=True)
def _impatient() -> Any:
    """Threads change places far more often than they do by default, so that what they share shows."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def made(tiny: Tiny, kind: str, name: str, options: dict[str, Any], family: str = "llama") -> PreTrainedModel:
    model = tiny(family)
    prepare(model, name, **options)
    calibrate_static(model, [torch.arange(3, 33).view(2, 15)])
    if kind != "prepared":
        freeze(model)
    return pack(model) if kind == "packed" else model


def work_of(rows: int, length: int, first: int) -> tuple[Tensor, Tensor]:
    """Prompts and a mask that pads every row but the first on the left."""
    ids = torch.randint(3, 61, (rows, length), generator=torch.Generator().manual_seed(first))
    mask = torch.ones_like(ids)
    for row in range(1, rows):
        mask[row, : min(row, length - 1)] = 0
    return ids, mask


def cache_of(model: PreTrainedModel, kind: str) -> Any:
    return None if kind == "packed" else Fp4Cache(model, 64)


def together(functions: list[Callable[[], None]]) -> None:
    """Run in as many threads, that start at once; raises what one of them raised."""
    errors: list[BaseException] = []
    gate = threading.Barrier(len(functions))

    def run(function: Callable[[], None]) -> None:
        gate.wait()
        try:
            function()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(function,)) for function in functions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


@pytest.mark.parametrize("kind", ["prepared", "frozen", "packed"])
@pytest.mark.parametrize(("name", "options"), PRECISIONS, ids=IDS)
def test_threads_get_what_one_thread_gets(tiny: Tiny, kind: str, name: str, options: dict[str, Any]) -> None:
    model = made(tiny, kind, name, options, "qwen3" if name.startswith("MX") else "llama")
    shapes = [(1, 6), (3, 11), (2, 1), (4, 18)]

    def run(i: int) -> Tensor:
        ids, mask = work_of(*shapes[i], i)
        cache = cache_of(model, kind)
        return model.generate(
            ids, attention_mask=mask, past_key_values=cache, max_new_tokens=16, do_sample=False, pad_token_id=0
        )

    expected = [run(i) for i in range(len(shapes))]
    wrong: list[tuple[int, int]] = []

    def work(i: int) -> None:
        for turn in range(4 if kind == "packed" else 2):
            if not torch.equal(run(i), expected[i]):
                wrong.append((i, turn))

    together([lambda i=i: work(i) for i in range(len(shapes))])  # type: ignore[misc]
    assert not wrong


@pytest.mark.parametrize("kind", ["frozen", "packed"])
def test_threads_forward_prompts_that_share_an_input_quantizer(tiny: Tiny, kind: str) -> None:
    model = made(tiny, kind, "NVFP4-W4A4KV4", {"global_scale": "row"})
    prompts = [work_of(2, 12, i)[0] for i in range(4)]
    with torch.no_grad():
        expected = [model(ids).logits for ids in prompts]
    wrong: list[int] = []

    def work(i: int) -> None:
        # In one thread without gradients, in the next in inference mode, whose tensors have no version.
        with torch.no_grad() if i % 2 else torch.inference_mode():
            for _ in range(12):
                if not torch.equal(model(prompts[i]).logits, expected[i]):
                    wrong.append(i)

    together([lambda i=i: work(i) for i in range(len(prompts))])  # type: ignore[misc]
    assert not wrong


@pytest.mark.parametrize("kind", ["frozen", "packed"])
def test_calls_that_take_turns_in_one_thread(tiny: Tiny, kind: str) -> None:
    model = made(tiny, kind, "NVFP4-W4A4KV4", {"global_scale": "row"})
    prompts = [work_of(2, 5, 1)[0], work_of(2, 9, 2)[0], work_of(1, 17, 3)[0]]

    @torch.no_grad()
    def steps(ids: Tensor) -> Any:
        cache = PackedCache(model) if kind == "packed" else Fp4Cache(model, 64)
        for _ in range(20):
            logits = model(ids, past_key_values=cache, use_cache=True).logits[:, -1]
            yield logits
            ids = logits.argmax(-1, keepdim=True)

    expected = [list(steps(ids)) for ids in prompts]
    turns = zip(*(steps(ids) for ids in prompts), strict=True)
    for turn, several in enumerate(turns):
        for i, logits in enumerate(several):
            assert torch.equal(logits, expected[i][turn])


@pytest.mark.parametrize("kind", ["frozen", "packed"])
def test_evaluations_in_threads(tiny: Tiny, kind: str) -> None:
    model = made(tiny, kind, "NVFP4-W4A4KV4", {"global_scale": "row"})

    def run(i: int) -> Any:
        prompts = [list(range(3, 7 + n)) for n in (0, i, 2 * i)]
        seeds, keys = [i, i + 1, i + 2], ["a", "b", "c"]
        decoding = Decoding.parse("sample(temperature=0.8, top_p=0.9)")
        return generate(
            model, None, prompts, seeds=seeds, row_keys=keys, decoding=decoding, max_new_tokens=12, eos_id=(5, 9)
        )

    expected = [run(i) for i in range(4)]
    wrong: list[int] = []

    def work(i: int) -> None:
        for _ in range(3):
            if run(i) != expected[i]:
                wrong.append(i)

    together([lambda i=i: work(i) for i in range(4)])  # type: ignore[misc]
    assert not wrong


def test_evaluation_ends_with_the_last_thread_and_each_module_in_its_own_mode(tiny: Tiny) -> None:
    model = tiny("llama").train()
    model.model.norm.eval()
    first, second = evaluating(model), evaluating(model)
    first.__enter__()
    second.__enter__()
    assert not any(module.training for module in model.modules())
    first.__exit__(None, None, None)
    assert not any(module.training for module in model.modules())  # the second is still at work
    second.__exit__(None, None, None)
    assert [name for name, module in model.named_modules() if not module.training] == ["model.norm"]


def test_weights_kept_for_a_step_are_the_same_in_all_threads(tiny: Tiny) -> None:
    model = tiny("llama")
    prepare(model, "NVFP4-W4A4KV4", global_scale="row")
    prompts = [work_of(2, 8, i)[0] for i in range(4)]
    with torch.no_grad():
        expected = [model(ids, use_cache=False).logits for ids in prompts]
    wrong: list[int] = []

    def work(i: int) -> None:
        for _ in range(4):
            # One thread's block ends while others are at work: they quantize anew, to the same weights.
            with weights_quantized_once(model, enabled=i % 2 == 0), torch.no_grad():
                if not torch.equal(model(prompts[i], use_cache=False).logits, expected[i]):
                    wrong.append(i)

    together([lambda i=i: work(i) for i in range(len(prompts))])  # type: ignore[misc]
    assert not wrong
    assert all(layer._kept is None for layer in quant_linears(model).values())


@pytest.mark.slow
@pytest.mark.skipif(not NATIVE, reason="needs the native library")
@pytest.mark.long
@pytest.mark.parametrize("isa", ["portable", "torch"])
def test_threads_with_other_kernels(isa: str) -> None:
    environment = {**os.environ, "REQAT_ISA": isa}
    assert_passes(environment, "threads_get and packed")


def assert_passes(environment: dict[str, str], chosen: str) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-p", "no:xdist", __file__]
    command += ["-k", f"({chosen}) and not other_kernels"]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert " passed" in done.stdout
