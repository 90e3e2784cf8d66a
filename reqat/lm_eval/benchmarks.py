"""Published benchmarks as data sets of lm-eval: from a JSONL file of yours, else from the hub.

A file is named by the benchmark, ``aime24.jsonl``, in a folder that ``--metadata data=FOLDER`` or the environment
variable ``REQAT_LM_EVAL_DATA`` names; or ``--metadata aime24=FILE`` names it. Its columns are those of the hub's data
sets, so that a copy of one can be used as it is. Where a file is named, the hub is not asked. Of the hub, the newest
version is read; column ``source`` of every row says which, by its commit (of a file: by its sha256).

:mod:`reqat.tasks.benchmarks` reads the rows, and says how they are asked and graded.
"""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reqat.config.errors import MissingFileError, ReqatError, unknown
from reqat.tasks.benchmarks import Row, given, lacks, question, rows_of, with_ids

FOLDER = "REQAT_LM_EVAL_DATA"
_LETTERS = "ABCD"
_COMMIT = re.compile(r"@([0-9a-f]{40})/")


@dataclass(frozen=True)
class Source:
    """A data set of the hub: its name, its configuration if it has several, and the split that is asked."""

    path: str
    split: str
    config: str | None = None


@dataclass(frozen=True)
class Benchmark:
    """How many problems a benchmark has, and the data sets of the hub that hold them together."""

    problems: int
    sources: tuple[Source, ...]


_AIME25 = Source("math-ai/aime25", "test")
BENCHMARKS = {
    "aime24": Benchmark(30, (Source("HuggingFaceH4/aime_2024", "train"),)),
    "aime25": Benchmark(30, (_AIME25,)),
    "aime120": Benchmark(120, (Source("AI-MO/aimo-validation-aime", "train"), _AIME25)),  # 2022 to 2024, and 2025
    "math500": Benchmark(500, (Source("HuggingFaceH4/MATH-500", "test"),)),
    "gsm8k": Benchmark(1319, (Source("openai/gsm8k", "test", "main"),)),
    "mmlu": Benchmark(14042, (Source("cais/mmlu", "test", "all"),)),
    "mmlu-dev": Benchmark(285, (Source("cais/mmlu", "dev", "all"),)),
}


def dataset(benchmark: str, **metadata: Any) -> dict[str, Any]:
    """The problems of a benchmark, as ``custom_dataset`` of a task: columns ``id``, ``prompt``, ``answer``,
    ``boxed`` (true), ``source``.

    Args:
        benchmark: of :data:`BENCHMARKS`, but for MMLU's.
        metadata: what lm-eval's ``--metadata`` says; ``data`` (a folder) and the benchmark's name (a file) count.

    Raises ReqatError for a file that is missing or holds a row without question or answer (named by its line), and,
    where no file is named, if the hub cannot be read.
    """
    from datasets import Dataset

    docs = [
        {"id": p.id, "prompt": p.prompt, "answer": p.answer, "boxed": p.boxed, "source": source}
        for where, id, row, source in _rows(benchmark, metadata)
        for p in [given(row, where, id, benchmark)]
    ]
    return {"test": Dataset.from_list(docs)}


def mmlu(shots: object = 5, **metadata: Any) -> dict[str, Any]:
    """MMLU, as ``custom_dataset`` of a task: ``id``, ``prompt`` (with the solved examples), ``answer`` (0 to 3),
    ``source``.

    The prompt is lm-eval's own (and Hendrycks's): the subject, ``shots`` solved examples of it in the order of the
    data, the question. Raises ReqatError as :func:`dataset` does, and for too few examples of a subject.
    """
    from datasets import Dataset

    if type(shots) is not int or shots < 0:
        raise ReqatError(f"--metadata shots={shots!r}: how many solved examples precede each question, 0 or more")
    solved: dict[str, list[str]] = {}
    if shots:
        for where, _, row, _ in _rows("mmlu-dev", metadata):
            text, answer, subject = _choice(row, where)
            solved.setdefault(subject, []).append(f"{text} {_LETTERS[answer]}\n\n")
    docs = []
    for where, id, row, source in _rows("mmlu", metadata):
        text, answer, subject = _choice(row, where)
        examples = solved.get(subject, [])[:shots]
        if len(examples) < shots:
            raise ReqatError(
                f"{where}: mmlu-dev holds {len(examples)} solved examples of subject {subject!r} and {shots} are asked "
                "for: add some, or lower --metadata shots"
            )
        about = f"The following are multiple choice questions (with answers) about {subject.replace('_', ' ')}.\n\n"
        docs.append({"id": id, "prompt": about + "".join(examples) + text, "answer": answer, "source": source})
    return {"test": Dataset.from_list(docs)}


def _rows(name: str, metadata: Mapping[str, Any]) -> Iterator[Row]:
    """The rows of a benchmark with ids of their own: of a file if one is named, else of the hub."""
    if name not in BENCHMARKS:
        raise unknown("benchmark", name, BENCHMARKS)
    file = _file(name, metadata)
    seen = 0
    for row in with_ids(_of_hub(name) if file is None else rows_of(file), file or name):
        seen += 1
        yield row
    if seen != BENCHMARKS[name].problems:
        warnings.warn(
            f"{file or name}: {seen} problems, where {name} has {BENCHMARKS[name].problems}; scores are of these",
            stacklevel=2,
        )


def _file(name: str, metadata: Mapping[str, Any]) -> Path | None:
    """The file that is named for a benchmark; None where none is. Raises MissingFileError for one that is not there."""
    if (given := metadata.get(name)) is not None:
        file, said = Path(str(given)), f"--metadata {name}={given}"
    elif (given := metadata.get("data")) is not None:
        file, said = Path(str(given), f"{name}.jsonl"), f"--metadata data={given}"
    elif given := os.environ.get(FOLDER):
        file, said = Path(given, f"{name}.jsonl"), f"{FOLDER}={given}"
    else:
        return None
    if not file.is_file():
        raise MissingFileError(
            f"{file}: no such file ({said}). Put the problems there, one JSON object a line with a question and an "
            f"answer; or leave the option out, and {name} is read from the hub."
        )
    return file


def _of_hub(name: str) -> Iterator[Row]:
    import datasets

    several = len(BENCHMARKS[name].sources) > 1
    for source in BENCHMARKS[name].sources:
        try:
            rows = datasets.load_dataset(source.path, source.config, split=source.split)
        except Exception as error:  # of datasets, huggingface_hub, httpx and the operating system
            reason = " ".join(str(error).split())[:200]
            raise ReqatError(
                f"{name}: {source.path} cannot be read from the hub ({type(error).__name__}: {reason}). Connect to the "
                f"network (and unset HF_HUB_OFFLINE), or give a file: --metadata {name}=FILE, or a folder with "
                f"{name}.jsonl: --metadata data=FOLDER or {FOLDER}=FOLDER."
            ) from error
        version = _version(source.path, rows.info.download_checksums or ())
        for number, row in enumerate(rows):
            if several:  # ids count from 0 in each
                row = {**row, "id": f"{source.path}/{row.get('id', number)}"}
            yield f"{source.path}, row {number}", f"{source.path}/{number}", row, version


def _version(path: str, files: Iterable[str]) -> str:
    """A data set of the hub with the commit that its files were fetched at, ``hf://datasets/PATH@COMMIT/FILE``, which
    `datasets` keeps in its cache, too; "unknown" where they do not say one."""
    commits = sorted({found[1] for file in files if f"/{path}@" in file and (found := _COMMIT.search(file))})
    return f"{path}@{','.join(commits) or 'unknown'}"


def _choice(row: Mapping[str, Any], where: str) -> tuple[str, int, str]:
    """Question with its choices and "Answer:", the right one (0 to 3), and the subject, of a row of MMLU."""
    choices, answer, subject = row.get("choices"), row.get("answer"), row.get("subject")
    if not isinstance(choices, Iterable) or isinstance(choices, str) or len(list(choices)) != len(_LETTERS):
        raise lacks(row, where, "'choices' (four)", choices)
    if isinstance(answer, str) and len(answer) == 1 and answer in _LETTERS:
        answer = _LETTERS.index(answer)
    if type(answer) is not int or not 0 <= answer < len(_LETTERS):
        raise lacks(row, where, "'answer' (0 to 3, or A to D)", answer)
    if not isinstance(subject, str) or not subject:
        raise lacks(row, where, "'subject'", subject)
    lines = [f"{letter}. {choice}" for letter, choice in zip(_LETTERS, choices, strict=True)]
    return "\n".join([question(row, where), *lines, "Answer:"]), answer, subject
