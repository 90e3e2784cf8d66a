"""Routing and noise against slow loops over one row, and against plain generation where nothing intervenes."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor
from transformers import LlamaForCausalLM, LogitsProcessorList, PreTrainedTokenizerFast

from reqat.data.tokenizer import build_tokenizer
from reqat.decoding.distributions import entropy_nats
from reqat.evaluation import evaluate
from reqat.evaluation.intervened import evaluate_noisy, evaluate_routed
from reqat.generation import BatchStart, Decoding, Generation, generate
from reqat.generation.interventions import LogitNoise, Noise, Router, Routing, normals, policies
from reqat.generation.sampling import row_state, sample_tokens, uniforms
from reqat.models import freeze, prepare
from reqat.tasks import Problem, problems, write_trace

EOS = 2
THRESHOLD = 1.3  # about the median of the tiny model's entropies, so that both sides are in use
N = 20
Tiny = Callable[..., LlamaForCausalLM]


def sharp(model: LlamaForCausalLM) -> LlamaForCausalLM:
    """With logits that spread the entropies over 0.1 to 2.5 nats."""
    with torch.no_grad():
        model.lm_head.weight.mul_(6)
    return model


@pytest.fixture
def reference(tiny: Tiny) -> LlamaForCausalLM:
    return sharp(tiny())


@pytest.fixture
def candidate(tiny: Tiny) -> LlamaForCausalLM:
    """The same weights in four bits; ``row`` scales, so that rows are independent."""
    model = sharp(tiny())
    prepare(model, "NVFP4-W4A4KV4", global_scale="row")
    return freeze(model)


def run(model: LlamaForCausalLM, prompts: list[list[int]], *processors: Any, **options: Any) -> list[Generation]:
    settings: dict[str, Any] = {
        "seeds": [i % 3 for i in range(len(prompts))],
        "row_keys": [f"key {i}" for i in range(len(prompts))],
        "decoding": Decoding.sample(0.9, 0.95),
        "max_new_tokens": N,
        "eos_id": [EOS, 8],
        **options,
    }
    return generate(model, None, prompts, processors=LogitsProcessorList(processors) or None, **settings)


def slowly(
    choose: Callable[[list[int], int], Tensor], prompt: list[int], seed: int, key: str
) -> tuple[Generation, list[Tensor]]:
    """One row, the logits [V] of each step from ``choose(ids, step)``, without any cache."""
    random_N = uniforms(np.array([row_state(seed, key)], dtype=np.uint64), 0, N)[:, 0]
    ids, seen = list(prompt), []
    for step in range(N):
        logits_V = choose(ids, step)
        seen.append(logits_V)
        token = int(sample_tokens(logits_V[None], random_N[step : step + 1], 0.9, 0.95))
        if token in (EOS, 8):
            return Generation(tuple(ids[len(prompt) :]), True, token), seen
        ids.append(token)
    return Generation(tuple(ids[len(prompt) :]), False), seen


def logits(model: LlamaForCausalLM, ids: list[int]) -> Tensor:
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0, -1].float()


@pytest.mark.parametrize("batch_rows", [None, 7])
def test_routing_to_one_model_is_that_model(
    reference: LlamaForCausalLM, candidate: LlamaForCausalLM, prompts: list[list[int]], batch_rows: int | None
) -> None:
    """Padding, equal prompts and dropped rows: the second cache goes the way of the first."""
    plain, quantized = run(reference, prompts), run(candidate, prompts)
    assert plain != quantized and any(g.finished for g in plain) and any(not g.finished for g in plain)
    for who, expected in (("reference", plain), ("candidate", quantized)):
        routed = Router(candidate, Routing(who, who, THRESHOLD))  # type: ignore[arg-type]
        assert run(reference, prompts, routed, batch_rows=batch_rows) == expected
        for g, decided_N2 in zip(expected, routed.decisions([g.n_tokens for g in expected]), strict=True):
            assert decided_N2.shape == (g.n_tokens, 2)
            assert (decided_N2[:, 1] == (who == "candidate")).all()


@pytest.mark.parametrize("who", [("reference", "candidate"), ("candidate", "reference")])
def test_routing_is_that_of_a_slow_loop(
    reference: LlamaForCausalLM, candidate: LlamaForCausalLM, prompts: list[list[int]], who: tuple[Any, Any]
) -> None:
    router = Router(candidate, Routing(*who, THRESHOLD))
    found = run(reference, prompts, router)
    decisions = router.decisions([g.n_tokens for g in found])
    for i in range(0, len(prompts), 4):
        low = []

        def choose(ids: list[int], step: int) -> Tensor:
            low.append(bool(entropy_nats(logits(reference, ids)[None])[0] < THRESHOLD))  # noqa: B023
            return logits(reference if who[0 if low[-1] else 1] == "reference" else candidate, ids)  # noqa: B023

        expected, _ = slowly(choose, prompts[i], i % 3, f"key {i}")
        assert found[i] == expected
        assert decisions[i][:, 0].tolist() == low
        assert decisions[i][:, 1].tolist() == [who[0 if is_low else 1] == "candidate" for is_low in low]
    together = np.concatenate(decisions)
    assert 0.1 < together[:, 0].mean() < 0.9
    # A row depends on no other row, here too.
    assert run(reference, prompts, Router(candidate, Routing(*who, THRESHOLD)), batch_rows=5) == found
    assert found not in (run(reference, prompts), run(candidate, prompts))


def test_policies() -> None:
    assert {name: str(policy) for name, policy in policies(0.6).items()} == {
        "all-reference": "route(all=reference)",
        "low-reference": "route(low=reference, high=candidate, threshold_nats=0.6)",
        "low-candidate": "route(low=candidate, high=reference, threshold_nats=0.6)",
        "all-candidate": "route(all=candidate)",
    }


def test_normals_are_normal_and_belong_to_row_and_step() -> None:
    states = np.array([row_state(s, "k") for s in range(40)], dtype=np.uint64)
    eta = torch.stack([normals(states, step, 501) for step in range(12)])  # odd: half a pair is left over
    assert eta.shape == (12, 40, 501) and eta.dtype == torch.float32
    assert stats.kstest(eta.numpy().ravel(), "norm").pvalue > 1e-3
    # No number is used twice, but for the half percent that fall on one float32 by chance.
    assert len(np.unique(eta.numpy())) > 0.99 * eta.numel()
    for a, b in ((eta[1:], eta[:-1]), (eta[:, 1:], eta[:, :-1]), (eta[..., 1:], eta[..., :-1])):
        correlation = float((a * b).mean())
        assert abs(correlation) < 4 / np.sqrt(a.numel())  # four standard errors
    few = [3, 17, 5]
    assert torch.equal(normals(states[few], 7, 501), eta[7, few])
    assert normals(states[:0], 3, 8).shape == (0, 8)


@pytest.mark.parametrize("side", ["low", "high"])
def test_noise_by_threshold_is_that_of_a_slow_loop(
    reference: LlamaForCausalLM, prompts: list[list[int]], side: Any
) -> None:
    noise = Noise(0.3, side, threshold_nats=THRESHOLD)
    processor = LogitNoise(noise)
    found = run(reference, prompts, processor)
    decisions = processor.decisions([g.n_tokens for g in found])
    for i in range(0, len(prompts), 4):
        # The row's own stream, apart from the one that its tokens are drawn from.
        state = np.array([row_state(i % 3, f"key {i}")], dtype=np.uint64) ^ np.uint64(0xA0761D6478BD642F)
        met = []

        def choose(ids: list[int], step: int) -> Tensor:
            Z = logits(reference, ids)
            met.append(bool(entropy_nats(Z[None])[0] < THRESHOLD) == (side == "low"))  # noqa: B023
            return Z + met[-1] * (0.3 * Z * normals(state, step, len(Z))[0])  # noqa: B023

        expected, _ = slowly(choose, prompts[i], i % 3, f"key {i}")
        assert found[i] == expected
        assert decisions[i].tolist() == met
    assert run(reference, prompts, LogitNoise(noise), batch_rows=5) == found
    assert found != run(reference, prompts)


class Forced:
    """A processor that is dealt logits and chosen tokens by hand."""

    def __init__(self, noise: Noise, rows: int) -> None:
        self.processor = LogitNoise(noise)
        self.ids = torch.full((rows, 3), 7)
        streams = tuple(row_state(i, "forced") for i in range(rows))
        self.processor.begin_batch(
            BatchStart(self.ids, torch.ones_like(self.ids).bool(), tuple(range(rows)), 60, streams, (EOS,))
        )

    def step(self, scores_BV: Tensor, chosen_B: Tensor) -> Tensor:
        """Which rows were changed, bool [B]; then ``chosen_B`` are the tokens."""
        before = scores_BV.clone()
        out_BV = self.processor(self.ids, scores_BV)
        assert torch.equal(scores_BV, before)
        self.ids = torch.cat([self.ids, chosen_B[:, None]], dim=1)
        return (out_BV != before).any(dim=1)


@pytest.mark.parametrize("side", ["low", "high"])
@pytest.mark.parametrize(("share", "rows"), [(0.25, 10), (0.25, 2), (0.25, 1), (1.0, 5)])
def test_noise_by_share_picks_of_the_rows_that_go_on(side: Any, share: float, rows: int) -> None:
    generator = torch.Generator().manual_seed(0)
    forced = Forced(Noise(0.1, side, share), rows)
    alive_B = torch.ones(rows, dtype=torch.bool)
    for _ in range(8):
        scores_BV = torch.randn(rows, 12, generator=generator) * torch.rand(rows, 1, generator=generator) * 5
        chosen_B = torch.where(torch.rand(rows, generator=generator) < 0.15, EOS, 7)
        changed_B = forced.step(scores_BV, torch.where(alive_B, chosen_B, EOS))
        wanted = int(np.floor(share * int(alive_B.sum()) + 0.5))
        assert changed_B.sum() == wanted and not (changed_B & ~alive_B).any()
        entropies_B = entropy_nats(scores_BV) * (1 if side == "low" else -1)
        if wanted:
            rest_B = alive_B & ~changed_B
            assert not rest_B.any() or entropies_B[changed_B].max() <= entropies_B[rest_B].min()
        alive_B &= chosen_B != EOS


def test_noise_leaves_forbidden_tokens_forbidden() -> None:
    processor = Forced(Noise(5.0, "low", 1.0), 4).processor
    scores_BV = torch.randn(4, 50, generator=torch.Generator().manual_seed(0))
    scores_BV[:, ::3] = -torch.inf
    out_BV = processor(torch.full((4, 3), 7), scores_BV)
    assert torch.equal(out_BV.isinf(), scores_BV.isinf()) and (out_BV[:, ::3] < 0).all() and not out_BV.isnan().any()


def test_no_noise_changes_nothing_and_more_noise_is_more_of_the_same(
    reference: LlamaForCausalLM, prompts: list[list[int]]
) -> None:
    plain = run(reference, prompts)
    assert run(reference, prompts, LogitNoise(Noise(0.0, "low", 1.0))) == plain
    assert run(reference, prompts, LogitNoise(Noise(3.0, "low", threshold_nats=0.0))) == plain  # nothing is below 0
    scores_BV = torch.randn(6, 30, generator=torch.Generator().manual_seed(1))
    shifts = [
        Forced(Noise(sigma, "low", 1.0), 6).processor(torch.full((6, 3), 7), scores_BV) - scores_BV
        for sigma in (0.5, 1.0)
    ]
    # Twice a float32 product, less the rounding of the sums that it came from.
    torch.testing.assert_close(2 * shifts[0], shifts[1], rtol=0, atol=8 * 2.0**-23)


@pytest.fixture(scope="module")
def asked() -> list[Problem]:
    return problems(["chain_sum", "simple_equations"], "validation", 6, seed=0)


@pytest.fixture(scope="module")
def tokenizer(asked: list[Problem]) -> PreTrainedTokenizerFast:
    return build_tokenizer([p.prompt for p in asked] + [write_trace(p, random.Random(0)) or "" for p in asked])


def test_graded(tiny: Tiny, asked: list[Problem], tokenizer: PreTrainedTokenizerFast) -> None:
    """Graded as in any evaluation; policies of one model equal plain evaluations; shares are of real tokens."""
    shape = {"vocab_size": len(tokenizer), "max_position_embeddings": 128}
    reference, candidate = sharp(tiny(**shape)), sharp(tiny(**shape))
    prepare(candidate, "NVFP4-W4A4KV4", global_scale="row")
    settings: dict[str, Any] = {"seeds": [4, 1], "decoding": "sample(temperature=1.0)", "max_new_tokens": 24}
    found = {
        name: evaluate_routed(reference, candidate, tokenizer, asked, policy, **settings)
        for name, policy in policies(THRESHOLD).items()
    }
    assert found["all-reference"].outcomes.response == evaluate(reference, tokenizer, asked, **settings).response
    assert found["all-candidate"].outcomes.response == evaluate(candidate, tokenizer, asked, **settings).response
    assert [found[name].touched for name in ("all-reference", "all-candidate")] == [0.0, 1.0]
    low_reference, low_candidate = found["low-reference"], found["low-candidate"]
    assert low_reference.low is not None and low_reference.touched == pytest.approx(1 - low_reference.low)
    assert low_candidate.low == pytest.approx(low_candidate.touched)
    assert low_candidate.outcomes.metadata["intervention"].startswith("route(low=candidate")
    noisy = evaluate_noisy(reference, tokenizer, asked, Noise(0.5, "high"), **settings)
    assert noisy.outcomes.problem_id == low_reference.outcomes.problem_id
    assert 0.2 < noisy.touched < 0.3 and noisy.low is None
    assert noisy.outcomes.metadata["intervention"] == "noise(sigma=0.5, side=high, share=0.25)"
    with pytest.raises(ValueError, match=f"{len(tokenizer)} tokens.*candidate 41"):
        evaluate_routed(reference, tiny(), tokenizer, asked, policies(0.6)["low-reference"], **settings)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Routing("ref", "candidate"), "low='ref'"),  # type: ignore[arg-type]
        (lambda: Routing("reference", "candidate", float("nan")), "threshold_nats=nan"),
        (lambda: Noise(-0.1, "low"), "sigma=-0.1"),
        (lambda: Noise(0.1, "lower"), "side='lower'"),  # type: ignore[arg-type]
        (lambda: Noise(0.1, "low", 0.0), "share=0.0"),
        (lambda: Noise(0.1, "low", threshold_nats=-1.0), "threshold_nats=-1.0"),
        (lambda: LogitNoise(Noise(0.1, "low"))(torch.ones(1, 1).long(), torch.ones(1, 3)), "needs begin_batch"),
    ],
)
def test_errors_name_the_value(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_models_of_different_vocabularies(tiny: Tiny, prompts: list[list[int]]) -> None:
    with pytest.raises(ValueError, match="44 tokens.*reference 41"):
        run(tiny(), prompts, Router(tiny(vocab_size=44), Routing("reference", "candidate")))
    with pytest.raises(ValueError, match="needs begin_batch"):
        Router(tiny(), Routing("reference", "candidate"))(torch.ones(1, 1).long(), torch.ones(1, 41))
