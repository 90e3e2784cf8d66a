"""Encoders in the training loop: transformers' losses, the distillation losses as published, what is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import BertConfig, BertForSequenceClassification, BertForTokenClassification, PreTrainedModel

from reqat.config.errors import ReqatError
from reqat.data import LabelledRows
from reqat.data.packing import IGNORE
from reqat.methods.terms import TERMS
from reqat.models import prepare
from reqat.training import NLL, Objective, RunSettings, loop, train

TERNARY = "TERNARY-tensor-W2+TERNARY-row-E2+INT8-tensor-A8Q8KV8P8:clamp=2.5"
CLASSES = 4


def bert(kind: type[PreTrainedModel] = BertForTokenClassification, seed: int = 0, types: int = 2) -> PreTrainedModel:
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=40, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48,
        max_position_embeddings=16, num_labels=CLASSES, type_vocab_size=types, initializer_range=0.2,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    model = kind(config)
    prepare(model, "BF16")
    return model


def rows(n: int = 24, per_token: bool = True, classes: int = CLASSES) -> LabelledRows:
    rng = np.random.default_rng(0)
    ids = tuple(rng.integers(3, 40, rng.integers(4, 12)) for _ in range(n))
    labels = []
    for row in ids:
        label = row % classes  # what a model can learn
        label[0 if per_token else 1 :: 3 if per_token else 1] = IGNORE
        labels.append(label)
    types = tuple((np.arange(len(row)) > 3).astype(np.int64) for row in ids)
    return LabelledRows(ids, tuple(labels), types, classes, 0)


def batch_of(rows: LabelledRows) -> tuple[dict[str, Tensor], Tensor]:
    """The batch of all rows as the arguments of a transformers model, and its labels."""
    batch = rows.batch(range(len(rows)))
    assert batch.token_types is not None
    mask = (batch.segment_ids > 0).long()
    return {"input_ids": batch.input_ids, "attention_mask": mask, "token_type_ids": batch.token_types}, batch.labels


@pytest.mark.parametrize("per_token", [True, False])
def test_the_loss_is_transformers_own(per_token: bool) -> None:
    kind = BertForTokenClassification if per_token else BertForSequenceClassification
    model, given = bert(kind), rows(per_token=per_token)
    inputs, labels = batch_of(given)
    theirs = model(**inputs, labels=labels if per_token else labels[:, 0]).loss
    ours, _ = loop.batch_loss(model, None, Objective((NLL(),)), given.batch(range(len(given))), autocast=False)
    torch.testing.assert_close(ours / given.n_labels, theirs)


def published(name: str, student: PreTrainedModel, teacher: PreTrainedModel, inputs: dict[str, Tensor]) -> Tensor:
    """The losses as mean squared errors and divergences of the whole batch, padding where the papers have it."""
    mask = inputs["attention_mask"].bool()
    blocks: dict[int, list[Tensor]] = {id(student): [], id(teacher): []}
    found = []
    for model in (student, teacher):
        handles = [
            layer.attention.output.register_forward_hook(lambda _, __, out, m=model: blocks[id(m)].append(out))
            for layer in model.bert.encoder.layer
        ]
        out = model.bert(**inputs, output_attentions=True, attention_scores=True, output_hidden_states=True)
        found.append((out.hidden_states, [s.masked_fill(s < -100, 0.0) for s in out.attentions], out.attentions))
        for handle in handles:
            handle.remove()
    mse = torch.nn.functional.mse_loss
    if name == "hidden_mse":
        return sum(map(mse, found[0][0], found[1][0]))  # type: ignore[arg-type]
    if name == "attention_score_mse":
        return sum(map(mse, found[0][1], found[1][1]))  # type: ignore[arg-type]
    if name == "attention_output_mse":
        return sum(map(mse, blocks[id(student)], blocks[id(teacher)]))  # type: ignore[arg-type]
    total = torch.zeros(())
    for s, t in zip(found[0][2], found[1][2], strict=True):
        for b in range(len(mask)):
            n = int(mask[b].sum())
            p, q = t[b, :, :n, :n].softmax(-1), s[b, :, :n, :n].softmax(-1)
            total = total + (p * (p.clamp(min=1e-8) / q.clamp(min=1e-8)).log()).sum((-1, -2)).mean() / n / len(mask)
    return total


ARGUMENTS = {
    "hidden_mse": {"over": "all"},
    "attention_score_mse": {"masked": "zero"},
    "attention_output_mse": {"over": "all"},
    "attention_kl": {"over": "tokens"},
}


@pytest.mark.parametrize("name", ARGUMENTS)
def test_terms_are_the_published_losses(name: str) -> None:
    student, teacher, given = bert(), bert(seed=1).eval(), rows()
    inputs, _ = batch_of(given)
    objective = Objective((TERMS[name](**ARGUMENTS[name]),))
    loss, _ = loop.batch_loss(student, teacher, objective, given.batch(range(len(given))), autocast=False)
    loss = loss / given.n_labels
    theirs = published(name, student, teacher, inputs)
    torch.testing.assert_close(loss, theirs, rtol=1e-4, atol=1e-6)
    parameters = list(student.parameters())
    ours = torch.autograd.grad(loss, parameters, allow_unused=True)
    for a, b in zip(ours, torch.autograd.grad(theirs, parameters, allow_unused=True), strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5 * float(b.abs().max()) + 1e-8)


def test_scores_without_those_masked_are_the_lower_triangle_of_a_decoder() -> None:
    from tests.training.test_loop import rows as packed_rows
    from tests.training.test_loop import tiny_model

    student, teacher, packed = tiny_model(), tiny_model(1), packed_rows(6)
    batch = packed.batch(range(len(packed)))
    objective = Objective((TERMS["attention_score_mse"](),))
    loss, _ = loop.batch_loss(student, teacher, objective, batch, autocast=False)
    same = batch.segment_ids[:, :, None] == batch.segment_ids[:, None]
    seen = same & torch.ones_like(same).tril() & (batch.segment_ids > 0)[:, :, None]
    seen |= torch.diag_embed(batch.segment_ids == 0)  # padding attends to itself
    total = torch.zeros(())
    scores = []
    for model in (student, teacher):
        inputs = {"attention_mask": seen[:, None], "position_ids": batch.position_ids, "use_cache": False}
        decoder = model.get_decoder()
        scores.append(decoder(batch.input_ids, **inputs, output_attentions=True, attention_scores=True).attentions)
    for s, t in zip(*scores, strict=True):
        where = seen[:, None].expand_as(s)
        total = total + (s[where] - t[where]).square().mean()
    torch.testing.assert_close(loss / batch.n_response_tokens, total, rtol=1e-4, atol=1e-6)


def test_a_ternary_student_learns_from_its_teacher(tmp_path: Path) -> None:
    """Every loss at once falls; a finished run that begins again at its checkpoint has its weights at once."""
    teacher = bert().eval()
    objective = Objective((TERMS["qad"](), *(TERMS[name](**args) for name, args in ARGUMENTS.items())))
    settings = RunSettings(lr=4e-3, rows_per_batch=8, epochs=4, autocast="none", schedule="linear", warmup=0.1)
    ends = []
    for _ in range(2):
        student = bert()
        prepare(student, TERNARY)
        result = train(student, rows(), objective, settings, tmp_path, teacher=teacher, progress=False)
        ends.append(student.bert.encoder.layer[0].attention.self.query.weight.detach().clone())
    first, last = result.history[:3], result.history[-3:]
    for name in (*ARGUMENTS, "qad"):
        assert sum(h[name] for h in last) < sum(h[name] for h in first), name
    assert torch.equal(*ends) and result.history[-1]["lr"] == pytest.approx(settings.lr * settings.min_lr_ratio)


def test_batches_see_each_row_once_an_epoch_and_few_paddings() -> None:
    given = rows(100)
    seen = list(given.batches(8, 2, seed=3))
    assert sorted(i for batch in seen for i in batch) == sorted([*range(100), *range(100)])
    assert list(given.batches(8, 2, seed=3)) == seen != list(given.batches(8, 2, seed=4))
    longest = sum(max(len(given.ids[i]) for i in batch) * len(batch) for batch in seen)
    assert longest < 1.15 * 2 * given.n_tokens
    assert given.digest == rows(100).digest != rows(99).digest


def test_what_cannot_be_is_refused() -> None:
    given = rows(classes=CLASSES)
    with pytest.raises(ReqatError, match="label 3.*0 to 2"):
        LabelledRows(given.ids, given.labels, None, 3, 0)
    objective = Objective((NLL(),))
    with pytest.raises(ReqatError, match="1 token types"):
        loop.batch_loss(bert(types=1), None, objective, given.batch([0, 1]), autocast=False)
    outputs = Objective((TERMS["attention_output_mse"](),))
    from tests.training.test_loop import rows as packed_rows
    from tests.training.test_loop import tiny_model

    with pytest.raises(ReqatError, match="attention_outputs.*layers.0"):
        loop.batch_loss(tiny_model(), tiny_model(1), outputs, packed_rows(4).batch([0]), autocast=False)
    plain = bert()
    plain.base_model._forward_pre_hooks.clear()
    plain.set_attn_implementation("sdpa")
    with pytest.raises(ReqatError, match="attention_scores.*teacher.*BF16"):
        scores = Objective((TERMS["attention_score_mse"](),))
        loop.batch_loss(bert(), plain, scores, given.batch([0]), autocast=False)
    for name, wrong in (("attention_kl", {"over": "all"}), ("attention_score_mse", {"masked": "one"})):
        with pytest.raises(ReqatError, match="unknown"):
            TERMS[name](**wrong)
