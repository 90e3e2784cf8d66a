"""Tokenizer, trace store, selection and packing."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from reqat.config.stage import DataSettings
from reqat.data import Trace, TraceStore, batches, build_tokenizer, encode_prompt, pack, select, write_store
from reqat.data.packing import IGNORE
from reqat.models.attention import dense_mask
from reqat.pipeline.generated import traces as generate
from reqat.tasks import problems, write_trace


@pytest.fixture(scope="module")
def texts() -> list[str]:
    rng = random.Random(0)
    found = problems(["chain_sum", "leg_counting", "simple_equations"], "train", 90, 0)
    return [text for p in found for text in (p.prompt, write_trace(p, rng) or "")]


@pytest.fixture(scope="module")
def tokenizer(texts):
    return build_tokenizer(texts)


def test_a_prompt_is_taken_as_it_stands_or_put_into_the_models_chat_template(tokenizer, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    prompt = "3 + 4 =\n"
    assert tokenizer.decode(encode_prompt(tokenizer, prompt)) == f"<bos>{prompt}"
    tokenizer.save_pretrained(tmp_path)
    chat = AutoTokenizer.from_pretrained(tmp_path)
    opening = "{% for m in messages %}{{ bos_token }} u {{ m['content'] }}{{ eos_token }}{% endfor %}"
    chat.chat_template = opening + "{% if add_generation_prompt %} a{% endif %}"
    assert chat.decode(encode_prompt(chat, prompt)) == "<bos> u 3 + 4 =<eos> a"


def test_text_survives_encoding_and_every_digit_is_one_token(texts, tokenizer, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer.save_pretrained(tmp_path)
    for tok in (tokenizer, AutoTokenizer.from_pretrained(tmp_path)):
        for text in texts:
            ids = tok(text, add_special_tokens=False)["input_ids"]
            assert tok.decode(ids) == text
            assert tok.unk_token_id not in ids
            assert tok(text)["input_ids"] == [tok.bos_token_id, *ids]
        digits = tok.convert_ids_to_tokens(tok(" 1234567890", add_special_tokens=False)["input_ids"])
        assert [d.strip() for d in digits] == list("1234567890")


def test_an_empty_corpus_is_refused() -> None:
    with pytest.raises(ValueError, match="empty"):
        build_tokenizer([])


def trace(i: int, prompt: int, response: int) -> Trace:
    return Trace(f"t{i}", f"p{i}", "f", "p", "r", tuple(range(100, 100 + prompt)), tuple(range(200, 200 + response)))


shapes = st.lists(st.tuples(st.integers(1, 8), st.integers(1, 12)), min_size=1, max_size=40)


@given(shapes, st.integers(21, 40))
def test_packing_keeps_every_trace_whole_and_masks_what_is_not_its_own(sizes, row_tokens: int) -> None:
    given_traces = [trace(i, p, r) for i, (p, r) in enumerate(sizes)]
    packed = pack(given_traces, row_tokens, bos_id=1, pad_id=0)
    assert sorted(t.id for row in packed.rows for t in row) == sorted(t.id for t in given_traces)
    batch = packed.batch(range(len(packed)))
    assert batch.n_tokens == sum(t.n_tokens for t in given_traces) == packed.n_tokens
    assert batch.n_response_tokens == sum(len(t.response_ids) for t in given_traces)
    mask = dense_mask(batch.segment_ids)
    assert mask.any(-1).all(), "a row of the softmax would be empty"
    rows = list(packed.rows)
    for b, row in enumerate(rows):
        at = 0
        for t in row:
            ids = [1, *t.prompt_ids, *t.response_ids]
            n = len(ids)
            assert batch.input_ids[b, at : at + n].tolist() == ids
            assert batch.position_ids[b, at : at + n].tolist() == list(range(n))
            expected = [IGNORE] * len(t.prompt_ids) + list(t.response_ids) + [IGNORE]
            assert batch.labels[b, at : at + n].tolist() == expected
            inside = mask[b, 0, at : at + n]
            assert torch.equal(inside[:, at : at + n], torch.ones(n, n, dtype=torch.bool).tril())
            assert int(inside.sum()) == n * (n + 1) // 2
            at += n


def test_packing_refuses_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match="t0 has 21 tokens"):
        pack([trace(0, 10, 10)], 20, bos_id=1, pad_id=0)
    with pytest.raises(ValueError, match="no traces"):
        pack([], 20, bos_id=1, pad_id=0)


@given(st.integers(1, 50), st.integers(1, 9), st.integers(1, 3), st.integers(0, 5))
def test_each_epoch_sees_each_row_once(n: int, size: int, epochs: int, seed: int) -> None:
    order = [i for b in batches(n, size, epochs, seed) for i in b]
    assert len(order) == n * epochs
    for e in range(epochs):
        assert sorted(order[e * n : (e + 1) * n]) == list(range(n))
    assert order == [i for b in batches(n, size, epochs, seed) for i in b]


def test_stage_two_of_taq_sees_the_traces_of_stage_one_and_the_control_none_of_them(tokenizer) -> None:
    """Token-identical for "same", disjoint for "different", as the plan's selections ask for them."""
    from itertools import islice

    settings = DataSettings(families={"chain_sum": {}, "leg_counting": {}}, tokens=1, seed=0)
    store = list(islice(generate(settings, tokenizer), 200))
    total = sum(t.n_tokens for t in store)
    ft, qat = total // 2, total // 4
    stage1, same, different = select(store, ft), select(store, qat), select(store, qat, skip_tokens=ft)
    assert same == stage1[: len(same)] and 0 < len(same) < len(stage1)
    assert all(
        a.prompt_ids + a.response_ids == b.prompt_ids + b.response_ids for a, b in zip(same, stage1, strict=False)
    )
    for key in ("id", "problem_id"):
        assert not {getattr(t, key) for t in stage1} & {getattr(t, key) for t in different}
    assert not {t.prompt_ids + t.response_ids for t in stage1} & {t.prompt_ids + t.response_ids for t in different}


def test_generated_traces_are_a_function_of_the_seed(tokenizer) -> None:
    from itertools import islice

    def first(seed: int) -> list[Trace]:
        return list(islice(generate(DataSettings(families={"chain_sum": {}}, tokens=1, seed=seed), tokenizer), 10))

    assert first(0) == first(0) != first(1)


def test_selection_refuses_more_than_there_is() -> None:
    store = [trace(i, 3, 4) for i in range(5)]
    assert select(store, 8) == store[:1] and select(store, 9) == store[:2]
    assert select(store, 8, skip_tokens=8) == store[1:2]
    with pytest.raises(ValueError, match="41 tokens.*holds 40"):
        select(store, 41)
    with pytest.raises(ValueError, match="tokens=0"):
        select(store, 0)


def test_a_store_reads_back_equal_and_a_damaged_one_is_refused(tmp_path: Path) -> None:
    store = [trace(i, 3, 4) for i in range(5)]
    write_store(tmp_path, {"train": store})
    assert list(TraceStore.read(tmp_path).traces) == store
    path = tmp_path / "train.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole[:-30])
    with pytest.raises(ValueError, match="damaged or truncated"):
        TraceStore.read(tmp_path)
    path.write_bytes(whole.replace(b"100", b"101", 1))
    with pytest.raises(ValueError, match="damaged or truncated"):
        TraceStore.read(tmp_path)
    path.write_bytes(whole)
    (tmp_path / "manifest.json").write_text(json.dumps({"files": {}}))
    with pytest.raises(ValueError, match="does not list"):
        TraceStore.read(tmp_path)
    (tmp_path / "manifest.json").unlink()
    with pytest.raises(FileNotFoundError, match="write the traces first"):
        TraceStore.read(tmp_path)
    with pytest.raises(ValueError, match="no traces for 'train'"):
        write_store(tmp_path / "new", {"train": []})
    with pytest.raises(ValueError, match=r"train\.jsonl.*already"):
        write_store(tmp_path, {"train": store})
    assert path.read_bytes() == whole and [p.name for p in tmp_path.iterdir() if p.is_file()] == ["train.jsonl"]
