"""The training loop: exact resumption, determinism, and agreement with transformers' own loss."""

from __future__ import annotations

import dataclasses
import math
import os
import random
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from reqat.config.errors import ReqatError
from reqat.data import Trace, pack
from reqat.data.packing import IGNORE
from reqat.methods.terms.qad import QAD
from reqat.methods.terms.sem import SEM
from reqat.models import freeze, prepare, set_gradient
from reqat.training import NLL, Objective, RunSettings, TermContext, learning_rate, loop, response_logits, train
from reqat.training.checkpoint import FILE

VOCABULARY, BOS, PAD = 40, 1, 0


def tiny_model(seed: int = 0, precision: str = "BF16", **options: Any) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            intermediate_size=48,
            tie_word_embeddings=True,
            max_position_embeddings=64,
        )
    )
    prepare(model, precision, **options)
    return model


def traces(n: int, seed: int = 0) -> list[Trace]:
    rng = random.Random(seed)

    def ids(k: int) -> tuple[int, ...]:
        return tuple(rng.randrange(3, VOCABULARY) for _ in range(k))

    return [Trace(f"t{i}", f"p{i}", "f", "", "", ids(rng.randint(2, 6)), ids(rng.randint(3, 10))) for i in range(n)]


def rows(n: int = 60, row_tokens: int = 32):
    return pack(traces(n), row_tokens, bos_id=BOS, pad_id=PAD)


def weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters()}


def assert_weights_equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def test_packed_loss_equals_transformers_loss_trace_by_trace() -> None:
    """Oracle: transformers' loss of each trace alone, prompt masked, summed."""
    model = tiny_model().eval()
    packed = rows(20)
    batch = packed.batch(range(len(packed)))
    keep = batch.labels != IGNORE
    total, _ = Objective()(TermContext(response_logits(model, batch, keep), batch.labels[keep]))
    expected = 0.0
    for trace in (t for row in packed.rows for t in row):
        ids = torch.tensor([[BOS, *trace.prompt_ids, *trace.response_ids]])
        labels = ids.clone()
        labels[:, : 1 + len(trace.prompt_ids)] = -100
        expected += float(model(input_ids=ids, labels=labels).loss) * len(trace.response_ids)
    assert float(total) == pytest.approx(expected, rel=1e-5)
    assert int(keep.sum()) == sum(len(t.response_ids) for row in packed.rows for t in row)


def test_same_seed_same_weights_other_seed_other_order(tmp_path: Path) -> None:
    out = []
    for i, seed in enumerate((3, 3, 4)):
        model = tiny_model()
        train(
            model,
            rows(),
            Objective(),
            RunSettings(lr=1e-2, rows_per_batch=4, seed=seed),
            tmp_path / str(i),
            progress=False,
        )
        out.append(weights(model))
    assert_weights_equal(out[0], out[1])
    assert any(not torch.equal(out[0][n], out[2][n]) for n in out[0])


def test_weight_decay_is_for_weights_and_not_for_learned_scales(tmp_path: Path) -> None:
    out = []
    for decay in (0.0, 0.5):
        model = tiny_model()
        prepare(model, "INT4-row-W4", override=True)
        set_gradient(model, "learned", roles=("weights",))
        settings = RunSettings(lr=1e-2, rows_per_batch=60, weight_decay=decay)
        assert train(model, rows(8), Objective(), settings, tmp_path / str(decay), progress=False).steps == 1
        out.append(weights(model))
    for name, value in out[0].items():
        assert torch.equal(value, out[1][name]) == name.endswith("gamma"), name
    assert any(name.endswith("gamma") and (value != 1).all() for name, value in out[0].items())


def test_accumulation_gives_the_gradient_of_the_whole_batch(tmp_path: Path) -> None:
    """One divisor for the accumulated batch: 2 x 4 rows must do what 8 rows do, though their token counts differ."""
    out = []
    for i, (size, accumulation) in enumerate(((8, 1), (4, 2))):
        model = tiny_model().double()
        settings = RunSettings(lr=1e-3, rows_per_batch=size, accumulation=accumulation, autocast="none")
        result = train(model, rows(), Objective(), settings, tmp_path / str(i), progress=False)
        out.append((weights(model), [h["loss"] for h in result.history]))
    assert out[0][1] == pytest.approx(out[1][1], rel=1e-6)
    for name in out[0][0]:
        torch.testing.assert_close(out[0][0][name], out[1][0][name], rtol=1e-4, atol=1e-6)


def test_training_lowers_the_loss_and_counts_tokens(tmp_path: Path) -> None:
    model, data = tiny_model(), rows()
    result = train(model, data, Objective(), RunSettings(lr=1e-2, rows_per_batch=4, epochs=6), tmp_path, progress=False)
    assert result.tokens == 6 * data.n_tokens
    assert result.history[-1]["loss"] < result.history[0]["loss"]
    assert result.response_tokens == 6 * sum(len(t.response_ids) for row in data.rows for t in row)


def test_schedule_warms_up_and_ends_at_the_floor() -> None:
    settings = RunSettings(lr=2.0, warmup=0.1, min_lr_ratio=0.01)
    rates = [learning_rate(s, 100, settings) for s in range(100)]
    assert rates[9] == 2.0 and rates[0] == pytest.approx(0.2)
    assert rates[-1] == pytest.approx(0.02)
    assert all(a >= b for a, b in zip(rates[9:], rates[10:], strict=False))
    torch_optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2.0)
    oracle = torch.optim.lr_scheduler.CosineAnnealingLR(torch_optimizer, T_max=89, eta_min=0.02)
    for rate in rates[10:]:
        assert rate == pytest.approx(oracle.get_last_lr()[0])
        torch_optimizer.step()
        oracle.step()


_RUN = """
    import sys, time
    from pathlib import Path
    import torch
    torch.set_num_threads(1)
    sys.path.insert(0, {tests!r})
    from test_loop import tiny_model, rows
    from reqat.training import Objective, RunSettings, train
    import reqat.training.loop as loop
    slow = float(sys.argv[2])
    original = loop.learning_rate
    def throttled(*a):
        time.sleep(slow)
        return original(*a)
    loop.learning_rate = throttled
    model = tiny_model()
    settings = RunSettings(lr=1e-2, rows_per_batch=4, epochs=4, checkpoint_seconds=0)
    train(model, rows(120), Objective(), settings, Path(sys.argv[1]), progress=False)
    model.save_pretrained(Path(sys.argv[1]) / "final")
"""


def _start(folder: Path, slow: float) -> subprocess.Popen[bytes]:
    code = textwrap.dedent(_RUN.format(tests=str(Path(__file__).parent)))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    return subprocess.Popen([sys.executable, "-c", code, str(folder), str(slow)], env=environment)


def test_a_killed_run_resumes_to_bit_identical_weights(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    whole, killed = tmp_path / "whole", tmp_path / "killed"
    reference = _start(whole, 0.0)
    victim = _start(killed, 0.03)
    deadline = time.monotonic() + 60
    while not (killed / FILE).is_file() and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.5)
    assert victim.poll() is None, "the run ended before it could be killed"
    victim.send_signal(signal.SIGKILL)
    victim.wait()
    assert not (killed / "final").exists()
    assert _start(killed, 0.0).wait() == 0 and reference.wait() == 0
    a, b = (load_file(f / "final" / "model.safetensors") for f in (whole, killed))
    assert_weights_equal(a, b)


def test_refuses_a_damaged_checkpoint_one_of_another_run_and_one_of_another_model(tmp_path: Path) -> None:
    settings = RunSettings(lr=1e-2, rows_per_batch=8)
    train(tiny_model(), rows(), Objective(), settings, tmp_path, progress=False)
    with pytest.raises(ValueError, match="belongs to another run"):
        train(tiny_model(), rows(), Objective(), RunSettings(lr=2e-2, rows_per_batch=8), tmp_path, progress=False)
    other = LlamaForCausalLM(
        LlamaConfig(vocab_size=8, hidden_size=16, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
    )
    with pytest.raises(ValueError, match="another model"):
        train(other, rows(), Objective(), settings, tmp_path, progress=False)
    path = tmp_path / FILE
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match="damaged"):
        train(tiny_model(), rows(), Objective(), settings, tmp_path, progress=False)


def test_a_full_disk_keeps_the_last_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from reqat.training import checkpoint

    settings = RunSettings(lr=1e-2, rows_per_batch=8)
    train(tiny_model(), rows(), Objective(), settings, tmp_path, progress=False)
    before = (tmp_path / FILE).read_bytes()

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    model = tiny_model()
    with pytest.raises(ReqatError, match=r"(?i)free some"):
        checkpoint.save(tmp_path, model, torch.optim.AdamW(model.parameters()), {})
    assert (tmp_path / FILE).read_bytes() == before and not list(tmp_path.glob("*.tmp"))


def test_a_loss_that_is_not_finite_names_the_step(tmp_path: Path) -> None:
    model = tiny_model()
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    with pytest.raises(ValueError, match="at step 1"):
        train(model, rows(), Objective(), RunSettings(), tmp_path, progress=False)


def gradients(model: LlamaForCausalLM, objective: Objective) -> tuple[float, dict[str, torch.Tensor]]:
    packed = rows(20)
    loss, parts = loop.batch_loss(model, None, objective, packed.batch(range(len(packed))), autocast=False)
    loss.backward()
    assert list(parts) == [t.name for t in objective.terms]
    value = float(loss.detach())
    assert value == pytest.approx(sum(t.weight * parts[t.name] for t in objective.terms), rel=1e-6)
    return value, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    "terms", [(NLL(),), (NLL(0.5), SEM(0.3, binary=True)), (SEM(0.3, name="selective"), NLL()), (SEM(0.1),)]
)
@pytest.mark.parametrize("frozen_head", [False, True])
def test_large_logits_are_not_held_and_change_nothing(terms, frozen_head: bool, monkeypatch) -> None:
    """In float64, with the tied embedding of the tiny model: its gradient comes from both ends."""
    held = tiny_model().double()
    fused = tiny_model().double()
    for model in (held, fused):
        model.get_output_embeddings().weight.requires_grad_(not frozen_head)
        model.model.norm.weight.data.fill_(10.0)  # entropies far apart: SEM's weights magnify differences of equal ones
    loss, grads = gradients(held, Objective(terms))
    monkeypatch.setattr(loop, "FUSE_ABOVE_BYTES", 0)
    fused.get_output_embeddings().forward = None  # the whole logits, had anyone asked for them
    fused_loss, fused_grads = gradients(fused, Objective(terms))
    # From logits the terms are computed in float32, whatever the model's dtype; the fused loss stays in float64.
    assert fused_loss == pytest.approx(loss, rel=1e-6, abs=1e-6)
    assert grads.keys() == fused_grads.keys()
    for name, grad in grads.items():
        assert (fused_grads[name] - grad).norm() <= 1e-5 * grad.norm() + 1e-12, name


def test_only_large_logits_of_a_plain_head_are_fused(monkeypatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("fused")

    monkeypatch.setattr(Objective, "from_hidden", refuse)
    model, packed = tiny_model(), rows(20)
    batch = packed.batch(range(len(packed)))
    size = 4 * int((batch.labels != IGNORE).sum()) * VOCABULARY

    def loss(objective: Objective, teacher: LlamaForCausalLM | None = None) -> None:
        loop.batch_loss(model, teacher, objective, batch, autocast=False)

    loss(Objective())  # far below the default
    monkeypatch.setattr(loop, "FUSE_ABOVE_BYTES", size)
    loss(Objective())
    monkeypatch.setattr(loop, "FUSE_ABOVE_BYTES", size - 1)
    with pytest.raises(AssertionError, match="fused"):
        loss(Objective())
    loss(Objective((NLL(), QAD())), tiny_model(1))  # a term wants the logits
    loss(Objective((NLL(), SEM(weight=0.0))))  # whose sum the fused loss would not compute
    loss(Objective((SEM(), SEM(name="again"))))
    hook = model.lm_head.register_forward_hook(lambda module, inputs, out: out * 0.5)
    loss(Objective())
    hook.remove()
    model.lm_head.bias = torch.nn.Parameter(torch.zeros(VOCABULARY))
    loss(Objective())


def test_an_objective_that_needs_logits_refuses_hidden_states() -> None:
    assert Objective((NLL(), SEM())).fusable and not Objective((NLL(), QAD())).fusable
    with pytest.raises(ValueError, match="cannot be fused"):
        Objective((QAD(),)).from_hidden(torch.zeros(1, 2), torch.zeros(3, 2), torch.zeros(1, dtype=torch.long))


def test_training_on_a_fused_loss_follows_training_on_logits(tmp_path: Path, monkeypatch) -> None:
    losses = []
    for i, limit in enumerate((loop.FUSE_ABOVE_BYTES, 0)):
        monkeypatch.setattr(loop, "FUSE_ABOVE_BYTES", limit)
        settings = RunSettings(lr=1e-3, rows_per_batch=4, autocast="none")
        result = train(tiny_model(), rows(), Objective((NLL(), SEM())), settings, tmp_path / str(i), progress=False)
        losses.append([h["loss"] for h in result.history])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)  # AdamW magnifies rounding of gradients near 0
    model = tiny_model()
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    with pytest.raises(ValueError, match="at step 1 of .*hidden holds"):
        train(model, rows(), Objective(), RunSettings(), tmp_path / "nan", progress=False)


def test_a_frozen_model_is_refused(tmp_path: Path) -> None:
    model = freeze(tiny_model())
    with pytest.raises(ValueError, match="prepare it without freezing"):
        train(model, rows(), Objective(), RunSettings(), tmp_path, progress=False)


def test_objective_refuses_terms_it_could_not_tell_apart() -> None:
    with pytest.raises(ValueError, match="distinct names"):
        Objective((NLL(), NLL(weight=0.5)))
    with pytest.raises(ValueError, match="distinct names"):
        Objective(())


@pytest.mark.parametrize(("field", "value"), [("lr", 0.0), ("epochs", 0), ("warmup", 1.5), ("rows_per_batch", -1)])
def test_settings_refuse_what_makes_no_sense(field: str, value: float) -> None:
    with pytest.raises(ValueError, match=field):
        RunSettings(**{field: value})


def test_a_trace_of_tokens_that_the_model_does_not_know_is_named(tmp_path: Path) -> None:
    given = pack([*traces(2), Trace("strange", "p", "f", "", "", (5,), (6, 2**40))], 24, bos_id=BOS, pad_id=PAD)
    with pytest.raises(ReqatError, match=f"trace strange: token id {2**40} "):
        train(tiny_model(), given, Objective(), RunSettings(), tmp_path, progress=False)


@pytest.mark.parametrize(("multiplies", "numbers"), [(False, "none"), (True, "bf16")])
def test_automatic_autocast_is_what_the_processor_is_good_at_and_no_run_changes_its_numbers(
    multiplies: bool, numbers: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(autocast: str, folder: str, able: bool = multiplies):
        monkeypatch.setattr(sys.modules["reqat.quant.autocast"], "cpu_multiplies", lambda dtype: able)
        model = tiny_model()
        settings = RunSettings(rows_per_batch=8, autocast=autocast)
        result = train(model, rows(20), Objective(), settings, tmp_path / folder, progress=False)
        return result, weights(model)

    chosen, chosen_weights = run("auto", "auto")
    assert chosen.autocast == numbers
    named, named_weights = run(numbers, "named")
    assert_weights_equal(chosen_weights, named_weights)
    assert [h["loss"] for h in chosen.history] == [h["loss"] for h in named.history]
    assert run("none", "none")[0].history != run("bf16", "bf16")[0].history
    with pytest.raises(ReqatError, match="another value of autocast"):
        run("auto", "auto", able=not multiplies)


def unevenly_sure_model() -> LlamaForCausalLM:
    """A new model is equally unsure everywhere, and SEM's weights are then quotients of rounding errors."""
    model = tiny_model()
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(20)
    return model


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("tau", ["minibatch", "released"])
def test_sem_takes_tau_from_the_accumulated_batch_or_as_released_from_each_micro_batch(
    tau: str, fused: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: the formula in float64, on the logits of the model before the first step."""
    if fused:
        monkeypatch.setattr(loop, "FUSE_ABOVE_BYTES", 0)
    model, packed = unevenly_sure_model(), rows(30)
    groups = list(packed.batches(3, 1, 0))[:3]
    entropies = []
    for indices in groups:
        batch = packed.batch(indices)
        p = response_logits(model, batch, batch.labels != IGNORE).detach().double().softmax(-1)
        entropies.append(-(p * p.log()).sum(-1))

    def total(H: torch.Tensor) -> float:
        low, n = H.min(), len(H)
        edge = H.quantile(0.75) if tau == "minibatch" else H.sort().values[math.floor(0.75 * n) - 1]
        return float(((1 - (H - low) / (edge - low)).clamp(min=0) * H).sum())

    whole = torch.cat(entropies)
    expected = total(whole) if tau == "minibatch" else sum(map(total, entropies))
    settings = RunSettings(rows_per_batch=3, accumulation=3, autocast="none")
    result = train(model, packed, Objective((NLL(), SEM(tau=tau))), settings, tmp_path, progress=False)
    assert result.history[0]["sem"] == pytest.approx(expected / len(whole), rel=1e-4)


@pytest.mark.parametrize("fused", [False, True])
def test_accumulation_changes_nothing_of_sem(fused: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if fused:
        monkeypatch.setattr(loop, "FUSE_ABOVE_BYTES", 0)
    first = []
    for size, accumulation in ((8, 1), (2, 4)):
        settings = RunSettings(rows_per_batch=size, accumulation=accumulation, autocast="none")
        objective = Objective((NLL(), SEM(weight=0.5)))
        first.append(
            train(unevenly_sure_model(), rows(), objective, settings, tmp_path / str(size), progress=False).history[0]
        )
    # Of the first step alone: AdamW magnifies rounding of gradients near 0 after it.
    for key in ("loss", "sem", "grad_norm"):
        assert first[0][key] == pytest.approx(first[1][key], rel=1e-5)


def test_attention_trace_by_trace_changes_nothing_but_rounding() -> None:
    """In float64: loss and gradients of traces apart are those under the mask, in BF16 and with keys and values in
    four bits, with each of their scales."""
    packed = rows(20)
    batch = packed.batch(range(len(packed)))
    assert bool((batch.segment_ids == 0).any()) and int(batch.segment_ids.max()) > 2
    for precision, options in (
        ("BF16", {}),
        ("NVFP4-W4A4KV4", {"global_scale": "row"}),
        ("NVFP4-W4A4KV4", {"global_scale": "dynamic"}),
    ):
        found = []
        for apart in (False, True):
            model = tiny_model(precision=precision, **options).double()
            given = dataclasses.replace(batch, apart=apart)
            loss, _ = loop.batch_loss(model, None, Objective(), given, autocast=False)
            loss.backward()
            found.append((float(loss.detach()), {n: p.grad for n, p in model.named_parameters()}))
        (loss, grads), (apart_loss, apart_grads) = found
        # The loss is summed in float32, and four bits may round a value elsewhere that differs in its last digit.
        assert apart_loss == pytest.approx(loss, rel=1e-6), precision
        for name, grad in grads.items():
            assert (apart_grads[name] - grad).norm() <= 1e-5 * grad.norm() + 1e-12, (precision, name)


def test_attention_trace_by_trace_computes_no_products_between_traces(monkeypatch: pytest.MonkeyPatch) -> None:
    packed = rows(20)
    batch = dataclasses.replace(packed.batch(range(len(packed))), apart=True)
    attend, seen = torch.nn.functional.scaled_dot_product_attention, []

    def noted(query: torch.Tensor, key: torch.Tensor, *given: object, **options: object) -> torch.Tensor:
        seen.append((query.shape[0], query.shape[2], key.shape[2]))
        return attend(query, key, *given, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", noted)
    loop.batch_loss(tiny_model(), None, Objective(), batch, autocast=False)
    lengths = [t.n_tokens for row in packed.rows for t in row]
    assert seen == [(1, n, n) for n in lengths] * 2, "once a trace in each of two layers"


def test_training_trace_by_trace_is_reproducible_and_close_to_training_by_rows(tmp_path: Path) -> None:
    losses, final = {}, {}
    for name, attention in (("rows", "rows"), ("traces", "traces"), ("again", "traces")):
        model = tiny_model()
        settings = RunSettings(lr=1e-3, rows_per_batch=4, autocast="none", attention=attention)
        result = train(model, rows(), Objective(), settings, tmp_path / name, progress=False)
        losses[name], final[name] = [h["loss"] for h in result.history], weights(model)
    assert losses["traces"] == pytest.approx(losses["rows"], rel=1e-4)
    assert_weights_equal(final["traces"], final["again"])
    settings = RunSettings(lr=1e-3, rows_per_batch=4, autocast="none")
    with pytest.raises(ReqatError, match="attention"):  # numbers of the last digit are another run
        train(tiny_model(), rows(), Objective(), settings, tmp_path / "traces", progress=False)
