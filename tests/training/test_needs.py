"""Terms that look at hidden states and attention maps, and teachers: definitions, gradients, what the loop gives."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from torch import Tensor

from reqat.config.errors import ReqatError
from reqat.data.packing import IGNORE
from reqat.methods.terms import TERMS
from reqat.models import prepare, set_gradient
from reqat.models.attention import dense_mask
from reqat.training import NLL, Objective, RunSettings, TermContext, loop, train
from tests.training.test_loop import rows, tiny_model, weights

DISTILLING = ("attention_kl", "hidden_mse", "tsld")


@dataclass
class Look:
    """A term that keeps what it was shown."""

    needs: frozenset[str]
    weight: float = 1.0
    name: str = "look"
    seen: ClassVar[list[TermContext]] = []

    def __call__(self, ctx: TermContext) -> Tensor:
        self.seen.append(ctx)
        return ctx.logits.float().sum() * 0


def shown(needs: set[str], student=None, teacher=None) -> TermContext:  # type: ignore[no-untyped-def]
    packed, Look.seen[:] = rows(20), []
    objective = Objective((Look(frozenset(needs)),))
    loop.batch_loss(student or tiny_model(), teacher, objective, packed.batch(range(len(packed))), autocast=False)
    return Look.seen[-1]


def test_the_context_holds_what_terms_need_and_nothing_else() -> None:
    teacher = tiny_model(1)
    ctx = shown({"logits"}, teacher=teacher)
    assert ctx.hidden_states is ctx.attentions is ctx.teacher_logits is ctx.teacher_hidden_states is None
    ctx = shown({"hidden_states", "teacher.attentions"}, teacher=teacher)
    assert ctx.attentions is ctx.teacher_logits is ctx.teacher_hidden_states is None
    B, T = ctx.responses.shape
    assert [tuple(h.shape) for h in ctx.hidden_states] == [(B, T, 32)] * 3
    assert [tuple(a.shape) for a in ctx.teacher_attentions] == [(B, 2, T, T)] * 2
    assert all(a.grad_fn is None and not a.requires_grad for a in ctx.teacher_attentions)
    assert all(h.requires_grad for h in ctx.hidden_states)
    assert ctx.responses.sum() == len(ctx.labels) == len(ctx.traces) and ctx.traces.max() == 19


def test_attention_maps_are_transformers_own(monkeypatch: pytest.MonkeyPatch) -> None:
    packed = rows(20)
    batch = packed.batch(range(len(packed)))
    model = tiny_model().double()
    ctx = shown({"attentions"}, student=model)
    model.set_attn_implementation("eager")
    model.get_decoder()._forward_pre_hooks.clear()  # which refuses another attention in a prepared model
    mask = torch.where(dense_mask(batch.segment_ids), 0.0, -1e30).double()
    out = model.get_decoder()(
        batch.input_ids, attention_mask=mask, position_ids=batch.position_ids, output_attentions=True, use_cache=False
    )
    for ours, theirs in zip(ctx.attentions, out.attentions, strict=True):
        # eager's softmax is in float32
        torch.testing.assert_close(ours, theirs.double(), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(ours.sum(-1), torch.ones_like(ours.sum(-1)))


def test_a_model_computes_the_same_with_maps_as_without() -> None:
    for name in ("BF16", "NVFP4-KV4:kv_rotation=16"):
        torch.manual_seed(0)
        model = loop_model(name)
        ids = torch.randint(3, 40, (2, 9))
        padding = torch.ones_like(ids)
        padding[0, :4] = 0
        for mask in (None, padding):
            plain = model(ids, attention_mask=mask).logits
            maps = model(ids, attention_mask=mask, output_attentions=True)
            torch.testing.assert_close(maps.logits, plain, rtol=1e-9, atol=1e-9)
            assert len(maps.attentions) == 2 and torch.isfinite(maps.attentions[0]).all()


def loop_model(precision: str, seed: int = 0):  # type: ignore[no-untyped-def]
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=40, num_key_value_heads=1, **shape)).double()
    prepare(model, precision)
    return model


def naive(name: str, ctx: TermContext) -> Tensor:
    """The terms by their definitions, position by position."""
    total = torch.zeros((), dtype=torch.float64)
    if name == "tsld":
        p, q = ctx.teacher_logits.double().log_softmax(-1), ctx.logits.double().log_softmax(-1)
        for trace in range(int(ctx.traces.max()) + 1):
            where = (ctx.traces == trace).nonzero().flatten().tolist()
            scale = torch.softmax(torch.stack([-p[t, ctx.labels[t]] / 10 for t in where]), 0).detach()
            total = total + len(where) * sum(s * -(p[t].exp() * q[t]).sum() for s, t in zip(scale, where, strict=True))
        return total
    for b, t in ctx.responses.nonzero().tolist():
        if name == "hidden_mse":
            for s, h in zip(ctx.hidden_states, ctx.teacher_hidden_states, strict=True):
                total = total + (s[b, t].double() - h[b, t].double()).square().mean()
        else:
            for s, a in zip(ctx.attentions, ctx.teacher_attentions, strict=True):
                A, S = a[b, :, t].double().clamp(min=1e-8), s[b, :, t].double().clamp(min=1e-8)
                total = total + (a[b, :, t] * (A / S).log()).sum(-1).mean()
    return total


@pytest.mark.parametrize("name", DISTILLING)
def test_terms_are_their_definitions(name: str) -> None:
    term = TERMS[name]()
    student, teacher = tiny_model(), tiny_model(1)
    ctx = shown(set(term.needs), student, teacher)
    assert {n for n in ("tsld", "hidden_mse", "attention_kl") if n == name} == {term.name}
    value = term(ctx)
    torch.testing.assert_close(value.double(), naive(name, ctx).detach(), rtol=1e-4, atol=1e-6)
    parameters = [p for p in student.parameters() if p.requires_grad]
    ours = torch.autograd.grad(value, parameters, retain_graph=True, allow_unused=True)
    theirs = torch.autograd.grad(naive(name, ctx), parameters, allow_unused=True)
    for a, b in zip(ours, theirs, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5 * float(b.abs().max()) + 1e-9)


@pytest.mark.parametrize("name", DISTILLING)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_accumulation_and_checkpointing_change_nothing(name: str, checkpointing: bool, tmp_path: Path) -> None:
    out = []
    for i, (size, accumulation) in enumerate(((8, 1), (4, 2))):
        model, teacher = tiny_model().double(), tiny_model(1).double().train()
        settings = RunSettings(
            lr=1e-3, rows_per_batch=size, accumulation=accumulation, autocast="none",
            gradient_checkpointing=checkpointing and i == 1,
        )  # fmt: skip
        objective = Objective((NLL(), TERMS[name](weight=0.5)))
        before = weights(teacher)
        result = train(model, rows(), objective, settings, tmp_path / str(i), teacher=teacher, progress=False)
        assert not teacher.training and all(torch.equal(v, before[n]) for n, v in weights(teacher).items())
        assert all(p.grad is None for p in teacher.parameters())
        out.append((weights(model), [h["loss"] for h in result.history], [h[name] for h in result.history]))
    assert out[0][1] == pytest.approx(out[1][1], rel=1e-6) and out[0][2] == pytest.approx(out[1][2], rel=1e-5)
    for n in out[0][0]:
        torch.testing.assert_close(out[0][0][n], out[1][0][n], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", DISTILLING)
def test_a_quantized_student_learns_from_it(name: str, tmp_path: Path) -> None:
    """Ternary weights, 8-bit activations, clipped gradients: the term falls."""
    teacher = tiny_model()
    teacher.model.norm.weight.data.fill_(10.0)  # a teacher that is sure of something
    student = type(teacher)(teacher.config)
    student.load_state_dict(teacher.state_dict(), strict=False)
    prepare(student, "TERNARY-row-W2+INT8-tensor-A8")
    set_gradient(student, "clipped", roles=("inputs",), limit=2.5)
    settings = RunSettings(lr=3e-3, rows_per_batch=8, epochs=6, autocast="none")
    objective = Objective((TERMS[name](),))
    history = train(student, rows(), objective, settings, tmp_path, teacher=teacher, progress=False).history
    epoch = len(history) // 6
    first, last = (sum(step[name] for step in part) for part in (history[:epoch], history[-epoch:]))
    assert last < first


def test_the_fused_loss_stays_where_terms_allow_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "FUSE_ABOVE_BYTES", 0)
    packed = rows(20)
    batch = packed.batch(range(len(packed)))
    fused: list[bool] = []
    original: Callable[..., object] = Objective.from_hidden
    monkeypatch.setattr(Objective, "from_hidden", lambda *a: (fused.append(True), original(*a))[1])
    loop.batch_loss(tiny_model(), None, Objective((NLL(), TERMS["sem"]())), batch, autocast=False)
    assert fused == [True]
    loop.batch_loss(tiny_model(), tiny_model(), Objective((NLL(), TERMS["hidden_mse"]())), batch, autocast=False)
    assert fused == [True]


def test_what_a_model_does_not_give_is_said() -> None:
    with pytest.raises(ReqatError, match="attention_maps.*attentions"):
        Objective((Look(frozenset({"attention_maps"})),))
    student, teacher = tiny_model(), tiny_model(1)
    teacher.get_decoder()._forward_pre_hooks.clear()
    teacher.set_attn_implementation("sdpa")
    with pytest.raises(ReqatError, match="attentions.*teacher.*sdpa.*prepare"):
        shown({"teacher.attentions"}, student, teacher)
    other = loop_model("BF16").float()
    other.model.layers = other.model.layers[:1]
    other.config.num_hidden_layers = 1
    with pytest.raises(ReqatError, match="hidden_states.*same architecture"):
        TERMS["hidden_mse"]()(shown({"hidden_states", "teacher.hidden_states"}, student, other))
    ctx = TermContext(torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64))
    with pytest.raises(ReqatError, match="teacher.attentions|attentions"):
        Objective((TERMS["attention_kl"](),))(ctx)
    assert (rows(4).batch([0]).labels != IGNORE).any()
