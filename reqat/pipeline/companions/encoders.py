"""KD for QAT of encoders: a fine-tuned teacher, its ternary copy trained by each loss, accuracy, attention recovered.

As in the paper's released code: students begin at their teacher; no loss on true labels; logits by soft cross-entropy
(here KL, which differs by a constant), hidden states, attention scores and outputs over padding too, maps without it;
rates fall linearly. Different: AdamW with the project's betas and clipping in place of BertAdam, weight decay on all
parameters, a teacher of its own for each seed, and corpora in place of GLUE.
"""

from __future__ import annotations

import copy
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import pandas as pd

from reqat.config.companions.encoders import CORPORA, GENERATED, HIDDEN, Settings, mix_name, task_and_seed
from reqat.pipeline.companions import Given

if TYPE_CHECKING:
    from reqat.data import LabelledRows


class Sizes(Protocol):
    """How much of a task there is to be."""

    @property
    def train_sequences(self) -> int:
        """To train on."""

    @property
    def test_sequences(self) -> int:
        """To test on."""

    @property
    def max_tokens(self) -> int:
        """Of a sequence."""

    @property
    def layers(self) -> int | None:
        """Of the encoder, from below; None: all."""


TEACHER, PTQ = "teacher", "ptq"
GROUPS = 50
_VALIDATION_EVERY = 8
_GENERATED_CLASSES, _GENERATED_WORDS = 5, 60


def run(settings: Settings, part: str, given: Given) -> pd.DataFrame:
    """A row a method and group of test sequences: `right` of `count` labels; and a row a method and layer:
    `map_kl_nats` and `output_error` (`reqat.evaluation.attention_recovery`). `ptq` is the student before training."""
    import torch

    from reqat.evaluation.attention_recovery import attention_recovery
    from reqat.evaluation.classification import correct_labels
    from reqat.models import prepare
    from reqat.training import NLL, Objective, RunSettings, train

    task, seed = task_and_seed(part)
    train_rows, test_rows, teacher = material(settings, task, seed, given, settings.held_out)
    shared: dict[str, Any] = {
        "rows_per_batch": settings.rows_per_batch,
        "warmup": settings.warmup,
        "weight_decay": settings.weight_decay,
        "schedule": "linear",
        "autocast": "none",
        "seed": seed,
        "checkpoint_seconds": 300,
    }
    looked_at = test_rows.first(settings.recovery_sequences)
    prepare(teacher, "BF16")
    tuning = RunSettings(lr=settings.teacher_lr, epochs=settings.teacher_epochs, **shared)
    train(teacher, train_rows, Objective((NLL(),)), tuning, given.checkpoints / TEACHER, label=f"{part} {TEACHER}")
    out: list[dict[str, Any]] = []

    def grade(method: str, model: Any) -> None:
        right, count = correct_labels(model, test_rows)
        given.say(f"{part} {method}: {100 * right.sum() / count.sum():.2f}% of {count.sum()} labels")
        for group in range(min(GROUPS, len(count))):
            sums = {"right": int(right[group::GROUPS].sum()), "count": int(count[group::GROUPS].sum())}
            out.append({"method": method, "group": group} | sums)

    grade(TEACHER, teacher)
    for method, objective in objectives(settings).items():
        torch.manual_seed(seed)
        student = copy.deepcopy(teacher)
        prepare(student, settings.precision, override=True)
        if objective is not None:
            qat = RunSettings(lr=settings.lr, epochs=settings.epochs, **shared)
            folder = given.checkpoints / method.replace(" ", "-")
            train(student, train_rows, objective, qat, folder, teacher=teacher, label=f"{part} {method}")
        grade(method, student)
        out += [{"method": method} | asdict(layer) for layer in attention_recovery(student, teacher, looked_at)]
    return pd.DataFrame(out).assign(task=task, seed=seed)


def objectives(settings: Settings) -> dict[str, Any]:
    """The objective of each student by the method's name; None for the one that is not trained."""
    from reqat.methods.terms import TERMS
    from reqat.training import Objective

    common = (TERMS["qad"](), TERMS["hidden_mse"](over="all"))  # type: ignore[call-arg]
    score = TERMS["attention_score_mse"](masked="zero")  # type: ignore[call-arg]
    found: dict[str, Any] = {PTQ: None}
    for baseline in settings.baselines:
        found[baseline] = Objective(common if baseline == HIDDEN else (*common, score))
    for c_map, c_out in settings.mixes:
        terms = [
            *([TERMS["attention_kl"](weight=c_map, over="tokens")] if c_map else []),  # type: ignore[call-arg]
            *([TERMS["attention_output_mse"](weight=c_out)] if c_out else []),
        ]
        found[mix_name(c_map, c_out)] = Objective((*common, *terms))
    return found


def material(
    settings: Sizes, task: str, seed: int, given: Given, held_out: str = "test"
) -> tuple[LabelledRows, LabelledRows, Any]:
    """Rows to train on and to test on, and the model that will be fine-tuned, with a fresh classifier. Other companions
    that need an encoder begin from the same. `held_out`: `test` or `validation`."""
    import torch

    torch.manual_seed(seed)
    if task == GENERATED:
        return _generated(settings, seed, held_out)
    from reqat.data import classified_rows, tagged_rows
    from reqat.models import load_tokenizer
    from reqat.tasks.labelled import TASKS, chosen

    folder = given.source("minilm")
    tokenizer, about, rows = load_tokenizer(folder), TASKS[task], []
    reading, graded = divided(_records(task, given), held_out)
    train = (reading, "train", settings.train_sequences, seed)
    for records, split, n, drawn_by in (train, (*graded, settings.test_sequences, 0)):
        examples = chosen(about, records, split, n, drawn_by)
        make: Any = tagged_rows if about.per_word else classified_rows
        rows.append(make(tokenizer, examples, classes=len(about.classes), max_tokens=settings.max_tokens))
    return rows[0], rows[1], _minilm(folder, len(about.classes), about.per_word, settings.layers)


def divided(
    records: list[dict[str, Any]], held_out: str
) -> tuple[list[dict[str, Any]], tuple[list[dict[str, Any]], str]]:
    """Texts to train on, and those to grade on with their split. For validation the texts that are no test are divided
    once more, by text: every eighth of the corpus, which lists its texts by genre, so of every genre."""
    if held_out == "test":
        return records, (records, "test")
    graded = records[::_VALIDATION_EVERY]
    return [text for i, text in enumerate(records) if i % _VALIDATION_EVERY], (graded, "train")


def _records(task: str, given: Given) -> list[dict[str, Any]]:
    from reqat.data.packaged import brown, spam_assassin

    source = str(CORPORA[task])
    load = {"brown": brown.load, "spam-assassin": spam_assassin.load}[source]
    return load(given.source(source))


def _minilm(folder: Path, classes: int, per_word: bool, layers: int | None) -> Any:
    from transformers import BertConfig, BertForSequenceClassification, BertForTokenClassification

    config = BertConfig.from_pretrained(folder, num_labels=classes)
    if layers is not None:
        config.num_hidden_layers = min(layers, config.num_hidden_layers)
    kind = BertForTokenClassification if per_word else BertForSequenceClassification
    return kind.from_pretrained(folder, config=config, use_safetensors=True)


def _generated(settings: Sizes, seed: int, held_out: str) -> tuple[LabelledRows, LabelledRows, Any]:
    """Random words whose class is that of their left neighbour, so that attention is needed, and a random encoder."""
    from transformers import BertConfig, BertForTokenClassification

    from reqat.data import LabelledRows

    def rows(n: int, stream: int) -> LabelledRows:
        rng = np.random.default_rng([seed, stream])
        ids = [rng.integers(3, _GENERATED_WORDS, rng.integers(6, settings.max_tokens)) for _ in range(n)]
        labels = [np.concatenate([[-100], row[:-1] % _GENERATED_CLASSES]) for row in ids]
        return LabelledRows(tuple(ids), tuple(labels), None, _GENERATED_CLASSES, 0)

    config = BertConfig(
        vocab_size=_GENERATED_WORDS, hidden_size=32, num_hidden_layers=settings.layers or 2, num_attention_heads=2,
        intermediate_size=64, max_position_embeddings=settings.max_tokens,
    )  # fmt: skip
    config.num_labels = _GENERATED_CLASSES
    graded = rows(settings.test_sequences, {"test": 1, "validation": 2}[held_out])
    return rows(settings.train_sequences, 0), graded, BertForTokenClassification(config)
