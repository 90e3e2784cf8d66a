"""The share of the gradient that low-entropy tokens carry, along a training stage (ReQAT Figure 7).

The stage is trained anew from its own settings while a probe looks on (:mod:`reqat.training.gradients`); its weights
must come out as they were, and where the stage's own weights are at hand they are compared. What counts as a
low-entropy token is not said in the paper, so that several thresholds stand beside each other
(:mod:`reqat.evaluation.low_entropy`): percentiles are those of the micro-batch's own entropies and hold the share of
tokens fixed while the model grows surer; one in nats holds the meaning fixed while the share of tokens moves. A share
of gradient means something beside the share of tokens that carries it; both are columns.
"""

from __future__ import annotations

import csv
import json
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from reqat.config.errors import ReqatError
from reqat.config.files import parse_json, read_text, write_file
from reqat.config.stage import Stage, TrainSettings
from reqat.evaluation.low_entropy import low_thresholds
from reqat.evaluation.statistics import ClusteredMeans, clustered_means
from reqat.models import load_model
from reqat.models.pretrained import plain_state
from reqat.pipeline.generated import MODEL
from reqat.pipeline.stages import train_again
from reqat.training.gradients import GradientProbe, TokenGradients

GRADIENTS = "gradients.csv"
COLUMNS = (
    "step",
    "steps",
    "threshold",
    "nats",
    "c_low",
    "lo",
    "hi",
    "c_high",
    "low_share",
    "low_tokens",
    "tokens",
    "clusters",
)


def low_entropy_share(found: TokenGradients, nats: float) -> ClusteredMeans:
    """``C_low``: the share of the summed squared gradients at positions whose entropy is below ``nats``, as one group.

    A ratio of two sums, clustered by trace. NaN where no position has a gradient, an interval of NaN for one trace.
    """
    square_N, trace_N = found.square_N.numpy(), found.trace_N.numpy()
    low_N = found.entropy_N.numpy() < nats
    return clustered_means(square_N * low_N, np.zeros(len(low_N), dtype=np.int64), trace_N, 1, weights_N=square_N)


def shares(step: int, found: TokenGradients) -> list[dict[str, Any]]:
    """Rows of ``gradients.csv`` of one look, a threshold each.

    ``c_low`` is the share of the squared gradients at tokens below ``nats``, ``c_high`` that of the others; ``lo`` and
    ``hi`` its 95% interval (:func:`low_entropy_share`), symmetric and therefore not cut to [0, 1]: means of several
    looks need the whole width; ``low_share`` the share of the ``tokens`` that are below.
    """
    entropy_N = found.entropy_N.numpy()
    rows = []
    for name, nats in low_thresholds(entropy_N).items():
        low_N = entropy_N < nats
        means = low_entropy_share(found, nats)
        c_low = float(means.value_G[0])
        rows.append(
            {
                "step": step,
                "threshold": name,
                "nats": nats,
                "c_low": c_low,
                "lo": float(means.lo_G[0]),
                "hi": float(means.hi_G[0]),
                "c_high": 1 - c_low,
                "low_share": float(low_N.mean()),
                "low_tokens": int(low_N.sum()),
                "tokens": len(low_N),
                "clusters": int(means.clusters_G[0]),
            }
        )
    return rows


def run_gradients(
    stage: Stage,
    inputs: Mapping[str, Path],
    out: Path,
    *,
    every: int = 10,
    trained: Path | None = None,
    checkpoints: Path | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Train ``stage`` anew with a probe every ``every`` steps; write ``gradients.csv`` into ``out``, return metrics.

    Args:
        stage: of kind `finetune` or `qat`.
        inputs: folders of its stages by role, as for ``run_stage``.
        out: made if need be.
        trained: the stage's own folder, whose weights the new ones are compared with (``same_weights``).
        checkpoints: where the training keeps its resumable state and what the probe saw so far; beside ``out`` if
            None. A killed run goes on from there; removing it is the caller's, once the result is safe.
        progress: whether to show it.

    Warns where the new weights differ from the stage's. Raises `ReqatError` for another kind of stage, or an input
    that is not there.
    """
    if not isinstance(stage.settings, TrainSettings):
        raise ReqatError(f"{stage.id} is a {stage.kind} stage, which has no gradients; name a finetune or qat stage.")
    for role, id in stage.inputs.items():
        if role not in inputs or not Path(inputs[role]).is_dir():
            raise ReqatError(f"{stage.id} needs its {role} stage {id}, which is not there; run that stage first.")
    checkpoints = checkpoints or out.parent / f".{out.name}.checkpoints"
    checkpoints.mkdir(parents=True, exist_ok=True)
    out.mkdir(parents=True, exist_ok=True)
    seen = checkpoints / "gradients.jsonl"
    rows = {(row["step"], row["threshold"]): row for row in _read(seen)}

    # Without a line that a kill cut short, to which the next would be glued.
    write_file(seen, "".join(json.dumps(row) + "\n" for row in rows.values()))
    with seen.open("a") as file:

        def take(step: int, found: TokenGradients) -> None:
            # On disk before the step's checkpoint can be: a resumed run misses none.
            for row in shares(step, found):
                rows[step, row["threshold"]] = row
                file.write(json.dumps(row) + "\n")
            file.flush()
            os.fsync(file.fileno())

        model, _, result = train_again(
            stage, inputs, checkpoints, observer=GradientProbe(every, take), progress=progress
        )
    for row in rows.values():
        row["steps"] = result.steps
    table = [rows[key] for key in sorted(rows, key=lambda key: key[0]) if key[0] % every == 0 and key[0] < result.steps]
    missing = set(range(0, result.steps, every)) - {row["step"] for row in table}
    if missing:
        raise ReqatError(f"{seen}: nothing of step {min(missing)}, which an earlier attempt saw; {_remedy(seen)}.")
    with (out / GRADIENTS).open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(table)
    metrics: dict[str, Any] = {
        "stage": stage.id,
        "steps": result.steps,
        "every": every,
        "looks": len({row["step"] for row in table}),
        "final_loss": result.final_loss,
    }
    if trained is not None:
        different = _different(plain_state(model), trained / MODEL)
        metrics["same_weights"] = not different
        if different:
            warnings.warn(
                f"{stage.id} trained anew differs from {trained} in {len(different)} tensors ({different[0]}, ...): "
                "another version, machine or number of threads trained it. The gradients are of the new training.",
                stacklevel=2,
            )
    return metrics


def _read(path: Path) -> list[dict[str, Any]]:
    """What an earlier attempt saw. A last line that a kill cut short is left out; raises `ReqatError` naming the line
    for anything else that is no row."""
    if not path.is_file():
        return []
    rows: list[dict[str, Any]] = []
    lines = read_text(path, "log of gradients", _remedy(path)).split("\n")
    for number, line in enumerate(lines[:-1], start=1):  # what follows the last line break is cut short, or nothing
        row = parse_json(line, f"{path}, line {number}", "row of gradients", _remedy(path))
        if not isinstance(row, dict) or row.keys() != set(COLUMNS) - {"steps"}:
            raise ReqatError(f"{path}, line {number}: not a row of gradients ({line[:60]!r}); {_remedy(path)}.")
        for key, value in row.items():
            good = isinstance(value, str) if key == "threshold" else type(value) in (int, float)
            if not good or (key == "step" and (type(value) is not int or value < 0)):
                raise ReqatError(f"{path}, line {number}: {key} is {value!r}; {_remedy(path)}.")
        rows.append(row)
    return rows


def _remedy(path: Path) -> str:
    return f"delete {path.parent} to begin the training anew"


def _different(state: Mapping[str, Tensor], folder: Path) -> list[str]:
    """Names of tensors that are not bit-identical in a saved model."""
    kept = load_model(folder).state_dict()
    names = sorted(set(state) | set(kept))
    return [n for n in names if n not in state or n not in kept or not torch.equal(state[n].cpu(), kept[n])]
