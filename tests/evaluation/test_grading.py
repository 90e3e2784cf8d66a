"""Evaluation end to end on real task families, with a model that is made to answer."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM, LogitsProcessorList, PreTrainedTokenizerFast

from reqat.data.tokenizer import build_tokenizer
from reqat.evaluation import evaluate
from reqat.generation import BatchStart, Decoding
from reqat.tasks import Problem, problems, write_trace

Tiny = Callable[..., LlamaForCausalLM]
WRONG = " No, the answer is 987654."  # of no problem asked here


@pytest.fixture(scope="module")
def asked() -> list[Problem]:
    return problems(["chain_sum", "simple_equations"], "validation", 6, seed=0)


@pytest.fixture(scope="module")
def answers(asked: list[Problem]) -> dict[str, str]:
    found = {p.id: write_trace(p, random.Random(0)) for p in asked}
    return {key: text for key, text in found.items() if text is not None}


@pytest.fixture(scope="module")
def tokenizer(asked: list[Problem], answers: dict[str, str]) -> PreTrainedTokenizerFast:
    return build_tokenizer([p.prompt for p in asked] + [text + WRONG for text in answers.values()])


class Dictate:
    """Forces each row's response, then (unless it is to stay unfinished) the end."""

    def __init__(self, texts: list[str], tokenizer: PreTrainedTokenizerFast, end: bool = True) -> None:
        tail = [tokenizer.eos_token_id] if end else []
        self.ids = [tokenizer(text, add_special_tokens=False)["input_ids"] + tail for text in texts]

    def begin_batch(self, start: BatchStart) -> None:
        self.rows, self.start = torch.tensor(start.rows), start.input_ids.shape[1]

    def select_rows(self, index: torch.Tensor) -> None:
        self.rows = self.rows[index]

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        step = input_ids.shape[1] - self.start
        wanted = [self.ids[row][min(step, len(self.ids[row]) - 1)] for row in self.rows.tolist()]
        return torch.full_like(scores, -torch.inf).scatter(1, torch.tensor(wanted)[:, None], 0.0)


def settings(**changes: Any) -> dict[str, Any]:
    return {"seeds": [3, 1], "decoding": "sample(temperature=0.6)", "max_new_tokens": 250, **changes}


def test_right_and_wrong_answers(
    tiny: Tiny, asked: list[Problem], answers: dict[str, str], tokenizer: PreTrainedTokenizerFast
) -> None:
    model = tiny(vocab_size=len(tokenizer), max_position_embeddings=512)
    # Right on the first seed; on the second the response goes on to another answer.
    texts = [t for p in asked for t in (answers[p.id], answers[p.id] + WRONG)]
    out = evaluate(model, tokenizer, asked, **settings(), processors=LogitsProcessorList([Dictate(texts, tokenizer)]))
    assert out.problem_id == tuple(p.id for p in asked for _ in range(2))
    assert out.family == tuple(p.family for p in asked for _ in range(2))
    assert out.seed.tolist() == [3, 1] * 6
    assert out.response == tuple(texts)
    assert out.correct.tolist() == [True, False] * 6
    assert out.finished.all()
    assert out.n_tokens.tolist() == [len(tokenizer(t, add_special_tokens=False)["input_ids"]) + 1 for t in texts]
    assert out.metadata == {"decoding": "sample(temperature=0.6, top_p=0.95)", "max_new_tokens": "250"}


def test_unfinished_responses_are_graded_as_they_stand(
    tiny: Tiny, asked: list[Problem], answers: dict[str, str], tokenizer: PreTrainedTokenizerFast
) -> None:
    model = tiny(vocab_size=len(tokenizer), max_position_embeddings=512)
    asked = asked[:2]
    short = min(len(tokenizer(answers[p.id], add_special_tokens=False)["input_ids"]) for p in asked)
    dictate = LogitsProcessorList([Dictate([answers[p.id] for p in asked], tokenizer, end=False)])
    cut = evaluate(
        model,
        tokenizer,
        asked,
        **settings(seeds=[0], max_new_tokens=short - 3),
        processors=dictate,
        keep_responses=False,
    )
    assert (cut.n_unfinished, cut.correct.tolist(), cut.response) == (2, [False, False], None)
    assert cut.n_tokens.tolist() == [short - 3] * 2


def test_prompts_begin_with_bos(tiny: Tiny, asked: list[Problem], tokenizer: PreTrainedTokenizerFast) -> None:
    model = tiny(vocab_size=len(tokenizer), max_position_embeddings=512)
    fed: list[torch.Tensor] = []
    model.register_forward_pre_hook(lambda _, args, kw: fed.append(kw["input_ids"]), with_kwargs=True)
    evaluate(model, tokenizer, asked[:1], **settings(max_new_tokens=1))
    assert fed[0][0, 0] == tokenizer.bos_token_id
    assert tokenizer.decode(fed[0][0, 1:]) == asked[0].prompt


def test_batches_do_not_matter(tiny: Tiny, asked: list[Problem], tokenizer: PreTrainedTokenizerFast) -> None:
    model = tiny(vocab_size=len(tokenizer), max_position_embeddings=512)
    whole = evaluate(model, tokenizer, asked, **settings(max_new_tokens=15))
    parts = evaluate(model, tokenizer, asked[::-1], **settings(max_new_tokens=15, seeds=[1, 3]), batch_rows=3)
    assert whole.digest == parts.digest


@pytest.mark.parametrize(
    ("n", "options", "message"),
    [
        (0, {}, "0 problems and 2 seeds"),
        (1, {"seeds": []}, "1 problems and 0 seeds"),
        (1, {"seeds": [5, 5]}, "seed 5.*more than once"),
        (1, {"decoding": "greedy"}, "2 seeds .*effective_seeds"),
        (1, {"decoding": "gredy"}, "gredy"),
    ],
)
def test_bad_arguments(
    tiny: Tiny,
    asked: list[Problem],
    tokenizer: PreTrainedTokenizerFast,
    n: int,
    options: dict[str, Any],
    message: str,
) -> None:
    with pytest.raises(ValueError, match=message):
        evaluate(tiny(), tokenizer, asked[:n], **settings(**options))
    with pytest.raises(ValueError, match="problem .*more than once"):
        evaluate(tiny(), tokenizer, [asked[0]] * 2, **settings(seeds=[0], decoding=Decoding.greedy()))
