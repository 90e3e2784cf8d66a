"""Bad inputs to every verb and to the Python API, tried in a few processes.

A case that ends its process or does not end within :data:`LONGEST_S` counts as a fault of that case; the next process
goes on after it. ``python -m tests.campaign.inputs MATERIAL SCRATCH`` is such a process: it reads numbers of cases on
standard input and answers each with a line of JSON.
"""

from __future__ import annotations

import dataclasses
import json
import os
import queue
import random
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from tests.campaign import material
from tests.campaign.cases import Case, Verdict, run

LONGEST_S = 120.0
"""What a case may take on a busy machine; one that computes nothing takes some milliseconds."""


def all_cases() -> list[Case]:
    """Every bad input, in a fixed order."""
    from tests.campaign import api, configuration, files, options

    return [case for module in (options, configuration, files, api) for case in module.cases()]


def sample(cases: Sequence[Case], n: int, seed: int) -> list[int]:
    """Numbers of ``n`` cases in which every kind has its share, at least one."""
    random_ = random.Random(seed)
    kinds: dict[str, list[int]] = {}
    for i, case in enumerate(cases):
        kinds.setdefault(case.kind, []).append(i)
    chosen: list[int] = []
    for numbers in kinds.values():
        chosen += random_.sample(numbers, min(len(numbers), max(1, n * len(numbers) // len(cases))))
    rest = [i for i in range(len(cases)) if i not in set(chosen)]
    chosen += random_.sample(rest, max(0, min(len(rest), n - len(chosen))))
    return sorted(chosen[: max(n, len(kinds))])


def try_cases(
    numbers: Sequence[int], *, processes: int, say: Callable[[str], None] = lambda line: None
) -> list[Verdict]:
    """The verdicts on the cases of these numbers. Good inputs of every kind are tried first: they must be accepted."""
    cases = all_cases()
    with tempfile.TemporaryDirectory(prefix="reqat-campaign-") as temporary:
        folder = Path(temporary)
        material.build(folder / "material")
        todo: queue.SimpleQueue[int] = queue.SimpleQueue()
        for number in numbers:
            todo.put(number)
        found: dict[int, Verdict] = {}

        def work(name: str) -> None:
            process = _Process(folder / "material", folder / name)
            while True:
                try:
                    number = todo.get_nowait()
                except queue.Empty:
                    process.end()
                    return
                found[number] = verdict = process.ask(number, cases[number])
                if not verdict.ok:
                    say(f"{verdict.kind}, {verdict.name}: {verdict.fault}")
                elif len(found) % 100 == 0:
                    say(f"{len(found)} of {len(numbers)} bad inputs")

        threads = [threading.Thread(target=work, args=(f"scratch-{i}",)) for i in range(processes)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    return [found[number] for number in numbers]


class _Process:
    """A process that tries cases, begun anew when one has ended it."""

    def __init__(self, source: Path, scratch: Path) -> None:
        self.source, self.scratch = source, scratch
        self.process: subprocess.Popen[str] | None = None

    def ask(self, number: int, case: Case) -> Verdict:
        if self.process is None:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "tests.campaign.inputs", str(self.source), str(self.scratch)],
                cwd=material.ROOT,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
                encoding="utf-8",
                env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
            )
        assert self.process.stdin is not None and self.process.stdout is not None
        timer = threading.Timer(LONGEST_S, self.process.kill)
        timer.start()
        try:
            self.process.stdin.write(f"{number}\n")
            self.process.stdin.flush()
            answer = self.process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        finally:
            late = not timer.is_alive()
            timer.cancel()
        if answer:
            return Verdict(**json.loads(answer))
        code = self.process.wait()
        self.process = None
        fault = f"no end within {LONGEST_S:.0f} s" if late else f"the process ended with {code}"
        return Verdict(case.kind, case.name, fault, "")

    def end(self) -> None:
        if self.process is not None and self.process.stdin is not None:
            self.process.stdin.close()
            self.process.wait()


def answers(source: Path, scratch: Path, numbers: Iterator[int]) -> Iterator[Verdict]:
    """The verdict on each case, tried in a copy of the material: a fresh one for each that spoils something."""
    cases = all_cases()
    shared = scratch / "shared"
    for number in numbers:
        case = cases[number]
        if case.prepare is None and case.call is None:
            if not shared.exists():
                material.copy(source, shared)
            verdict = run(case, shared)
            if not verdict.ok:
                shutil.rmtree(shared, ignore_errors=True)
        else:
            own = material.copy(source, scratch / str(number))
            verdict = run(case, own)
            shutil.rmtree(own, ignore_errors=True)
        yield verdict


def main() -> None:
    """Answer on standard output; what libraries print goes nowhere."""
    answer = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    import torch

    torch.set_num_threads(1)
    for verdict in answers(Path(sys.argv[1]), Path(sys.argv[2]), (int(line) for line in sys.stdin)):
        answer.write(json.dumps(dataclasses.asdict(verdict)) + "\n")
        answer.flush()


if __name__ == "__main__":
    main()
