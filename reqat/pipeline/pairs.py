"""Token entropies of two models over the same tokens: sample, read, analyse, draw."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reqat.config.errors import ReqatError
from reqat.records import provenance
from reqat.tasks.problem_files import Given, grade

if TYPE_CHECKING:
    import torch

    from reqat.evaluation.entropies import ForcedTrace
    from reqat.evaluation.trace_files import TraceInfo


def collect(
    paths: dict[str, str],
    precisions: tuple[str, str],
    options: Sequence[dict[str, Any]],
    rows: Sequence[Given],
    out: Path,
    *,
    seeds: Sequence[int],
    decoding: str,
    max_new_tokens: int,
    batch_rows: int | None,
    sample: bool | None,
    end_marker: str | None,
    logprobs: dict[str, tuple[int, ...]],
    k: int,
    bins: int,
    more_than: int,
    root: Path,
    progress: bool,
    plots: bool = True,
    autocast: torch.dtype | None = None,
) -> dict[str, Any]:
    """Sample, force, analyse, draw: all files but the record; returns the record's metrics.

    ``paths`` are the folders of reference and candidate, ``precisions`` and ``options`` (of `prepare`) go with them;
    ``autocast`` (e.g. ``torch.bfloat16``) is what both sample and read under.
    """
    from analysis.entropy.pair_plots import draw
    from analysis.entropy.pair_report import report
    from reqat.evaluation.entropies import force_traces, vocabulary_of
    from reqat.evaluation.loading import load_at
    from reqat.evaluation.trace_files import TraceWriter
    from reqat.evaluation.trace_folder import TraceFolder
    from reqat.generation import Decoding
    from reqat.models import end_ids, load_tokenizer

    policy = Decoding.parse(decoding)
    used = policy.effective_seeds(seeds)
    labels = _labels(paths, precisions)
    tokenizer = load_tokenizer(paths["reference"])
    if paths["candidate"] != paths["reference"]:
        check_tokenizers(tokenizer, load_tokenizer(paths["candidate"]), paths)
    models: dict[str, Any] = {}
    for label, path, precision, how in zip(labels, paths.values(), precisions, options, strict=True):
        given = {name: value for name, value in how.items() if value is not None}
        models[label] = load_at(path, precision, **given)
    faults: list[tuple[TraceInfo, str]] = []
    ends = tuple(dict.fromkeys(i for model in models.values() for i in end_ids(model, tokenizer)))
    answered = [row for row in rows if row.has_response]
    traces = _given_traces(tokenizer, answered, ends, end_marker, logprobs, faults)
    wanted = [row for row in rows if sample or (sample is None and not row.has_response)]
    asked = list({row.id: row for row in wanted}.values())  # one problem may come with several responses
    for label, model in models.items():
        caption = f"sampling {label}" if progress else False
        traces += _sampled_traces(
            model, tokenizer, asked, label, used, policy, max_new_tokens, batch_rows, end_marker, logprobs, caption,
            autocast,
        )  # fmt: skip
    metadata = {
        "decoding": str(policy),
        "seeds": list(used),
        "models": dict(zip(labels, provenance.scrub(list(paths.values()), root), strict=True)),
        "precisions": dict(zip(labels, precisions, strict=True)),
        "tokenizer": provenance.scrub(paths["reference"], root),
    }
    width = max(int(model.config.vocab_size) for model in models.values())
    with TraceWriter(
        out, labels, vocabulary_of(tokenizer, width), k=k, logprobs=bool(logprobs), metadata=metadata
    ) as writer:
        for info, reason in faults:
            writer.leave_out(info, reason)
        force_traces(models, traces, writer, skip_bad=True, autocast=autocast)
        left_out = list(writer.left_out)
    for entry in left_out:
        print(f"reqat: warning: left out: {entry['reason']}", file=sys.stderr)
    folder = TraceFolder(out)
    found = report(folder, *labels, bins=bins, more_than=more_than)
    found.write(out)
    if plots:
        draw(found, out / "plots")
    return {
        "labels": labels,
        "traces": len(folder.traces),
        "tokens": folder.n_tokens,
        "unfinished": int((~folder.traces["finished"]).sum()),
        "left_out": len(left_out),
        "headlines": found.table.data.to_dict("records"),
    }


def _labels(paths: dict[str, str], precisions: tuple[str, str]) -> list[str]:
    """The precisions, or with the folder's name in front where both are in one."""
    if precisions[0] != precisions[1]:
        return list(precisions)
    names = [f"{Path(path).name}:{precision}" for path, precision in zip(paths.values(), precisions, strict=True)]
    if names[0] != names[1]:
        return names
    if paths["reference"] == paths["candidate"]:
        raise ReqatError(f"reference and candidate are the same model in {precisions[0]}; change one of them.")
    return [f"reference:{precisions[0]}", f"candidate:{precisions[1]}"]


def check_tokenizers(a: Any, b: Any, paths: dict[str, str]) -> None:
    """Raises `ReqatError` with the first difference where two tokenizers are not the same."""
    known_a, known_b = a.get_vocab(), b.get_vocab()
    if known_a == known_b:
        if (a.bos_token_id, a.eos_token_id) == (b.bos_token_id, b.eos_token_id):
            return
        what = f"end a response with ids {a.eos_token_id} and {b.eos_token_id}"
    else:
        token = min(t for t in known_a.keys() | known_b.keys() if known_a.get(t) != known_b.get(t))
        what = (
            f"hold {len(known_a)} and {len(known_b)} tokens; {token!r} has id {known_a.get(token)} in one and "
            f"{known_b.get(token)} in the other"
        )
    raise ReqatError(
        f"{paths['reference']} and {paths['candidate']} have different tokenizers: they {what}. Tokens of one mean "
        "nothing to the other; compare models that share a tokenizer."
    )


def _given_traces(
    tokenizer: Any,
    rows: Sequence[Given],
    ends: tuple[int, ...],
    end_marker: str | None,
    logprobs: dict[str, tuple[int, ...]],
    faults: list[tuple[TraceInfo, str]],
) -> list[ForcedTrace]:
    """Responses that came with the problems. A response's text is followed by the first of ``ends`` (the ids that end
    a response), if it has one.

    Those with text that the tokenizer does not know go to ``faults``.
    """
    from reqat.data import encode_prompt, unknown_id
    from reqat.evaluation.entropies import ForcedTrace
    from reqat.evaluation.trace_files import TraceInfo

    out = []
    unknown = unknown_id(tokenizer)
    for row in rows:
        prompt = encode_prompt(tokenizer, row.prompt)
        finished = row.finished
        if row.response_ids is not None:
            ids = list(row.response_ids)
            finished = finished and bool(ids) and ids[-1] in ends
            known = [i for i in ids if 0 <= i < len(tokenizer)]
            text = row.response if row.response is not None else tokenizer.decode(known, skip_special_tokens=True)
        else:
            text = str(row.response)
            ids = list(tokenizer(text, add_special_tokens=False)["input_ids"])
            if unknown is not None and unknown in prompt + ids:
                # The id that stands for "no such token" tells nothing; forced on it, a model is judged by noise.
                where = "prompt" if unknown in prompt else "response"
                info = TraceInfo(row.id, row.family, row.seed, "given", row.prompt, text, row.answer, None, finished)
                faults.append(
                    (
                        info,
                        f"{info.name}: its {where} has text that the tokenizer knows no token for (an unknown token).",
                    )
                )
                continue
            if finished and ids and ends and ids[-1] not in ends:
                ids.append(ends[0])
        finished = finished and (end_marker is None or end_marker in text)
        correct = grade(row, text) if ids else None
        info = TraceInfo(row.id, row.family, row.seed, "given", row.prompt, text, row.answer, correct, finished)
        at = tuple(p for p in logprobs.get(row.id, ()) if p < len(ids))
        out.append(ForcedTrace(info, tuple(prompt), tuple(ids), at))
    return out


def _sampled_traces(
    model: Any,
    tokenizer: Any,
    rows: Sequence[Given],
    label: str,
    seeds: Sequence[int],
    decoding: Any,
    max_new_tokens: int,
    batch_rows: int | None,
    end_marker: str | None,
    logprobs: dict[str, tuple[int, ...]],
    progress: bool | str,
    autocast: torch.dtype | None,
) -> list[ForcedTrace]:
    """A response of one model to each problem and seed."""
    if not rows:
        return []
    from reqat.data import encode_prompt
    from reqat.evaluation.entropies import ForcedTrace
    from reqat.evaluation.trace_files import TraceInfo
    from reqat.generation import generate

    prompts = [encode_prompt(tokenizer, row.prompt) for row in rows]
    pairs = [(row, prompt, seed) for row, prompt in zip(rows, prompts, strict=True) for seed in seeds]
    found = generate(
        model,
        tokenizer,
        [prompt for _, prompt, _ in pairs],
        seeds=[seed for _, _, seed in pairs],
        row_keys=[row.id for row, _, _ in pairs],
        decoding=decoding,
        max_new_tokens=max_new_tokens,
        batch_rows=batch_rows,
        autocast=autocast,
        progress=progress,
    )
    out = []
    for (row, prompt, seed), generation in zip(pairs, found, strict=True):
        text = tokenizer.decode(list(generation.token_ids), skip_special_tokens=True)
        ids = generation.all_ids
        finished = generation.finished and (end_marker is None or end_marker in text)
        info = TraceInfo(row.id, row.family, seed, label, row.prompt, text, row.answer, grade(row, text), finished)
        at = tuple(p for p in logprobs.get(row.id, ()) if p < len(ids))
        out.append(ForcedTrace(info, tuple(prompt), ids, at))
    return out
