"""Held-out likelihood as a study measured it (`likelihood.parquet`), as one observation a training run and trace."""

from __future__ import annotations

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from reqat.config.errors import ReqatError
from reqat.evaluation.means import Mean, mean_over_runs, ratio_observations

# Quantity -> the sums that it is made of and the tokens that it is a mean over.
QUANTITIES = {
    "low": (("nll_low",), ("tokens_low",)),
    "high": (("nll_high",), ("tokens_high",)),
    "all": (("nll_low", "nll_high"), ("tokens_low", "tokens_high")),
    "kl": (("kl_low", "kl_high"), ("tokens_low", "tokens_high")),
    "kl_low": (("kl_low",), ("tokens_low",)),
}


def observations(frame: pd.DataFrame, quantity: str) -> NDArray[np.float64]:
    """A quantity (nats per token) of one model as an observation a training run and trace: [runs, traces].

    Raises `ReqatError` if its runs did not read the same traces.
    """
    sums, counts = ([group[list(names)].sum(axis=1).to_numpy() for _, group in frame.groupby("seed", dropna=False)]
                    for names in QUANTITIES[quantity])  # fmt: skip
    if len({len(run) for run in sums}) > 1:
        raise ReqatError("its runs read different traces; run the study again (reqat study --force).")
    return ratio_observations(np.stack(sums), np.stack(counts))


def differences(frame: pd.DataFrame, other: pd.DataFrame, quantity: str) -> NDArray[np.float64] | None:
    """A quantity (nats per token) of one model minus that of another, as an observation a training seed that both have
    and a trace: [runs, traces]. None where they share no seed.

    Raises `ReqatError` if the two did not read the same traces.
    """
    a, b = (set(part["seed"].fillna(-1)) for part in (frame, other))
    shared = a & b
    if not shared:
        return None
    a_RP, b_RP = (observations(part[part["seed"].fillna(-1).isin(shared)], quantity) for part in (frame, other))
    if a_RP.shape != b_RP.shape:
        raise ReqatError("its models read different traces; run the study again (reqat study --force).")
    return a_RP - b_RP


def compared(frame: pd.DataFrame, other: pd.DataFrame, quantity: str) -> Mean | None:
    """Mean difference of two models over the training seeds that both have; None where they share none."""
    d_RP = differences(frame, other, quantity)
    return None if d_RP is None else mean_over_runs(d_RP)
