"""Several processes train as one does. Processes are forked from the test's own and talk by gloo."""

from __future__ import annotations

import itertools
import os
import random
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from reqat.config.errors import ReqatError
from reqat.config.launch import launched
from reqat.data import PackedRows, Trace, pack
from reqat.methods.terms.qad import QAD
from reqat.methods.terms.sem import SEM
from reqat.models import prepare, sharing_global_scales
from reqat.quant import Precision
from reqat.training import NLL, Objective, RunSettings, TrainResult, checkpoint, distributed, train
from reqat.training.distributed import Ranks
from tests.training.processes import together

VOCABULARY = 40
QAT = {"precision": "NVFP4-W4A4KV4", "global_scale": "row"}
SETTINGS: dict[str, Any] = {"lr": 1e-4, "rows_per_batch": 1, "accumulation": 3, "autocast": "none"}
SEM_OBJECTIVE = Objective((NLL(), SEM()))


def model(precision: str = "BF16", *, tied: bool = True, seed: int = 0, **options: Any) -> Qwen2ForCausalLM:
    torch.manual_seed(seed)
    made = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=VOCABULARY,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            intermediate_size=48,
            tie_word_embeddings=tied,
            initializer_range=0.2,  # entropies far enough apart that SEM's weights do not magnify rounding
            max_position_embeddings=64,
        )
    )
    prepare(made, precision, **options)
    return made


def rows(n: int = 24, seed: int = 0) -> PackedRows:
    rng = random.Random(seed)

    def ids(k: int) -> tuple[int, ...]:
        return tuple(rng.randrange(3, VOCABULARY) for _ in range(k))

    made = [Trace(f"t{i}", f"p{i}", "f", "", "", ids(rng.randint(2, 4)), ids(rng.randint(3, 9))) for i in range(n)]
    return pack(made, 16, bos_id=1, pad_id=0)


def run(
    folder: Path, *, objective: Objective = SEM_OBJECTIVE, data: PackedRows | None = None,
    after: Callable[[int], object] = lambda step: None, tied: bool = True, handed: bool = True, **changes: Any,
) -> tuple[TrainResult, Qwen2ForCausalLM]:  # fmt: skip
    """A training with shared scales; ``after`` sees the number of each checkpoint that was written (all are).
    ``handed``: the first process alone makes the models."""
    make = distributed.current().made if handed else lambda make: make()
    trained = make(lambda: model(**QAT, tied=tied))
    teacher = make(lambda: model(seed=1, tied=tied)) if objective.needs_teacher else None
    saves, plain_save = itertools.count(1), checkpoint.save

    def save(*arguments: Any) -> None:
        plain_save(*arguments)
        after(next(saves))

    checkpoint.save = save  # type: ignore[assignment]
    try:
        with sharing_global_scales(trained):
            settings = RunSettings(**{**SETTINGS, "checkpoint_seconds": 1e9, **changes})
            given = rows() if data is None else data
            return train(trained, given, objective, settings, folder, teacher=teacher, progress=False), trained
    finally:
        checkpoint.save = plain_save


def curves(result: TrainResult) -> dict[str, list[float]]:
    """What a run's history says, by name; wall time is no part of it."""
    return {name: [entry[name] for entry in result.history] for name in result.history[0]}


def as_one(folder: Path, **how: Any) -> dict[str, Any]:
    """Curves and weights of the same run in one process."""
    result, trained = run(folder, **how)
    return {"curves": curves(result), "weights": {name: p.tolist() for name, p in trained.named_parameters()}}


def divided(folder: Path, **how: Any) -> Callable[[Ranks], Any]:
    """The same in the processes at hand."""

    def compute(ranks: Ranks) -> Any:
        result, trained = run(folder, **how)
        plain = model(**QAT, tied=how.get("tied", True)) if ranks.first else None
        ranks.fill(plain, trained)
        weights = {} if plain is None else {name: p.tolist() for name, p in plain.named_parameters()}
        return {"curves": curves(result), "weights": weights}

    return compute


def assert_same(found: dict[str, Any], expected: dict[str, Any], within: float = 1e-5) -> None:
    assert found["curves"].keys() == expected["curves"].keys()
    for name, curve in expected["curves"].items():
        assert found["curves"][name] == pytest.approx(curve, abs=within), name
    assert found["weights"].keys() == expected["weights"].keys()
    for name, weight in expected["weights"].items():
        torch.testing.assert_close(torch.tensor(found["weights"][name]), torch.tensor(weight), rtol=0, atol=1e-4)


@pytest.mark.slow
def test_two_processes_train_as_one_for_50_steps(tmp_path: Path) -> None:
    """NVFP4-W4A4KV4, SEM over the whole minibatch, three micro-batches a step for two processes (one idles)."""
    how: dict[str, Any] = {"epochs": 8}
    expected = as_one(tmp_path / "one", **how)
    assert len(expected["curves"]["loss"]) >= 50
    first, second = together(2, tmp_path, divided(tmp_path / "two", **how))
    assert_same(first["result"], expected)
    assert second["result"]["curves"] == first["result"]["curves"]  # metrics are of all, on each


@pytest.mark.parametrize(
    "how",
    [
        {"objective": Objective((QAD(),))},
        {"objective": Objective((QAD(),)), "handed": False},
        {"rows_per_batch": 6, "accumulation": 1},
        {"tied": False, "gradient_checkpointing": True, "clip": 0.1},
    ],
    ids=[
        "a teacher is divided too",
        "each makes the models",
        "rows of a micro-batch are divided",
        "checkpointing, clipping, a head of its own",
    ],
)
def test_two_processes_train_as_one(tmp_path: Path, how: dict[str, Any]) -> None:
    data = rows(12)
    expected = as_one(tmp_path / "one", data=data, **how)
    found = together(2, tmp_path, divided(tmp_path / "two", data=data, **how))
    assert_same(found[0]["result"], expected)


def test_offloading_changes_no_number(tmp_path: Path) -> None:
    how: dict[str, Any] = {"data": rows(9)}
    expected = as_one(tmp_path / "one", **how)
    (found,) = together(1, tmp_path, divided(tmp_path / "offloaded", **how), offload=True)
    assert_same(found["result"], expected)


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2), (2, 3)])
def test_a_killed_run_goes_on_with_another_number_of_processes(tmp_path: Path, before: int, after: int) -> None:
    """One of the processes is killed (SIGKILL) once the second checkpoint is written; the others end, saying why."""
    data, folder = rows(16), tmp_path / "checkpoints"
    expected = as_one(tmp_path / "one", data=data)

    def until_killed(ranks: Ranks) -> None:
        def die(saved: int) -> None:
            if saved == 2 and ranks.rank == before - 1:
                os.kill(os.getpid(), signal.SIGKILL)

        run(folder, data=data, after=die, checkpoint_seconds=0)

    *others, killed = together(before, tmp_path, until_killed)
    assert killed["code"] == -signal.SIGKILL
    assert all(other["code"] == 0 and f"of {before} lost another process" in other["error"] for other in others)
    found = checkpoint.newest(folder)
    assert found is not None and (found.name == checkpoint.FILE) == (before == 1)
    done = together(after, tmp_path, divided(folder, data=data))
    assert_same(done[0]["result"], expected)
    assert [path.name for path in folder.iterdir()] == [checkpoint.newest(folder).name]  # type: ignore[union-attr]


def test_processes_that_differ_are_told_in_what(tmp_path: Path) -> None:
    def differ(ranks: Ranks) -> list[str]:
        said = []
        for changes in (
            {"lr": 1e-4 * (1 + ranks.rank)},
            {"data": rows(12, seed=ranks.rank)},
            {"objective": Objective((NLL(), SEM(weight=0.1 + ranks.rank)))},
        ):
            with pytest.raises(ReqatError) as error:
                run(tmp_path / "checkpoints", **{"data": rows(12), **changes})
            said.append(str(error.value))
        return said

    for each in together(2, tmp_path, differ):
        lr, data, objective = each["result"]
        assert all(text.startswith("process 1 of 2 has another ") for text in each["result"])
        assert "value of lr (0.0002 against 0.0001)" in lr and "set of traces" in data and "objective" in objective


def test_an_error_of_one_process_ends_all(tmp_path: Path) -> None:
    """A process that fails alone leaves the others neither waiting nor going on."""

    def fail(ranks: Ranks) -> None:
        def stop(saved: int) -> None:
            if ranks.rank == 1:
                raise ReqatError("told to fail")

        run(tmp_path / "checkpoints", data=rows(12), after=stop, checkpoint_seconds=0)

    first, second = together(2, tmp_path, fail)
    assert second["error"] == "told to fail" and "lost another process" in first["error"]


def test_damage_to_any_part_of_a_checkpoint_is_named(tmp_path: Path) -> None:
    folder, data = tmp_path / "checkpoints", rows(9)
    together(2, tmp_path, lambda ranks: run(folder, data=data) and None)
    path = checkpoint.newest(folder)
    assert path is not None
    for file in sorted(path.iterdir()):
        whole = file.read_bytes()
        file.write_bytes(whole[:-9] + bytes([whole[-9] ^ 1]) + whole[-8:])
        with pytest.raises(ReqatError, match=file.name):
            run(folder, data=data)
        file.write_bytes(whole)
    run(folder, data=data)  # whole, it is taken up


@pytest.mark.parametrize(("micro", "accumulation", "size"), [(4, 4, 2), (3, 4, 2), (1, 4, 3), (5, 5, 3)])
def test_each_micro_batch_counts_once_and_all_compute_as_many(micro: int, accumulation: int, size: int) -> None:
    step = [[2 * i, 2 * i + 1] for i in range(micro)]
    shares = [Ranks(rank, size).share(step, accumulation) for rank in range(size)]
    assert len({len(share) for share in shares}) == 1
    assert sorted(rows for share in shares for rows, counts in share if counts) == step
    assert all(rows in step for share in shares for rows, _ in share)


def test_rows_are_divided_where_there_are_fewer_micro_batches_than_processes() -> None:
    shares = [Ranks(rank, 4).share([list(range(6))], 1) for rank in range(4)]
    assert sorted(len(rows) for ((rows, _),) in shares) == [1, 1, 2, 2]
    assert sorted(row for ((rows, counts),) in shares for row in rows if counts) == list(range(6))


def test_entropies_of_all_processes_are_gathered_whatever_their_numbers(tmp_path: Path) -> None:
    found = together(3, tmp_path, lambda ranks: ranks.gathered(torch.arange(2.0 * ranks.rank) + ranks.rank).tolist())
    assert [each["result"] for each in found] == [[1.0, 2.0, 2.0, 3.0, 4.0, 5.0]] * 3


@pytest.mark.parametrize(
    ("size", "precision", "objective", "named"),
    [
        (2, "dynamic", NLL(), "accumulation 1 .* dynamic"),
        (2, "row", SEM(tau="released"), "accumulation 1 .* released"),
        (9, "row", NLL(), "8 rows .* 9 processes"),
    ],
)
def test_steps_that_would_depend_on_the_number_of_processes_are_refused(
    size: int, precision: str, objective: Any, named: str
) -> None:
    def check(accumulation: int, ranks: Ranks) -> None:
        settings = RunSettings(rows_per_batch=8 // accumulation, accumulation=accumulation)
        at = Precision.parse("NVFP4-W4A4KV4", global_scale=precision)
        of_micro_batch = Objective((objective,)).needs_micro_batch
        distributed.check_division(ranks, settings, at, of_micro_batch, torch.nn.Linear(1, 1))

    with pytest.raises(ReqatError, match=named):
        check(1, Ranks(0, size))
    check(4, Ranks(0, 2))
    check(1, Ranks())


def test_dropout_is_warned_of() -> None:
    with pytest.warns(UserWarning, match="dropout"):
        distributed.check_division(Ranks(0, 2), RunSettings(accumulation=2), None, False, torch.nn.Dropout(0.1))


def test_an_environment_that_torchrun_does_not_write_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    assert launched() == (0, 1, 0)
    monkeypatch.setenv("RANK", "2")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ReqatError, match="RANK='2'"):
        launched()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_named() -> None:
    assert distributed.device_of("auto", 3) == torch.device("cpu")
    with pytest.raises(ReqatError, match="process 1 .* no GPU"):
        distributed.device_of("cuda", 1)
