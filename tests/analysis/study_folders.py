"""Studies with known numbers: the files that studies leave, written without a model."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from analysis.entropy.pair_report import report
from analysis.report.studies import Study
from reqat.evaluation.outcomes import Outcomes
from reqat.evaluation.trace_files import TokenColumns, TraceInfo, TraceWriter
from reqat.evaluation.trace_folder import TraceFolder

REF, CAND = "BF16", "NVFP4-W4A4KV4"
WORDS = ["<eos>", " so", " is", " 1", " 2", " 3", " +", " -", " ="]
RIGHT, WRONG = " 1 + 1 = 2", " 1 + 1 = 3"
# Models of the primary claims, as likelihood studies label them -> recipe and precision.
CLAIMED = {
    "Base": ("base", "BF16"),
    "PTQ": ("ptq", CAND),
    "FT": ("ft", "BF16"),
    "QAT": ("qat", CAND),
    "FT+QAT, different traces": ("ft-qat-different", CAND),
    "ReQAT-T": ("reqat-t", CAND),
    "ReQAT-TQ": ("reqat-tq", CAND),
    "ReQAT-TQS": ("reqat-tqs", CAND),
}
TWO = {"reference": REF, "candidate": CAND}


def study(path: Path, kind: str, name: str, precisions: dict[str, str], **settings: Any) -> Study:
    about = {
        "id": path.name,
        "commit": "0123456789abcdef",
        "dirty": False,
        "hardware": {"device": "cpu"},
        "seeds": [0, 1],
        "metrics": {},
        "settings": {"n": 12, "decoding": "greedy", "tier": "synthetic", "precisions": precisions, **settings},
    }
    return Study(path.name, kind, name, path, about)


def conditions(path: Path, rows: list[dict[str, Any]]) -> None:
    path.mkdir(parents=True, exist_ok=True)
    common = {"problems": 12, "seeds": 2, "unfinished": 3, "mean_tokens": 40.5, "decoding": "greedy"}
    full = [common | {"lo": row["accuracy"] - 0.1, "hi": row["accuracy"] + 0.05} | row for row in rows]
    (path / "summary.json").write_text(json.dumps(full))


def routing(path: Path, threshold: str, accuracies: tuple[float, ...]) -> Study:
    touched = {"all-reference": 0.0, "low-reference": 0.3, "low-candidate": 0.7, "all-candidate": 1.0}
    rows: list[dict[str, Any]] = [
        {"condition": name, "accuracy": value, "touched": touched[name]}
        for name, value in zip(touched, accuracies, strict=True)
    ]
    for row in rows[1:]:
        row |= {"difference": row["accuracy"] - accuracies[0], "difference_lo": -1, "difference_hi": 1, "p": 0.25}
    conditions(path, rows)
    return study(path, "routing", path.name, TWO, threshold=threshold, threshold_nats=0.0042)


# Problem and seed -> (right without noise, right with noise on the least sure, on the surest decisions, tokens of the
# plain response). The rule of Figure 9 takes p3: p1 is longer, p2 is wrong with any noise, p4 right with all.
NOISY = {
    ("p1", 0): (True, True, False, 9),
    ("p2", 0): (True, False, False, 5),
    ("p3", 1): (True, True, False, 7),
    ("p4", 1): (True, True, True, 4),
}


def noise(path: Path, answers: dict[tuple[str, int], tuple[bool, bool, bool, int]] = NOISY) -> Study:
    rows = [{"condition": "none", "accuracy": 0.9}]
    rows += [
        {"condition": f"{side}-{sigma}", "accuracy": value}
        for side, sigma, value in (("low", "0.2", 0.5), ("high", "0.2", 0.8), ("low", "0.5", 0.1), ("high", "0.5", 0.7))
    ]
    conditions(path, rows)
    for i, name in enumerate(("none", "high-0.2", "low-0.2")):
        Outcomes(
            problem_id=tuple(problem for problem, _ in answers),
            family=("leg_counting",) * len(answers),
            seed=np.array([seed for _, seed in answers]),
            correct=np.array([answer[i] for answer in answers.values()]),
            n_tokens=np.array([answer[3] for answer in answers.values()]),
            finished=np.ones(len(answers), dtype=bool),
            response=tuple(f"So {p} costs $1 + 1 = {2 if a[i] else 3} in {name}." for (p, _), a in answers.items()),
        ).to_parquet(path / f"{name}.parquet")
    return study(path, "noise", "noise", {"model": REF}, sigmas=[0.2, 0.5], share=0.25)


def reset(path: Path) -> Study:
    cold = "reset(t_low=0.3, tau0=0.05, t_high=1.0, top_p=0.95, window=32, step=paragraph)"
    rows: list[dict[str, Any]] = [
        {"condition": "quantized", "accuracy": 0.5, "decoding": "sample(temperature=0.6, top_p=0.95)"},
        {"condition": "reset", "accuracy": 0.625, "decoding": cold, "difference": 0.125, "p": 0.0421},
        {
            "condition": "reset-0.1",
            "accuracy": 0.55,
            "decoding": cold.replace("0.3", "0.1"),
            "difference": 0.05,
            "p": 0.5,
        },
        {
            "condition": "bf16",
            "accuracy": 0.75,
            "decoding": "sample(temperature=0.6, top_p=0.95)",
            "difference": 0.25,
            "p": 1e-4,
        },
        {"condition": "also-0", "accuracy": 0.45, "decoding": "greedy", "seeds": 1},
    ]
    for row in rows:
        if "difference" in row:
            row |= {"difference_lo": row["difference"] - 0.1, "difference_hi": row["difference"] + 0.1}
    conditions(path, rows)
    tau0 = {"value": 0.05, "lo": 0.01, "hi": 0.25, "quantile": 0.8, "n_tokens": 2903, "n_problems": 20, "n_seeds": 1}
    return study(path, "reset", "reset", {"quantized": CAND, "reference": REF}, tau0=tau0)


def traces(path: Path, wrong: tuple[int, ...]) -> TraceFolder:
    """Twelve problems with two seeds: the reference answers 2, the candidate 3 for the problems in ``wrong``.

    The wrong digit is the last token but one. Before it the responses differ in their first word, where the reference's
    entropy is highest for problem 4.
    """
    rng = np.random.default_rng(3)
    with TraceWriter(path, [REF, CAND], WORDS, k=3, metadata={"seeds": [0, 1], "decoding": "greedy"}) as writer:
        for p in range(12):
            for seed in (0, 1):
                for source in (REF, CAND):
                    bad = source == CAND and p in wrong
                    text = (" so" if source == REF else " is") + (WRONG if bad else RIGHT)
                    ids = [1 if source == REF else 2, 3, 6, 3, 8, 5 if bad else 4, 0]
                    H = np.array([2.0 if p == 4 else 1.0 + 0.01 * p, 0.01, 0.02, 0.01, 0.03, 0.004, 1e-6])
                    # With four bits the wrong digit is likelier by 0.05 for every problem.
                    prob_ref = np.array([0.4, 0.99, 0.99, 0.99, 0.99, 0.001 if bad else 0.9, 1.0])
                    prob_cand = prob_ref + np.where(np.arange(7) == 5, 0.05 * p / 12 if bad else 0.0, 0.0)
                    made = {
                        label: _columns(rng, ids, prob, scale * H)
                        for label, prob, scale in ((REF, prob_ref, 1.0), (CAND, prob_cand, 2.0))
                    }
                    info = TraceInfo(
                        f"p{p}", family="f", prompt="?", response=text, answer="2", seed=seed, source=source,
                        correct=not bad, finished=True,
                    )  # fmt: skip
                    writer.add(info, np.array(ids), made)
    return TraceFolder(path)


def _columns(rng: np.random.Generator, ids: list[int], prob: np.ndarray, entropy: np.ndarray) -> TokenColumns:
    n = len(ids)
    top = np.stack([rng.permutation(len(WORDS))[:3] for _ in range(n)]).astype(np.int32)
    top_prob = -np.sort(-rng.dirichlet(np.ones(4), n)[:, :3], axis=1)
    tail = (1 - top_prob[:, 0]).clip(1e-9)
    return TokenColumns(*(x.astype(np.float32) for x in (entropy, tail, prob)), top, top_prob.astype(np.float32))


def pair(path: Path, wrong: tuple[int, ...] = (2, 7, 9), more_than: int = 10) -> Study:
    folder = traces(path, wrong)
    report(folder, REF, CAND, bins=4, more_than=more_than).write(path)
    for name in (
        "tokens.parquet",
        "traces.parquet",
        "meta.json",
    ):  # pinning keeps no traces, so no figure may need them
        (path / name).unlink()
    return study(path, "pair", "pair", TWO)


LABELS = ["FT", "QAT", "FT+QAT same traces", "FT+QAT different traces", "ReQAT-TQS"]
"""Of `dynamics`."""


def dynamics(path: Path, labels: Sequence[str] = LABELS) -> Study:
    rng = np.random.default_rng(0)
    rows = []
    for label in labels:
        for statistic, values in (("change", [1e-4, 2e-3, 5e-3, -0.1]), ("normalized", [9.0, 20.0, 2.0, 0.9])):
            for b, value in enumerate(values):
                value *= rng.uniform(0.8, 1.2)
                half = 0.2 * abs(value)
                mean = [1e-5, 1e-4, 4e-3, 1.2][b]
                rows.append(
                    {"statistic": statistic, "bin": b, "entropy_lo": mean / 2, "entropy_hi": 2 * mean}
                    | {"entropy_mean": mean, "value": value, "lo": value - half, "hi": value + half}
                    | {"n": 250 + b, "clusters": 40, "label": label}
                )
    path.mkdir(parents=True, exist_ok=True)
    pd.DataFrame(rows).to_csv(path / "dynamics.csv", index=False)
    return study(path, "dynamics", "dynamics", {"base": "BF16", "FT": "BF16"} | dict.fromkeys(labels[1:], CAND))


LAYERS, TOKENS, CHANNELS, GRID = 6, 12, 8, (0.0, 0.25, 0.5, 0.75)
"""Of `keys`."""
ALPHA = [0.25, 0.75, 0.5, 0.0, 0.25, 0.5]  # chosen; smallest in layer 3, largest in layer 1
BETA = [0.5] * LAYERS


def keys(path: Path) -> Study:
    path.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    wide = []
    for layer in (1, 3):
        for words in ("before RoPE", "after RoPE"):
            frame = pd.DataFrame(rng.random((TOKENS, CHANNELS)), columns=[f"c{i}" for i in range(CHANNELS)])
            wide.append(frame.assign(layer=layer, keys=words, token=range(TOKENS)))
    pd.concat(wide).to_csv(path / "surfaces.csv", index=False)
    profiles = [
        {"layer": layer, "head": 0, "along": along, "index": i, "largest": 1 + layer + i / size}
        for layer in range(LAYERS)
        for along, size in (("channel", CHANNELS), ("token", TOKENS))
        for i in range(size)
    ]
    pd.DataFrame(profiles).to_csv(path / "profiles.csv", index=False)
    errors = [
        {"layer": x, "alpha": a, "beta": b, "error": 1 + (a - ALPHA[x]) ** 2 + (b - BETA[x]) ** 2,
         "chosen": (a, b) == (ALPHA[x], BETA[x])}
        for x in range(LAYERS) for a in GRID for b in GRID
    ]  # fmt: skip
    pd.DataFrame(errors).to_csv(path / "errors.csv", index=False)
    window = [
        pd.DataFrame(rng.random((10, 64)), columns=[f"d{32 + i}" for i in range(64)]).assign(
            inputs=w, token=range(5, 15)
        )
        for w in ("before rotation", "after rotation")
    ]
    pd.concat(window).to_csv(path / "inputs.csv", index=False)
    measured = {
        "model": {"recipe": "reqat-tq", "precision": CAND},
        "sequences": 4,
        "rotation": 32,
        "layers": {"largest": 1, "smallest": 3},  # records sort keys
        "heads": [0, 1, 0, 1, 0, 0],
        "alpha": ALPHA,
        "beta": BETA,
        "tokens": TOKENS,
        "down_proj": "model.layers.2.mlp.down_proj",
        "largest_input": {"before": 31.0, "after": 5.5},
    }
    return study(path, "keys", "keys", {"model": CAND}, **measured)
