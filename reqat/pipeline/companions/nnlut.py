"""NN-LUT: tables of nonlinear functions by themselves, and in a decoder and an encoder.

Networks are trained as the public replication trains them (:mod:`reqat.methods.nonlinear.nn_lut`), which replaces SiLU
and exp alone and divides exactly; here all functions of a model are replaced, and that pair beside them. Calibration
reads what the unquantized model computes with exact functions; the same tables serve the quantized one. The encoder is
fine-tuned first and never trained afterwards, as in the paper.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import pandas as pd

from reqat.config.companions.nnlut import FIT, Settings
from reqat.pipeline.companions import Given

if TYPE_CHECKING:
    from reqat.methods.nonlinear import Function, Network, Table

EXACT, ALL = "exact", "all"
LINEAR, NLI, NLI_RELEASED, NN_LUT = "linear", "nli", "nli released", "nn_lut"
FULL = "BF16"
"""The precision that quantizes nothing; weights and arithmetic are float32."""
GROUPS = 50
_CURVE_POINTS, _CURVE_FROM = 160, -20.0  # exp is below 2e-9 further to the left
_BATCH_TOKENS = 1024
# The functions that the replication replaces.
_REPLICATED = "activation+exp"


@dataclass(frozen=True)
class Arm:
    """A model with these tables: ``functions`` is `all`, or which of them, `activation`, `softmax`, `norm` or
    `activation+exp` (with exact division)."""

    method: str
    entries: int = 0
    version: str = "fp32"
    functions: str = ALL
    calibrated: bool = False
    seed: int = 0
    scaling: str = "full"
    """Of the inputs of 1/sqrt; `below` is the paper's."""


def arms(settings: Settings, quantized: bool) -> Iterator[Arm]:
    """What is measured of a model; of a quantized one less."""
    entries, first = settings.entries[0], settings.seeds[0]
    yield Arm(EXACT)
    yield Arm(LINEAR, entries)
    yield Arm(NLI, entries)
    for calibrated in (False, True):
        for seed in settings.seeds:
            yield Arm(NN_LUT, entries, calibrated=calibrated, seed=seed)
    if quantized:
        return
    yield Arm(NLI_RELEASED)
    for version in ("fp16", "int32"):
        yield Arm(NN_LUT, entries, version=version, seed=first)
    for functions in ("activation", "softmax", "norm", _REPLICATED):
        yield Arm(NN_LUT, entries, functions=functions, seed=first)
    yield Arm(NN_LUT, entries, functions="norm", seed=first, scaling="below")
    yield Arm(NLI_RELEASED, functions=_REPLICATED)


def run(settings: Settings, part: str, given: Given) -> pd.DataFrame:
    """Of a function: a row (`what` = fit) a table and arithmetic, with its errors, and rows (curve) of tables' errors
    over x. Of a model: a row (decoder) an arm and window, `nats` of `tokens`, or (encoder) an arm and group of
    sequences, `right` of `count`; and a row (inputs) a function, what the model's inputs to it are (of 1/sqrt
    with the paper's scaling)."""
    if part.startswith(FIT):
        return _fits(settings, part.removeprefix(FIT), given)
    if part == settings.decoder:
        return _decoder(settings, part, given)
    return _encoder(settings, part, given)


# --- functions --------------------------------------------------------------------------------------------------------


def _fits(settings: Settings, name: str, given: Given) -> pd.DataFrame:
    from reqat.methods.nonlinear import FUNCTIONS, VERSIONS

    function = FUNCTIONS[name]
    out: list[dict[str, Any]] = []
    for method, entries, seed, table in _tables(settings, function):
        about = {"function": name, "method": method, "entries": entries, "seed": seed}
        effective = table.effective(function.low, function.high)
        for version, made in VERSIONS.items():
            measured = function.errors(made(table, function))
            out.append(
                {"what": "fit", **about, "version": version, "size": table.entries, "effective": effective} | measured
            )
        given.say(f"{name} {method} {entries}: mean error {out[-len(VERSIONS)]['mean_abs']:.2g}")
        if seed in (None, settings.seeds[0]) and entries in (None, settings.entries[0]):
            x = replace(function, low=max(function.low, _CURVE_FROM)).samples(_CURVE_POINTS)
            error = (VERSIONS["fp32"](table, function)(x.float()).double() - function(x)).abs()
            out += [{"what": "curve", **about, "x": float(a), "error": float(b)} for a, b in zip(x, error, strict=True)]
    return pd.DataFrame(out)


def _tables(settings: Settings, function: Function) -> Iterator[tuple[str, int | None, int | None, Table]]:
    """Method, entries asked for (None: the released layout), seed (None: there is no chance in it), table."""
    from reqat.methods.nonlinear import METHODS, nli

    for entries in settings.entries:
        yield LINEAR, entries, None, METHODS["linear"](function, entries)
        yield NLI, entries, None, METHODS["nli"](function, entries, candidates=settings.candidates)
        for seed in settings.seeds:
            yield NN_LUT, entries, seed, METHODS["nn_lut"](function, entries, seed=seed, steps=settings.steps)
    released = nli.fit(function, parts=nli.RELEASED, candidates=settings.candidates)
    yield NLI_RELEASED, None, None, released


# --- models -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tables:
    """All tables of a model's functions: ``fixed`` method -> function -> table; ``networks`` seed -> function ->
    network, for NN-LUT; ``own`` seed -> name of a lookup -> its calibrated evaluation."""

    fixed: Mapping[str, Mapping[str, Table]]
    networks: Mapping[int, Mapping[str, Network]]
    own: dict[int, Mapping[str, Any]]

    def of(self, arm: Arm) -> dict[str, Any]:
        """Function -> its evaluation, of the functions that the arm replaces."""
        from reqat.methods.nonlinear import FUNCTIONS, VERSIONS

        if arm.method == NN_LUT:
            tables: Mapping[str, Table] = {name: net.table() for name, net in self.networks[arm.seed].items()}
        else:
            tables = self.fixed[arm.method]
        made = VERSIONS[arm.version]
        return {
            name: made(table, FUNCTIONS[name])
            for name, table in tables.items()
            if _group(name) & _groups(arm.functions)
        }


def _group(function: str) -> set[str]:
    """The kinds of operation that a function is part of, and its own name."""
    kinds = {"exp": "softmax", "reciprocal": "softmax", "rsqrt": "norm"}
    return {kinds.get(function, "activation"), function, ALL}


def _groups(functions: str) -> set[str]:
    return set(functions.split("+"))


def _made_tables(settings: Settings, names: list[str]) -> Tables:
    from reqat.methods.nonlinear import FUNCTIONS, METHODS, nli, nn_lut

    entries, functions = settings.entries[0], [FUNCTIONS[name] for name in names]
    fixed = {
        LINEAR: {f.name: METHODS["linear"](f, entries) for f in functions},
        NLI: {f.name: METHODS["nli"](f, entries, candidates=settings.candidates) for f in functions},
        NLI_RELEASED: {f.name: nli.fit(f, parts=nli.RELEASED, candidates=settings.candidates) for f in functions},
    }
    networks = {
        seed: {f.name: nn_lut.trained(f, entries - 1, seed=seed, steps=settings.steps) for f in functions}
        for seed in settings.seeds
    }
    return Tables(fixed, networks, {})


def _measured(
    settings: Settings,
    model: Any,
    quantized: tuple[Any, str],
    calibrate: Callable[[], Any],
    score: Callable[[Any], list[dict[str, Any]]],
    given: Given,
) -> list[dict[str, Any]]:
    """Rows of all arms of a model and of its quantized copy (and its precision), and of the inputs of its functions.

    ``calibrate`` runs the model on what tables learn from, ``score`` gives the rows of a model as it is."""
    from reqat.methods import nonlinear
    from reqat.methods.nonlinear import FUNCTIONS, VERSIONS, calibrated, observe

    exact = {name: function.exact for name, function in FUNCTIONS.items()}
    done = nonlinear.replace(model, exact, scaling="below")
    raw = observe(model, done, calibrate, samples=1)
    done.undo()
    done = nonlinear.replace(model, exact)
    names = sorted({lookup.function for lookup in done.lookups.values()})
    seen = observe(model, done, calibrate, samples=settings.calibration_samples, seed=settings.seeds[0])
    done.undo()
    given.say(f"training tables of {', '.join(names)}")
    tables = _made_tables(settings, names)
    for seed, networks in tables.networks.items():
        tables.own[seed] = calibrated(networks, seen, VERSIONS["fp32"], steps=settings.calibration_steps, seed=seed)
    out: list[dict[str, Any]] = []
    for name in names:
        of_function = [at for at in raw.values() if at.function.name == name]
        total = sum(at.count for at in of_function)
        out.append(
            {
                "what": "inputs", "function": name, "places": len(of_function),
                "low": min(at.low for at in of_function), "high": max(at.high for at in of_function),
                "outside": sum(at.outside for at in of_function) / max(1, total),
            }
        )  # fmt: skip
    for one, precision in ((model, FULL), (quantized[0], quantized[1])):
        for arm in arms(settings, quantized=one is not model):
            undo = _put(one, arm, tables)
            try:
                rows = score(one)
            finally:
                undo()
            out += [{"precision": precision, **asdict(arm)} | row for row in rows]
            given.say(f"{precision} {arm}: {_mean(rows):.4f}")
    return out


def _mean(rows: list[dict[str, Any]]) -> float:
    over, under = ("nats", "tokens") if "nats" in rows[0] else ("right", "count")
    return float(sum(row[over] for row in rows) / sum(row[under] for row in rows))


def _put(model: Any, arm: Arm, tables: Tables) -> Callable[[], None]:
    """Replace the functions of an arm; returns what takes them back."""
    from reqat.methods import nonlinear

    if arm.method == EXACT:
        return lambda: None
    done = nonlinear.replace(model, tables.of(arm), scaling=arm.scaling)
    if arm.calibrated:
        done.set(tables.own[arm.seed])
    return done.undo


def _decoder(settings: Settings, name: str, given: Given) -> pd.DataFrame:
    import torch

    from reqat.evaluation.likelihood import log_likelihoods
    from reqat.models import freeze, prepare

    model, windows, calibration = _tiny(settings) if name == "tiny" else _smollm2(settings, given)
    quantized = copy.deepcopy(model)
    prepare(quantized, settings.decoder_precision, override=True)
    freeze(quantized)
    prepare(model, FULL)  # attention as in the quantized one

    def score(one: Any) -> list[dict[str, Any]]:
        try:
            nats = -log_likelihoods(one, [(w[:1], w[1:]) for w in windows], batch_tokens=_BATCH_TOKENS)
        except ValueError:  # NaN or infinity on the way: the tables destroyed the model
            nats = torch.full((len(windows),), torch.nan).numpy()
        return [
            {"window": i, "tokens": len(w) - 1, "nats": float(n)}
            for i, (w, n) in enumerate(zip(windows, nats, strict=True))
        ]

    def calibrate() -> None:
        log_likelihoods(model, [(w[:1], w[1:]) for w in calibration], batch_tokens=_BATCH_TOKENS)

    rows = _measured(settings, model, (quantized, settings.decoder_precision), calibrate, score, given)
    return pd.DataFrame([{"what": "decoder", "model": name} | row for row in rows])


def _smollm2(settings: Settings, given: Given) -> tuple[Any, list[list[int]], list[list[int]]]:
    """The model, windows to score, and windows to calibrate on."""
    from reqat.config.companions import SMOLLM2
    from reqat.models import load_model, load_tokenizer

    folder = given.source(SMOLLM2)
    tokenizer = load_tokenizer(folder)
    scored, read = (_windows(text, tokenizer, settings.window_tokens) for text in _texts(settings, given))
    windows, calibration = (
        _spread(found, n, name)
        for found, n, name in (
            (scored, settings.windows, "windows"),
            (read, settings.calibration_windows, "calibration_windows"),
        )
    )
    return load_model(folder), windows, calibration


def _texts(settings: Settings, given: Given) -> tuple[str, str]:
    """The text that is scored, and the one that tables are calibrated on."""
    if settings.text == "austen":
        from reqat.data.packaged import austen

        folder = given.source("austen")
        return austen.load(folder, "persuasion"), austen.load(folder, "emma")
    from reqat.data.packaged import brown

    parts: dict[bool, list[str]] = {True: [], False: []}
    for text in brown.load(given.source("brown")):
        parts[text["id"].endswith("0")] += [" ".join(brown.written(s) for s in text["sentences"])]
    return "\n".join(parts[True]), "\n".join(parts[False])


def _windows(text: str, tokenizer: Any, length: int) -> list[list[int]]:
    from reqat.data.text import blocks

    return blocks(tokenizer(text, add_special_tokens=False)["input_ids"], length)


def _spread(found: list[list[int]], count: int, name: str) -> list[list[int]]:
    """`count` of the windows, evenly spread. Raises `ReqatError` naming the setting where there are fewer."""
    from reqat.config.errors import ReqatError

    if len(found) < count:
        raise ReqatError(f"{name} {count}: the text has {len(found)}; lower it, or window_tokens.")
    return found[:: len(found) // count][:count]


def _tiny(settings: Settings) -> tuple[Any, list[list[int]], list[list[int]]]:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(settings.seeds[0])
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, tie_word_embeddings=True,
    )  # fmt: skip
    ids = torch.randint(0, 64, (settings.windows + settings.calibration_windows, settings.window_tokens)).tolist()
    return LlamaForCausalLM(config).eval(), ids[: settings.windows], ids[settings.windows :]


def _encoder(settings: Settings, task: str, given: Given) -> pd.DataFrame:
    from reqat.evaluation.classification import correct_labels
    from reqat.models import freeze, prepare
    from reqat.pipeline.companions.encoders import material
    from reqat.training import NLL, Objective, RunSettings, train

    seed = settings.seeds[0]
    train_rows, test_rows, model = material(settings, task, seed, given)
    prepare(model, FULL)
    tuning = RunSettings(
        lr=settings.lr,
        epochs=settings.epochs,
        rows_per_batch=settings.rows_per_batch,
        warmup=0.1,
        weight_decay=0.01,
        schedule="linear",
        autocast="none",
        seed=seed,
        checkpoint_seconds=300,
    )
    train(model, train_rows, Objective((NLL(),)), tuning, given.checkpoints / "fine-tuned", label=f"{task} fine-tuning")
    quantized = copy.deepcopy(model)
    prepare(quantized, settings.encoder_precision, override=True)
    freeze(quantized)
    first = slice(settings.calibration_sequences)
    types = None if train_rows.types is None else train_rows.types[first]
    calibration = replace(train_rows, ids=train_rows.ids[first], labels=train_rows.labels[first], types=types)

    def score(one: Any) -> list[dict[str, Any]]:
        right, count = correct_labels(one, test_rows)
        return [
            {"group": group, "right": int(right[group::GROUPS].sum()), "count": int(count[group::GROUPS].sum())}
            for group in range(min(GROUPS, len(count)))
        ]

    def calibrate() -> None:
        correct_labels(model, calibration)

    rows = _measured(settings, model, (quantized, settings.encoder_precision), calibrate, score, given)
    return pd.DataFrame([{"what": "encoder", "task": task} | row for row in rows])
