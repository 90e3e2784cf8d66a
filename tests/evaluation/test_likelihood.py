"""Likelihoods against transformers' own loss; choices and perplexity against their definitions."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, LogitsProcessorList, PreTrainedModel, TemperatureLogitsWarper

from reqat.config.decoding import SAMPLE
from reqat.config.errors import ReqatError
from reqat.data.tokenizer import build_tokenizer
from reqat.evaluation import evaluate
from reqat.evaluation.likelihood import choose, log_likelihoods, perplexity
from reqat.tasks import options_of, problems, verify, write_trace


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=61, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.3,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def rows(n: int) -> list[tuple[list[int], list[int]]]:
    rng = np.random.default_rng(0)
    return [
        (rng.integers(0, 61, rng.integers(1, 9)).tolist(), rng.integers(0, 61, rng.integers(1, 9)).tolist())
        for _ in range(n)
    ]


def loss(model: PreTrainedModel, prompt: list[int], continuation: list[int]) -> float:
    """Summed negative log-likelihood by transformers' own labels, a row alone."""
    ids = torch.tensor([prompt + continuation])
    labels = torch.tensor([[-100] * len(prompt) + continuation])
    with torch.no_grad():
        return float(model(input_ids=ids, labels=labels).loss) * len(continuation)


@pytest.mark.parametrize("batch_tokens", [1, 40, 8192])
def test_log_likelihoods_are_those_of_transformers_whatever_the_batch(
    model: PreTrainedModel, batch_tokens: int
) -> None:
    given = rows(12)
    found = log_likelihoods(model, given, batch_tokens=batch_tokens)
    np.testing.assert_allclose(found, [-loss(model, *row) for row in given], rtol=1e-5)


def test_perplexity_is_the_exponential_of_the_mean_over_tokens(model: PreTrainedModel) -> None:
    sequences = [[*prompt, *continuation] for prompt, continuation in rows(5)]
    total = sum(loss(model, sequence[:1], sequence[1:]) for sequence in sequences)
    expected = np.exp(total / sum(len(sequence) - 1 for sequence in sequences))
    assert perplexity(model, sequences) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("row", "named"),
    [(([], [1]), "0 tokens"), (([1], []), "0 to score"), (([1], [61]), "61"), (([1] * 60, [2] * 9), "64")],
)
def test_what_cannot_be_scored_is_refused(model: PreTrainedModel, row: tuple, named: str) -> None:
    with pytest.raises(ReqatError, match=named):
        log_likelihoods(model, [([1], [2]), row])
    with pytest.raises(ReqatError):
        perplexity(model, [])


def test_a_likelihood_that_is_nan_is_no_choice(model: PreTrainedModel) -> None:
    weight = model.get_output_embeddings().weight
    kept = weight.detach().clone()
    try:
        with torch.no_grad():
            weight[5] = float("nan")
        with pytest.raises(ReqatError, match="row 0.*NaN"):
            log_likelihoods(model, [([1], [2])])
    finally:
        with torch.no_grad():
            weight.copy_(kept)


@pytest.fixture(scope="module")
def asked() -> Callable[[], tuple]:
    families = {"facts": {"countries": 6}, "chain_sum": {"min_terms": 2, "max_terms": 2}}
    given = problems(families, "test", 8, 0)
    import random

    corpus = [p.prompt + str(write_trace(p, random.Random(0))) + "".join(options_of(p)) for p in given]
    tokenizer = build_tokenizer(corpus)
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=128, initializer_range=0.3, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    return lambda: (LlamaForCausalLM(config).eval(), tokenizer, given)


def test_a_choice_is_the_option_of_the_smallest_loss(asked: Callable[[], tuple]) -> None:
    model, tokenizer, given = asked()
    facts = [p for p in given if p.family == "facts"]
    for problem, choice in zip(facts, choose(model, tokenizer, facts), strict=True):
        prompt = tokenizer(problem.prompt)["input_ids"]
        losses = [loss(model, prompt, tokenizer(o, add_special_tokens=False)["input_ids"]) for o in options_of(problem)]
        assert choice.text == options_of(problem)[int(np.argmin(losses))]
        np.testing.assert_allclose(choice.nats, [-value for value in losses], rtol=1e-5)


def test_an_evaluation_scores_choices_and_generates_the_rest_in_the_order_asked(asked: Callable[[], tuple]) -> None:
    model, tokenizer, given = asked()
    how = {"seeds": [0, 1], "decoding": SAMPLE, "max_new_tokens": 5}
    found = evaluate(model, tokenizer, given, **how)
    assert list(found.problem_id) == [p.id for p in given for _ in range(2)] and list(found.seed) == [0, 1] * len(given)
    others = [p for p in given if p.family != "facts"]
    alone = evaluate(model, tokenizer, others, **how)
    rows = [i for i, family in enumerate(found.family) if family != "facts"]
    assert [found.response[i] for i in rows] == list(alone.response), "generation is what it is without the others"
    facts = [p for p in given if p.family == "facts"]
    chosen = {p.id: c for p, c in zip(facts, choose(model, tokenizer, facts), strict=True)}
    for i, id in enumerate(found.problem_id):
        if id in chosen:
            problem = next(p for p in facts if p.id == id)
            assert found.response[i] == chosen[id].text and found.finished[i]
            assert found.correct[i] == verify(problem, chosen[id].text) and found.n_tokens[i] == chosen[id].n_tokens
    only = evaluate(model, tokenizer, facts, **how)
    assert len(only) == 2 * len(facts)
    with pytest.raises(ReqatError, match="likelihood"):
        evaluate(model, tokenizer, given, processors=LogitsProcessorList([TemperatureLogitsWarper(2.0)]), **how)
