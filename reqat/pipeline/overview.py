"""One real position for the overview of ReQAT (Figure 3): how sure three models are of a digit, and what SEM weighs.

The models read the same verified traces. Among the quarter of the digits that the BF16 model is surest of, the one is
shown that lost most of its probability in quantized training: there SEM has something to give back. It is chosen by
that rule, so it is an illustration and no evidence; Figures 2 and 4 have the averages.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from reqat.config.errors import ReqatError
from reqat.config.files import write_file
from reqat.config.plan import Plan
from reqat.config.stage import QFitSettings, SEMTerm, TrainSettings
from reqat_kernels.sem_loss import sem_weights

if TYPE_CHECKING:
    import pandas as pd

    from reqat.evaluation.trace_folder import TraceFolder

LABELS = {"bf16": "BF16", "qat": "QAT", "sem": "QAT with SEM"}
"""Role of the study -> what figures call the model."""
_SUREST = 0.75  # quantile of the digits' probability from which on one is among the surest
_TOKENS, _BEFORE = 6, 3  # of the strip, and of these in front of the digit


def strip(folder: TraceFolder, term: SEMTerm) -> pd.DataFrame:
    """The strip of six tokens around the chosen digit, a row a token.

    Columns: ``token`` (text), ``chosen``, ``entropy`` (nats) and ``weight`` of SEM with QAT's entropies (a micro-batch
    of this one trace), and ``p <label>``, the token's probability in each model. Raises `ReqatError` where the traces
    hold no digit.
    """
    import pandas as pd

    bf16, qat, _ = LABELS.values()
    texts = np.array(folder.vocabulary, dtype=object)[folder.column("token")]
    digit_N = np.array([text.strip().isdigit() for text in texts])
    p = {label: folder.column(f"prob_{label}").astype(float) for label in LABELS.values()}
    if not digit_N.any():
        raise ReqatError("these traces hold no digit to look at; ask other task families.")
    sure_N = digit_N & (p[bf16] >= np.quantile(p[bf16][digit_N], _SUREST))
    at = int(np.where(sure_N, p[qat] - p[bf16], np.inf).argmin())
    trace = int(folder.trace_index[at])
    first, length = int(folder.starts[trace]), int(folder.lengths[trace])
    entropy_T = folder.entropy(qat)[first : first + length].astype(float)
    entropies = torch.from_numpy(entropy_T)
    weight_T = sem_weights(entropies, percentile=term.percentile, binary=term.binary, tau=term.tau).numpy()
    start = min(max(first, at - _BEFORE), max(first, first + length - _TOKENS))
    shown = np.arange(start, min(start + _TOKENS, first + length))
    columns: dict[str, Any] = {
        "token": texts[shown],
        "chosen": shown == at,
        "entropy": entropy_T[shown - first],
        "weight": weight_T[shown - first],
    }
    return pd.DataFrame(columns | {f"p {label}": p[label][shown] for label in LABELS.values()})


def run_overview(
    plan: Plan,
    models: Mapping[str, tuple[Path, Any]],
    traces: list[Any],
    out: Path,
    *,
    last: str,
    term: SEMTerm,
    autocast: torch.dtype | None,
    progress: bool,
) -> dict[str, Any]:
    """Let three models read the traces; writes the trace folder and ``strip.csv`` into ``out``, returns metrics.

    Args:
        models: role of :data:`LABELS` -> folder of a model and the precision it reads at.
        traces: verified ones, as of :func:`reqat.evaluation.dynamics.verified_traces`.
        last: the stage that the model with SEM came from; the metrics say what its stages do.
    """
    from reqat.evaluation.dynamics import run_dynamics
    from reqat.evaluation.trace_folder import TraceFolder

    named = {LABELS[role]: models[role] for role in LABELS}
    counts = run_dynamics(named, traces, out, autocast=autocast, progress=progress)
    table = strip(TraceFolder(out), term)
    write_file(out / "strip.csv", table.to_csv(index=False, lineterminator="\n"))
    return counts | {"measured": {"stages": _stages(plan, last), "percentile": term.percentile}}


def _stages(plan: Plan, last: str) -> list[dict[str, Any]]:
    """What each training or fitting stage behind a model does, the first one first."""
    out: list[dict[str, Any]] = []
    for stage in reversed(list(plan.since_base(last))):
        s = stage.settings
        if isinstance(s, TrainSettings):
            terms = [term.model_dump(mode="json") for term in s.training.objective]
            about = {"tokens": s.traces.budget_tokens, "skip_tokens": s.traces.skip_tokens, "objective": terms}
        elif isinstance(s, QFitSettings):
            about = {"grid": s.grid, **s.calibration.model_dump()}
        else:
            continue
        out.append({"kind": stage.kind, "precision": str(stage.precision), **about})
    return out
