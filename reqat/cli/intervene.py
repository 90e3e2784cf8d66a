"""Verbs that intervene in decoding: `route` (who chooses sure and unsure tokens), `noise` (what noise does to either).

Each grades several conditions on the same problems and seeds, and writes a folder: `CONDITION.parquet` with the
outcomes, `summary.json` with accuracies, intervals and paired differences from the first condition, and a record.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

import reqat
from reqat.cli import arguments
from reqat.cli.app import Quiet, Tier, app, session, start_computing
from reqat.cli.arguments import Policy, Problems, Seeds, Threads, numbers, seed_list
from reqat.config.decoding import SAMPLE, Threshold
from reqat.config.errors import ReqatError, unknown
from reqat.config.files import write_file
from reqat.config.precision import PrecisionSpec, family
from reqat.records import record

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from reqat.config.studies import PlannedStudy
    from reqat.evaluation import Outcomes
    from reqat.evaluation.intervened import Intervened
    from reqat.tasks import Problem

Out = Annotated[Path, typer.Option(help="Folder to write.")]
Force = Annotated[bool, typer.Option("--force", help="Replace the result of the same verb that is there.")]
Held = Annotated[
    int,
    typer.Option("--held-out", min=1, max=arguments.MOST, help="Validation problems that percentiles are measured on."),
]


@dataclass(frozen=True)
class Task:
    """The problems of a tier, and how long a response may be."""

    families: dict[str, dict[str, Any]]
    split: str
    seed: int
    max_new_tokens: int
    batch_rows: int
    autocast: str
    """Of the tier's decoding: `none` or `bf16`."""

    @classmethod
    def of_tier(cls, tier: str) -> Task:
        """Those that the tier grades its own models on."""
        given = session.plan(tier).tier
        how = given.evaluation
        families = how.families if how.families is not None else given.data.families
        return cls(
            dict(sorted(families.items())),
            how.split,
            how.problem_seed,
            how.decoding.max_new_tokens,
            how.decoding.batch_rows,
            how.decoding.autocast,
        )

    @classmethod
    def of_study(cls, study: PlannedStudy) -> Task:
        """Those that a study asks its models."""
        asked, how = study.problems, study.decoding
        assert asked is not None and how is not None
        return cls(asked.families, asked.split, asked.seed, how.max_new_tokens, how.batch_rows, how.autocast)

    def problems(self, n: int, split: str | None = None) -> list[Problem]:
        """The first `n` problems of the split (default: the one that is graded)."""
        from reqat.tasks import problems

        return problems(self.families, split or self.split, n, self.seed)

    def options(self, seeds: Sequence[int], decoding: str, quiet: bool, caption: str) -> dict[str, Any]:
        """What `evaluate` is told, besides models and problems."""
        from reqat.evaluation.loading import AUTOCAST
        from reqat.generation import Decoding

        policy = Decoding.parse(decoding)
        return {
            "seeds": policy.effective_seeds(seeds),
            "decoding": policy,
            "max_new_tokens": self.max_new_tokens,
            "batch_rows": self.batch_rows,
            "autocast": AUTOCAST[self.autocast],
            "progress": False if quiet else caption,
        }


def load(folder: str | Path, precision: str | PrecisionSpec) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A model at a precision, as evaluations load it, with its tokenizer. By its name alone, it has the options
    that the folder was saved with, or else, for NVFP4, one global scale a row."""
    from reqat.evaluation.loading import load_at
    from reqat.models import load_tokenizer

    if isinstance(precision, str):
        family(precision)  # says what is wrong in one line
        model = load_at(folder, precision)
    else:
        model = load_at(folder, precision.name, override=True, **precision.options())
    return model, load_tokenizer(folder)


def same_tokens(a: PreTrainedTokenizerBase, b: PreTrainedTokenizerBase) -> None:
    """Refuse two models whose ids mean different tokens. Raises `ReqatError` naming the first one."""
    ours, theirs = a.get_vocab(), b.get_vocab()
    different = sorted(token for token in ours.keys() | theirs.keys() if ours.get(token) != theirs.get(token))
    if different:
        token = different[0]
        raise ReqatError(
            f"the models have different tokenizers: {token!r} is id {ours.get(token)} in the reference and "
            f"{theirs.get(token)} in the candidate ({len(different)} tokens differ). Take models of one tokenizer."
        )


def weights(folder: str) -> dict[str, str]:
    """sha256 of a model's weight files, by name; empty for a model out of a package."""
    return {path.name: record.sha256(path) for path in sorted(Path(folder).glob("*.safetensors"))}


@contextlib.contextmanager
def writing(
    kind: str, out: Path, models: dict[str, str], seeds: Sequence[int], *, force: bool, threads: int
) -> Iterator[Conditions]:
    """A job with a record whose inputs are `models` (role -> folder); `add(name, outcomes, ...)` takes conditions, and
    `settings` what the record says of them. Entered before torch is imported and models are loaded."""
    root = Path(reqat.__file__).parents[1]
    with record.asked_for(kind, out, {}, root=root, force=force, inputs=models.values()) as job:
        start_computing(threads)
        conditions = Conditions(job.partial)
        yield conditions
        job.config, job.seeds = conditions.settings, list(seeds)
        job.inputs = {role: {"id": Path(folder).name, "weights": weights(folder)} for role, folder in models.items()}
        job.metrics = conditions.finish()
    print(f"written: {out}")


class Conditions:
    """Graded conditions, each printed and written when it is there, and compared with the first."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.rows: list[dict[str, Any]] = []
        self.settings: dict[str, Any] = {}
        self._first: Outcomes | None = None

    def add(self, name: str, outcomes: Outcomes, **more: Any) -> None:
        """One condition; `more` goes into its row."""
        from reqat.evaluation import accuracy, paired

        outcomes.to_parquet(self.folder / f"{name}.parquet")
        found = accuracy(outcomes)
        row = {
            "condition": name,
            **{key: outcomes.metadata[key] for key in ("decoding", "intervention") if key in outcomes.metadata},
            "accuracy": found.value,
            "lo": found.lo,
            "hi": found.hi,
            "problems": found.n_problems,
            "seeds": found.n_seeds,
            "unfinished": found.n_unfinished,
            "mean_tokens": float(outcomes.n_tokens.mean()),
            **more,
        }
        said = f"{name}: {found}"
        if self._first is None:
            self._first = outcomes
        elif outcomes.seeds == self._first.seeds:
            d = paired(outcomes, self._first)
            row |= {"difference": d.value, "difference_lo": d.lo, "difference_hi": d.hi, "p": d.p}
            said += f", {100 * d.value:+.1f} [{100 * d.lo:+.1f}, {100 * d.hi:+.1f}] from {self.rows[0]['condition']}"
        self.rows.append(row)
        print(said, flush=True)

    def add_intervened(self, name: str, found: Intervened) -> None:
        """One condition with what the intervention touched."""
        self.add(name, found.outcomes, touched=found.touched, low=found.low)

    def finish(self) -> dict[str, Any]:
        """Write `summary.json`; returns the record's metrics."""
        write_file(self.folder / "summary.json", json.dumps(self.rows, indent=1) + "\n")
        return {"conditions": self.rows}


def nats(text: str, model: PreTrainedModel, tokenizer: Any, task: Task, n: int, quiet: bool) -> float:
    """A threshold: nats as they are, or `p75`, the percentile of the model's entropies on held-out problems."""
    threshold = Threshold.parse(text)
    if not threshold.is_percentile:
        return threshold.value
    return entropy_percentile(threshold.value, model, tokenizer, task, n, quiet)


def entropy_percentile(
    percentile: float, model: PreTrainedModel, tokenizer: Any, task: Task, n: int, quiet: bool
) -> float:
    """A percentile of the model's entropies (nats) on the first `n` held-out problems."""
    from reqat.evaluation.tau0 import fit_tau0

    options = task.options([0], SAMPLE, quiet, "measuring entropies")
    found = fit_tau0(model, tokenizer, task.problems(n, "validation"), quantile=percentile / 100, **options)
    print(f"threshold p{percentile:g}: {found}", flush=True)
    return found.value


@app.command()
def route(
    reference: Annotated[
        str, typer.Option(callback=arguments.model, help="Folder of the model whose entropy decides.")
    ],
    out: Out,
    candidate: Annotated[
        str | None, typer.Option(callback=arguments.model, help="Folder of the other model (default: the same).")
    ] = None,
    candidate_precision: Annotated[
        str, typer.Option(callback=arguments.precision, help="The candidate's precision.")
    ] = "NVFP4-W4A4KV4",
    reference_precision: Annotated[
        str, typer.Option(callback=arguments.precision, help="The reference's precision.")
    ] = "BF16",
    threshold: Annotated[
        str,
        typer.Option(callback=arguments.threshold, help="In nats, or p75: a percentile of the reference's entropies."),
    ] = "0.6",
    policy: Annotated[list[str] | None, typer.Option(help="A policy's name (default: all four).")] = None,
    tier: Tier = "laptop",
    problems: Problems = 200,
    seeds: Seeds = "0",
    decoding: Policy = SAMPLE,
    held_out: Held = 20,
    quiet: Quiet = False,
    threads: Threads = 1,
    force: Force = False,
) -> None:
    """Entropy-routed decoding: sure tokens from one model, unsure ones from the other; four policies, graded."""
    task, used, other = Task.of_tier(tier), seed_list(seeds), candidate or reference
    roles = {"reference": reference, "candidate": other}
    with writing("route", out, roles, used, force=force, threads=threads) as conditions:
        from reqat.generation.interventions import policies

        names = policy or list(policies(0.0))
        for name in names:
            if name not in policies(0.0):
                raise unknown("policy", name, policies(0.0))
        first, tokenizer = load(reference, reference_precision)
        second, their_tokenizer = load(other, candidate_precision)
        same_tokens(tokenizer, their_tokenizer)
        value = nats(threshold, first, tokenizer, task, held_out, quiet)
        conditions.settings = {
            "reference": reference, "candidate": other, "reference_precision": reference_precision,
            "candidate_precision": candidate_precision,
            "threshold": threshold, "threshold_nats": value, "policies": names, "tier": tier, "problems": problems,
            "decoding": decoding, "held_out": held_out,
        }  # fmt: skip
        grade_routes(conditions, first, second, tokenizer, task, names, value, problems, used, decoding, quiet)


def grade_routes(
    conditions: Conditions,
    reference: PreTrainedModel,
    candidate: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    names: Sequence[str],
    threshold_nats: float,
    n: int,
    seeds: Sequence[int],
    decoding: str,
    quiet: bool,
) -> None:
    """Grade each of the policies `names` on the first `n` problems."""
    from reqat.evaluation.intervened import evaluate_routed
    from reqat.generation.interventions import policies

    asked, given = task.problems(n), policies(threshold_nats)
    for name in names:
        options = task.options(seeds, decoding, quiet, name)
        found = evaluate_routed(reference, candidate, tokenizer, asked, given[name], **options)
        conditions.add_intervened(name, found)


@app.command()
def noise(
    model: Annotated[str, typer.Option(callback=arguments.model, help="The model's folder.")],
    out: Out,
    sigmas: Annotated[str, typer.Option(callback=arguments.sigmas, help="Relative sizes of the noise, 0.1,0.3.")],
    precision: Annotated[str, typer.Option(callback=arguments.precision, help="The model's precision.")] = "BF16",
    share: Annotated[
        float, typer.Option(callback=arguments.unit, help="Share of the decisions that meet noise, at either end.")
    ] = 0.25,
    by: Annotated[
        Literal["batch", "percentile"],
        typer.Option(help="batch: the share of each step's batch; percentile: a threshold measured beforehand."),
    ] = "batch",
    tier: Tier = "laptop",
    problems: Problems = 200,
    seeds: Seeds = "0",
    decoding: Policy = SAMPLE,
    held_out: Held = 20,
    quiet: Quiet = False,
    threads: Threads = 1,
    force: Force = False,
) -> None:
    """Noise on the logits of the lowest- or highest-entropy decisions, over sigma; graded beside no noise."""
    task = Task.of_tier(tier)
    used, sizes = seed_list(seeds), numbers(sigmas, "--sigmas", float)
    with writing("noise", out, {"model": model}, used, force=force, threads=threads) as conditions:
        from reqat.generation.interventions import Noise

        for value in sizes:
            Noise(value, "low", share)  # refuses what makes no sense before anything is loaded
        loaded, tokenizer = load(model, precision)
        ends = noise_ends(by, share, loaded, tokenizer, task, held_out, quiet)
        conditions.settings = {
            "model": model, "precision": precision, "sigmas": sizes, "share": share, "by": by,
            "thresholds_nats": ends, "tier": tier, "problems": problems, "decoding": decoding, "held_out": held_out,
        }  # fmt: skip
        grade_noise(conditions, loaded, tokenizer, task, sizes, share, ends, problems, used, decoding, quiet)


def noise_ends(
    by: str,
    share: float,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    held_out: int,
    quiet: bool,
) -> dict[str, float | None]:
    """Below and above which entropy (nats) a decision meets noise; None where each step's batch says it."""
    ends: dict[str, float | None] = {"low": None, "high": None}
    if by == "percentile":
        for side, percentile in (("low", 100 * share), ("high", 100 * (1 - share))):
            ends[side] = entropy_percentile(percentile, model, tokenizer, task, held_out, quiet)
    return ends


def grade_noise(
    conditions: Conditions,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    sigmas: Sequence[float],
    share: float,
    ends: Mapping[str, float | None],
    n: int,
    seeds: Sequence[int],
    decoding: str,
    quiet: bool,
) -> None:
    """Grade no noise, and noise of every size at either end, on the first `n` problems."""
    from reqat.evaluation import evaluate
    from reqat.evaluation.intervened import evaluate_noisy
    from reqat.generation.interventions import Noise

    asked = task.problems(n)
    options = task.options(seeds, decoding, quiet, "no noise")
    conditions.add("none", evaluate(model, tokenizer, asked, **options))
    for sigma in sigmas:
        for side in ("low", "high"):
            given = Noise(sigma, side, share, ends[side])  # type: ignore[arg-type]
            name = f"{side}-{sigma:g}"
            options = task.options(seeds, decoding, quiet, name)
            conditions.add_intervened(name, evaluate_noisy(model, tokenizer, asked, given, **options))
