"""Tasks of lm-eval: the problems are ours, the scores are our graders', and the standard error is over problems."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import lm_eval
import numpy as np
import pytest
from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.api.task import ConfigurableTask
from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import load_yaml

from reqat.config.errors import MissingFileError, ReqatError
from reqat.evaluation.grading import verified
from reqat.lm_eval import TASKS, benchmarks, generated
from reqat.lm_eval.scores import graded, keep_all, score
from reqat.tasks import problems, verify, write_trace
from reqat.tasks.answers import grade
from reqat.tasks.benchmarks import read_benchmark

NAMES = {"aime24", "aime25", "aime120", "math500", "gsm8k", "mmlu", "gsm_symbolic", "chain_sum"}


def manager(**metadata: Any) -> TaskManager:
    """lm-eval with our tasks alone: it looks through thousands of files for its own."""
    return TaskManager(include_path=TASKS, include_defaults=False, metadata=metadata)


def test_lm_eval_finds_every_task() -> None:
    assert set(manager().all_subtasks) == {f"reqat_{name}" for name in NAMES}
    assert "reqat" in manager().all_tags


# --- our generators ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "family", [pytest.param("gsm_symbolic", marks=pytest.mark.long), "chain_sum", "leg_counting", "code"]
)
def test_problems_of_a_generator_are_those_that_we_evaluate(family: str) -> None:
    ours = problems([family], "test", 8, 1)
    rows = generated.dataset(family, n_problems=6)["test"]
    assert [row["id"] for row in rows] == [problem.id for problem in ours[:6]]
    assert [row["prompt"] for row in rows] == [problem.prompt for problem in ours[:6]]
    responses = [trace for problem in ours if (trace := write_trace(problem, random.Random(0))) is not None]
    for row, problem in zip(rows, ours, strict=False):
        for response in [*responses, "", "The answer is", "The answer is 12."]:
            assert graded(row, response)[1] == verify(problem, response)
        assert any(graded(row, response)[1] for response in responses)


def test_options_of_a_generator_come_from_the_command_line() -> None:
    options = {"min_terms": 12, "max_terms": 12}
    (row,) = generated.dataset("chain_sum", n_problems=1, problem_seed=5, chain_sum=options, pretrained="m")["test"]
    assert row["prompt"] == problems({"chain_sum": options}, "test", 1, 5)[0].prompt
    with pytest.raises(ReqatError, match="n_problems='many'"):
        generated.dataset("chain_sum", n_problems="many")
    with pytest.raises(ReqatError, match="chain_sum=3"):
        generated.dataset("chain_sum", chain_sum=3)
    with pytest.raises(ReqatError, match="min_words"):
        generated.dataset("chain_sum", chain_sum={"min_words": 3})


# --- scores -----------------------------------------------------------------------------------------------------------

RESPONSES = [
    r"so \boxed{\frac{1}{2}}", "The answer is 0.5.", "The answer is 3.", "", "I give up",
    r"<think>\boxed{7}</think> 1/2", r"\boxed{3", r"first \boxed{3}, no, \boxed{0.50}", "#### 3", "9^9^9^9",
]  # fmt: skip


@pytest.mark.parametrize("k", [1, 2, 5, 8])
def test_scores_are_those_of_our_grader(k: int) -> None:
    rng = random.Random(k)
    for _ in range(20):
        picked = rng.choices(RESPONSES, k=k)
        doc = {"id": "a", "prompt": "?", "answer": "1/2"}
        right = [grade(response, "1/2") for response in picked]
        found = score(doc, keep_all([picked], [doc]))
        assert found["avg@k"] == np.mean(right) and found["pass@k"] == float(any(right))


@pytest.mark.parametrize(
    ("answers", "expected"),
    [
        (["1/2", "0.5", "3"], 1),  # two spellings of one answer
        (["3", "3", "1/2"], 0),
        (["1/2", "3"], 1),  # of equals the first
        (["3", "1/2"], 0),
        (["3", "", "", "", "1/2", "0.5"], 1),  # no answer, no vote
        (["", ""], 0),
    ],
)
def test_the_majority_is_of_answers_and_not_of_spellings(answers: list[str], expected: int) -> None:
    responses = [f"The answer is {answer}." if answer else "" for answer in answers]
    assert score({"answer": "1/2"}, [responses])["maj@k"] == expected


class Scripted(LM):
    """Says the n-th of its responses when it is asked for the n-th time."""

    def __init__(self, responses: dict[str, list[str]]) -> None:
        super().__init__()
        self.responses, self.asked = {key: iter(texts) for key, texts in responses.items()}, []

    def generate_until(self, requests: list[Instance]) -> list[str]:
        self.asked = [request.args[1] for request in requests]
        return [next(self.responses[request.doc["id"]]) for request in requests]

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        raise NotImplementedError

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        raise NotImplementedError


def test_through_lm_eval_scores_are_ours_problem_by_problem_and_the_error_is_over_problems() -> None:
    ours, rng = problems(["gsm_symbolic"], "test", 5, 1), random.Random(0)
    said = {p.id: rng.choices([f"The answer is {p.answer}.", "It is 17.", "none", rf"\boxed{{{p.answer}}}"], k=8)
            for p in ours}  # fmt: skip
    lm = Scripted(said)
    out: Any = simple_evaluate(
        lm, tasks=["reqat_gsm_symbolic"], limit=5, task_manager=manager(n_problems=9), bootstrap_iters=2
    )
    assert len(lm.asked) == 40 and lm.asked[0]["until"] == [] and "seed" not in lm.asked[0]
    assert (lm.asked[0]["temperature"], lm.asked[0]["top_p"]) == (0.6, 0.95)
    means = [np.mean([verify(problem, response) for response in said[problem.id]]) for problem in ours]
    assert [sample["avg@k"] for sample in out["samples"]["reqat_gsm_symbolic"]] == means
    found = out["results"]["reqat_gsm_symbolic"]
    assert found["avg@k,all"] == pytest.approx(np.mean(means))
    assert found["avg@k_stderr,all"] == pytest.approx(np.std(means, ddof=1) / np.sqrt(5))


# --- published benchmarks, from files ---------------------------------------------------------------------------------


def write(file: Path, *rows: Any) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


AIME = {"problem": "What is $1+1$?", "answer": 2, "url": "none"}


@pytest.mark.filterwarnings("ignore:.*scores are of these")
def test_a_file_is_found_by_folder_variable_or_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, text in (("variable", "a"), ("folder", "b"), ("file", "c")):
        (tmp_path / name).mkdir()
        write(tmp_path / name / "aime24.jsonl", {**AIME, "problem": text})
    file = write(tmp_path / "mine.jsonl", {**AIME, "problem": "c"})
    monkeypatch.setenv("REQAT_LM_EVAL_DATA", str(tmp_path / "variable"))
    asked: list[dict[str, Any]] = [{}, {"data": str(tmp_path / "folder")}]
    asked.append({**asked[1], "aime24": str(file), "pretrained": "a model", "version": 1.0})
    found = [benchmarks.dataset("aime24", **metadata)["test"][0]["prompt"] for metadata in asked]
    assert [prompt.splitlines()[0] for prompt in found] == ["a", "b", "c"]
    assert all("\\boxed{}" in prompt for prompt in found)


@pytest.mark.filterwarnings("ignore:.*scores are of these")
def test_columns_are_those_of_the_hubs_data_sets(tmp_path: Path) -> None:
    file = write(tmp_path / "gsm8k.jsonl", {"question": "How many?", "answer": "2 + 2 = <<2+2=4>>4\n#### 1,004"})
    (row,) = benchmarks.dataset("gsm8k", gsm8k=file)["test"]
    assert row["answer"] == "1,004" and graded(row, r"\boxed{1004}")[1]
    file = write(tmp_path / "math500.jsonl", {"problem": "x", "answer": r"\frac{3}{4}", "unique_id": "test/1.json"})
    (row,) = benchmarks.dataset("math500", math500=file)["test"]
    assert row["id"] == "test/1.json" and graded(row, r"\boxed{0.75}")[1] and not graded(row, r"\boxed{3}")[1]
    file = write(tmp_path / "aime24.jsonl", {"ID": "2024-I-1", "Problem": "x", "Answer": 204})  # as some write
    assert benchmarks.dataset("aime24", aime24=file)["test"][0]["id"] == "2024-I-1"


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([AIME, {"problem": "x", "url": "y"}], "line 2: no 'answer'.*problem, url"),
        ([AIME, AIME, {"answer": 3}], "line 3: no 'problem' or 'question'.*answer"),
        ([{"problem": "x", "answer": None}], "line 1: no 'answer'"),
        ([{"problem": "x", "answer": [1]}], r"line 1: no 'answer' \(\[1\]"),
        ([{"problem": "  ", "answer": 1}], "line 1: no 'problem'"),
        ([{**AIME, "id": 7}, {**AIME, "id": 7}], "line 2: id '7'.*line 1"),
        ([5], "line 1.*object"),
        ([], "no problem"),
    ],
)
def test_a_bad_row_is_named(rows: list[Any], expected: str, tmp_path: Path) -> None:
    with pytest.raises(ReqatError, match=expected):
        benchmarks.dataset("aime24", aime24=write(tmp_path / "a.jsonl", *rows))


def test_a_missing_file_and_an_unreachable_hub_end_with_the_remedies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("REQAT_LM_EVAL_DATA", raising=False)
    with pytest.raises(MissingFileError, match="aime25.jsonl.*data=.*hub"):
        benchmarks.dataset("aime25", data=str(tmp_path))
    with pytest.raises(ReqatError, match="(?s)aime25.*network.*aime25=FILE.*data=FOLDER.*REQAT_LM_EVAL_DATA"):
        benchmarks.dataset("aime25")  # tests have no network
    with pytest.raises(ReqatError, match="'aime2'.*aime24"):
        benchmarks.dataset("aime2")


@pytest.mark.filterwarnings("ignore:.*scores are of these")
def test_a_file_is_asked_and_graded_as_a_tier_asks_and_grades_it(tmp_path: Path) -> None:
    rows = [{**AIME, "id": "a"}, {"question": "x?", "answer": r"\frac{3}{4}"}, {"problem": "y", "answer": "#### 1,004"}]
    file = Path(write(tmp_path / "aime24.jsonl", *rows))
    docs, ours = benchmarks.dataset("aime24", aime24=str(file))["test"], read_benchmark(file)
    assert [(row["id"], row["prompt"], row["answer"]) for row in docs] == [(p.id, p.prompt, p.answer) for p in ours]
    responses = [r"\boxed{2}", r"\boxed{0.75}", r"is \boxed{1004}.", "The answer is 2.", "2", r"\boxed{2", "", "3/4"]
    verdicts = [[graded(row, response)[1] for response in responses] for row in docs]
    assert verdicts == [[verified(problem, response) for response in responses] for problem in ours]
    assert [row.index(True) for row in verdicts] == [0, 1, 2] and sum(map(sum, verdicts)) == 3, "only what is in a box"


@pytest.mark.filterwarnings("ignore:.*scores are of these")
def test_rows_say_which_version_they_are_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import hashlib

    import datasets

    file = write(tmp_path / "aime24.jsonl", AIME)
    (row,) = benchmarks.dataset("aime24", aime24=file)["test"]
    assert row["source"] == f"aime24.jsonl sha256:{hashlib.sha256(Path(file).read_bytes()).hexdigest()}"

    def load(path: str, config: str | None, *, split: str) -> Any:
        rows = datasets.Dataset.from_list([AIME])
        commit = hashlib.sha1(path.encode()).hexdigest()
        rows.info.download_checksums = {f"hf://datasets/{path}@{commit}/data/{split}.parquet": {"num_bytes": 1}}
        return rows

    monkeypatch.delenv("REQAT_LM_EVAL_DATA", raising=False)
    monkeypatch.setattr(datasets, "load_dataset", load)
    names = ["AI-MO/aimo-validation-aime", "math-ai/aime25"]
    expected = [f"{name}@{hashlib.sha1(name.encode()).hexdigest()}" for name in names]
    assert [row["source"] for row in benchmarks.dataset("aime120")["test"]] == expected


def test_another_number_of_problems_is_said(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="1 problems.*30"):
        benchmarks.dataset("aime24", aime24=write(tmp_path / "a.jsonl", AIME))


def mmlu_row(subject: str, i: int) -> dict[str, Any]:
    choices = [f"{subject[0]}{i}{c}" for c in "wxyz"]
    return {"question": f" Which {i}? ", "subject": subject, "choices": choices, "answer": i % 4}


@pytest.mark.filterwarnings("ignore:.*scores are of these")
def test_the_prompt_of_mmlu_is_lm_evals_own(tmp_path: Path) -> None:
    dev = [mmlu_row(subject, i) for subject in ("abstract_algebra", "law") for i in range(3)]
    test = [mmlu_row(subject, 7) for subject in ("law", "abstract_algebra")]
    write(tmp_path / "mmlu.jsonl", *test), write(tmp_path / "mmlu-dev.jsonl", *dev)
    ours = benchmarks.mmlu(shots=2, data=tmp_path)["test"]
    folder = Path(lm_eval.__file__).parent / "tasks" / "mmlu" / "default"
    theirs = load_yaml(folder / "mmlu_abstract_algebra.yaml")
    from datasets import Dataset

    def algebra(**_: Any) -> dict[str, Any]:
        rows = {name: [row for row in part if row["subject"] == "abstract_algebra"]
                for name, part in (("dev", dev), ("test", test))}  # fmt: skip
        return {name: Dataset.from_list(part) for name, part in rows.items()}

    task = ConfigurableTask(config={**theirs, "custom_dataset": algebra, "metadata": {}})
    expected = task.fewshot_context(task.eval_docs[0], num_fewshot=2)
    assert ours[1]["prompt"] == expected and ours[1]["answer"] == 3
    assert "law" in ours[0]["prompt"] and "algebra" not in ours[0]["prompt"]
    zero = benchmarks.mmlu(shots=0, mmlu=tmp_path / "mmlu.jsonl")["test"][1]["prompt"]
    assert zero == task.fewshot_context(task.eval_docs[0], num_fewshot=0)
    with pytest.raises(ReqatError, match="3 solved.*'law'.*shots"):
        benchmarks.mmlu(shots=4, data=tmp_path)
    with pytest.raises(ReqatError, match="shots=-1"):
        benchmarks.mmlu(shots=-1, data=tmp_path)
    for column, value in (("choices", ["a", "b"]), ("answer", "E"), ("answer", 4), ("subject", None)):
        write(tmp_path / "bad.jsonl", test[0], {**test[1], column: value})
        with pytest.raises(ReqatError, match=f"line 2: no '{column}'"):
            benchmarks.mmlu(shots=0, mmlu=tmp_path / "bad.jsonl")
