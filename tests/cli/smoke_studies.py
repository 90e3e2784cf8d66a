"""The studies that tests of `reqat study` run, on stages of a few thousand random weights."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import LlamaConfig, LlamaForCausalLM

from reqat.cli.main import main
from reqat.config import Paths, load
from reqat.config import studies as config
from reqat.config.studies import PlannedStudy
from reqat.data.tokenizer import build_tokenizer
from reqat.evaluation.loading import load_at
from reqat.models import save_model
from reqat.records import record
from reqat.tasks import problems, write_trace

ROOT = Path(__file__).parents[2]
REPORT = ("report", "--what", "studies", "--tier", "smoke")
PIN = ("pin", "--what", "studies", "--tier", "smoke", "--allow-dirty")
BF16, FP4 = {"recipe": "ft", "precision": "BF16"}, {"recipe": "ft-ptq", "precision": "NVFP4-W4A4KV4"}
BOTH: dict[str, Any] = {"reference": BF16, "candidate": FP4, "n": 4, "seeds": [0, 3]}
NOISE: dict[str, Any] = {"kind": "noise", "model": BF16, "sigmas": [0.5], "n": 4, "seeds": [0, 3]}
STUDIES: list[dict[str, Any]] = [
    {"kind": "pair", "bins": 4, "more_than": 5, **BOTH},
    {"kind": "routing", "threshold": "p60", "held_out": 3, **BOTH},
    NOISE,
    {
        "kind": "reset", "quantized": FP4, "reference": BF16, "n": 4, "seeds": [0, 3], "t_low": [0.3, 0.1],
        "held_out": 3, "controls": ["greedy"],
    },
    {
        "kind": "dynamics", "base": {"recipe": "base", "precision": "BF16"}, "bins": 3, "n": 4,
        "models": {"FT": BF16, "QAT": {"recipe": "qat", "precision": "NVFP4-W4A4KV4"}},
    },
    {
        "kind": "likelihood", "n": 4, "against": "QAT",
        "models": {"QAT": {"recipe": "qat", "precision": "NVFP4-W4A4KV4"}, "FT+PTQ": FP4},
    },
]  # fmt: skip


def reqat(*arguments: object) -> int:
    with pytest.raises(SystemExit) as end:
        main([str(a) for a in arguments])
    return int(end.value.code or 0)


def noted(folder: str | Path, precision: str, **options: Any) -> Any:
    """`load_at`, which keeps a list."""
    LOADED.append((Path(folder).parent.name, precision))
    return load_at(folder, precision, **options)


def ask(root: Path, *studies: dict[str, Any]) -> dict[str, PlannedStudy]:
    """Write the smoke tier's studies; returns them as planned."""
    (root / "config" / "studies.yaml").write_text(yaml.safe_dump({"tiers": {"smoke": list(studies)}}))
    return config.load_studies(load("smoke", Paths(root)), root / "config")


def nonsense(vocabulary: int, seed: int) -> LlamaForCausalLM:
    """One layer of random weights, wide apart, so that its answers are sure and wrong."""
    torch.manual_seed(seed)
    shape = LlamaConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        vocab_size=vocabulary,
        max_position_embeddings=256,
        initializer_range=0.3,
    )
    return LlamaForCausalLM(shape)


def train(root: Path, studies: dict[str, PlannedStudy], first_seed: int = 0) -> None:
    """Put models that answer nonsense where the studies' stages would be, of random weights from `first_seed` on."""
    families = next(study.problems.families for study in studies.values() if study.problems is not None)
    asked = [
        p for split, seed in (("train", 0), ("test", 1), ("validation", 1)) for p in problems(families, split, 40, seed)
    ]
    tokenizer = build_tokenizer([p.prompt for p in asked] + [write_trace(p, random.Random(0)) or "" for p in asked])
    stages = sorted({id for study in studies.values() for id in study.inputs.values()})
    for seed, id in enumerate(stages, first_seed):
        out, partial = root / "build" / "stages" / id, root / "build" / "partial" / id
        with record.job(id.partition("-")[0], id, {}, root=root, out=out, partial=partial) as job:
            save_model(nonsense(len(tokenizer), seed), tokenizer, job.partial / "model")


LOADED: list[tuple[str, str]] = []  # (stage, precision) of every model that the studies below were measured on
