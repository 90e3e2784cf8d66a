"""What each kind of stage does: the verbs that recipes are written in.

A stage is a pure function from its settings and the folders of the stages before it to a folder with a model (or, for
``data``, a trace store). Methods differ in their chains of stages, which are configuration (``config/recipes.yaml``);
this file only carries them out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from reqat.config.errors import ReqatError
from reqat.config.stage import (
    BaseSettings,
    Calibration,
    Gradient,
    PTQSettings,
    QFitSettings,
    Selection,
    Stage,
    Training,
    TrainSettings,
)
from reqat.data import (
    PackedRows,
    Trace,
    Traces,
    TraceStore,
    pack,
    select,
    with_bos,
)
from reqat.methods.terms import TERMS
from reqat.models import (
    check_length,
    embedding_rows,
    freeze,
    has_learned_scales,
    load_model,
    load_tokenizer,
    prepare,
    save_model,
    set_gradient,
    sharing_global_scales,
)
from reqat.pipeline.generated import MODEL, TOKENIZER, generated
from reqat.pipeline.scratch import from_scratch
from reqat.pipeline.task import same_tokens
from reqat.training import Objective, Observer, RunSettings, TrainResult, check_traces, distributed, train

# At most this many points of a training curve go into the record.
_CURVE_POINTS = 200


def carry_out(
    stage: Stage, inputs: Mapping[str, Path], out: Path, *, checkpoints: Path | None = None, progress: bool = True
) -> dict[str, Any]:
    """Carry out ``stage`` into the folder ``out`` and return its metrics.

    ``inputs`` maps the roles in ``stage.inputs`` to folders of finished stages. ``checkpoints`` is where a training
    keeps its resumable state (default: beside ``out``); the caller removes it once the result is in its place. Raises
    ``ReqatError`` where a role is missing or its folder is not there.
    """
    for role in stage.inputs:
        if role not in inputs or not Path(inputs[role]).is_dir():
            raise ReqatError(
                f"stage {stage.id} needs its {role} stage {stage.inputs[role]}, which is not there; "
                "run that stage first."
            )
    checkpoints = checkpoints or out.parent / f".{out.name}.checkpoints"
    out.mkdir(parents=True, exist_ok=True)
    if trains(stage):
        with distributed.current().work(
            {
                "stage": stage.model_dump(mode="json"),
                "inputs": {role: str(Path(inputs[role]).absolute()) for role in stage.inputs},
                "checkpoints": str(checkpoints.absolute()),
            }
        ):
            model, tokenizer, result = train_with(stage, inputs, checkpoints, progress=progress)
        save_model(model, tokenizer, out / MODEL)
        parameters = {"parameters": sum(p.numel() for p in model.parameters())} if stage.kind == "base" else {}
        return parameters | _training_metrics(result)
    run: Callable[..., dict[str, Any]] = _RUN[stage.kind]
    return run(stage, inputs, out, checkpoints, progress)


def trains(stage: Stage) -> bool:
    """Whether a stage runs the training loop."""
    return stage.kind in ("finetune", "qat") or (
        isinstance(stage.settings, BaseSettings) and stage.settings.source == "scratch"
    )


def train_with(
    stage: Stage, inputs: Mapping[str, Path], checkpoints: Path, *, progress: bool = False
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, TrainResult]:
    """The training of a stage, in which every process takes part; the first gets the trained model as a plain one."""
    with distributed.current().contact(f"at {stage.id}", "the same command goes on from the last checkpoint"):
        if isinstance(stage.settings, BaseSettings):
            return _train_scratch(stage, inputs, checkpoints, progress)
        return train_again(stage, inputs, checkpoints, progress=progress)


def _base(stage: Stage, inputs: Mapping[str, Path], out: Path, checkpoints: Path, progress: bool) -> dict[str, Any]:
    settings = stage.settings
    assert isinstance(settings, BaseSettings)
    location = {
        "pinned": "results/base/" + settings.name,
        "package": f"package:{settings.reference}",
        "path": str(settings.reference),
    }[settings.source]
    model = load_model(location)
    save_model(model, with_bos(load_tokenizer(location)), out / MODEL)
    return {"parameters": sum(p.numel() for p in model.parameters())}


def _train_scratch(
    stage: Stage, inputs: Mapping[str, Path], checkpoints: Path, progress: bool
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, TrainResult]:
    settings = stage.settings
    assert isinstance(settings, BaseSettings) and settings.architecture and settings.training and settings.traces
    shape = settings.architecture
    tokenizer = with_bos(load_tokenizer(inputs["data"] / TOKENIZER))

    def begin() -> PreTrainedModel:
        torch.manual_seed(settings.seed)
        model = from_scratch(shape, tokenizer)
        prepare(model, "BF16")
        return model

    model = distributed.current().made(begin)
    result = _train(
        model, tokenizer, stage, settings.training, settings.traces, settings.seed, inputs, checkpoints, None, progress
    )
    return _whole(model, begin), tokenizer, result


def _whole(model: PreTrainedModel, begin: Callable[[], PreTrainedModel]) -> PreTrainedModel:
    """The trained model, on the first of several processes as a plain one: what the training began with, with the
    weights that it ended with."""
    ranks = distributed.current()
    if not ranks.sharded:
        return model
    plain = begin().eval() if ranks.first else None
    ranks.fill(plain, model)
    return model if plain is None else plain


def train_again(
    stage: Stage,
    inputs: Mapping[str, Path],
    checkpoints: Path,
    *,
    observer: Observer | None = None,
    progress: bool = True,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, TrainResult]:
    """The training of a `finetune` or `qat` stage: its trained model, the tokenizer, and the run's history.
    A model with learned scales is frozen.

    ``observer`` looks on (:class:`reqat.training.Observer`); the weights are those of the stage without it.
    """
    settings = stage.settings
    assert isinstance(settings, TrainSettings)

    def begin() -> PreTrainedModel:
        model = load_model(inputs["parent"] / MODEL)
        prepare(model, stage.precision.name, override=True, **stage.precision.for_prepare())
        gradient = settings.training.gradient
        if gradient != Gradient():
            set_gradient(model, gradient.rule, roles=gradient.roles, **(gradient.model_extra or {}))
        return model

    ranks = distributed.current()
    model, tokenizer = ranks.made(begin), with_bos(load_tokenizer(inputs["parent"] / MODEL))
    teacher = None
    if objective(settings.training).needs_teacher:
        of = inputs["teacher" if "teacher" in inputs else "parent"] / MODEL
        same_tokens(tokenizer, with_bos(load_tokenizer(of)), (f"{stage.id}'s parent", f"its teacher {stage.teacher}"))

        def teaching() -> PreTrainedModel:
            made = load_model(of)
            prepare(made, "BF16", override=True)
            return made.eval().requires_grad_(False)

        teacher = ranks.made(teaching)
        sizes = [m.get_output_embeddings().weight.shape[0] for m in (model, teacher)]
        if sizes[0] != sizes[1]:
            raise ReqatError(
                f"{stage.id}: its vocabulary has {sizes[0]} tokens, its teacher's ({stage.teacher}) {sizes[1]}: "
                "take a teacher whose output head is as wide"
            )
    with sharing_global_scales(model) if settings.share_global_scale else nullcontext():
        result = _train(
            model,
            tokenizer,
            stage,
            settings.training,
            settings.traces,
            settings.seed,
            inputs,
            checkpoints,
            teacher,
            progress,
            observer,
        )
    model = _whole(model, begin)
    if has_learned_scales(model) and ranks.first:
        freeze(model)  # dense weights would lose them
    return model, tokenizer, result


def _qfit(stage: Stage, inputs: Mapping[str, Path], out: Path, checkpoints: Path, progress: bool) -> dict[str, Any]:
    from reqat.methods.transforms import TRANSFORMS

    settings = stage.settings
    assert isinstance(settings, QFitSettings)
    model, tokenizer = _parent(inputs)
    _, metrics = TRANSFORMS["qfit"].apply(
        model,
        precision_of(stage),
        calibration_ids(inputs["data"], tokenizer, settings.calibration),
        grid=settings.grid,
        scale=settings.scale,
        shift=settings.shift,
        variant=settings.variant,
        progress=progress,
    )
    save_model(model, tokenizer, out / MODEL)
    return metrics


def _ptq(stage: Stage, inputs: Mapping[str, Path], out: Path, checkpoints: Path, progress: bool) -> dict[str, Any]:
    from reqat.methods import ptq

    settings = stage.settings
    assert isinstance(settings, PTQSettings)
    model, tokenizer = _parent(inputs)
    _, metrics = ptq.quantize(
        settings.method,
        model,
        stage.precision.name,
        calibration_ids(inputs["data"], tokenizer, settings.calibration),
        precision_options=stage.precision.options(),
        override=True,
        share_global_scale=settings.share_global_scale,
        progress=progress,
        **settings.options,
    )
    save_model(model, tokenizer, out / MODEL)
    return metrics


_RUN: dict[str, Callable[..., dict[str, Any]]] = {
    "data": generated,
    "base": _base,
    "qfit": _qfit,
    "ptq": _ptq,
}


def precision_of(stage: Stage) -> Any:
    """The stage's :class:`reqat.quant.Precision`."""
    from reqat.quant import Precision

    return Precision.parse(stage.precision.name, **stage.precision.options())


def objective(training: Training) -> Objective:
    """The objective that a configuration's list of terms means."""
    terms = []
    for term in training.objective:
        settings = term.model_dump(exclude={"name"})
        try:
            terms.append(TERMS[term.name](**settings))
        except TypeError as error:
            raise ReqatError(f"objective term {term.name}: {error}; its settings are its class's arguments.") from error
    return Objective(tuple(terms))


def selected(store: TraceStore, selection: Selection) -> Sequence[Trace]:
    """The traces that a training stage sees, in the store's order."""
    return select(store.traces, selection.tokens, skip_tokens=selection.skip_tokens)


def calibration_ids(data: Path, tokenizer: PreTrainedTokenizerBase, calibration: Calibration) -> torch.Tensor:
    """``[sequences, sequence_tokens]`` int64: the store's first traces strung together, each with its ``<bos>`` if it
    has one, without padding.

    Raises ``ReqatError`` where the store is too small, or was written for a tokenizer with a ``<bos>`` and this one has
    none.
    """
    need = calibration.sequences * calibration.sequence_tokens
    ids: list[int] = []
    traces = TraceStore.read(data).traces
    for number in range(len(traces)):
        if len(ids) >= need:
            break
        if traces.bos[number]:
            ids.append(_bos(tokenizer, traces.id(number)))
        ids += traces.tokens(number).tolist()
    if len(ids) < need:
        raise ReqatError(
            f"calibration wants {need} tokens, the trace store holds {len(ids)}; lower calibration.sequences."
        )
    return torch.tensor(ids[:need]).reshape(calibration.sequences, calibration.sequence_tokens)


def _parent(inputs: Mapping[str, Path]) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    return _model(inputs, "parent")


def _model(inputs: Mapping[str, Path], role: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    folder = inputs[role] / MODEL
    return load_model(folder), with_bos(load_tokenizer(folder))


def _bos(tokenizer: PreTrainedTokenizerBase, trace: str) -> int:
    if tokenizer.bos_token_id is None:
        raise ReqatError(
            f"trace {trace} begins with <bos>, and the tokenizer has none: the traces were written for another "
            "tokenizer or by an older version; make the data stage again"
        )
    return int(tokenizer.bos_token_id)


def _pad(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int:
    """What padded positions hold: nothing sees it, but it needs an embedding row, and an added <pad> may have none."""
    rows = embedding_rows(model)
    given = (tokenizer.pad_token_id, tokenizer.eos_token_id)
    return next((int(i) for i in given if i is not None and 0 <= int(i) < rows), 0)


def _train(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    stage: Stage,
    training: Training,
    selection: Selection,
    seed: int,
    inputs: Mapping[str, Path],
    checkpoints: Path,
    teacher: PreTrainedModel | None,
    progress: bool,
    observer: Observer | None = None,
) -> TrainResult:
    chosen = Traces.of(selected(TraceStore.read(inputs["data"]), selection))
    check_traces(model, chosen, stage.id, tokenizer)
    longest = int(chosen.lengths.argmax())
    check_length(model.config, int(chosen.lengths[longest]), f"{stage.id}, trace {chosen.id(longest)}")
    rows: PackedRows = pack(chosen, training.row_tokens, bos_id=tokenizer.bos_token_id, pad_id=_pad(model, tokenizer))
    settings = RunSettings.of(training, epochs=selection.epochs, seed=seed)
    return train(
        model,
        rows,
        objective(training),
        settings,
        checkpoints,
        teacher=teacher,
        observer=observer,
        label=stage.id,
        progress=progress,
    )


def _training_metrics(result: TrainResult) -> dict[str, Any]:
    stride = max(1, -(-len(result.history) // _CURVE_POINTS))
    curve = [
        {
            "tokens": window[-1]["tokens"],
            **{k: sum(h[k] for h in window) / len(window) for k in window[0] if k not in ("step", "tokens", "lr")},
        }
        for window in (result.history[i : i + stride] for i in range(0, len(result.history), stride))
    ]
    return {
        "steps": result.steps,
        "tokens": result.tokens,
        "response_tokens": result.response_tokens,
        "train_seconds": result.seconds,
        "tokens_per_second": result.tokens_per_second,
        "final_loss": result.final_loss,
        "autocast": result.autocast,
        "curve": curve,
    }
