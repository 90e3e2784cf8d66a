"""Bad calls of the Python API: `reqat.*`, decoding, generation, tasks, packing, training checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tests.campaign.cases import Case

HUGE = 99999999999999999999


def cases() -> Iterator[Case]:
    """All of them."""
    yield from _precisions()
    yield from _formats()
    yield from _models()
    yield from _sidecars()
    yield from _generation()
    yield from _tasks()
    yield from _checkpoints()


def _case(name: str, says: str | tuple[str, ...], call: Callable[[Path], Any], raises: str = "ReqatError") -> Case:
    return Case("API", name, (says,) if isinstance(says, str) else says, call=call, raises=raises)


def _precisions() -> Iterator[Case]:
    def parse(name: Any, **options: Any) -> Callable[[Path], Any]:
        def call(_: Path) -> Any:
            import reqat

            return reqat.Precision.parse(name, **options)

        return call

    for name in ("X", "", "NVFP4-W4A5", "W4A4", 5, None, ["NVFP4"], b"NVFP4-W4A4", "NVFP4-W4A4+NVFP4-W4"):
        yield _case(f"Precision.parse({name!r})", "precision", parse(name))
    for options in (
        {"globalscale": "row"},
        {"global_scale": "rows"},
        {"global_scale": 5},
        {"kv_element": "E3M0"},
        {"element": "INT4"},
        {"rotation": -4},
        {"rotation": 3},
        {"rotation": "x"},
        {"rotation": 0},
        {"rotation": 2.0},
        {"rotation": True},
        {"kv_rotation": -16},
        {"kv_rotation": HUGE},
        {"scale_rule": "ceil"},
        {"scale": "FP99"},
        {"rounding": "up"},
        {"rounding": ["even"]},
    ):
        key, value = next(iter(options.items()))
        yield _case(
            f"Precision.parse({options})",
            ("" if key == "kv_element" else key, "" if key == "globalscale" else str(value).strip("[]'")[:20]),
            parse("NVFP4-W4A4KV4", **options),
        )

    def instance(**fields: Any) -> Callable[[Path], Any]:
        def call(_: Path) -> Any:
            import reqat

            return reqat.Precision(**fields)

        return call

    yield _case("Precision(weights='NVFP4')", ("weights", "NVFP4"), instance(weights="NVFP4"))
    yield _case("Precision(rotation=6)", ("rotation", "6"), instance(rotation=6))

    def ignored(_: Path) -> Any:
        import reqat

        return reqat.Precision.parse(reqat.Precision.parse("NVFP4-W4A4"), kv_element="E2M1")

    yield _case("options beside a Precision", "option", ignored)


def _formats() -> Iterator[Case]:
    """These raise ValueError or TypeError: formats stand below the errors of configuration."""

    def quantize(
        x: Callable[[Any], Any], *given: Any, which: str = "quantize", **options: Any
    ) -> Callable[[Path], Any]:
        def call(_: Path) -> Any:
            import torch

            import reqat

            return getattr(reqat, which)(x(torch), *given, **options)

        return call

    for which in ("quantize", "quantize_dequantize"):
        for name, x, says in (
            ("a list", lambda torch: [1.0] * 16, "tensor"),
            ("None", lambda torch: None, "tensor"),
            ("int64", lambda torch: torch.ones(16, dtype=torch.int64), "int64"),
            ("bool", lambda torch: torch.ones(16, dtype=torch.bool), "bool"),
            ("complex", lambda torch: torch.ones(16, dtype=torch.complex64), "complex64"),
            ("NaN", lambda torch: torch.full((16,), float("nan")), "NaN"),
            ("inf", lambda torch: torch.full((16,), float("inf")), "infinite"),
            ("no axis", lambda torch: torch.tensor(1.0), "axis"),
            ("length 17", lambda torch: torch.ones(17), "17"),
        ):
            yield _case(f"{which} of {name}", says, quantize(x, "NVFP4", which=which), "ValueError")
        ones = lambda torch: torch.ones(4, 16)  # noqa: E731
        for given, options, says in (
            (("NVFP5",), {}, "NVFP5"),
            ((None,), {}, "format"),
            ((["NVFP4"],), {}, "format|NVFP4|hash"),
            (("NVFP4",), {"globalscale": "row"}, "globalscale"),
            (("NVFP4",), {"global_scale": "rows"}, "rows"),
            (("NVFP4",), {"global_scale": 0.0}, "global_scale"),
            (("NVFP4",), {"global_scale": -1.0}, "global_scale"),
            (("NVFP4",), {"global_scale": float("nan")}, "global_scale"),
            (("MXFP4",), {"global_scale": 1.0, "pad": True}, "global scale"),
            (("NVFP4",), {"axis": 5}, "axis"),
            (("NVFP4",), {"element": "E9M9"}, "E9M9"),
            (("NVFP4",), {"global_scale": "static"}, "static"),
        ):
            yield _case(f"{which}{given} {options}", says, quantize(ones, *given, which=which, **options), "ValueError")


def _models() -> Iterator[Case]:
    def loaded(folder: Path) -> Any:
        import reqat

        return reqat.load_model(folder / "model")

    def with_model(use: Callable[[Any, Any, Path], Any]) -> Callable[[Path], Any]:
        def call(folder: Path) -> Any:
            import reqat

            return use(reqat, loaded(folder), folder)

        return call

    def without(use: Callable[[Any, Path], Any]) -> Callable[[Path], Any]:
        def call(folder: Path) -> Any:
            import reqat

            return use(reqat, folder)

        return call

    for path in (
        "nowhere",
        "",
        "package:",
        "package:no-such-package",
        "problems.jsonl",
        "config",
        None,
        5,
        "a\0b",
        "x" * 5000,
    ):
        yield _case(
            f"load_model({str(path)[:30]!r})",
            "model|package|folder|path",
            without(lambda r, f, path=path: r.load_model(path)),
        )
    for dtype in ("float32", "int8", 5):
        yield _case(
            f"load_model(dtype={dtype!r})", "dtype", without(lambda r, f, d=dtype: r.load_model(f / "model", dtype=d))
        )
    yield _case(
        "load_model(dtype=torch.int8)",
        "dtype",
        without(lambda r, f: r.load_model(f / "model", dtype=_torch().int8)),
    )
    for model in (None, "model", 5):
        yield _case(f"prepare({model!r})", "model", without(lambda r, f, m=model: r.prepare(m, "NVFP4-W4A4")))
        yield _case(f"freeze({model!r})", "model", without(lambda r, f, m=model: r.freeze(m)))
        yield _case(f"pack({model!r})", "model", without(lambda r, f, m=model: r.pack(m)))
        yield _case(f"calibrate_static({model!r})", "model", without(lambda r, f, m=model: r.calibrate_static(m, [])))
        yield _case(f"save_model({model!r})", "model", without(lambda r, f, m=model: _save(m, f / "out")))
    yield _case(
        "prepare of a plain module",
        "PreTrainedModel",
        without(lambda r, f: r.prepare(_torch().nn.Linear(2, 2), "BF16")),
    )
    for name, use, says in (
        ("prepare twice", lambda r, m, f: (r.prepare(m, "NVFP4-W4A4"), r.prepare(m, "MXFP4-W4A4")), "prepared"),
        ("prepare(globalscale=)", lambda r, m, f: r.prepare(m, "NVFP4-W4A4", globalscale="row"), "globalscale"),
        ("prepare(skip=5)", lambda r, m, f: r.prepare(m, "NVFP4-W4A4", skip=5), "skip"),
        ("prepare(precision=None)", lambda r, m, f: r.prepare(m, None), "precision"),
        ("prepare with rotation 128", lambda r, m, f: r.prepare(m, "NVFP4-W4A4", rotation=128), "128"),
        ("prepare with kv_rotation 64", lambda r, m, f: r.prepare(m, "NVFP4-W4A4KV4", kv_rotation=64), "64"),
        ("prepare NaN", lambda r, m, f: (_spoil(m), r.prepare(m, "NVFP4-W4A4")), "NaN"),
        ("freeze unprepared", lambda r, m, f: r.freeze(m), "prepare"),
        ("pack unprepared", lambda r, m, f: r.pack(m), "prepare"),
        ("pack backend", lambda r, m, f: (r.prepare(m, "NVFP4-W4A4"), r.pack(m, "cuda")), "cuda"),
        ("pack triton on a CPU", lambda r, m, f: (r.prepare(m, "NVFP4-W4A4"), r.pack(m, "triton")), "triton"),
        (
            "pack uncalibrated",
            lambda r, m, f: (r.prepare(m, "NVFP4-W4A4", global_scale="static"), r.pack(m)),
            "calibrat",
        ),
        ("calibrate with nothing", lambda r, m, f: _calibrate(r, m, []), "batch"),
        ("calibrate with None", lambda r, m, f: _calibrate(r, m, None), "batch"),
        ("calibrate with texts", lambda r, m, f: _calibrate(r, m, ["So 2"]), "batch"),
        ("calibrate with float ids", lambda r, m, f: _calibrate(r, m, [_torch().ones(1, 4)]), "batch|dtype|id"),
        ("save packed", lambda r, m, f: (r.prepare(m, "NVFP4-W4A4"), r.pack(m), _save(m, f / "out")), "pack"),
        ("save onto a file", lambda r, m, f: _save(m, f / "text.txt"), "text.txt"),
        ("save as int8", lambda r, m, f: _save(m, f / "out", dtype=_torch().int8), "dtype"),
        ("save below a file", lambda r, m, f: _save(m, f / "text.txt" / "x"), "text.txt"),
    ):
        yield _case(name, says, with_model(use))


def _torch() -> Any:
    import torch

    return torch


def _calibrate(reqat: Any, model: Any, batches: Any) -> Any:
    reqat.prepare(model, "NVFP4-W4A4", global_scale="static")
    return reqat.calibrate_static(model, batches)


def _save(model: Any, folder: Path, **options: Any) -> Any:
    from reqat.models import save_model

    return save_model(model, None, folder, **options)


def _spoil(model: Any) -> None:
    next(model.parameters()).data[0, 0] = float("nan")


def _sidecars() -> Iterator[Case]:
    from tests.campaign.files import sidecars

    def read(folder: Path) -> Any:
        import reqat

        return reqat.prepare(reqat.load_model(folder / "quantized/model"), "NVFP4-W4A4KV4")

    for what, says, prepare in sidecars():
        yield Case("sidecar", what, (says,), call=read, prepare=prepare)


def _generation() -> Iterator[Case]:
    def run(prompts: Any, **options: Any) -> Callable[[Path], Any]:
        def call(folder: Path) -> Any:
            from reqat.generation import Decoding, generate
            from reqat.models import load_model, load_tokenizer

            model, tokenizer = load_model(folder / "model"), load_tokenizer(folder / "model")
            given = {
                "seeds": [0] * len(prompts),
                "row_keys": [str(i) for i in range(len(prompts))],
                "decoding": Decoding.greedy(),
                "max_new_tokens": 2,
            } | options
            return generate(model, tokenizer, prompts, **given)

        return call

    for name, prompts, options, says in (
        ("an empty prompt", [[]], {}, "prompt"),
        ("no tokens to make", [[1, 4]], {"max_new_tokens": 0}, "max_new_tokens"),
        ("no rows a batch", [[1, 4]], {"batch_rows": 0}, "batch_rows"),
        ("too long", [[1, 4]], {"max_new_tokens": 1000}, "position"),
        ("id beyond the embedding", [[1, 10**6]], {}, "1000000"),
        ("id negative", [[1, -1]], {}, "-1"),
        ("seeds of another length", [[1, 4]], {"seeds": [0, 1]}, "seed"),
        ("keys of another length", [[1, 4]], {"row_keys": []}, "key"),
    ):
        yield _case(f"generate: {name}", says, run(prompts, **options))

    def decoding(text: Any) -> Callable[[Path], Any]:
        def call(_: Path) -> Any:
            from reqat.generation import Decoding

            return Decoding.parse(text)

        return call

    for text in (
        "",
        "beam",
        "sample(",
        "sample(temperature=0)",
        "sample(top_p=1e999)",
        "reset()",
        None,
        5,
        "reset(t_low=1,tau0=0,window=1e3)",
    ):
        yield _case(f"Decoding.parse({text!r})", "decoding|reset", decoding(text))

    def encode(template: str | None, prompt: str) -> Callable[[Path], Any]:
        def call(folder: Path) -> Any:
            import reqat.data
            from reqat.models import load_tokenizer

            tokenizer = load_tokenizer(folder / "model")
            tokenizer.chat_template = template
            return reqat.data.encode_prompt(tokenizer, prompt)

        return call

    for template in (
        "{% for",
        "{{ x | nosuch }}",
        "{{ messages.__class__.__mro__ }}",
        "{{ raise_exception('no') }}",
        "{{ 1 // 0 }}",
    ):
        yield _case(f"template {template}", "template", encode(template, "So 2"))
    for prompt in ("\ud800", "So \udfff 2"):
        yield _case(f"prompt {prompt!r}", "surrogate", encode(None, prompt))


def _tasks() -> Iterator[Case]:
    def problems(*given: Any) -> Callable[[Path], Any]:
        def call(_: Path) -> Any:
            from reqat.tasks import problems as make

            return make(*given)

        return call

    for given, says in (
        ((["no_such"], "test", 1, 0), "no_such"),
        ((["chain_sum"], "dev", 1, 0), "dev"),
        ((["chain_sum"], "test", 0, 0), "n"),
        (([], "test", 1, 0), "famil"),
        (({"chain_sum": {"no_option": 1}}, "test", 1, 0), "no_option"),
        (({"chain_sum": {"min_terms": 9, "max_terms": 2}}, "test", 1, 0), "terms"),
        (({"leg_counting": {"min_animals": 1, "max_animals": 1}}, "test", 10**6, 0), "distinct"),
    ):
        yield _case(f"problems{given}", says, problems(*given))


def _checkpoints() -> Iterator[Case]:
    def read(folder: Path) -> Any:
        import torch

        from reqat.training import checkpoint

        layer = torch.nn.Linear(4, 4)
        return checkpoint.load(folder / "checkpoint", layer, torch.optim.AdamW(layer.parameters()), {})

    def spoiled(change: Callable[[dict[str, Any]], dict[str, Any]], metadata: Any = None) -> Callable[[Path], None]:
        def prepare(folder: Path) -> None:
            from safetensors import safe_open
            from safetensors.torch import load_file, save_file

            path = folder / "checkpoint/checkpoint.safetensors"
            with safe_open(path, "pt") as file:
                about = file.metadata()
            save_file(change(load_file(path)), path, about if metadata is None else metadata)

        return prepare

    nan = float("nan")
    for what, prepare in (
        ("weights NaN", spoiled(lambda t: t | {"model.weight": t["model.weight"] * nan})),
        ("moments NaN", spoiled(lambda t: t | {"optimizer.exp_avg.weight": t["optimizer.exp_avg.weight"] * nan})),
        (
            "second moments negative",
            spoiled(lambda t: t | {"optimizer.exp_avg_sq.weight": -t["optimizer.exp_avg_sq.weight"] - 1}),
        ),
        ("moments missing", spoiled(lambda t: {k: v for k, v in t.items() if "exp_avg" not in k})),
        ("one moment missing", spoiled(lambda t: {k: v for k, v in t.items() if k != "optimizer.exp_avg.bias"})),
        (
            "moments of another shape",
            spoiled(lambda t: t | {"optimizer.exp_avg.weight": t["optimizer.exp_avg.weight"][:2].clone()}),
        ),
        ("steps missing", spoiled(lambda t: {k: v for k, v in t.items() if "step" not in k})),
        ("no random state", spoiled(lambda t: {k: v for k, v in t.items() if not k.startswith("random")})),
        ("random state cut", spoiled(lambda t: t | {"random.cpu": t["random.cpu"][:10].clone()})),
        ("no position", spoiled(lambda t: t, {})),
        ("position no JSON", spoiled(lambda t: t, {"position": "{"})),
        ("position a list", spoiled(lambda t: t, {"position": "[]"})),
        ("a parameter missing", spoiled(lambda t: {k: v for k, v in t.items() if k != "model.bias"})),
    ):
        yield Case("checkpoint", what, ("checkpoint",), call=read, prepare=prepare)
    for what, change in (("cut", lambda d: d[:-9]), ("empty", lambda d: b""), ("text", lambda d: b"hello")):
        yield Case("checkpoint", what, ("checkpoint",), call=read, prepare=_bytes(change))


def _bytes(change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    def prepare(folder: Path) -> None:
        path = folder / "checkpoint/checkpoint.safetensors"
        path.write_bytes(change(path.read_bytes()))

    return prepare
