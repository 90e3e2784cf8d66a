"""Training checkpoints: taken up by the run that wrote them, whole, or refused by name with nothing changed."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from reqat.config.errors import ReqatError
from reqat.data import PackedRows, Trace, pack
from reqat.methods.terms.qad import QAD
from reqat.methods.terms.sem import SEM
from reqat.models import prepare
from reqat.training import NLL, Objective, RunSettings, TrainResult, checkpoint, loop, train
from reqat.training.checkpoint import FILE

SETTINGS = RunSettings(lr=1e-2, rows_per_batch=4, checkpoint_seconds=0)


def model(seed: int = 0, precision: str = "BF16", **options: Any) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    made = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=24,
            hidden_size=32,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=16,
            max_position_embeddings=32,
        )
    )
    prepare(made, precision, **options)
    return made


def rows(n: int = 16, seed: int = 0, **changes: int) -> PackedRows:
    rng = random.Random(seed)

    def ids() -> tuple[int, ...]:
        return tuple(rng.randrange(3, 24) for _ in range(rng.randint(3, 8)))

    made = [Trace(f"t{i}", f"p{i}", "f", "", "", ids(), ids()) for i in range(n)]
    return pack(made, **{"row_tokens": 24, "bos_id": 1, "pad_id": 0, **changes})


def run(folder: Path, **changes: Any) -> tuple[dict[str, Tensor], TrainResult]:
    """Train a small model; returns its weights and the result."""
    given: dict[str, Any] = {
        "model": model(),
        "rows": rows(),
        "objective": Objective(),
        "settings": SETTINGS,
        "checkpoints": folder,
        "progress": False,
    } | changes
    result = train(**given)
    return {name: p.detach().clone() for name, p in given["model"].named_parameters()}, result


class Killed(Exception):
    """Stands for a kill."""


def begun(folder: Path, monkeypatch: pytest.MonkeyPatch, after: int = 2, **changes: Any) -> Path:
    """A run that was killed right after its second checkpoint; returns the checkpoint's file."""
    saves: list[int] = []

    def save_and_die(*arguments: Any) -> None:
        original(*arguments)
        saves.append(1)
        if len(saves) == after:
            raise Killed

    original = checkpoint.save
    with monkeypatch.context() as patched:
        patched.setattr(loop.checkpoint, "save", save_and_die)
        with pytest.raises(Killed):
            run(folder, **changes)
    return folder / FILE


def read(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    with safe_open(file, "pt") as f:
        return {name: f.get_tensor(name) for name in f.keys()}, f.metadata()  # noqa: SIM118


def resealed(file: Path, tensors: dict[str, Tensor], about: dict[str, str]) -> None:
    """Write a checkpoint whose digest is right, as one that a defect of ours would have written."""
    about["digest"] = checkpoint._digest(about["position"], tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file, about)


def test_a_resumed_run_gives_the_same_weights_bit_for_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, result = run(tmp_path / "whole")
    begun(tmp_path / "killed", monkeypatch)
    torch.manual_seed(99)
    again, resumed = run(tmp_path / "killed", settings=SETTINGS.model_copy(update={"checkpoint_seconds": 60.0}))
    assert all(torch.equal(whole[name], again[name]) for name in whole)
    assert resumed.steps == result.steps
    assert [entry["loss"] for entry in resumed.history] == [entry["loss"] for entry in result.history]


OTHERS: dict[str, dict[str, Any]] = {
    "traces": {"rows": rows(seed=1)},
    "traces, one fewer": {"rows": rows(n=15)},
    "traces in longer rows": {"rows": rows(row_tokens=28)},
    "traces with another bos": {"rows": rows(bos_id=2)},
    "model at the start": {"model": lambda: model(1)},
    "precision": {"model": lambda: model(precision="NVFP4-W4A4")},
    "precision in one option": {"model": lambda: model(precision="NVFP4-W4A4", rounding="away")},
    "objective": {"objective": Objective((NLL(), SEM()))},
    "value of lr": {"settings": SETTINGS.model_copy(update={"lr": 2e-2})},
    "value of seed": {"settings": SETTINGS.model_copy(update={"seed": 1})},
    "value of autocast": {"settings": SETTINGS.model_copy(update={"autocast": "none"})},
    "value of accumulation": {"settings": SETTINGS.model_copy(update={"accumulation": 2})},
}


@pytest.mark.parametrize("what", OTHERS)
def test_a_checkpoint_of_another_run_is_refused_naming_what_differs(
    what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = {"model": model(precision="NVFP4-W4A4")} if what == "precision in one option" else {}
    file = begun(tmp_path, monkeypatch, **first)
    before = file.read_bytes()
    changes = {key: value() if key == "model" else value for key, value in OTHERS[what].items()}
    word = re.split(", | in | with ", what)[0]
    with pytest.raises(ReqatError, match=f"{FILE} belongs to another run.*another (set of )?{word}.*delete"):
        run(tmp_path, **changes)
    assert file.read_bytes() == before


def test_terms_of_the_same_name_are_compared_by_their_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun(tmp_path, monkeypatch, objective=Objective((NLL(), SEM(weight=0.1))))
    with pytest.raises(ReqatError, match="another objective.*0.1.*0.5"):
        run(tmp_path, objective=Objective((NLL(), SEM(weight=0.5))))


def test_a_teacher_is_compared_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    teacher = model(3).eval().requires_grad_(False)
    begun(tmp_path, monkeypatch, objective=Objective((QAD(),)), teacher=teacher)
    with pytest.raises(ReqatError, match="another teacher"):
        run(tmp_path, objective=Objective((QAD(),)), teacher=model(4).eval().requires_grad_(False))
    run(tmp_path, objective=Objective((QAD(),)), teacher=teacher)


def test_every_flipped_byte_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = begun(tmp_path, monkeypatch)
    whole = file.read_bytes()
    tensors, about = read(file)
    position = json.loads(about["position"])
    student = model()
    before = {name: p.detach().clone() for name, p in student.named_parameters()}
    optimizer = torch.optim.AdamW(student.parameters())
    header = 8 + int.from_bytes(whole[:8], "little")
    places = [*range(0, header, header // 60), *range(header, len(whole), (len(whole) - header) // 100)]
    for at in places:
        file.write_bytes(whole[:at] + bytes([whole[at] ^ 0x10]) + whole[at + 1 :])
        with pytest.raises(ReqatError, match=FILE):
            checkpoint.load(tmp_path, student, optimizer, position["run"])
    for length in (0, 7, header // 2, header, len(whole) - 1):
        file.write_bytes(whole[:length])
        with pytest.raises(ReqatError, match=f"{FILE} is damaged.*delete"):
            checkpoint.load(tmp_path, student, optimizer, position["run"])
    assert all(torch.equal(p, before[name]) for name, p in student.named_parameters()) and not optimizer.state
    file.write_bytes(whole)
    assert checkpoint.load(tmp_path, student, optimizer, position["run"]) == position
    assert all(torch.equal(p, tensors[f"model.{name}"]) for name, p in student.named_parameters())


UP = "model.layers.0.mlp.up_proj.weight"


def position(change: Callable[[dict[str, Any]], object]) -> Callable[[dict[str, Tensor], dict[str, str]], object]:
    def apply(tensors: dict[str, Tensor], about: dict[str, str]) -> None:
        content = json.loads(about["position"])
        change(content)
        about["position"] = json.dumps(content)

    return apply


DAMAGE: dict[str, Callable[[dict[str, Tensor], dict[str, str]], object]] = {
    "NaN in a weight": lambda t, a: t[f"model.{UP}"].view(-1)[:1].fill_(torch.nan),
    "infinity in a weight": lambda t, a: t[f"model.{UP}"].view(-1)[:1].fill_(torch.inf),
    "a weight missing": lambda t, a: t.pop(f"model.{UP}"),
    "a weight in half": lambda t, a: t.update({f"model.{UP}": t[f"model.{UP}"].half()}),
    "a weight of another shape": lambda t, a: t.update({f"model.{UP}": t[f"model.{UP}"][:-1].clone()}),
    "a moment missing": lambda t, a: t.pop(f"optimizer.exp_avg_sq.{UP}"),
    "steps missing": lambda t, a: t.pop(f"optimizer.step.{UP}"),
    "a moment of another shape": lambda t, a: t.update({f"optimizer.exp_avg.{UP}": torch.zeros(3)}),
    "a moment that is an integer": lambda t, a: t.update({f"optimizer.exp_avg.{UP}": torch.zeros(32, 32).int()}),
    "a moment that is NaN": lambda t, a: t[f"optimizer.exp_avg.{UP}"].fill_(torch.nan),
    "a second moment that is negative": lambda t, a: t[f"optimizer.exp_avg_sq.{UP}"].fill_(-1.0),
    "no random state": lambda t, a: t.pop("random.cpu"),
    "a short random state": lambda t, a: t.update({"random.cpu": t["random.cpu"][:-1].clone()}),
    "no position": lambda t, a: a.update(position="null"),
    "a position that is no JSON": lambda t, a: a.update(position="{"),
    "no run": position(lambda p: p.pop("run")),
    "no result": position(lambda p: p.pop("result")),
    "no steps": position(lambda p: p["result"].pop("steps")),
    "negative steps": position(lambda p: p["result"].update(steps=-1)),
    "steps that are a text": position(lambda p: p["result"].update(steps="2")),
    "more steps than there are": position(lambda p: p["result"].update(steps=10**6)),
    "a history of other steps": position(lambda p: p["result"].update(history=[])),
    "a history that is a text": position(lambda p: p["result"].update(history="long")),
    "seconds that are NaN": position(lambda p: p["result"].update(seconds=float("nan"))),
    "no format": lambda t, a: a.pop("format"),
    "another format": lambda t, a: a.update(format="1"),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_a_state_that_cannot_be_is_refused(what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = begun(tmp_path, monkeypatch)
    tensors, about = read(file)
    DAMAGE[what](tensors, about)
    resealed(file, tensors, about)
    with pytest.raises(ReqatError, match=rf"{FILE}.*delete that folder"):
        run(tmp_path)


def test_missing_moments_are_noticed_by_the_digest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = begun(tmp_path, monkeypatch)
    tensors, about = read(file)
    kept = {name: tensor for name, tensor in tensors.items() if not (name.startswith("optimizer.") and UP in name)}
    save_file(kept, file, about)
    with pytest.raises(ReqatError, match=f"{FILE} is damaged.*delete"):
        run(tmp_path)
