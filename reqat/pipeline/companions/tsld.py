"""TSLD: a small decoder trained on a text, its ternary copies trained by each loss, best evaluation perplexity.

As in the paper: students begin at their teacher, which was trained on the same text; every linear layer but the head is
ternary, with plain straight-through gradients; the token-scaled term is a sum over the sequences of a step. Different:
the teacher is trained from scratch, or the testbed's pinned base, and not a published model; students read a part of
its text many times; sizes, rates and the text are those of a CPU.

`numbers: bfloat16` holds weights and moments of the students in bfloat16, as Hugging Face's trainer does with
``--bf16 --torch_dtype bfloat16``; small updates are then lost.
"""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from reqat.config.companions import TESTBED
from reqat.config.companions.tsld import Settings
from reqat.config.errors import ReqatError
from reqat.pipeline.companions import Given

TEACHER, PTQ = "teacher", "ptq"
GROUPS = 20
_AUSTEN_TEST = "persuasion"


@dataclass(frozen=True)
class Material:
    """The teacher, what its students read, and what they are tested on: (token ids that are given, that are scored),
    and problems to answer, if any."""

    teacher: Any
    rows: Any
    test: list[tuple[Sequence[int], Sequence[int]]]
    sequences: float = 1.0
    """Sequences of a row, on average: blocks fill one each, several solutions share one."""
    problems: Sequence[Any] = ()
    tokenizer: Any = None


def run(settings: Settings, part: str, given: Given) -> pd.DataFrame:
    """A row a method, evaluation and group of held-out blocks (or traces): `step`, `nats` summed over `tokens`, and
    `train_loss`, the mean of the last epoch; where problems are answered, `right` of `answered` in the rows of the last
    step. `ptq` is the student before training."""
    import torch

    from reqat.evaluation.likelihood import log_likelihoods
    from reqat.evaluation.watched import Watched
    from reqat.models import prepare, set_gradient
    from reqat.training import RunSettings, train

    seed = int(part.removeprefix("seed"))
    found = _of_traces(settings, seed, given) if settings.text == "traces" else _of_text(settings, part, given)
    teacher, rows, half = found.teacher, found.rows, settings.numbers == "bfloat16"
    tokens = sum(len(scored) for _, scored in found.test)

    def nats(model: Any) -> list[float]:
        autocast = torch.bfloat16 if model.dtype == torch.bfloat16 else None
        return (-log_likelihoods(model, found.test, autocast=autocast)).tolist()  # type: ignore[no-any-return]

    measured: dict[tuple[str, int], tuple[list[float], float]] = {(TEACHER, 0): (nats(teacher), math.nan)}
    right = {(TEACHER, 0): _right(teacher, found, settings, given, f"{part} {TEACHER}")}
    steps = -(-len(rows) * settings.epochs // settings.rows_per_batch)
    for method in (PTQ, *settings.losses):
        student = copy.deepcopy(teacher)
        prepare(student, settings.precision, override=True)
        if method == PTQ:
            measured[PTQ, 0] = nats(student), math.nan
            right[PTQ, 0] = _right(student, found, settings, given, f"{part} {PTQ}")
            continue
        if half:
            student.to(torch.bfloat16)
        if settings.learned_scale:
            set_gradient(student, "learned", roles=("weights",), base="mean")
        qat = RunSettings(
            lr=settings.rate_of(method),
            rows_per_batch=settings.rows_per_batch,
            epochs=settings.epochs,
            autocast="bf16" if half else "none",
            seed=seed,
        )
        folder, label = given.checkpoints / method.replace("+", "-"), f"{part} {method}"
        watched = Watched(nats, max(1, steps // settings.evaluations), folder / "nats.json")
        objective = objective_of(method, settings.rows_per_batch * found.sequences)
        result = train(student, rows, objective, qat, folder, teacher=teacher, observer=watched, label=label)
        watched.at(student, steps)
        right[method, steps] = _right(student, found, settings, given, label)
        last = [entry["loss"] for entry in result.history[-max(1, steps // settings.epochs) :]]
        best = math.exp(sum(watched.values[watched.lowest]) / tokens)
        given.say(f"{label}: best perplexity {best:.3f} after {watched.lowest} of {steps} steps")
        measured |= {(method, step): (values, sum(last) / len(last)) for step, values in sorted(watched.values.items())}
    about = {"seed": seed, "numbers": settings.numbers, "precision": settings.precision, "steps": steps}
    frame = pd.DataFrame(list(_grouped(measured, [len(scored) for _, scored in found.test], right)))
    return frame.assign(**about, learned_scale=settings.learned_scale)


def _right(model: Any, found: Material, settings: Settings, given: Given, label: str) -> list[bool]:
    """Which of the problems a model answers rightly, greedily."""
    import torch

    from reqat.evaluation import evaluate

    if not found.problems:
        return []
    model.eval()
    with torch.random.fork_rng([]):
        outcomes = evaluate(
            model,
            found.tokenizer,
            found.problems,
            seeds=[0],
            decoding="greedy",
            max_new_tokens=settings.answer_tokens,
            autocast=torch.bfloat16 if model.dtype == torch.bfloat16 else None,
            keep_responses=False,
        )
    right = [bool(x) for x in outcomes.correct]
    given.say(f"{label}: {sum(right)} of {len(right)} problems")
    return right


def _grouped(
    measured: dict[tuple[str, int], tuple[list[float], float]],
    tokens: list[int],
    right: dict[tuple[str, int], list[bool]],
) -> Iterator[dict[str, Any]]:
    """Every twentieth block (and problem) is of one group: enough groups to see how much blocks differ."""
    for (method, step), (nats, loss) in measured.items():
        answers, groups = right.get((method, step), []), min(GROUPS, len(nats))
        for group in range(groups):
            about = {"method": method, "step": step, "group": group, "train_loss": loss}
            about |= {"nats": sum(nats[group::groups]), "tokens": sum(tokens[group::groups])}
            asked = {"right": sum(answers[group::groups]), "answered": len(answers[group::groups])} if answers else {}
            yield about | asked


def _of_traces(settings: Settings, seed: int, given: Given) -> Material:
    """Verified solutions; the pinned base of the testbed, which has learned problems of their kind, is the teacher."""
    from reqat.data import Trace, pack
    from reqat.evaluation.dynamics import verified_traces
    from reqat.models import load_model, load_tokenizer, prepare
    from reqat.tasks import problems

    folder = given.source(TESTBED)
    teacher, tokenizer = load_model(folder), load_tokenizer(folder)
    prepare(teacher, "BF16", override=True)
    read, unseen = (
        verified_traces(settings.problems, tokenizer, n=n, split=split, seed=seed)
        for n, split, seed in ((settings.student_blocks, "train", seed), (settings.test_blocks, settings.held_out, 0))
    )
    asked = problems(settings.problems, settings.held_out, settings.answered, seed=1) if settings.answered else ()
    traces = [
        Trace(f"trace {i}", trace.info.problem, trace.info.family, "", "", trace.prompt_ids, trace.response_ids, False)
        for i, trace in enumerate(read)
    ]
    rows = pack(traces, settings.block_tokens, bos_id=None, pad_id=int(tokenizer.pad_token_id or 0))
    scored: list[tuple[Sequence[int], Sequence[int]]] = [(trace.prompt_ids, trace.response_ids) for trace in unseen]
    return Material(teacher, rows, scored, len(traces) / len(rows), asked, tokenizer)


def _of_text(settings: Settings, part: str, given: Given) -> Material:
    """Blocks of a text, and a decoder trained on them from scratch."""
    import torch

    from reqat.data.text import block_rows
    from reqat.models import prepare
    from reqat.pipeline.scratch import from_scratch
    from reqat.training import NLL, Objective, RunSettings, train

    seed = int(part.removeprefix("seed"))
    read, test, tokenizer = _blocks(settings, seed, given)
    pad = int(tokenizer.pad_token_id or 0)
    torch.manual_seed(seed)
    teacher = from_scratch(settings.architecture, tokenizer)
    prepare(teacher, "BF16")
    run = RunSettings(
        lr=settings.teacher_lr,
        rows_per_batch=settings.teacher_rows,
        epochs=settings.teacher_epochs,
        autocast="none",
        seed=seed,
    )
    rows = block_rows(read, pad)
    train(teacher, rows, Objective((NLL(),)), run, given.checkpoints / TEACHER, label=f"{part} {TEACHER}")
    return Material(teacher, block_rows(read[: settings.student_blocks], pad), [(b[:1], b[1:]) for b in test])


def _blocks(settings: Settings, seed: int, given: Given) -> tuple[list[list[int]], list[list[int]], Any]:
    """Blocks that the teacher reads, those to test on, and the tokenizer."""
    from reqat.data.text import blocks, text_tokenizer

    reading, unseen = texts(settings, given)
    tokenizer = text_tokenizer(reading, settings.vocabulary)
    found = blocks(_ids(tokenizer, reading), settings.block_tokens)
    _enough(settings, "teacher_blocks", len(found))
    _enough(settings, "student_blocks", settings.teacher_blocks)
    drawn = random.Random(seed).sample(range(len(found)), settings.teacher_blocks)
    if settings.held_out == "validation":
        unread = sorted(set(range(len(found))) - set(drawn))
        test = [found[i] for i in unread]
    else:
        test = blocks(_ids(tokenizer, unseen), settings.block_tokens)
    _enough(settings, "test_blocks", len(test))
    step = len(test) // settings.test_blocks
    return [found[i] for i in drawn], test[::step][: settings.test_blocks], tokenizer


def _enough(settings: Settings, name: str, most: int) -> None:
    if getattr(settings, name) > most:
        raise ReqatError(f"{name} {getattr(settings, name)}: there are {most}; lower it")


def _ids(tokenizer: Any, text: str) -> list[int]:
    """Line by line: the tokenizer would warn of a text longer than any model reads."""
    return [id for line in text.splitlines() for id in tokenizer(line + "\n")["input_ids"]]


def objective_of(loss: str, sequences: float) -> Any:
    """The objective of a loss by its name, where a step has so many sequences on average."""
    from reqat.methods.terms import TERMS
    from reqat.training import NLL, Objective

    terms: dict[str, tuple[Any, ...]] = {
        "gt": (NLL(),),
        "logit": (TERMS["qad"](),),
        "logit+gt": (TERMS["qad"](), NLL()),
        # A mean over sequences, weighted by their lengths; the paper's is a sum over those of a step. Where lengths
        # differ, as those of solutions do, this is that sum on average.
        "tsld": (NLL(), TERMS["tsld"](weight=float(sequences))),
        "l2l": (TERMS["qad"](), TERMS["hidden_mse"](over="tokens"), TERMS["attention_score_mse"]()),  # type: ignore[call-arg]
    }
    return Objective(terms[loss])


def texts(settings: Settings, given: Given) -> tuple[str, str]:
    """The text to read, and the text to test on, which has other words in other sentences."""
    if settings.text == "generated":
        rng = random.Random(0)
        words = ["".join(rng.choices("abcdefghij", k=rng.randint(2, 7))) for _ in range(200)]
        lines = [" ".join(rng.choices(words, weights=range(200, 0, -1), k=12)) + "." for _ in range(1200)]
        return "\n".join(lines[:1000]), "\n".join(lines[1000:])
    if settings.text == "austen":
        from reqat.data.packaged import austen

        folder = given.source("austen")
        others = [title for title in austen.TITLES if title != _AUSTEN_TEST]
        return "\n".join(austen.load(folder, title) for title in others), austen.load(folder, _AUSTEN_TEST)
    from reqat.data.packaged import brown

    parts: dict[bool, list[str]] = {False: [], True: []}
    for text in brown.load(given.source("brown")):
        parts[text["id"].endswith("0")] += [brown.written(sentence) for sentence in text["sentences"]]
    return "\n".join(parts[False]), "\n".join(parts[True])
