"""The probe: nothing of the training moves, and its numbers are those of plain autograd in float64."""

from __future__ import annotations

import copy
from pathlib import Path
from types import MethodType

import pytest
import torch
import torch.nn.functional as F

from reqat.data.packing import IGNORE
from reqat.evaluation.entropies import token_statistics
from reqat.methods.terms.sem import SEM
from reqat.models import prepare
from reqat.models.attention import dense_mask
from reqat.training import NLL, Objective, RunSettings, train
from reqat.training.gradients import GradientProbe, TokenGradients, token_gradients
from reqat.training.loop import batch_loss
from tests.training.test_loop import assert_weights_equal, rows, tiny_model, weights

SETTINGS = RunSettings(lr=1e-2, rows_per_batch=3, accumulation=2, seed=3)
OBJECTIVE = Objective((NLL(), SEM(weight=0.1)))


def float64_norms(model: torch.nn.Module) -> torch.nn.Module:
    """Transformers computes RMSNorm in float32 whatever the model's type; this makes a float64 model float64."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon))

    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = MethodType(forward, module)
    return model


def found_in(model, batch, objective=OBJECTIVE, autocast=False) -> TokenGradients:
    return token_gradients(model, batch, lambda: batch_loss(model, None, objective, batch, autocast=autocast)[0])


@pytest.mark.parametrize("precision", ["BF16", "NVFP4-W4A4KV4"])
def test_training_with_the_probe_is_the_training_without(tmp_path: Path, precision: str) -> None:
    def run(name: str, observer=None):
        model = tiny_model()
        prepare(model, precision)
        result = train(model, rows(), OBJECTIVE, SETTINGS, tmp_path / name, observer=observer, progress=False)
        return weights(model), result, torch.get_rng_state()

    seen: list[int] = []
    plain, plain_result, plain_rng = run("plain")
    probed, probed_result, probed_rng = run("probed", GradientProbe(2, lambda step, found: seen.append(step)))
    assert_weights_equal(plain, probed)
    assert plain_result.history == probed_result.history
    assert torch.equal(plain_rng, probed_rng)
    assert seen == list(range(0, plain_result.steps, 2)), "once a step, though a step has two micro-batches"


def test_the_observer_sees_every_micro_batch_and_the_loss_of_the_loop(tmp_path: Path) -> None:
    seen: list[tuple[int, float, int]] = []

    def observer(model, batch, step, loss):
        seen.append((step, float(loss().detach()), batch.n_response_tokens))

    result = train(tiny_model(), rows(), OBJECTIVE, SETTINGS, tmp_path, observer=observer, progress=False)
    for history in result.history:
        of_step = [(loss, n) for step, loss, n in seen if step == history["step"] - 1]
        assert history["loss"] == pytest.approx(sum(x for x, _ in of_step) / sum(n for _, n in of_step), rel=1e-6)


def test_a_look_leaves_gradients_mode_random_state_and_hooks_alone() -> None:
    model = tiny_model().train()
    batch = rows().batch([0, 1])
    batch_loss(model, None, OBJECTIVE, batch, autocast=False)[0].backward()
    before = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    values, state = weights(model), torch.get_rng_state()
    found_in(model, batch)
    assert {n for n, p in model.named_parameters() if p.grad is not None} == set(before)
    for name, parameter in model.named_parameters():
        if name in before:
            assert torch.equal(parameter.grad, before[name])
    assert_weights_equal(values, weights(model))
    assert model.training and torch.equal(state, torch.get_rng_state())
    assert not model.get_input_embeddings()._forward_hooks and not model.get_decoder()._forward_hooks


def test_squares_and_entropies_are_those_of_plain_autograd_trace_by_trace() -> None:
    """Oracle: each trace alone, unpacked, in float64, transformers' own forward pass from embeddings."""
    model = float64_norms(tiny_model().double()).eval()
    packed = rows(12)
    batch = packed.batch(range(len(packed)))
    found = found_in(model, batch, Objective())
    squares, entropies = [], []
    for row in packed.rows:
        for trace in row:
            ids = torch.tensor([[packed.bos_id, *trace.prompt_ids, *trace.response_ids]])
            embedding = model.get_input_embeddings()(ids).detach().requires_grad_(True)
            logits = model(inputs_embeds=embedding).logits[0]
            first = len(trace.prompt_ids)  # position of <bos> and the prompt's last token: it predicts the response
            loss = F.cross_entropy(logits[first:-1], ids[0, first + 1 :], reduction="sum")
            loss.backward()
            squares.append(embedding.grad[0, first:-1].square().sum(-1))
            p = logits[first:-1].detach().softmax(-1)
            entropies.append(torch.special.entr(p).sum(-1))
    # transformers computes in float64 here but for float32 rotations, and the loop's loss in float32.
    torch.testing.assert_close(found.square_N, torch.cat(squares), rtol=1e-5, atol=0)
    torch.testing.assert_close(found.entropy_N, torch.cat(entropies), rtol=1e-6, atol=0)
    lengths = [len(s) for s in squares]
    assert torch.equal(found.trace_N, torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)))


def test_entropies_agree_with_those_of_traces() -> None:
    model = tiny_model().eval()
    batch = rows().batch([0, 1])
    keep = batch.labels != IGNORE
    mask = dense_mask(batch.segment_ids)
    logits = model(input_ids=batch.input_ids, attention_mask=mask, position_ids=batch.position_ids).logits[keep]
    expected = token_statistics(logits.detach()).entropy_N
    torch.testing.assert_close(found_in(model, batch).entropy_N.float(), expected, rtol=1e-5, atol=1e-6)


def test_large_logits_have_the_same_gradients_from_hidden_states(monkeypatch: pytest.MonkeyPatch) -> None:
    from reqat.training import loop

    model, batch = tiny_model().eval(), rows().batch([0, 1, 2])
    plain = found_in(model, batch)
    monkeypatch.setattr(loop, "FUSE_ABOVE_BYTES", 0)
    fused = found_in(model, batch)
    torch.testing.assert_close(fused.square_N, plain.square_N, rtol=1e-4, atol=1e-12)
    assert torch.equal(fused.entropy_N, plain.entropy_N)


def test_gradient_checkpointing_and_autocast_change_nothing_but_rounding() -> None:
    model, batch = tiny_model().train(), rows().batch([0, 1])
    exact = found_in(model, batch)
    again = copy.deepcopy(model)
    again.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    torch.testing.assert_close(found_in(again, batch).square_N, exact.square_N, rtol=1e-5, atol=1e-12)
    rounded = found_in(model, batch, autocast=True)
    shares = [float(one.square_N[one.entropy_N < 3.6].sum() / one.square_N.sum()) for one in (rounded, exact)]
    assert shares[0] == pytest.approx(shares[1], abs=0.05)


def test_a_model_that_is_not_finite_is_refused() -> None:
    model = tiny_model()
    with torch.no_grad():
        model.get_decoder().norm.weight.fill_(float("nan"))
    with pytest.raises(ValueError, match="not finite"):
        found_in(model, rows().batch([0]), Objective())


def test_a_probe_looks_at_least_every_step() -> None:
    with pytest.raises(ValueError, match="every must be"):
        GradientProbe(0, lambda step, found: None)
