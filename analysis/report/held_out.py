"""Held-out likelihood as a study measured it (`likelihood.parquet`), as one observation a training run and trace."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from analysis.report.studies import Study
from reqat.config.errors import ReqatError
from reqat.config.studies import LikelihoodStudy
from reqat.evaluation.means import Mean, mean_over_runs, ratio_observations

FRAME = "likelihood"
# Quantity -> the sums that it is made of and the tokens that it is a mean over.
QUANTITIES = {
    "low": (("nll_low",), ("tokens_low",)),
    "high": (("nll_high",), ("tokens_high",)),
    "all": (("nll_low", "nll_high"), ("tokens_low", "tokens_high")),
    "kl": (("kl_low", "kl_high"), ("tokens_low", "tokens_high")),
    "kl_low": (("kl_low",), ("tokens_low",)),
}


def together(study: Study, *more: Study) -> pd.DataFrame:
    """The rows of a likelihood study, and of `more` those of models that were trained under further seeds: one a run
    and trace, sums of nats over its tokens. A model that the first study has (the base, under whatever seed) is the
    first one's.

    Raises `ReqatError` for other settings, other traces, or two trainings of one model and seed.
    """
    frames = [study.parquet(FRAME)]
    if not more:
        return frames[0]
    asked, models = _but_seeds(study), _models(study)
    for other in more:
        if _but_seeds(other) != asked:
            raise ReqatError(f"{other.path} is of other settings than {study.path}; they cannot be read as one.")
        frame, its = other.parquet(FRAME), _models(other)
        known = {label: [model for (name, _), model in models.items() if name == label] for label, _ in its}
        new = {key: model for key, model in its.items() if model not in known[key[0]]}
        if twice := new.keys() & models.keys():
            raise ReqatError(f"{other.path}: {sorted(twice)} is another training in {study.path}.")
        if _traces(frame) != _traces(frames[0]):
            raise ReqatError(f"{other.path} read other traces than {study.path}; they cannot be read as one.")
        kept = [(label, seed) in new for label, seed in zip(frame["label"], frame["seed"], strict=True)]
        frames.append(frame[kept])
        models |= new
    return pd.concat(frames, ignore_index=True)


def _traces(frame: pd.DataFrame) -> list[str]:
    """The problems whose solutions every run read, in order: of the first run."""
    label, seed = frame["label"].iloc[0], frame["seed"].iloc[0]
    return frame.loc[(frame["label"] == label) & (frame["seed"].isna() | (frame["seed"] == seed)), "problem"].tolist()


def _but_seeds(study: Study) -> dict[str, Any]:
    """All that the study was asked for, but its training seeds and the models that these make."""
    config = study.record["config"]
    settings = {key: value for key, value in config["settings"].items() if key != "training_seeds"}
    return _stated({**config, "models": None, "settings": settings})


def _stated(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings without those that are null: a record of before a setting was there does not have it."""
    given = {key: value for key, value in settings.items() if value is not None}
    return {key: _stated(value) if isinstance(value, dict) else value for key, value in given.items()}


def _models(study: Study) -> dict[tuple[str, int], Any]:
    """Label and training seed of every run -> its model: stage and precision."""
    config = study.record["config"]
    settings, models = LikelihoodStudy.model_validate(config["settings"]), config["models"]
    roles = {(label, seed): settings.role(label, seed) for label, seeds in settings.runs().items() for seed in seeds}
    return {(label, seed): models[role] for (label, seed), role in roles.items() if seed is not None and role in models}


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
