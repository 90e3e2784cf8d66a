"""Damaged results and models: model and tokenizer folders, sidecars, records, trace stores, traces, problems, fits."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tests.campaign.cases import Case
from tests.campaign.damage import (
    chat_template,
    contents,
    entries,
    filled,
    first_weight,
    flip_last,
    folder_for,
    index_file,
    more_tokens,
    pickled,
    rewritten,
    stored_trace,
    tensors,
    torch_module,
    with_tensor,
    without_column,
)

HUGE = 2**70
QUANTIZE = ("quantize", "--model", "model", "--precision", "NVFP4-W4A4KV4", "--out", "out", "--quiet")
ENTROPY = (
    "entropy",
    "--reference",
    "model",
    "--out",
    "out",
    "--problems",
    "problems.jsonl",
    "--max-new-tokens",
    "2",
    "--no-sample",
    "--quiet",
)
DEEP = b"[" * 100_000

# Changes of config.json: what it says then, and what the message must hold.
CONFIG: tuple[tuple[dict[str, Any], str], ...] = (
    ({"hidden_size": "wide"}, "hidden_size"),
    ({"hidden_size": -64}, "hidden_size|64"),
    ({"hidden_size": 63}, ""),
    ({"head_dim": 0}, "head_dim"),
    ({"head_dim": -1}, ""),
    ({"head_dim": "x"}, ""),
    ({"hidden_act": "no_such"}, "no_such"),
    ({"dtype": "float99"}, "float99"),
    ({"dtype": 5}, ""),
    ({"num_hidden_layers": 0}, ""),
    ({"num_hidden_layers": -1}, ""),
    ({"num_hidden_layers": 3}, "missing|layers"),
    ({"num_attention_heads": 0}, ""),
    ({"num_attention_heads": "two"}, ""),
    ({"num_key_value_heads": 7}, ""),
    ({"vocab_size": 0}, ""),
    ({"vocab_size": 10}, ""),
    ({"vocab_size": HUGE}, ""),
    ({"intermediate_size": None}, ""),
    ({"model_type": "no_such_type"}, "no_such_type"),
    ({"model_type": None}, ""),
    ({"model_type": "gpt2"}, ""),
    ({"model_type": ["llama"]}, ""),
    ({"rope_parameters": "x"}, ""),
    ({"rope_parameters": {"rope_type": "no_such", "rope_theta": 1e4}}, ""),
    ({"rms_norm_eps": "small"}, ""),
    ({"architectures": 5}, ""),
    ({"max_position_embeddings": "many"}, ""),
    ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "gptq"),
    ({"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}, "bitsandbytes"),
    ({"quantization_config": {"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized"}}, "quant"),
    ({"quantization_config": 5}, ""),
    ({"auto_map": {"AutoModelForCausalLM": "evil.Evil"}, "model_type": "evil"}, "evil"),
)
JSON_DAMAGES: tuple[tuple[str, bytes | None], ...] = (
    ("not there", None),
    ("empty", b""),
    ("cut", b'{"a": '),
    ("a list", b"[]"),
    ("a number", b"5"),
    ("null", b"null"),
    ("bad UTF-8", b"\xff\xfe\x00"),
    ("nested deeply", DEEP),
)
PROBLEM_LINES: tuple[tuple[str, bytes, str], ...] = (
    ("mistyped key", b'{"prompt": "a", "respnse": "b"}', "respnse"),
    ("no prompt", b'{"response": "b"}', "prompt"),
    ("prompt null", b'{"prompt": null}', "prompt"),
    ("prompt a number", b'{"prompt": 5}', "prompt"),
    ("prompt blank", b'{"prompt": "  "}', "prompt"),
    ("seed text", b'{"prompt": "a", "seed": "x"}', "seed"),
    ("seed a list", b'{"prompt": "a", "seed": [1]}', "seed"),
    ("seed infinite", b'{"prompt": "a", "seed": 1e999}', "seed"),
    ("seed negative", b'{"prompt": "a", "seed": -1}', "seed"),
    ("seed true", b'{"prompt": "a", "seed": true}', "seed"),
    ("seed a fraction", b'{"prompt": "a", "seed": 1.5}', "seed"),
    ("ids too large", b'{"prompt": "a", "response_ids": [1180591620717411303424]}', "response_ids"),
    ("ids negative", b'{"prompt": "a", "response_ids": [-1]}', "response_ids"),
    ("ids text", b'{"prompt": "a", "response_ids": "1 2"}', "response_ids"),
    ("ids true", b'{"prompt": "a", "response_ids": [true]}', "response_ids"),
    ("ids beyond the embedding", b'{"prompt": "a", "response_ids": [100000]}', "100000"),
    ("response a number", b'{"prompt": "a", "response": 5}', "response"),
    ("finished text", b'{"prompt": "a", "finished": "no"}', "finished"),
    ("answer a list", b'{"prompt": "a", "answer": [1]}', "answer"),
    ("id a list", b'{"prompt": "a", "id": [1]}', "id"),
    ("family a number", b'{"prompt": "a", "family": 5}', "family"),
    ("lone surrogate", b'{"prompt": "\\ud800"}', "surrogate"),
    ("lone surrogate in the response", b'{"prompt": "a", "response": "\\udfff"}', "surrogate"),
    ("not JSON", b"prompt: a", "JSON"),
    ("NaN", b'{"prompt": "a", "seed": NaN}', "NaN"),
    ("a text", b'"a"', "object"),
    ("nested deeply", b'{"prompt": ' + DEEP, "nest"),
    ("bad UTF-8", b'{"prompt": "\xff"}', "UTF-8"),
    ("a key twice", b'{"prompt": "a", "prompt": "b"}', "prompt"),
    ("a long number", b'{"prompt": "a", "seed": ' + b"9" * 9999 + b"}", ""),
    ("60 MB", b'{"prompt": "' + b"a" * 60_000_000 + b'"}', "long|bytes|characters|tokens"),
    ("too many tokens", b'{"prompt": "' + b"2 + " * 500 + b"2 =" + b'", "response": "4"}', "tokens|positions"),
    ("the same id twice", b'{"prompt": "a", "id": "p1"}', "p1"),
)
TRACES = ("tokens.parquet", "traces.parquet", "meta.json")


def cases() -> Iterator[Case]:
    """All of them."""
    yield from _models()
    yield from _tokenizers()
    yield from _problems()
    yield from _stores()
    yield from _views()
    yield from _fits()
    yield from _records()


def _models() -> Iterator[Case]:
    for change, says in CONFIG:
        yield _model(f"config.json {change}"[:90], says, entries("model/config.json", change))
    for what, data in JSON_DAMAGES:
        yield _model(f"config.json {what}", "config.json", contents("model/config.json", data))
        yield _model(
            f"generation_config.json {what}" if data is not None else "no weights",
            "json|safetensors",
            contents("model/generation_config.json" if data is not None else "model/model.safetensors", data),
        )
    for what, change in (
        ("cut", lambda data: data[:-100]),
        ("empty", lambda data: b""),
        ("a header of 2^60", lambda data: b"\x00" * 7 + b"\x10" + data[8:]),
        ("not safetensors", lambda data: b"PK" + data[2:]),
        ("a pickle", lambda data: b"\x80\x04."),
    ):
        yield _model(f"weights {what}", "safetensors", rewritten("model/model.safetensors", change))
    yield _model("weights a folder", "safetensors", folder_for("model/model.safetensors"))
    yield _model("only pickled weights", "pickle", pickled)
    yield _model(
        "weights of integers",
        "dtype|I32|int32|integer",
        tensors(lambda t: {**t, first_weight(t): t[first_weight(t)].to(torch_module().int32)}),
    )
    yield _model(
        "weights with NaN", "NaN", tensors(lambda t: {**t, first_weight(t): t[first_weight(t)] * float("nan")})
    )
    yield _model(
        "weights of another shape", "shape", tensors(lambda t: {**t, first_weight(t): t[first_weight(t)][:3].clone()})
    )
    yield _model("a weight missing", "missing", tensors(lambda t: {k: v for k, v in t.items() if k != first_weight(t)}))
    yield _model(
        "a weight more", "unknown|more", tensors(lambda t: {**t, "model.extra.weight": t[first_weight(t)].clone()})
    )
    yield _model(
        "F32 declared as I32",
        "dtype|I32|int",
        rewritten("model/model.safetensors", lambda d: d.replace(b'"F32"', b'"I32"')),
    )
    for what, index in (
        ("leaves the folder", {"metadata": {}, "weight_map": {"x": "../outside.safetensors"}}),
        ("absolute", {"metadata": {}, "weight_map": {"x": "/etc/passwd"}}),
        ("a number as name", {"weight_map": {"x": 5}}),
        ("without metadata", {"weight_map": {"x": "no.safetensors"}}),
        ("weight_map a list", {"weight_map": [1]}),
        ("without weight_map", {"metadata": {}}),
        ("a list", []),
        ("names no file", {"metadata": {}, "weight_map": {}}),
        ("null name", {"weight_map": {"x": None}}),
    ):
        yield _model(f"index {what}", "index|safetensors", index_file(index))
    yield _model(
        "index cut", "index", contents("model/model.safetensors.index.json", b'{"weight_map": ', also=index_file({}))
    )


def _tokenizers() -> Iterator[Case]:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        for what, data in (*JSON_DAMAGES, ("an empty object", b"{}" if name == "tokenizer.json" else b"[1]")):
            yield Case("tokenizer", f"{name} {what}", ("tokenizer",), ENTROPY, prepare=contents(f"model/{name}", data))
    for what, change in (
        ("bos a list", {"bos_token": [1]}),
        ("template a number", {"chat_template": 5}),
    ):
        yield Case(
            "tokenizer",
            f"{what}",
            ("tokenizer|template",),
            ENTROPY,
            prepare=entries("model/tokenizer_config.json", change),
        )
    yield Case("tokenizer", "ids beyond the embedding", ("token|embedding|vocabular",), ENTROPY, prepare=more_tokens)
    for what, template in (
        ("syntax", "{% for m in messages %}{{ m"),
        ("unknown filter", "{{ messages | nosuch }}"),
        ("stopped by the sandbox", "{{ messages.__class__.__mro__[1].__subclasses__() }}"),
        ("raises", "{{ raise_exception('no system prompt') }}"),
        ("types", "{{ messages + 5 }}"),
        ("undefined", "{{ nothing.at.all }}"),
        ("division", "{{ 1 // 0 }}"),
        ("endless range", "{% for i in range(10**9) %}{% endfor %}"),
        ("recursion", "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}"),
        ("unknown tag", "{% include 'x' %}"),
    ):
        yield Case("template", what, ("template",), ENTROPY, prepare=chat_template(template))


def sidecars() -> Iterator[tuple[str, str, Callable[[Path], None]]]:
    """(name, what the message says, change) of sidecars of a quantized model."""
    says = "reqat|scale|codes"
    for change, what in (
        (lambda t: with_tensor(t, "weight_scale", lambda x: x[:, :-1].clone()), "fewer blocks"),
        (lambda t: with_tensor(t, "weight_scale", lambda x: x.view(torch_module().uint8)), "scales as bytes"),
        (lambda t: with_tensor(t, "weight_scale", filled(0x7F)), "scales NaN"),
        (lambda t: with_tensor(t, "weight_scale", filled(0xB8)), "scales negative"),
        (lambda t: with_tensor(t, "weight_scale", lambda x: x[:1].clone()), "one row of scales"),
        (lambda t: with_tensor(t, "weight_scale", lambda x: x[:0].clone()), "no scales"),
        (lambda t: with_tensor(t, "weight_global_scale", lambda x: x * 0), "global scale 0"),
        (lambda t: with_tensor(t, "weight_global_scale", lambda x: -x), "global scale negative"),
        (lambda t: with_tensor(t, "weight_global_scale", lambda x: x * float("nan")), "global scale NaN"),
        (lambda t: {k: v for k, v in t.items() if "global" not in k}, "no global scale"),
        (lambda t: with_tensor(t, "weight_packed", lambda x: x.flatten()[:-1].clone()), "codes cut"),
        (lambda t: with_tensor(t, "weight_packed", lambda x: x.to(torch_module().float32)), "codes of floats"),
        (lambda t: with_tensor(t, "weight_packed", lambda x: x ^ 1), "a bit of each code flipped"),
        (lambda t: {k + "x": v for k, v in t.items()}, "of other names"),
        (lambda t: {}, "nothing in it"),
    ):
        yield what, says, tensors(change, "quantized/model/reqat.safetensors")
    for what, data in JSON_DAMAGES[1:]:
        yield f"description {what}", "reqat.json", contents("quantized/model/reqat.json", data)
    for key, value in (
        ("precision", 5),
        ("precision", {"name": "X"}),
        ("precision", None),
        ("schema", 999),
        ("schema", None),
    ):
        yield f"description's {key} {value}", "reqat.json", entries("quantized/model/reqat.json", {key: value})
    for what, change_bytes in (("cut", lambda data: data[:-50]), ("a byte flipped", flip_last)):
        yield f"tensors {what}", says, rewritten("quantized/model/reqat.safetensors", change_bytes)
    yield "no tensors", says, contents("quantized/model/reqat.safetensors", None)
    yield "no description", says, contents("quantized/model/reqat.json", None)


def _problems() -> Iterator[Case]:
    for what, line, says in PROBLEM_LINES:
        first = b'{"id": "p1", "prompt": "So 2 + 2 =", "response": "4"}\n' if "same id" in what else b""
        yield Case(
            "problems", what, ("problem", says), ENTROPY, prepare=contents("problems.jsonl", first + line + b"\n")
        )
    for what, data in (
        ("empty", b""),
        ("blank lines", b"\n\n"),
        ("an empty array", b"[]"),
        ("array of numbers", b"[1]"),
        ("not there", None),
    ):
        yield Case("problems", what, ("problem",), ENTROPY, prepare=contents("problems.jsonl", data))
    yield Case("problems", "a folder", ("problems.jsonl",), ENTROPY, prepare=folder_for("problems.jsonl"))


def _stores() -> Iterator[Case]:
    given = (
        *QUANTIZE[:-3],
        "--out",
        "out",
        "--quiet",
        "--method",
        "gptq",
        "--sequences",
        "2",
        "--sequence-tokens",
        "8",
    )
    store = (*given, "--calibration", "store")
    for what, data in JSON_DAMAGES:
        yield Case(
            "trace store", f"manifest {what}", ("manifest|store",), store, prepare=contents("store/manifest.json", data)
        )
    for what, change in (
        ("cut", lambda data: data[:-40]),
        ("empty", lambda data: b""),
        ("a byte changed", lambda data: data[:50] + b"z" + data[51:]),
    ):
        yield Case("trace store", what, ("train.jsonl|store",), store, prepare=rewritten("store/train.jsonl", change))
    for what, change in (
        ("unknown key", {"extra": 1}),
        ("id beyond the vocabulary", {"prompt_ids": [10**6]}),
        ("id negative", {"prompt_ids": [-3]}),
        ("ids text", {"prompt_ids": "abc"}),
        ("no ids", {"response_ids": None}),
        ("id 2^70", {"response_ids": [HUGE]}),
    ):
        yield Case("trace store", what, ("train.jsonl|trace|token id",), store, prepare=stored_trace(change))
    yield Case("trace store", "not there", ("nowhere",), (*given, "--calibration", "nowhere"))
    yield Case("trace store", "too small", ("sequences|tokens",), (*store, "--sequences", "10000"))
    text = (*given, "--calibration", "text.txt")
    yield Case(
        "calibration text", "bad UTF-8", ("text.txt", "UTF-8"), text, prepare=contents("text.txt", b"So 2 \xff" * 99)
    )
    yield Case("calibration text", "empty", ("text.txt",), text, prepare=contents("text.txt", b""))
    yield Case(
        "calibration text",
        "unknown words only",
        ("text.txt|unknown|token",),
        text,
        prepare=contents("text.txt", "我们".encode() * 999),
    )


def _views() -> Iterator[Case]:
    view = ("view", "traces", "--out", "out.html")
    for name in TRACES:
        for what, change in (
            ("cut", lambda data: data[: len(data) // 2]),
            ("empty", lambda data: b""),
            ("other bytes", lambda data: b"x" * 300),
        ):
            yield Case("traces", f"{name} {what}", (name,), view, prepare=rewritten(f"traces/{name}", change))
        yield Case("traces", f"{name} not there", (name,), view, prepare=contents(f"traces/{name}", None))
    for what, data in JSON_DAMAGES[2:]:
        yield Case("traces", f"meta.json {what}", ("meta.json",), view, prepare=contents("traces/meta.json", data))
    for change in (
        {"schema": "reqat.traces/999"},
        {"labels": []},
        {"labels": 5},
        {"labels": ["a"]},
        {"k": -1},
        {"vocabulary": []},
    ):
        yield Case("traces", f"meta {change}", ("traces|meta.json",), view, prepare=entries("traces/meta.json", change))
    for column in ("trace", "position", "token"):
        yield Case(
            "traces",
            f"tokens without {column}",
            ("tokens.parquet|traces", column),
            view,
            prepare=without_column(column),
        )
    yield Case("traces", "no such folder", ("nowhere",), ("view", "nowhere", "--out", "out.html"))
    yield Case("traces", "a file", ("text.txt",), ("view", "text.txt", "--out", "out.html"))


def _fits() -> Iterator[Case]:
    given = ("reset", "--model", "model", "--fit", "fit.json", "--out", "out", "--tier", "smoke", "--n", "1", "--quiet")
    for what, data in (
        *JSON_DAMAGES,
        ("no policy", b'{"schema": "reqat.reset/1"}'),
        ("another schema", b'{"schema": "x", "policy": "greedy"}'),
        ("policy a number", b'{"schema": "reqat.reset/1", "policy": 5}'),
        ("policy nonsense", b'{"schema": "reqat.reset/1", "policy": "beam"}'),
    ):
        yield Case("fit", what, ("fit.json|beam",), given, prepare=contents("fit.json", data))


def _records() -> Iterator[Case]:
    for what, data in (*JSON_DAMAGES, ("outputs a list", b'{"outputs": [1]}'), ("no outputs", b'{"id": "x"}')):
        yield Case("record", what, ("record.json",), call=_read_record, prepare=contents("quantized/record.json", data))
    for change in (
        {"outputs": {"model/config.json": 5}},
        {"outputs": {"../x": {"bytes": 1, "sha256": "0"}}},
        {"outputs": 7},
        {"outputs": {"model/config.json": {"bytes": "many", "sha256": "0"}}},
        {"outputs": {"model/config.json": {}}},
        {"schema_version": 999},
        {"schema_version": None},
        {"id": "other"},
    ):
        yield Case(
            "record",
            f"{change}"[:80],
            ("record.json|quantized",),
            call=_read_record,
            prepare=entries("quantized/record.json", change),
        )
    yield Case(
        "record",
        "an output changed",
        ("config.json",),
        call=_read_record,
        prepare=entries("quantized/model/config.json", {"x": 1}),
    )


def _read_record(folder: Path) -> Any:
    from reqat.records import record

    return record.verify(folder / "quantized", id="quantized", deep=True)


def _model(name: str, says: str, prepare: Callable[[Path], None]) -> Case:
    return Case("model folder", name, ("model", says), QUANTIZE, prepare=prepare)
