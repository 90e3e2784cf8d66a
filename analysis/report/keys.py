"""Keys of attention, channel by channel: what Q-FIT sees, and what it does to them.

Keys have a few large channels before rotary embedding (RoPE) and a mean far from zero after it. Four bits of a block
have to span both. The frames here say, for each channel, where its values lie; the figures show them before RoPE, after
it, and after Q-FIT's scale and shift, and the attention error over the grid that Q-FIT searches.

Shapes: n sequences, T tokens, G key/value heads, D head_dim, L layers, A and B sizes of the grid.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from analysis.report import style
from analysis.report.document import number
from reqat.config.errors import ReqatError

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

    from reqat.methods.qfit import Activations, QFitResult
    from reqat.tasks import Problem

# Of a channel's values, the band that holds all but one in a hundred at each end.
_BAND = (0.01, 0.99)


def calibration_ids(
    tokenizer: PreTrainedTokenizerBase, problems: Sequence[Problem], sequences: int, tokens: int, *, seed: int = 0
) -> Tensor:
    """Solved problems one after another, cut into int64 [sequences, tokens]; every sequence starts with ``<bos>`` where
    the tokenizer has one.

    Raises `ReqatError` where the problems do not give enough tokens.
    """
    import torch

    from reqat.tasks import write_trace

    rng = random.Random(seed)
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    wanted = sequences * (tokens - len(bos))
    ids: list[int] = []
    for problem in problems:
        solution = write_trace(problem, rng)
        if solution is not None:
            ids += tokenizer(f"{problem.prompt}{solution}\n", add_special_tokens=False)["input_ids"]
        if len(ids) >= wanted:
            break
    if len(ids) < wanted:
        raise ReqatError(f"{len(problems)} problems give {len(ids):,} tokens, not {wanted:,}; give more problems.")
    each = tokens - len(bos)
    return torch.tensor([bos + ids[i * each : (i + 1) * each] for i in range(sequences)])


def key_channels(key: Tensor) -> pd.DataFrame:
    """Where the values of each channel lie, over the tokens of ``key`` [n, G, T, D]; one row a head and channel.

    Columns: ``head``, ``channel``, ``mean``, ``lo`` and ``hi`` (1st and 99th percentile), ``largest`` (magnitude).
    """
    values_GND = key.detach().double().transpose(0, 1).flatten(1, 2).numpy()
    G, _, D = values_GND.shape
    lo_GD, hi_GD = np.quantile(values_GND, _BAND, axis=1)
    return pd.DataFrame(
        {
            "head": np.repeat(np.arange(G), D),
            "channel": np.tile(np.arange(D), G),
            "mean": values_GND.mean(axis=1).ravel(),
            "lo": lo_GD.ravel(),
            "hi": hi_GD.ravel(),
            "largest": np.abs(values_GND).max(axis=1).ravel(),
        }
    )


def stages_of_keys(activations: Activations, scale_GD: Tensor, shift_GD: Tensor) -> dict[str, Tensor]:
    """The keys of a layer on their way into the cache, each [n, G, T, D]: ``before RoPE``, ``after RoPE``, ``scaled``,
    ``scaled and shifted``.
    """
    from reqat.methods.qfit import rope

    rotated = rope(activations.key, activations.cos, activations.sin)
    scaled = rotated / scale_GD[:, None]
    return {
        "before RoPE": activations.key,
        "after RoPE": rotated,
        "scaled": scaled,
        "scaled and shifted": scaled - shift_GD[:, None],
    }


def spread(keys: Mapping[str, Tensor]) -> pd.DataFrame:
    """How uneven the channels of a layer's keys [n, G, T, D] are, one row a stage, as means over heads.

    Columns: ``keys``, ``largest over median`` (of the channels' largest magnitudes) and ``mean over spread`` (root mean
    square of the channels' means over that of their standard deviations: what a shift can take away).
    """
    rows = []
    for name, key in keys.items():
        frame = key_channels(key)
        by_head = frame.groupby("head")["largest"]
        deviation_GD = key.detach().double().transpose(0, 1).flatten(1, 2).std(dim=1, correction=0).numpy()
        mean_GD = frame["mean"].to_numpy().reshape(deviation_GD.shape)
        rows.append(
            {
                "keys": name,
                "largest over median": float((by_head.max() / by_head.median()).mean()),
                "mean over spread": float(np.mean(np.sqrt((mean_GD**2).mean(axis=1) / (deviation_GD**2).mean(axis=1)))),
            }
        )
    return pd.DataFrame(rows)


def draw_channels(keys: Mapping[str, Tensor], head: int, *, notes: Sequence[str] = ()) -> Figure:
    """A panel for each stage of a layer's keys [n, G, T, D]: band, mean and largest magnitude by channel of one head.

    Raises ValueError for a head that the keys do not have.
    """
    heads = min(key.shape[1] for key in keys.values())
    if not 0 <= head < heads:
        raise ValueError(f"head {head}: these keys have {heads} heads, 0 to {heads - 1}")
    rows = -(-len(keys) // 2)
    with style.context():
        fig = style.figure(0.5 + 1.75 * rows)
        axes = fig.subplots(rows, 2, squeeze=False, sharex=True)
        for letter, ax, (name, key) in zip("abcdefgh", axes.flat, keys.items(), strict=False):
            frame = key_channels(key)
            frame = frame[frame["head"] == head]
            ax.use_sticky_edges = False  # stairs would end the axis at the lowest band
            edges = np.arange(len(frame) + 1) - 0.5
            ax.stairs(
                frame["hi"], edges, baseline=frame["lo"], fill=True, color=style.SKY, alpha=0.6, label="98% of values"
            )
            ax.stairs(frame["mean"], edges, baseline=None, color=style.BLUE, lw=1.2, label="mean")
            ax.plot(frame["channel"], frame["largest"], ".", color=style.VERMILION, ms=3.5, label="largest magnitude")
            ax.axhline(0, color=style.GREY, lw=0.6)
            ax.set_xlim(-0.5, len(frame) - 0.5)
            style.panel(ax, letter, name)
        for ax in axes.flat[len(keys) :]:
            ax.set_visible(False)
        for ax in axes[-1]:
            ax.set_xlabel("channel (a RoPE pair is channels r and r + D/2)")
        for ax in axes[:, 0]:
            ax.set_ylabel("key")
        handles, labels = axes.flat[0].get_legend_handles_labels()
        fig.legend(handles, labels, loc="outside upper right", ncols=len(handles))
        if notes:
            style.footer(fig, notes)
        return fig


def draw_error_maps(found: QFitResult, *, notes: Sequence[str] = ()) -> Figure:
    """The attention error over the grid of a Q-FIT search, a panel a layer; see :func:`error_maps`."""
    with style.context():
        fig = error_maps(found.errors.numpy(), found.alphas, found.betas, found.choice)
        style.footer(fig, ["Circle: the chosen point; its change of the error stands over each layer.", *notes])
        return fig


def error_maps(
    errors: NDArray[np.float64], alphas: Sequence[float], betas: Sequence[float], choice: Sequence[tuple[int, int]]
) -> Figure:
    """Attention error [L, A, B] at each scale exponent and share of the shift; ``choice`` [L] are the chosen indices.

    Colour is the error relative to no Q-FIT (alpha = beta = 0), in percent: every layer has a scale of its own for its
    errors, and what matters is how much of it goes away. No footer; drawn under the style that is in force.
    """
    before = errors[:, :1, :1]
    change = 100 * np.where(before > 0, errors / np.where(before > 0, before, 1) - 1, 0)
    n = len(change)
    columns = min(n, 4 if n <= 8 else 8)
    rows = -(-n // columns)
    side = (style.WIDTH_IN - 1.2) / max(columns, 4)  # inches of a panel
    fig = style.figure(1.0 + rows * (side + 0.2), 1.2 + columns * side)
    axes = fig.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    # Beyond +50% worse is worse all the same; a symmetric scale keeps "no change" at the neutral colour.
    reach = float(min(50.0, max(1.0, np.abs(change).max())))
    step_a, step_b = _step(alphas), _step(betas)
    extent = (
        betas[0] - step_b / 2,
        betas[-1] + step_b / 2,
        alphas[0] - step_a / 2,
        alphas[-1] + step_a / 2,
    )
    image = None
    for layer, ax in enumerate(axes.flat):
        if layer >= n:
            ax.set_visible(False)
            continue
        image = ax.imshow(
            change[layer], origin="lower", extent=extent, cmap="PuOr_r", vmin=-reach, vmax=reach, aspect="auto"
        )
        i, j = choice[layer]
        ax.plot(
            betas[j],
            alphas[i],
            marker="o",
            ms=5.5 if columns <= 4 else 3.5,
            mfc="white",
            mec="black",
            mew=1.1,
        )
        wide = columns <= 4
        said = number(float(change[layer, i, j]), 1 if wide else 0, sign=True)
        title = f"layer {layer}: {said}%" if wide else f"{layer}: {said}%"
        ax.set_title(title, fontsize=8 if wide else 7, loc="left")
        ax.grid(False)
        ax.xaxis.set_major_locator(MaxNLocator(3))
        for edge in ("top", "right"):
            ax.spines[edge].set_visible(True)
    for ax in axes[-1]:
        ax.set_xlabel("shift \u03b2")
    for ax in axes[:, 0]:
        ax.set_ylabel("scale \u03b1")
    assert image is not None
    bar = fig.colorbar(
        image, ax=axes, fraction=0.04, pad=0.01, extend="max" if np.abs(change).max() > reach else "neither"
    )
    bar.set_label("attention error vs. none (%)")
    return fig


def _step(values: Sequence[float]) -> float:
    return values[1] - values[0] if len(values) > 1 else 1.0
