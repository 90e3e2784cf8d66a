"""What the figures on keys need from a model, as small tables: where keys are large before and after RoPE, how much of
the attention error Q-FIT took away, and the outliers at the input of `down_proj` (ReQAT Figures 5, 10 and 11).

Keys have a few large channels before RoPE. RoPE turns each pair (r, r + D/2), so that afterwards they oscillate along
the tokens. A surface |K| [tokens, channels] shows both; a profile, its largest value along one axis, shows one.

Which layers, which head and which `down_proj` are shown is decided by rules, not by hand; each is said in the metrics.

Shapes: L layers, n sequences, T tokens, G key/value heads, D head_dim, M inputs of `down_proj`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from reqat.config.errors import ReqatError
from reqat.config.files import write_file
from reqat.config.stage import Calibration, QFitSettings, Stage
from reqat.models.adapters import DOWN, blocks_of
from reqat.pipeline.generated import MODEL
from reqat.pipeline.stages import calibration_ids
from reqat.quant import block_hadamard

if TYPE_CHECKING:
    import pandas as pd
    from transformers import PreTrainedModel

_SHOWN = 60  # tokens and inputs of the window around the largest input, as in the paper


def run_keys(
    stage: Stage, found: Mapping[str, Any], inputs: Mapping[str, Path], out: Path, *, sequences: int, rotation: int
) -> dict[str, Any]:
    """Measure the keys that the Q-FIT `stage` was calibrated on; writes four tables into ``out``, returns metrics.

    - ``surfaces.csv``: |K| of two layers and one head on one sequence, a row a token: ``layer``, ``keys`` (before or
      after RoPE), ``token``, then a column a channel. The layers are those of the smallest and the largest scale
      exponent that the search chose.
    - ``profiles.csv``: of every layer and that head, ``largest`` |K| a channel before RoPE (over all tokens) and a
      token after it (over channels, of that sequence).
    - ``errors.csv``: the search's attention error at every ``alpha`` and ``beta``, and which point was ``chosen``.
    - ``inputs.csv``: |input| of one `down_proj` before and after block rotation, a row a token, in a window around its
      largest value. It is that of the layer whose largest input is most times the root mean square.

    Args:
        stage: of kind `qfit`, with scale and shift.
        found: the stage's metrics, as its record has them.
        inputs: folders of the roles `before` (the model) and `data`.
        sequences: of the calibration's, those that are looked at.
        rotation: block size of the rotation of `down_proj`'s inputs.

    Raises `ReqatError` for metrics without an error map, more sequences than the calibration has, a model without
    `down_proj`, and a rotation that does not divide its inputs.
    """
    import pandas as pd

    from reqat.data import with_bos
    from reqat.methods.qfit import activations, rope
    from reqat.models import load_model, load_tokenizer

    settings = stage.settings
    assert isinstance(settings, QFitSettings)
    if sequences > settings.calibration.sequences:
        raise ReqatError(
            f"{stage.id} was calibrated on {settings.calibration.sequences} sequences, not on {sequences}."
        )
    errors = _errors(found, stage.id)
    folder = inputs["before"] / MODEL
    model, tokenizer = load_model(folder), with_bos(load_tokenizer(folder))
    wanted = Calibration(sequences=sequences, sequence_tokens=settings.calibration.sequence_tokens)
    ids = calibration_ids(inputs["data"], tokenizer, wanted)
    alpha = [float(a) for a in found["alpha"]]
    shown = {"smallest": alpha.index(min(alpha)), "largest": alpha.index(max(alpha))}
    heads, surfaces, profiles = [], [], []
    for layer, act in enumerate(activations(model, ids)):
        keys = {"before RoPE": act.key.abs(), "after RoPE": rope(act.key, act.cos, act.sin).abs()}
        head = outlying_head(act.key)
        heads.append(head)
        channel_D = keys["before RoPE"][:, head].amax(dim=(0, 1))
        token_T = keys["after RoPE"][0, head].amax(dim=-1)
        for along, largest in (("channel", channel_D), ("token", token_T)):
            rows = {
                "layer": layer,
                "head": head,
                "along": along,
                "index": range(len(largest)),
                "largest": largest.tolist(),
            }
            profiles.append(pd.DataFrame(rows))
        if layer in shown.values():
            for name, key in keys.items():
                surfaces.append(_wide(key[0, head], "c", layer=layer, keys=name))
    chosen, window, of_inputs = _inputs(model, ids, rotation)
    tables = {"surfaces": pd.concat(surfaces), "profiles": pd.concat(profiles), "errors": errors, "inputs": window}
    for name, table in tables.items():
        write_file(out / f"{name}.csv", table.to_csv(index=False, lineterminator="\n", float_format="%.5g"))
    return {
        "measured": {
            "quantized": str(stage.precision),
            "layers": shown,
            "heads": heads,
            "alpha": alpha,
            "beta": [float(b) for b in found["beta"]],
            "tokens": int(ids.shape[1]),
            DOWN: chosen,
            "largest_input": of_inputs,
        }
    }


def outlying_head(key: Tensor) -> int:
    """The head of keys before RoPE [n, G, T, D] whose largest channel is most times its median one."""
    largest_GD = key.abs().amax(dim=(0, 2))
    return int((largest_GD.amax(dim=-1) / largest_GD.median(dim=-1).values.clamp(min=1e-12)).argmax())


def _errors(found: Mapping[str, Any], name: str) -> pd.DataFrame:
    """The error map of a Q-FIT record's metrics, a row a layer and point."""
    import pandas as pd

    try:
        alphas, betas = found["alphas"], found["betas"]
        points = zip(found["error_map"], found["alpha"], found["beta"], strict=True)
        rows = [
            {"layer": layer, "alpha": a, "beta": b, "error": row[j], "chosen": (a, b) == (alpha, beta)}
            for layer, (error_AB, alpha, beta) in enumerate(points)
            for a, row in zip(alphas, error_AB, strict=True)
            for j, b in enumerate(betas)
        ]
    except (KeyError, ValueError, IndexError) as error:
        raise ReqatError(f"{name}: its record has no whole error map ({error}); run the stage again.") from None
    return pd.DataFrame(rows)


def _wide(x: Tensor, letter: str, first: int = 0, start: int = 0, **more: Any) -> pd.DataFrame:
    """A matrix [tokens, columns] as a frame, a row a token; columns are called by letter and number."""
    import pandas as pd

    frame = pd.DataFrame(x.numpy(), columns=[f"{letter}{first + i}" for i in range(x.shape[1])])
    for i, (name, value) in enumerate({**more, "token": range(start, start + len(frame))}.items()):
        frame.insert(i, name, value)
    return frame


@torch.no_grad()
def _inputs(model: PreTrainedModel, ids: Tensor, rotation: int) -> tuple[str, pd.DataFrame, dict[str, float]]:
    """Name of the `down_proj` with the largest outlier, |its inputs| around that, and the largest of all, before and
    after rotation."""
    import pandas as pd

    sites = [site for block in blocks_of(model) for site in block.sites() if site.attribute == DOWN]
    if not sites:
        raise ReqatError(f"model type {model.config.model_type!r} has no down_proj whose inputs could be looked at.")
    kept: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        def look(module: Any, args: tuple[Tensor, ...]) -> None:
            kept[name] = args[0].detach().float()

        return look

    handles = [site.module.register_forward_pre_hook(keep(site.name)) for site in sites]
    try:
        model.eval()(ids, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    size = next(iter(kept.values())).shape[-1]
    if size % rotation:
        raise ReqatError(
            f"{sites[0].name}: its {size} inputs do not divide into blocks of {rotation}; name another rotation."
        )
    name = max(kept, key=lambda k: float(kept[k].abs().max() / kept[k].square().mean().sqrt()))
    x_nTM = kept[name]
    n, t, m = (int(i) for i in torch.unravel_index(x_nTM.abs().argmax(), x_nTM.shape))
    turned_nTM = block_hadamard(x_nTM, rotation)
    token = slice(*_around(t, x_nTM.shape[1], 1))
    column = slice(*_around(m, x_nTM.shape[2], rotation))
    frames = [
        _wide(x[n, token, column].abs(), "d", first=column.start, start=token.start, inputs=words)
        for words, x in (("before rotation", x_nTM), ("after rotation", turned_nTM))
    ]
    return name, pd.concat(frames), {"before": float(x_nTM.abs().max()), "after": float(turned_nTM.abs().max())}


def _around(at: int, size: int, step: int) -> tuple[int, int]:
    """About `_SHOWN` places around one, from a multiple of `step`, so that whole blocks are shown."""
    width = min(size, -(-_SHOWN // step) * step)
    start = min(max(0, at - width // 2), size - width) // step * step
    return start, start + width
