"""Likelihoods and divergences of held-out traces, against scipy in float64, and what is kept of the reference."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from scipy.special import log_softmax, rel_entr
from transformers import LlamaForCausalLM

from reqat.config.errors import ReqatError
from reqat.evaluation import held_out
from reqat.evaluation.entropies import ForcedTrace
from reqat.evaluation.held_out import SUMS, Reference, likelihood_sums
from reqat.evaluation.trace_files import TraceInfo
from reqat.models import freeze, prepare

Tiny = Callable[..., LlamaForCausalLM]


@pytest.fixture
def traces() -> list[ForcedTrace]:
    rng = np.random.default_rng(0)
    drawn = [tuple(map(int, rng.integers(3, 40, n))) for n in (4, 9, 2, 12, 5, 7, 3, 20)]
    return [
        ForcedTrace(TraceInfo(f"p{i}", "sums", 0, "given", "", "", "", None, True), drawn[i], drawn[i + 1])
        for i in range(0, 8, 2)
    ]


def by_hand(model: Any, reference: Any, trace: ForcedTrace) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Negative log-likelihood, divergence and the reference's entropy of each response token, in float64."""
    ids = torch.tensor([[*trace.prompt_ids, *trace.response_ids]])
    with torch.no_grad():
        q, p = (log_softmax(m(ids).logits[0].double().numpy(), axis=-1) for m in (model, reference))
    at = len(trace.prompt_ids) - 1 + np.arange(len(trace.response_ids))
    nll = -q[at, list(trace.response_ids)]
    return nll, rel_entr(np.exp(p[at]), np.exp(q[at])).sum(axis=-1), -(np.exp(p[at]) * p[at]).sum(axis=-1)


def test_sums_are_those_of_each_trace_read_alone(tiny: Tiny, traces: list[ForcedTrace]) -> None:
    reference, model = tiny().eval(), tiny().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.2)
    read = Reference(reference, traces)
    threshold = float(np.median(np.concatenate(read.entropies)))
    found = likelihood_sums(model, read, threshold)
    for i, trace in enumerate(traces):
        nll, kl, entropy = by_hand(model, reference, trace)
        low = read.entropies[i] < threshold
        np.testing.assert_allclose(read.entropies[i], entropy, atol=1e-5)
        expected = [low.sum(), (~low).sum(), *(x[m].sum() for x in (nll, kl) for m in (low, ~low))]
        np.testing.assert_allclose(found.loc[i, list(SUMS)].astype(float), expected, rtol=1e-4, atol=1e-6)
    assert found["kl_low"].sum() + found["kl_high"].sum() > 0.01, "the models differ"


@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
def test_the_reference_reads_once_and_without_room_each_time_to_the_same_bits(
    tiny: Tiny, traces: list[ForcedTrace], monkeypatch: pytest.MonkeyPatch, autocast: torch.dtype | None
) -> None:
    reference, model = tiny().eval(), tiny().eval()
    prepare(model, "NVFP4-W4A4KV4")
    freeze(model)
    monkeypatch.setattr(held_out, "_BATCH_TOKENS", 24)  # several batches
    reads: list[int] = []
    reference.base_model.register_forward_pre_hook(lambda *_: reads.append(1))

    def sums() -> Any:
        reads.clear()
        read = Reference(reference, traces, autocast=autocast)
        batches = len(reads)
        return likelihood_sums(model, read, 3.0), batches, len(reads) - batches

    kept, batches, again = sums()
    assert batches > 1 and again == 0
    monkeypatch.setattr(held_out, "_KEPT_BYTES", 0)
    reread, batches, again = sums()
    assert again == batches
    assert reread.equals(kept)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("n", [1, 2, 4, 5, 6, 7])
def test_a_few_tokens_at_a_time_are_all_of_them_to_the_same_bits(
    monkeypatch: pytest.MonkeyPatch, n: int, threads: int
) -> None:
    wide = 100_000  # enough for threads to share a row
    theirs, logits = torch.randn(2, n, wide, generator=torch.Generator().manual_seed(0))
    tokens = torch.arange(n)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        monkeypatch.setattr(held_out, "_FLOAT64_BYTES", 8 * wide * 100)
        whole = held_out.compared(theirs, logits, tokens)
        monkeypatch.setattr(held_out, "_FLOAT64_BYTES", 8 * wide * 3)
        few = held_out.compared(theirs, logits, tokens)
    finally:
        torch.set_num_threads(before)
    assert len(few[0]) == n and all(torch.equal(a, b) for a, b in zip(whole, few, strict=True))


def test_models_of_other_vocabularies_are_refused(tiny: Tiny, traces: list[ForcedTrace]) -> None:
    read = Reference(tiny().eval(), traces)
    with pytest.raises(ReqatError, match="logits"):
        likelihood_sums(tiny(vocab_size=read.model.config.vocab_size + 1).eval(), read, 1.0)
