"""Generation against transformers' own, and against itself in other batches."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor
from transformers import LlamaForCausalLM, LogitsProcessorList, SuppressTokensLogitsProcessor

from reqat.generation import BatchStart, Decoding, Generation, generate
from reqat.generation import batches as module
from reqat.models import freeze, prepare

EOS = 2
Tiny = Callable[..., LlamaForCausalLM]


def run(model: LlamaForCausalLM, prompts: list[list[int]], **options: Any) -> list[Generation]:
    settings: dict[str, Any] = {
        "seeds": list(range(len(prompts))),
        "row_keys": [f"problem {i % 5}" for i in range(len(prompts))],
        "decoding": Decoding(),
        "max_new_tokens": 12,
        "eos_id": EOS,
        **options,
    }
    return generate(model, None, prompts, **settings)


def by_transformers(model: LlamaForCausalLM, prompt: list[int], max_new_tokens: int, **options: Any) -> list[int]:
    """Greedy tokens of ``prompt`` alone, without padding and without an end."""
    ids = torch.tensor([prompt])
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=max_new_tokens,
        eos_token_id=None,
        pad_token_id=0,
        **options,
    )
    return out[0, len(prompt) :].tolist()


def test_greedy_equals_transformers(tiny: Tiny, prompts: list[list[int]]) -> None:
    model, greedy = tiny(), Decoding.greedy()
    prompts = prompts[:6] + prompts[-4:]
    free = [by_transformers(model, prompt, 14) for prompt in prompts]
    # An end that stops rows at different steps, and some not at all.
    stops = {token: {tuple(row).index(token) if token in row else None for row in free} for token in range(41)}
    end = max((t for t in stops if None in stops[t]), key=lambda t: len(stops[t]))
    assert len(stops[end]) >= 4
    expected = [
        Generation(tuple(r[: r.index(end)]), True, end) if end in r else Generation(tuple(r), False) for r in free
    ]
    for precision in (None, "BF16"):
        if precision is not None:
            prepare(model, precision)
        for batch_rows in (None, 4):
            found = run(model, prompts, decoding=greedy, eos_id=end, max_new_tokens=14, batch_rows=batch_rows)
            assert found == expected, (precision, batch_rows)


def test_several_ends(tiny: Tiny, prompts: list[list[int]]) -> None:
    model = tiny()
    one_end = run(model, prompts, eos_id=(), decoding=Decoding.greedy())
    assert all(not g.finished and len(g.token_ids) == 12 for g in one_end)
    ends = (EOS, 11, 30)
    several = run(model, prompts, eos_id=ends, decoding=Decoding.greedy())
    assert any(g.finished for g in several)
    for free, ended in zip(one_end, several, strict=True):
        stop = next((i for i, token in enumerate(free.token_ids) if token in ends), None)
        assert ended == Generation(
            free.token_ids[:stop], stop is not None, None if stop is None else free.token_ids[stop]
        )
        assert ended.all_ids == free.token_ids[: None if stop is None else stop + 1]


@pytest.mark.parametrize(
    ("precision", "options"),
    [
        (None, {}),
        ("BF16", {}),
        ("NVFP4-W4A4KV4", {"global_scale": "row"}),
        ("MXFP4-W4A4", {"rotation": 32}),
    ],
)
def test_a_row_depends_on_no_other_row(
    tiny: Tiny,
    prompts: list[list[int]],
    precision: str | None,
    options: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Alone, in a batch, in small batches, in another order: the same tokens."""
    monkeypatch.setattr(module, "_RANDOM_STEPS", 5)  # so that random numbers are drawn anew after rows were dropped
    model = tiny()
    if precision is not None:
        prepare(model, precision, **options)
        freeze(model)
    n = len(prompts)
    seeds, keys = [i % 3 for i in range(n)], [f"key {i}" for i in range(n)]
    together = run(model, prompts, seeds=seeds, row_keys=keys)
    assert any(g.finished for g in together) and any(not g.finished for g in together)
    assert run(model, prompts, seeds=seeds, row_keys=keys, batch_rows=5) == together
    shuffled = np.random.default_rng(0).permutation(n).tolist()
    again = run(
        model, [prompts[i] for i in shuffled], seeds=[seeds[i] for i in shuffled], row_keys=[keys[i] for i in shuffled]
    )
    assert again == [together[i] for i in shuffled]
    for i in range(0, n, 5):
        assert run(model, [prompts[i]], seeds=[seeds[i]], row_keys=[keys[i]]) == [together[i]]


def test_seed_and_key_make_the_response(tiny: Tiny) -> None:
    model = tiny()
    rows = [(0, "a"), (1, "a"), (0, "b")]
    first = run(model, [[1, 5, 6]] * 3, seeds=[s for s, _ in rows], row_keys=[k for _, k in rows], eos_id=())
    assert len(set(first)) == 3
    assert run(model, [[1, 5, 6]] * 3, seeds=[s for s, _ in rows], row_keys=[k for _, k in rows], eos_id=()) == first


@pytest.mark.parametrize("attention", ["sdpa", "eager", "reqat"])
def test_left_padding_changes_no_logits(tiny: Tiny, prompts: list[list[int]], attention: str) -> None:
    model = tiny()
    model.set_attn_implementation(attention) if attention != "reqat" else prepare(model, "BF16")
    rows = sorted(prompts, key=lambda p: (len(p), p))
    fed = torch.arange(len(rows)) + 3
    with torch.no_grad():
        batch = module.RunningBatch(model, rows, 4, None)
        prefill, _ = batch.logits, batch.step(fed)
        for i, row in enumerate(rows):
            plain = model(torch.tensor([[*row, int(fed[i])]])).logits[0, -2:]
            torch.testing.assert_close(torch.stack([prefill[i], batch.logits[i]]), plain, rtol=1e-4, atol=1e-4)


def test_padding_computes_what_the_first_token_computes(tiny: Tiny) -> None:
    """So padding never widens the range that a dynamic quantizer sees."""
    model = tiny()
    prepare(model, "BF16")
    seen: list[Tensor] = []
    for layer in model.model.layers:
        layer.mlp.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        module.RunningBatch(model, [[9, 5], [7, 5, 4, 6, 8]], 4, None)
    for x_UPC in seen:
        torch.testing.assert_close(x_UPC[0, :3], x_UPC[0, 3:4].expand(3, -1), rtol=1e-5, atol=1e-5)


def test_no_mask_where_lengths_are_equal_and_prompts_are_read_once(tiny: Tiny) -> None:
    model = tiny()
    calls: list[dict[str, Any]] = []
    model.register_forward_pre_hook(lambda _, args, kwargs: calls.append(kwargs), with_kwargs=True)
    run(model, [[1, 5], [1, 6]] * 10, eos_id=(), max_new_tokens=3, row_keys=[str(i) for i in range(20)])
    assert [tuple(c["input_ids"].shape) for c in calls] == [(2, 2), (20, 1), (20, 1)]
    assert all(c["attention_mask"] is None for c in calls)


@pytest.mark.parametrize("n_ends", [1, 3])
def test_finished_rows_leave_the_batch(tiny: Tiny, prompts: list[list[int]], n_ends: int) -> None:
    model, prompts = tiny(), prompts * 3
    options: dict[str, Any] = {"max_new_tokens": 30, "row_keys": [str(i) for i in range(72)]}
    free = np.bincount([t for g in run(model, prompts, eos_id=(), **options) for t in g.token_ids], minlength=41)
    rows: list[int] = []
    model.register_forward_pre_hook(lambda _, args, kwargs: rows.append(len(kwargs["input_ids"])), with_kwargs=True)
    ends = free.argsort()[::-1][:n_ends].tolist()
    lengths = [g.n_tokens for g in run(model, prompts, eos_id=ends, **options)]
    assert np.median(lengths) < 25  # most rows do end
    for step, fed in enumerate(rows[1:], start=1):
        alive = sum(length > step for length in lengths)
        assert alive <= fed < alive / 0.75 + 1


def test_frequencies_of_the_first_token(tiny: Tiny) -> None:
    """End to end: seeds are the sample."""
    model, n = tiny(), 6000
    prompt = [1, 7, 9]
    out = run(
        model,
        [prompt] * n,
        seeds=list(range(n)),
        row_keys=["p"] * n,
        decoding=Decoding.sample(2.0, 1.0),
        eos_id=(),
        max_new_tokens=1,
    )
    counts = np.bincount([g.token_ids[0] for g in out], minlength=41)
    with torch.no_grad():
        expected = n * (model(torch.tensor([prompt])).logits[0, -1].double() / 2).softmax(-1).numpy()
    often = expected >= 5
    observed, wanted = counts[often], expected[often]
    if not often.all():
        observed, wanted = np.append(observed, counts[~often].sum()), np.append(wanted, expected[~often].sum())
    assert stats.chisquare(observed, wanted).pvalue > 1e-3


class Recorder:
    """A stateful processor: remembers what it was told, forbids nothing."""

    def __init__(self) -> None:
        self.starts: list[BatchStart] = []
        self.ids = torch.empty(0)
        self.n_selected = 0

    def begin_batch(self, start: BatchStart) -> None:
        self.starts.append(start)
        self.ids = start.input_ids

    def select_rows(self, index: Tensor) -> None:
        self.ids = self.ids[index]
        self.n_selected += 1

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        assert scores.dtype == torch.float32 and len(scores) == len(input_ids)
        if input_ids.shape[1] > self.ids.shape[1]:  # one token more than before, for the same rows
            assert torch.equal(input_ids[:, :-1], self.ids)
        self.ids = input_ids
        return scores


def test_processors(tiny: Tiny, prompts: list[list[int]]) -> None:
    model, recorder = tiny(), Recorder()
    forbid, few = SuppressTokensLogitsProcessor([EOS, 11, 12, 13]), prompts[:3]
    found = run(model, few, decoding=Decoding.greedy(), processors=LogitsProcessorList([forbid]), max_new_tokens=6)
    expected = [by_transformers(model, p, 6, suppress_tokens=[EOS, 11, 12, 13]) for p in few]
    assert [list(g.token_ids) for g in found] == expected
    plain = run(model, prompts, max_new_tokens=30, batch_rows=10)
    assert run(model, prompts, max_new_tokens=30, batch_rows=10, processors=LogitsProcessorList([recorder])) == plain
    assert len(recorder.starts) == 3 and recorder.n_selected > 0
    assert sorted(row for start in recorder.starts for row in start.rows) == list(range(len(prompts)))
    for start in recorder.starts:
        for i, row in enumerate(start.rows):
            assert start.input_ids[i][start.attention[i]].tolist() == prompts[row]


def test_autocast_reaches_the_model(tiny: Tiny) -> None:
    model = tiny()
    dtypes: set[torch.dtype] = set()
    model.model.layers[0].mlp.down_proj.register_forward_hook(lambda _, args, out: dtypes.add(out.dtype))
    run(model, [[1, 5]], autocast=torch.bfloat16)
    assert dtypes == {torch.bfloat16}


def test_the_model_is_left_as_it_was(tiny: Tiny, capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    run(model, [[1, 5], [1, 6, 7]], progress="trying")
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert capsys.readouterr() == ("", "")  # no terminal, no progress bar
    assert run(model, []) == []


def test_default_batch_fits_the_memory(tiny: Tiny) -> None:
    small = module._default_batch_rows(tiny(), 30, 60)
    assert small == 1024
    long = module._default_batch_rows(
        tiny(num_hidden_layers=32, hidden_size=256, num_key_value_heads=4), 20_000, 30_000
    )
    assert long == 1


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ([[1], []], {}, "row 1 .* is empty"),
        ([[1], [1]], {"seeds": [0]}, "2 prompts, 1 seeds"),
        ([[1], [1]], {"row_keys": ["a"]}, "1 row keys"),
        ([[1], [1]], {"seeds": [4, 4], "row_keys": ["a", "a"]}, "seed 4 and row key 'a'"),
        ([[1]], {"max_new_tokens": 0}, "max_new_tokens=0"),
        ([[1]], {"batch_rows": 0}, "batch_rows=0"),
        ([[1] * 90], {"max_new_tokens": 12}, "90 tokens.*max_new_tokens=12.* 96 .* to 6"),
    ],
)
def test_bad_arguments(tiny: Tiny, prompts: list[list[int]], options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run(tiny(), prompts, **options)


def test_nan_weights(tiny: Tiny) -> None:
    model = tiny()
    model.model.norm.weight.data[3] = torch.nan
    with pytest.raises(ValueError, match="rows hold nan .*NaN weights"):
        run(model, [[1, 4], [1, 5]])


def test_a_killed_run_decodes_no_batch_twice(
    tiny: Tiny, prompts: list[list[int]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, decode, decoded = tiny(), module._decode, []
    whole = run(model, prompts, batch_rows=4)

    def counted(*given: Any) -> Tensor:
        decoded.append(given[1])
        if len(decoded) == 3:
            raise KeyboardInterrupt
        return decode(*given)

    monkeypatch.setattr(module, "_decode", counted)
    with pytest.raises(KeyboardInterrupt):
        run(model, prompts, batch_rows=4, kept=tmp_path / "kept")
    assert run(model, prompts, batch_rows=4, kept=tmp_path / "kept") == whole
    done = [tuple(rows) for rows in decoded]
    assert len(done) == len(set(done)) + 1 and done[2] == done[3], "the batch that was interrupted, and no other"
    assert any(g.finished for g in whole) and any(not g.finished for g in whole)
    suppressed = LogitsProcessorList([SuppressTokensLogitsProcessor([3])])
    with pytest.raises(ValueError, match="processors"):
        run(model, prompts, kept=tmp_path / "kept", processors=suppressed)
    next((tmp_path / "kept").glob("*.json")).write_text("[[1, 2, 3, 4]]")
    with pytest.raises(ValueError, match="kept batch"):
        run(model, prompts, batch_rows=4, kept=tmp_path / "kept")
