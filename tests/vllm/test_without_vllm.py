"""Parts of the plugin that say little to vLLM, against our own, with a stand-in for what they import of it."""

from __future__ import annotations

import importlib
import logging
import random
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum, auto
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from reqat.config.policy import Decoding
from reqat.formats import get_format, quantize_dequantize
from reqat.generation.reset import ReSET
from reqat.quant import block_hadamard, with_signs

VOCABULARY = 23
POLICIES = ("reset(t_low=0.3, tau0=1.5, t_high=1.2, window=4)", "reset(t_low=0.5, tau0=1.0, t_high=1.0, window=2)")


class Move(Enum):
    UNIDIRECTIONAL = auto()
    SWAP = auto()


class Texts:
    """A tokenizer as far as ReSET needs one; token 3 is a line feed, 4 holds a blank line."""

    def __len__(self) -> int:
        return VOCABULARY

    def batch_decode(self, ids: list[list[int]], **_: Any) -> list[str]:
        return [{3: "\n", 4: "x\n\ny"}.get(token, f"t{token}") for (token,) in ids]


@dataclass(eq=False)
class Params:
    extra_args: dict[str, str] | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0


def register(op_name: str, op_func: Any, mutates_args: list[str], fake_impl: Any) -> None:
    """What vLLM's function of that name does, for a CPU."""
    schema = torch.library.infer_schema(op_func, mutates_args=mutates_args)
    LIBRARY.define(op_name + schema)
    LIBRARY.impl(op_name, op_func, dispatch_key="CPU")
    LIBRARY._register_fake(op_name, fake_impl)


LIBRARY = torch.library.Library("vllm", "FRAGMENT")
STAND_INS: dict[str, dict[str, Any]] = {
    "vllm": {},
    "vllm.distributed": {"get_tp_group": lambda: SimpleNamespace(world_size=1)},
    "vllm.logger": {"init_logger": logging.getLogger},
    "vllm.sampling_params": {"SamplingParams": Params},
    "vllm.tokenizers": {"cached_tokenizer_from_config": lambda _: Texts()},
    "vllm.utils": {},
    "vllm.utils.torch_utils": {"direct_register_custom_op": register},
    "vllm.v1": {},
    "vllm.v1.sample": {},
    "vllm.v1.sample.logits_processor": {"BatchUpdate": Any, "LogitsProcessor": object, "MoveDirectionality": Move},
}
PLUGIN = ("reqat.vllm.operators", "reqat.vllm.reset")


@pytest.fixture(scope="module")
def plugin() -> Iterator[SimpleNamespace]:
    """The modules of the plugin under their last names."""
    with pytest.MonkeyPatch.context() as patch:
        for name, content in STAND_INS.items():
            module = ModuleType(name)
            vars(module).update(content)
            patch.setitem(sys.modules, name, module)
        yield SimpleNamespace(**{name.rpartition(".")[2]: importlib.import_module(name) for name in PLUGIN})
    for name in PLUGIN:  # they know the stand-ins
        sys.modules.pop(name, None)


@dataclass
class Request:
    """One request and what it should get: ``logits(t)`` before its t-th token, tempered by our own processor."""

    name: int
    params: Params
    prompt: list[int]
    length: int
    output: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        policy = (self.params.extra_args or {}).get("reqat_decoding")
        rule = Decoding.parse(policy).rule if policy else None
        self.ours = ReSET(rule, Texts()) if rule else None  # type: ignore[arg-type]

    def logits(self, step: int) -> Tensor:
        generator = torch.Generator().manual_seed(1000 * self.name + step)
        return torch.randn(VOCABULARY, generator=generator) * torch.rand((), generator=generator) * 8

    def expected(self) -> Tensor:
        logits = self.logits(len(self.output))[None]
        return logits[0] if self.ours is None else self.ours(torch.tensor([self.prompt + self.output]), logits)[0]


class Batch:
    """A batch as vLLM keeps it: rows are filled, swapped and closed up, and changes are told."""

    def __init__(self) -> None:
        self.rows: list[Request] = []
        self.clear()

    def clear(self) -> None:
        self.removed: list[int] = []
        self.added: list[Any] = []
        self.moved: list[Any] = []

    def change(self, leave: list[Request], enter: list[Request], rng: random.Random) -> SimpleNamespace | None:
        """What a step's changes look like; None if there are none."""
        empty = sorted(i for i, request in enumerate(self.rows) if request in leave)
        rows: list[Request | None] = [None if i in empty else request for i, request in enumerate(self.rows)]
        for request in enter:
            row = empty.pop(0) if empty else len(rows)  # one that replaces another is not told as removed
            rows[row : row + 1] = [request]
            self.added.append((row, request.params, request.prompt, request.output))
        self.removed += sorted(empty, reverse=True)
        while None in rows:  # the last one moves into the first gap
            while rows and rows[-1] is None:
                rows.pop()
            if None in rows:
                gap = rows.index(None)
                rows[gap], rows[-1] = rows[-1], None
                self.moved.append((len(rows) - 1, gap, Move.UNIDIRECTIONAL))
        if len(rows) > 1 and rng.random() < 0.3:
            one, other = rng.sample(range(len(rows)), 2)
            rows[one], rows[other] = rows[other], rows[one]
            self.moved.append((one, other, Move.SWAP))
        self.rows = [request for request in rows if request is not None]
        told = SimpleNamespace(batch_size=len(self.rows), removed=self.removed, added=self.added, moved=self.moved)
        changed = any((self.removed, self.added, self.moved))
        self.clear()
        return told if changed else None


@pytest.mark.parametrize("seed", range(4))
def test_each_request_gets_the_temperatures_that_it_has_alone(plugin: SimpleNamespace, seed: int) -> None:
    """Requests that come, go, change places, wait and are resumed with another list of their tokens; tokens that are
    thrown away; two policies, and requests that ask for none."""
    rng = random.Random(seed)
    config = SimpleNamespace(model_config=SimpleNamespace(skip_tokenizer_init=False))
    processor = plugin.reset.ReSET(config, torch.device("cpu"), False)
    waiting = [
        Request(
            name,
            Params({"reqat_decoding": POLICIES[name % 3]} if name % 3 < 2 else None),
            [rng.randrange(3, 7) for _ in range(3)],
            rng.randrange(5, 30),
        )
        for name in range(12)
    ]
    batch, computed, resumed, discarded = Batch(), 0, 0, 0
    while waiting or batch.rows:
        done = [request for request in batch.rows if len(request.output) == request.length]
        paused = [request for request in batch.rows if request not in done and rng.random() < 0.08]
        enter = [waiting.pop(0) for _ in range(min(len(waiting), 5 - len(batch.rows) + len(done) + len(paused)))]
        for request in enter:
            resumed += bool(request.output)
            request.output = list(request.output)
        waiting += paused
        told = batch.change(done + paused, enter, rng)
        processor.update_state(told)
        if not batch.rows:
            continue
        thrown_away = [request in enter and rng.random() < 0.5 for request in batch.rows]
        logits = [
            torch.randn(VOCABULARY) if away else request.logits(len(request.output))
            for request, away in zip(batch.rows, thrown_away, strict=True)
        ]
        found = processor.apply(torch.stack(logits))
        for request, away, row in zip(batch.rows, thrown_away, found, strict=True):
            if away:
                discarded += 1
                continue
            torch.testing.assert_close(row, request.expected(), rtol=1e-6, atol=0)
            request.output.append(rng.choice([3, 3, 4, 7, 8, 9, 10]))
            computed += 1
    assert computed > 100 and resumed > 3 and discarded > 3


@pytest.mark.parametrize(
    ("params", "part"),
    [
        (Params({"reqat_decoding": POLICIES[0]}, top_p=0.95), None),
        (Params({"reqat_decoding": POLICIES[0]}, temperature=0.0), None),  # greedy: whatever the temperature
        (Params(None, temperature=0.6), None),
        (Params({"reqat_decoding": POLICIES[0]}, temperature=0.6, top_p=0.95), "temperature=0.6"),
        (Params({"reqat_decoding": POLICIES[0]}, top_p=0.9), "top_p=0.9"),
        (Params({"reqat_decoding": POLICIES[0]}, top_p=0.95, top_k=-1), None),
        (Params({"reqat_decoding": POLICIES[0]}, top_p=0.95, top_k=20), "top_k=20.*generation-config"),
        (Params({"reqat_decoding": POLICIES[0]}, top_p=0.95, repetition_penalty=1.05), "repetition_penalty"),
        (Params({"reqat_decoding": "greedy"}), "reset"),
        (Params({"reqat_decoding": "reset(t_low=-1, tau0=1)"}), "t_low"),
    ],
)
def test_requests_that_ask_for_two_things_are_refused(
    plugin: SimpleNamespace, params: Params, part: str | None
) -> None:
    if part is None:
        plugin.reset.ReSET.validate_params(params)
        return
    with pytest.raises(ValueError, match=part):
        plugin.reset.ReSET.validate_params(params)


def test_a_processor_without_tokenizer_or_tokens_says_so(plugin: SimpleNamespace) -> None:
    config = SimpleNamespace(model_config=SimpleNamespace(skip_tokenizer_init=True))
    with pytest.raises(ValueError, match="tokenizer"):
        plugin.reset.ReSET(config, torch.device("cpu"), False)
    config.model_config.skip_tokenizer_init = False
    processor = plugin.reset.ReSET(config, torch.device("cpu"), False)
    added = [(0, Params({"reqat_decoding": POLICIES[0]}), [5], [-1])]  # as vLLM's lists are before tokens arrive
    processor.update_state(SimpleNamespace(removed=[], added=added, moved=[]))
    with pytest.raises(ValueError, match="logits-processors"):
        processor.apply(torch.zeros(1, VOCABULARY))


def test_the_operator_is_our_arithmetic(plugin: SimpleNamespace) -> None:
    """Also while torch traces: the operator is one node of the graph."""
    op, x = plugin.operators, torch.randn(5, 2, 32, generator=torch.Generator().manual_seed(0))
    row, static = (get_format("NVFP4", element="E1M2", global_scale=scale) for scale in ("row", "static"))
    g, shift = torch.tensor(70.0), torch.randn(2, 32, generator=torch.Generator().manual_seed(1))
    moved = block_hadamard(with_signs(x - shift, 3), 16)
    for found, expected in (
        (op.fake_quantize(x, op.spelled(row)), quantize_dequantize(x, row)),
        (op.fake_quantize(x, op.spelled(row), split=True), quantize_dequantize(x, row)),
        (op.fake_quantize(x, op.spelled(static), global_scale=g), quantize_dequantize(x, static, global_scale=g)),
        (op.fake_quantize(x, "", signs=3, rotation=16), block_hadamard(with_signs(x, 3), 16)),
        (
            op.fake_quantize(x, op.spelled(row), shift=shift, signs=3, rotation=16),
            quantize_dequantize(moved, row),
        ),
    ):
        assert torch.equal(found, expected)
    text = op.spelled(row)
    traced = torch.compile(lambda x: op.fake_quantize(2 * x, text), fullgraph=True, backend="eager")
    assert torch.equal(traced(x), quantize_dequantize(2 * x, row))
