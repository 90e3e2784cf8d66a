"""ReSET against its definition, one row at a time in exact fractions, and inside both generation paths."""

from __future__ import annotations

import random
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM, LogitsProcessorList

from reqat.config.policy import ReSETRule
from reqat.data.tokenizer import build_tokenizer
from reqat.decoding import STEP_ENDS, StepEnds, entropy_nats
from reqat.evaluation.tau0 import fit_tau0
from reqat.generation import Decoding, generate
from reqat.generation.reset import EntropyLog, ReSET, collect_rows
from reqat.tasks import problems, write_trace

Tiny = Callable[..., LlamaForCausalLM]
EOS = 2


class Texts:
    """A tokenizer as far as ReSET needs one: the text of each token."""

    eos_token_id = EOS

    def __init__(self, texts: list[str]) -> None:
        self.texts = texts

    def __len__(self) -> int:
        return len(self.texts)

    def batch_decode(self, ids: list[list[int]], **_: Any) -> list[str]:
        return ["".join(self.texts[i] for i in row) for row in ids]


# Of 41 tokens: 3 is a line feed, 4 a blank line inside other text, 5 a full stop.
TEXTS = Texts(["<pad>", "<bos>", "<eos>", "\n", "x\n\ny", "."] + [f"t{i}" for i in range(6, 41)])


class Watched(ReSET):
    """Keeps the temperatures and entropies of each call, and which rows they are of."""

    def begin_batch(self, start: Any) -> None:
        super().begin_batch(start)
        self.rows = np.array(start.rows)
        self.steps = getattr(self, "steps", [])

    def select_rows(self, index: Tensor) -> None:
        super().select_rows(index)
        self.rows = self.rows[index.numpy()]

    def temperatures(self, input_ids: Tensor, entropies_B: Tensor) -> Tensor:
        found = super().temperatures(input_ids, entropies_B)
        if not hasattr(self, "rows"):
            self.rows, self.steps = np.arange(len(found)), []
        self.steps.append((self.rows, torch.stack([found, entropies_B.double()], dim=1)))
        return found


def by_definition(ids: list[int], prompt: int, entropies: list[float], rule: ReSETRule) -> list[float]:
    """Temperatures of the tokens after the first ``prompt`` ids, from lists, in exact arithmetic."""
    seen: list[Fraction] = []
    step: list[Fraction] = []
    found = []
    for t, value in enumerate(entropies):
        before = [TEXTS.texts[i] for i in ids[: prompt + t]]
        if t > 0 and rule.step == "paragraph" and ("\n\n" in before[-1] or before[-2:] == ["\n", "\n"]):
            step = []
        if t > 0 and rule.step == "sentence" and any(mark in before[-1] for mark in ".?!\n"):
            step = []
        h_t = Fraction(value)
        if not seen:
            H_step = h_t
        elif len(step) < rule.window:
            H_step = sum(seen[-rule.window :]) / Fraction(len(seen[-rule.window :]))
        else:
            H_step = sum(step) / Fraction(len(step))
        H_bar = sum(seen) / Fraction(len(seen)) if seen else H_step
        threshold = Fraction(rule.tau0) if H_step <= H_bar else H_step
        found.append(rule.t_high if h_t >= threshold else rule.t_low)
        seen.append(h_t)
        step.append(h_t)
    return found


def replay(
    rule: ReSETRule, ids_BT: Tensor, prompt: int, entropies_BN: Tensor, drop: random.Random
) -> list[list[float]]:
    """Temperatures of all rows by one processor; some rows leave now and then, the rest changes places."""
    processor = ReSET(rule, TEXTS)  # type: ignore[arg-type]
    rows = torch.arange(len(ids_BT))
    found: list[list[float]] = [[] for _ in ids_BT]
    for t in range(entropies_BN.shape[1]):
        temperatures_B = processor.temperatures(ids_BT[rows, : prompt + t], entropies_BN[rows, t])
        for row, temperature in zip(rows.tolist(), temperatures_B.tolist(), strict=True):
            found[row].append(temperature)
        if len(rows) > 2 and drop.random() < 0.1:
            keep = torch.tensor(drop.sample(range(len(rows)), len(rows) - 1))
            processor.select_rows(keep)
            rows = rows[keep]
    return found


@pytest.mark.parametrize("window", [1, 2, 5, 32])
@pytest.mark.parametrize("step", ["paragraph", "sentence"])
@pytest.mark.parametrize("grid", [None, 0.125])
def test_temperatures_are_those_of_the_definition(window: int, step: Any, grid: float | None) -> None:
    """Random traces; on a grid of entropies there are ties everywhere, and each is a tie here too."""
    rng = np.random.default_rng(window)
    rule = ReSETRule(0.3, 0.5, 1.1, window, step)
    B, prompt, N = 24, 3, 90
    # Each row has its own share of ends of steps: from none (row 0) to every other token.
    common = rng.random((B, 1)) * 0.5 * (np.arange(B)[:, None] > 0)
    ends, plain = rng.integers(3, 6, size=(B, prompt + N)), rng.integers(6, 41, size=(B, prompt + N))
    ids = np.where(rng.random(plain.shape) < common, ends, plain)
    entropies = rng.exponential(0.4, size=(B, N)).astype(np.float32)
    if grid is not None:
        entropies = (entropies / grid).round().astype(np.float32) * np.float32(grid)
    found = replay(rule, torch.from_numpy(ids), prompt, torch.from_numpy(entropies), random.Random(window))
    assert min(map(len, found)) < N and max(map(len, found)) == N  # rows did drop out
    used = set()
    for row in range(B):
        expected = by_definition(ids[row].tolist(), prompt, entropies[row].tolist(), rule)
        assert found[row] == expected[: len(found[row])], row
        used |= set(expected)
    assert used == {0.3, 1.1}


def one_row(rule: ReSETRule, ids: list[int], entropies: list[float]) -> list[float]:
    """Temperatures after a prompt of one token, ``ids`` being what follows; checked against the definition too."""
    whole = torch.tensor([[1, *ids]])
    found = replay(rule, whole, 1, torch.tensor([entropies]), random.Random(0))[0]
    assert found == by_definition(whole[0].tolist(), 1, entropies, rule)
    return found


def test_the_first_token_is_compared_with_tau0() -> None:
    for entropy, expected in ((0.5, 1.0), (0.4999, 0.1)):
        assert one_row(ReSETRule(0.1, 0.5), [7], [entropy]) == [expected]


def test_without_steps_every_token_is_compared_with_tau0() -> None:
    """The step is the trace, and its mean is the trace's mean, to the last bit, however long."""
    rng = np.random.default_rng(0)
    entropies = rng.exponential(0.5, size=150).astype(np.float32).tolist()
    found = one_row(ReSETRule(0.1, 0.5), [7] * 150, entropies)
    assert found == [1.0 if entropy >= 0.5 else 0.1 for entropy in entropies]


@pytest.mark.parametrize(
    ("step", "last", "expected"),
    [
        ([2.0, 2.0, 2.0], 1.6, 1.0),  # shorter than the window: mean of 0, 2, 2, 2
        ([2.0, 2.0, 2.0, 2.0], 1.9, 0.1),  # as long as the window: the window is the step
        ([4.5, 2.0, 2.0, 2.0, 2.0], 2.1, 0.1),  # longer: its mean is 2.5, its last four's would be 2.0
        ([1.0, 2.5, 2.0, 2.0, 2.0], 2.1, 1.0),  # its mean is 1.9, its last four's would be 2.125
    ],
)
def test_a_step_stands_for_itself_from_the_window_on(step: list[float], last: float, expected: float) -> None:
    """Window 4; sure tokens, the end of a step (token 4), an unsure step, and the token in question."""
    entropies = [0.0] * 8 + step + [last]
    assert one_row(ReSETRule(0.1, 0.5, window=4), [7] * 7 + [4] + [7] * (len(step) + 1), entropies)[-1] == expected


def test_an_empty_step() -> None:
    """Two ends in a row, and line feeds that end a step only when doubled."""
    rng = np.random.default_rng(1)
    ids = [7, 4, 4, 3, 3, 3, 7, 3, 7, 3, 4, 3, 3, 7] * 4
    one_row(ReSETRule(0.2, 0.3, window=2), ids, rng.exponential(0.4, size=len(ids)).astype(np.float32).tolist())


def test_tables_hold_every_named_end() -> None:
    for name, expected in (("paragraph", {4}), ("line", {3, 4}), ("sentence", {3, 4, 5})):
        rule = ReSETRule(0.1, 0.5, step=name)  # type: ignore[arg-type]
        processor = ReSET(rule, TEXTS)  # type: ignore[arg-type]
        assert set(processor.ends_V.nonzero()[:, 0].tolist()) == expected
        assert processor.doubled_V.nonzero()[:, 0].tolist() == ([3] if name == "paragraph" else [])
    own = ReSET(ReSETRule(0.1, 0.5), TEXTS, step_ends=StepEnds(("t7", "t40")))  # type: ignore[arg-type]
    assert own.ends_V.nonzero()[:, 0].tolist() == [7, 40]
    for bad in (lambda: StepEnds(()), lambda: StepEnds(("",)), lambda: StepEnds((".",), doubled="")):
        with pytest.raises(ValueError, match="at least one text"):
            bad()
    assert set(STEP_ENDS) == {"paragraph", "line", "sentence"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_are_divided_by_the_temperature(dtype: torch.dtype) -> None:
    """Also of a vocabulary that the model padded beyond the tokenizer's."""
    generator = torch.Generator().manual_seed(0)
    watched = Watched(ReSETRule(0.25, 1.0, 2.0), TEXTS)  # type: ignore[arg-type]
    ids_BT = torch.randint(3, 64, (9, 40), generator=generator)
    used = set()
    for t in range(30):
        scores_BV = (torch.randn(9, 64, generator=generator) * 4).to(dtype)
        before = scores_BV.clone()
        out_BV = watched(ids_BT[:, : 5 + t], scores_BV)
        temperatures_B1 = watched.steps[-1][1][:, :1]
        assert out_BV.dtype == dtype and torch.equal(scores_BV, before)
        assert torch.equal(out_BV, before / temperatures_B1.to(dtype))
        used |= set(temperatures_B1[:, 0].tolist())
    assert used == {0.25, 2.0}
    with pytest.raises(ValueError, match="9 rows.*of 3"):
        watched(ids_BT, scores_BV[:3])


def test_it_starts_anew_with_other_ids() -> None:
    rule = ReSETRule(0.1, 0.5)
    used, rng = ReSET(rule, TEXTS), np.random.default_rng(5)  # type: ignore[arg-type]
    for rows, length in ((3, 6), (3, 7), (2, 7), (3, 4)):
        ids_BT = torch.from_numpy(rng.integers(3, 41, size=(rows, length + 20)))
        entropies_BN = torch.from_numpy(rng.exponential(0.5, size=(rows, 20)).astype(np.float32))
        fresh = ReSET(rule, TEXTS)  # type: ignore[arg-type]
        for t in range(20):
            now = ids_BT[:, : length + t], entropies_BN[:, t]
            assert torch.equal(used.temperatures(*now), fresh.temperatures(*now))
    ids_BT = torch.cat([ids_BT[:, :-1], ids_BT[:, :1]], dim=1)  # would go on, but for:
    used.forget()
    fresh = ReSET(rule, TEXTS)  # type: ignore[arg-type]
    assert torch.equal(used.temperatures(ids_BT, entropies_BN[:, 0]), fresh.temperatures(ids_BT, entropies_BN[:, 0]))


@pytest.mark.parametrize("batch_rows", [None, 5])
def test_in_our_generation(tiny: Tiny, prompts: list[list[int]], batch_rows: int | None) -> None:
    """Left padding, several batches, rows that end and are dropped. The policy is the same processor as one given."""
    model, rule = tiny(), ReSETRule(0.3, 3.35, 1.2, window=4)  # tau0 is this model's median entropy
    prompts = prompts[::2] + prompts[-2:]
    watched = Watched(rule, TEXTS)  # type: ignore[arg-type]
    policy = Decoding.reset(0.3, 3.35, t_high=1.2, window=4)
    settings: dict[str, Any] = {
        "seeds": list(range(len(prompts))),
        "row_keys": [str(i) for i in range(len(prompts))],
        "eos_id": [EOS, 8, 9],
        "max_new_tokens": 25,
        "batch_rows": batch_rows,
    }
    by_hand: dict[str, Any] = {"decoding": Decoding.sample(1.0), "processors": LogitsProcessorList([watched])}
    out = generate(model, None, prompts, **by_hand, **settings)
    assert any(g.finished for g in out) and any(not g.finished for g in out)
    used: set[float] = set()
    for prompt, g, noted in zip(prompts, out, collect_rows(watched.steps, [g.n_tokens for g in out]), strict=True):
        ids = [*prompt, *g.token_ids]
        assert len(noted) == g.n_tokens
        assert noted[:, 0].tolist() == by_definition(ids, len(prompt), noted[:, 1].tolist(), rule)
        with torch.no_grad():
            logits_NV = model(torch.tensor([ids])).logits[0, len(prompt) - 1 :]
        assert np.abs(noted[:, 1] - entropy_nats(logits_NV).numpy()[: len(noted)]).max() < 1e-3
        used |= set(noted[:, 0].tolist())
    assert used == {0.3, 1.2}
    assert generate(model, TEXTS, prompts, decoding=policy, **settings) == out  # type: ignore[arg-type]
    # One temperature for all is plain sampling.
    constant = Decoding.reset(0.6, 1.0, t_high=0.6)
    plain = generate(model, TEXTS, prompts, decoding=Decoding(), **settings)  # type: ignore[arg-type]
    assert generate(model, TEXTS, prompts, decoding=constant, **settings) == plain  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="needs the tokenizer"):
        generate(model, None, prompts, decoding=policy, **settings)


def test_in_transformers_generation(tiny: Tiny, prompts: list[list[int]]) -> None:
    """A padded batch in which rows end gives each row the temperatures that the row has alone."""
    model, rule = tiny(), ReSETRule(0.3, 3.35, 1.2, window=4)
    rows = sorted(prompts, key=len)[6:13]
    longest = max(map(len, rows))

    def run(batch: list[list[int]], width: int) -> tuple[Tensor, list[np.ndarray[Any, Any]]]:
        ids = torch.tensor([[0] * (width - len(row)) + row for row in batch])
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in batch])
        watched = Watched(rule, TEXTS)  # type: ignore[arg-type]
        out = model.generate(
            ids, attention_mask=mask, do_sample=False, max_new_tokens=25, eos_token_id=ends, pad_token_id=0,
            logits_processor=LogitsProcessorList([watched]),
        )  # fmt: skip
        new = out[:, width:]
        # Tokens of a row, its end included; greedy, so that temperatures change no token.
        lengths = [next((i + 1 for i, t in enumerate(row) if t in ends), len(row)) for row in new.tolist()]
        return new, collect_rows(watched.steps, lengths)

    ends = [2, 6, 9, 11, 20, 33]
    together, noted = run(rows, longest)
    assert len({len(row) for row in noted}) > 2
    for i, row in enumerate(rows):
        alone, expected = run([row], len(row))
        n = len(expected[0])
        assert torch.equal(together[i, :n], alone[0, :n])
        assert noted[i][:, 0].tolist() == expected[0][:, 0].tolist()
        ids = [*row, *alone[0, :n].tolist()]
        assert noted[i][:, 0].tolist() == by_definition(ids, len(row), noted[i][:, 1].tolist(), rule)


def test_recorder_keeps_each_row_apart(tiny: Tiny, prompts: list[list[int]]) -> None:
    model, recorder = tiny(), EntropyLog()
    out = generate(
        model,
        None,
        prompts,
        seeds=list(range(len(prompts))),
        row_keys=["p"] * len(prompts),
        decoding=Decoding.sample(1.5, 1.0),
        max_new_tokens=30,
        eos_id=[EOS, 8, 9],
        batch_rows=7,
        processors=LogitsProcessorList([recorder]),
    )
    rows = recorder.of_rows([g.n_tokens for g in out])
    for prompt, g, found in zip(prompts, out, rows, strict=True):
        with torch.no_grad():
            logits_NV = model(torch.tensor([[*prompt, *g.token_ids]])).logits[0, len(prompt) - 1 :]
        assert len(found) == g.n_tokens
        np.testing.assert_allclose(found, entropy_nats(logits_NV)[: g.n_tokens], atol=1e-3)


def test_fit_tau0(tiny: Tiny) -> None:
    asked = problems(["chain_sum", "simple_equations"], "validation", 5, seed=0)
    traces = [write_trace(p, random.Random(0)) or "" for p in asked]
    tokenizer = build_tokenizer([p.prompt for p in asked] + traces)
    model = tiny(vocab_size=len(tokenizer), max_position_embeddings=128)
    settings: dict[str, Any] = {"seeds": [0, 1], "max_new_tokens": 20, "decoding": Decoding.greedy()}
    with pytest.raises(ValueError, match="greedy"):
        fit_tau0(model, tokenizer, asked, **settings)
    settings |= {"decoding": "sample(temperature=1.0)"}
    fit = fit_tau0(model, tokenizer, asked, **settings)
    assert fit.n_problems == 5 and fit.n_seeds == 2 and fit.lo <= fit.value <= fit.hi
    assert fit_tau0(model, tokenizer, asked, batch_rows=3, **settings).value == pytest.approx(fit.value, rel=1e-5)
    recorder = EntropyLog()
    bos = tokenizer.bos_token_id
    out = generate(
        model,
        tokenizer,
        [[bos, *tokenizer(p.prompt, add_special_tokens=False)["input_ids"]] for p in asked for _ in range(2)],
        seeds=[0, 1] * 5,
        row_keys=[p.id for p in asked for _ in range(2)],
        decoding=Decoding.sample(1.0),
        max_new_tokens=20,
        processors=LogitsProcessorList([recorder]),
    )
    everything = np.concatenate(recorder.of_rows([g.n_tokens for g in out]))
    assert fit.n_tokens == len(everything)
    assert fit.value == pytest.approx(float(np.quantile(everything, 0.8)), rel=1e-6)
    for quantile in (0, 1, 80):
        with pytest.raises(ValueError, match=f"quantile={quantile}"):
            fit_tau0(model, tokenizer, asked, quantile=quantile, **settings)
