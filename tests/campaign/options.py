"""Bad options of every verb, and a bad environment. None of these may cost a model's loading."""

from __future__ import annotations

from collections.abc import Iterator

from tests.campaign.cases import Case

BASE: dict[str, tuple[str, ...]] = {
    "quantize": ("quantize", "--model", "model", "--precision", "NVFP4-W4A4", "--out", "out"),
    "export": ("export", "--model", "model", "--format", "modelopt", "--precision", "NVFP4-W4A16", "--out", "out"),
    "entropy": ("entropy", "--reference", "model", "--problems", "problems.jsonl", "--out", "out"),
    "route": ("route", "--reference", "model", "--out", "out", "--tier", "smoke"),
    "noise": ("noise", "--model", "model", "--sigmas", "0.1", "--out", "out", "--tier", "smoke"),
    "fit-reset": ("fit-reset", "--model", "model", "--precision", "NVFP4-W4A4", "--out", "out.json", "--tier", "smoke"),
    "reset": ("reset", "--model", "model", "--fit", "fit.json", "--out", "out", "--tier", "smoke"),
    "view": ("view", "traces", "--out", "out.html"),
    "stage": ("stage", "finetune-0", "--tier", "smoke"),
    "evaluate": ("evaluate", "evaluation-0", "--tier", "smoke"),
    "study": ("study", "study-0", "--tier", "smoke"),
    "bench": ("bench", "--tier", "smoke"),
    "data": ("data", "data-0", "--tier", "smoke"),
    "report": ("report", "--tier", "smoke"),
    "plan": ("plan",),
    "doctor": ("doctor",),
    "pin": ("pin",),
    "pin base": ("pin", "--what", "base", "--tier", "smoke"),
    "compare": ("compare",),
}
COMPUTING = (
    "quantize", "export", "entropy", "route", "noise", "fit-reset", "reset", "stage", "evaluate", "study", "bench",
)  # fmt: skip
SAMPLING = ("entropy", "route", "noise", "fit-reset", "reset")
HUGE = "99999999999999999999"
PRECISIONS = ("NVFP4-W4A5", "nvfp4", "W4A4", "FP8-W4A4", "NVFP4-W4A4KV4 ", "BF16-W4A4")

# (verbs, option, bad values): each must end in an error that names the option and the value.
OPTIONS: tuple[tuple[tuple[str, ...], str, tuple[str, ...]], ...] = (
    (COMPUTING, "--threads", ("1000000000", "-1", HUGE, "two")),
    (SAMPLING, "--seeds", ("0,0", "-1", "0,-1", HUGE, "1.5", "0,", "a", "nan")),
    (
        SAMPLING,
        "--decoding",
        (
            "sample(temperature=nan)",
            "sample(temperature=0)",
            "sample(top_p=2)",
            "sample(temprature=1)",
            "beam",
            "sample(temperature=1",
            "reset(t_low=0.3)",
            "sample(top_p=inf)",
            "sample(temperature=1,temperature=2)",
        ),
    ),
    (("route", "noise", "reset"), "--n", ("0", "-3", HUGE, "ten", "1e3")),
    (("entropy",), "--n", ("0", "-3", HUGE, "nan")),
    (("fit-reset",), "--problems", ("0", "-1", HUGE)),
    (("route", "noise"), "--held-out", ("0", "-1", HUGE)),
    (("quantize", "export", "noise", "reset"), "--precision", PRECISIONS),
    (("route", "entropy"), "--candidate-precision", PRECISIONS[:3]),
    (("route", "entropy"), "--reference-precision", PRECISIONS[3:]),
    (("noise",), "--sigmas", ("nan", "inf", "-0.1", "0.1,0.1", "a", "0.1,", "0.1,0.10000001")),
    (("noise",), "--share", ("nan", "0", "-0.5", "2", "inf", "half")),
    (("noise",), "--by", ("rows", "Batch")),
    (("route",), "--threshold", ("nan", "p100", "p0", "low", "-0.5", "inf", "p")),
    (("route",), "--policy", ("low", "all_reference")),
    (("fit-reset",), "--t-low", ("0", "nan", "-1", "inf")),
    (("fit-reset",), "--t-high", ("0", "nan")),
    (("fit-reset",), "--top-p", ("0", "1.5", "nan")),
    (("fit-reset",), "--window", ("0", "-1", HUGE)),
    (("fit-reset",), "--step", ("word", "")),
    (("fit-reset",), "--quantile", ("0", "1", "nan", "1.5")),
    (("entropy",), "--top", ("0", "-1", HUGE)),
    (("entropy",), "--bins", ("1", "0", "-2", HUGE)),
    (("entropy",), "--more-than", ("-1", HUGE)),
    (("entropy",), "--logprobs", ("p1", "p1:-1", "nobody:0", "p1:x", ":")),
    (("entropy",), "--batch-rows", ("0", "-1", HUGE)),
    (("entropy",), "--max-new-tokens", ("0", "-1", HUGE)),
    (("entropy",), "--split", ("dev", "Test")),
    (("entropy",), "--problem-seed", ("-1", HUGE)),
    (("entropy", "quantize"), "--kv-element", ("E3M0", "e1m2x")),
    (("entropy", "quantize"), "--global-scale", ("rows", "none")),
    (("quantize",), "--rotation", ("-4", "3", "48", HUGE, "x")),
    (("quantize",), "--method", ("gtpq", "awq")),
    (("export",), "--format", ("GGUF", "gptq", "compressed_tensors")),
    (("quantize", "export"), "--sequences", ("0", "-1", HUGE)),
    (("quantize", "export"), "--sequence-tokens", ("0", HUGE)),
    (
        ("quantize", "export", "noise", "reset", "fit-reset"),
        "--model",
        ("nowhere", "package:", "package:no-such-package", " "),
    ),
    (("entropy", "route"), "--reference", ("nowhere", "package:")),
    (("view",), "--limit", ("0", "-1", HUGE, "all")),
    (("view",), "--floor", ("nan", "-0.1", "1.5", "inf")),
    (("view",), "--family", ("no_such_family",)),
    (("pin base",), "--dtype", ("float8", "int4")),
    (("pin base",), "--model", ("other",)),
    (("pin", "report"), "--what", ("runs", "", "base ")),
    (tuple(v for v in BASE if v not in ("quantize", "export", "view")), "--tier", ("smokey",)),
    (("plan", "doctor", "data", "route"), "--tier", ("../smoke", "", "laptop.yaml")),
)
TEXTS: tuple[tuple[str, ...], ...] = (
    ("quantize", "--out"),
    ("export", "--out"),
    ("entropy", "--out"),
    ("view", "--title"),
    ("view", "--out"),
    ("noise", "--sigmas"),
    ("entropy", "--candidate"),
    ("quantize", "--calibration"),
    ("reset", "--fit"),
    ("entropy", "--end-marker"),
)


def cases() -> Iterator[Case]:
    """All of them."""
    for verbs, option, values in OPTIONS:
        for verb in verbs:
            for value in values:
                yield _option(verb, option, value)
    for verb, option in TEXTS:
        yield _option(verb, option, "")
        yield _option(verb, option, "\udcff", says=(option, "UTF-8"))
    yield Case("option", "empty argument with =", ("--out",), (*BASE["quantize"][:-2], "--out="))
    yield Case(
        "option", "two sources of problems", ("--problems", "--families"), (*BASE["entropy"], "--families", "chain_sum")
    )
    yield Case("option", "no source of problems", ("--families",), (*BASE["entropy"][:3], "--out", "out"))
    for names in ("no_such", "chain_sum,chain_sum", "chain_sum,", ","):
        given = (*BASE["entropy"][:3], "--out", "out", "--families", names, "--tier", "smoke")
        yield Case("option", f"entropy --families {names}", ("--families",), given)
    for verb in BASE:
        yield Case("option", f"{verb}: unknown option", ("--no-such-option",), (*BASE[verb], "--no-such-option", "1"))
    yield Case("option", "unknown verb", ("quantise", "quantize"), ("quantise",))
    for verb in ("stage", "evaluate", "study", "data", "bench"):
        yield Case("option", f"{verb}: unknown id", ("smoke",), BASE[verb] if verb != "bench" else (*BASE[verb], "x-1"))
    for root in ("nowhere", "config", "problems.jsonl", ""):
        yield Case("option", f"--root {root!r}", (root or "--root",), ("--root", root, "plan"))
    for models in ("", "\udc80"):
        yield Case("option", f"--models {models!r}", ("--models",), ("--models", models, "plan"))
    yield from _environments()


def _option(verb: str, option: str, value: str, says: tuple[str, ...] | None = None) -> Case:
    base = list(BASE[verb])
    if (verb, option) == ("entropy", "--tier"):  # it is for task families alone
        base[base.index("--problems") : base.index("--problems") + 2] = ["--families", "chain_sum"]
    while option in base:  # the last one would win, but a message should not hold both
        at = base.index(option)
        del base[at : at + 2]
    shown = value.strip() or option
    named = f"{option}|{option.removeprefix('--').replace('-', ' ')}|{option.removeprefix('--').replace('-', '_')}"
    if option in ("--reference", "--candidate"):  # names the folder, and that it is none of a model
        named += "|no model folder"
    return Case(
        "option",
        f"{verb} {option} {value!r}",
        says if says is not None else (named, *(() if option == "--decoding" else (shown[:20],))),
        (*base, option, value),
    )


def _environments() -> Iterator[Case]:
    for name, values in (
        ("OMP_NUM_THREADS", ("abc", "-2", "0", "1000000000", "2.5")),
        ("REQAT_ISA", ("avx1024", "native")),
        ("REQAT_LIBRARY", ("/nowhere/lib.so",)),
        ("REQAT_GGML", ("/nowhere",)),
    ):
        for value in values:
            for verb in ("quantize", "plan") if name == "OMP_NUM_THREADS" else ("quantize",):
                yield Case(
                    "environment", f"{verb} {name}={value}", (name, value[:8]), BASE[verb], environment={name: value}
                )
