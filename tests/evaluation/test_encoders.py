"""Encoders graded, what they recovered of their teacher's attention, and values watched during a training."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch

from reqat.config.errors import ReqatError
from reqat.data.packing import IGNORE
from reqat.evaluation.attention_recovery import attention_recovery
from reqat.evaluation.classification import correct_labels
from reqat.evaluation.watched import Watched
from reqat.models import prepare
from reqat.training import NLL, Objective, RunSettings, train
from tests.training.test_encoders import TERNARY, batch_of, bert, rows
from tests.training.test_loop import rows as packed_rows
from tests.training.test_loop import tiny_model


@torch.no_grad()
def test_labels_are_graded_sequence_by_sequence() -> None:
    model, given = bert().eval(), rows(20)
    inputs, labels = batch_of(given)
    hits = (model(**inputs).logits.argmax(-1) == labels) & (labels != IGNORE)
    right, count = correct_labels(model, given, rows_per_batch=3)
    assert right.tolist() == hits.sum(1).tolist() and count.sum() == given.n_labels


@torch.no_grad()
def test_recovery_is_its_definition_and_zero_for_the_teacher_itself() -> None:
    teacher, given = bert().eval(), rows(10)
    student = copy.deepcopy(teacher)
    for same in attention_recovery(student, teacher, given):
        assert same.map_kl_nats == pytest.approx(0, abs=1e-9) and same.output_error == pytest.approx(0, abs=1e-9)
    prepare(student, TERNARY)
    found = attention_recovery(student, teacher, given, rows_per_batch=len(given))
    inputs, _ = batch_of(given)
    real = inputs["attention_mask"].bool().numpy()
    seen: dict[str, list[np.ndarray]] = {}
    for name, model in (("s", student), ("t", teacher)):
        outputs: list[np.ndarray] = []
        for layer in model.bert.encoder.layer:
            layer.attention.output.register_forward_hook(lambda _, __, out, o=outputs: o.append(out.double().numpy()))
        seen[f"{name} maps"] = [a.double().numpy() for a in model.bert(**inputs, output_attentions=True).attentions]
        seen[f"{name} out"] = outputs
    for layer, entry in enumerate(found):
        s, t = seen["s maps"][layer], seen["t maps"][layer]
        with np.errstate(divide="ignore", invalid="ignore"):
            kl = np.where(t > 0, t * np.log(t / s), 0.0).sum(-1).mean(1)[real].mean()
        assert entry.layer == layer and entry.map_kl_nats == pytest.approx(kl, rel=1e-4) and kl > 0
        difference = (seen["s out"][layer] - seen["t out"][layer])[real]
        error = np.square(difference).sum() / np.square(seen["t out"][layer][real]).sum()
        assert entry.output_error == pytest.approx(error, rel=1e-4)


def test_values_are_taken_on_the_way_and_survive_a_kill(tmp_path: Path) -> None:
    file, calls = tmp_path / "deep" / "values.json", []

    def measure(model: torch.nn.Module) -> list[float]:
        torch.rand(3)  # the training must not notice
        calls.append(1)
        return [abs(len(calls) - 2.0), 1.0]

    settings, objective = RunSettings(rows_per_batch=8, epochs=2, autocast="none"), Objective((NLL(),))
    watched = Watched(measure, 3, file)
    with pytest.raises(ReqatError, match="nothing was measured"):
        _ = watched.lowest
    runs = []
    for folder, observer in (("plain", None), ("watched", watched)):
        model = tiny_model()
        result = train(model, packed_rows(), objective, settings, tmp_path / folder, observer=observer, progress=False)
        runs.append(model.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(runs[0].values(), runs[1].values(), strict=True))
    watched.at(model, result.steps)
    assert list(watched.values) == [*range(3, result.steps, 3), result.steps] and watched.lowest == 6
    again = Watched(measure, 3, file)
    before = len(calls)
    again.at(model, 3)
    assert again.values == watched.values and len(calls) == before
