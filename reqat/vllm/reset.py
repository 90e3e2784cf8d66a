"""ReSET (:mod:`reqat.decoding.reset`) as a logits processor of vLLM's first interface (``vllm.v1.sample``).

    VLLM_USE_V2_MODEL_RUNNER=0 vllm serve FOLDER --quantization reqat --logits-processors reqat.vllm.reset:ReSET

A request asks for it by the policy that ``reqat fit-reset`` writes, ``SamplingParams(temperature=1, top_p=0.95,
extra_args={"reqat_decoding": "reset(t_low=0.3, tau0=0.5)"})``; others are left alone. It must be named as above (vLLM
keeps output tokens current for processors that are), and not by an entry point.

vLLM computes rows of requests that come, go, change places, wait for memory and are resumed, and rows whose token it
throws away (of a prompt that is read in parts). So each request has a state of its own, which is an immutable row of
some batch's; it holds the one before, too, to go back to where a token was thrown away.

Shapes: B rows, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import math
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from vllm.logger import init_logger
from vllm.sampling_params import SamplingParams
from vllm.tokenizers import cached_tokenizer_from_config
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor, MoveDirectionality

from reqat.config.errors import ReqatError
from reqat.config.policy import Decoding, ReSETRule
from reqat.decoding import STEP_ENDS, ResetState, entropy_nats, step_tables

ARGUMENT = "reqat_decoding"
"""Key of ``SamplingParams.extra_args`` whose value is a policy."""

_GREEDY = 1e-5  # the temperature below which vLLM takes the likeliest token
_NOTHING_ELSE = {"top_k": 0, "min_p": 0.0, "presence_penalty": 0.0, "frequency_penalty": 0.0, "repetition_penalty": 1.0}
_KEPT = 1024  # requests that left the batch and may come back
_logger = init_logger(f"vllm.{__name__}")  # vLLM shows its own loggers


@dataclass
class _Request:
    """A request in the batch: who asked, its rule, and vLLM's own list of its output, which grows."""

    params: SamplingParams
    rule: ReSETRule
    last_of_prompt: int | None
    output: list[int]
    noted: int = 0
    """Entropies in ``now``."""
    now: tuple[ResetState, int] | None = None
    """A state and the row in it."""
    before: tuple[ResetState, int] | None = None
    """The same without the last entropy."""

    def go_to(self, tokens: int) -> None:
        """Let ``now`` be the state after so many tokens."""
        if tokens == self.noted:
            return
        if tokens == self.noted - 1 and self.before is not None:
            self.noted, self.now = tokens, self.before
            return
        if tokens:
            _logger.warning("ReSET begins anew after %d tokens of a response, of which it saw %d", tokens, self.noted)
        self.noted, self.now, self.before = tokens, None, None


class ReSET(LogitsProcessor):
    """Divides the logits of each request that asks for it by the temperature of its next token."""

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        """Raise ValueError for a policy that cannot be read, or beside which the request asks for something else."""
        policy = asked(sampling_params)
        if policy is None or sampling_params.temperature < _GREEDY:
            return
        wanted = {"temperature": 1.0, "top_p": policy.top_p, **_NOTHING_ELSE}
        for name, value in wanted.items():
            given = getattr(sampling_params, name)
            if not math.isclose(given, value, rel_tol=1e-6) and not (name == "top_k" and given == -1):
                raise ReqatError(
                    f"{name}={given} beside {ARGUMENT}={str(policy)!r}: give {name}={value} (where the request does "
                    "not, vLLM takes it from the model's generation_config.json; --generation-config vllm ends that)"
                )

    def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool) -> None:
        if vllm_config.model_config.skip_tokenizer_init:
            raise ReqatError("ReSET needs the tokenizer, which tells where steps end: leave out skip_tokenizer_init")
        self.model_config = vllm_config.model_config
        self._requests: dict[int, _Request] = {}
        self._away: OrderedDict[int, _Request] = OrderedDict()
        self._ends = cache(self._read_ends)

    def is_argmax_invariant(self) -> bool:
        """Not as vLLM means it: such processors see logits that were tempered already, and none of a greedy batch."""
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        """Follow the requests of the batch."""
        if batch_update is None:
            return
        for index in batch_update.removed:
            self._leave(index)
        for index, params, prompt, output in batch_update.added:
            self._leave(index)
            policy = asked(params)
            if policy is None or policy.rule is None:
                continue
            request = self._away.pop(id(params), None) or _Request(params, policy.rule, None, output)
            request.last_of_prompt, request.output = (prompt[-1] if prompt else None), output
            self._requests[index] = request
        for one, other, how in batch_update.moved:
            moved, replaced = self._requests.pop(one, None), self._requests.pop(other, None)
            if moved is not None:
                self._requests[other] = moved
            if how == MoveDirectionality.SWAP and replaced is not None:
                self._requests[one] = replaced

    def _leave(self, index: int) -> None:
        request = self._requests.pop(index, None)
        if request is None:
            return
        for name in ("now", "before"):  # its own row, not the whole batch's state
            place = getattr(request, name)
            if place is not None:
                setattr(request, name, (place[0].rows(torch.tensor([place[1]], device=place[0].sum_B.device)), 0))
        request.output = []  # it is given anew with a request that comes back
        self._away[id(request.params)] = request  # which holds the parameters, so their id is no other's
        while len(self._away) > _KEPT:
            self._away.popitem(last=False)

    def apply(self, logits: Tensor) -> Tensor:
        """Tempered logits [B, V], float32; in place."""
        by_rule: dict[ReSETRule, list[int]] = {}
        for row, request in sorted(self._requests.items()):
            by_rule.setdefault(request.rule, []).append(row)
        for rule, rows in by_rule.items():
            requests = [self._requests[row] for row in rows]
            index_B = torch.tensor(rows, device=logits.device)
            logits_BV = logits[index_B]
            ended_B = torch.tensor([self._ended(request) for request in requests], device=logits.device)
            state = self._state(rule, requests, logits.device)
            following = dataclasses.replace(state)
            temperatures_B = following.temperatures(rule, entropy_nats(logits_BV), ended_B)
            for row, request in enumerate(requests):
                request.before, request.now = (state, row), (following, row)
                request.noted += 1
            logits[index_B] = logits_BV / temperatures_B[:, None].to(logits.dtype)
        return logits

    def _state(self, rule: ReSETRule, requests: Sequence[_Request], device: torch.device) -> ResetState:
        """The state of these requests as rows of one."""
        for request in requests:
            request.go_to(len(request.output))
        places = [request.now for request in requests]
        state = places[0][0] if places[0] is not None else None
        if (
            state is not None
            and len(state.sum_B) == len(places)
            and places == [(state, row) for row in range(len(places))]
        ):
            return state  # the batch of the step before
        parts = []
        for request in requests:
            if request.now is None:
                parts.append(ResetState.begin(1, rule.window, device))
            else:
                state, row = request.now
                parts.append(state.rows(torch.tensor([row], device=device)))
        return ResetState.joined(parts)

    def _ended(self, request: _Request) -> bool:
        """Whether the last token ended a step."""
        output = request.output
        if not output:
            return False
        last, before = output[-1], output[-2] if len(output) > 1 else request.last_of_prompt
        if last < 0:
            raise ReqatError(
                "vLLM did not say which token it sampled last: name the processor by --logits-processors (LLM("
                "logits_processors=[...])), not by an entry point"
            )
        ends, doubled = self._ends(request.rule.step)
        return last in ends or (last in doubled and before in doubled)

    def _read_ends(self, step: str) -> tuple[frozenset[int], frozenset[int]]:
        """Tokens that end a step, and those that do so when doubled."""
        tokenizer = cached_tokenizer_from_config(self.model_config)
        ends_V, doubled_V = step_tables(tokenizer, STEP_ENDS[step])
        return (frozenset(ends_V.nonzero()[:, 0].tolist()), frozenset(doubled_V.nonzero()[:, 0].tolist()))


def asked(params: SamplingParams) -> Decoding | None:
    """The policy of a request that asks for ReSET; None if it does not. Raises ValueError for another policy."""
    text = (params.extra_args or {}).get(ARGUMENT)
    if text is None:
        return None
    policy = _parsed(str(text))
    if policy.kind != "reset":
        raise ReqatError(f"{ARGUMENT}={text!r}: give reset(...), or vLLM's own temperature and top_p")
    return policy


@cache
def _parsed(text: str) -> Decoding:
    return Decoding.parse(text)
