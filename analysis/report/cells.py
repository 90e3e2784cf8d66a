"""Plan and records, joined: every cell of every table with what was measured for it.

The plan (`reqat.config.plan`) says which cells a tier's artifacts have and which evaluation measures each; evaluations
and stages leave a folder each, with `record.json` and, for evaluations, `outcomes.parquet` (one row a problem and
sampling seed). Cells that differ in nothing but the training seed are one `Entry`, one line of a table. Estimates and
paired differences come from `reqat.evaluation.statistics` and are computed once each.

Missing or incomplete results are an error (`MissingResults`) that lists the cells and the command that makes them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from analysis.report.paper import parse_condition
from reqat.config.errors import ReqatError
from reqat.config.recipe import OWN
from reqat.records import record

if TYPE_CHECKING:
    from reqat.config.plan import Cell, Plan
    from reqat.evaluation.outcomes import Outcomes
    from reqat.evaluation.statistics import Difference, Estimate

OUTCOMES = "outcomes.parquet"
OUTCOME_COLUMNS = ("problem_id", "family", "seed", "correct", "n_tokens", "finished")
_LISTED = 12  # missing cells that an error spells out


class MissingResults(ReqatError):
    """Cells of the plan whose evaluation or stage left no (whole) result."""


@dataclass(frozen=True)
class Entry:
    """One line of a table at one budget: the plan's cells that differ in their training seed only."""

    artifact: str
    model: str
    recipe: str
    method: str
    precision: str
    condition: str  # "key=value;key=value", empty for most artifacts
    total_tokens: int | None  # None: trains nothing
    multiple: int | None  # total_tokens in QAT budgets; the paper's 140M is 2
    problems: str  # the set of problems; "own" for the tier's own
    cells: tuple[Cell, ...]  # in the order of their training seeds

    @property
    def training_seeds(self) -> tuple[int, ...]:
        """Seeds of the trainings behind the cells; one of no meaning where nothing is trained."""
        return tuple(c.training_seed for c in self.cells)

    @property
    def conditions(self) -> dict[str, str]:
        """`condition`, parsed."""
        return parse_condition(self.condition)

    def __str__(self) -> str:
        parts = [self.artifact, self.model, self.precision, self.method]
        parts += [f"{self.multiple} x QAT budget"] if self.multiple else []
        parts += [f"problems {self.problems}"] if self.problems != OWN else []
        return ", ".join([*parts, *([self.condition] if self.condition else [])])


def entries(cells: Iterable[Cell]) -> list[Entry]:
    """Group cells into entries, in the plan's order. Raises `ReqatError` if two cells are the same but for their
    evaluation.
    """
    grouped: dict[tuple[Any, ...], list[Cell]] = {}
    for c in cells:
        spent = (c.total_tokens, c.multiple)
        key = (c.artifact, c.model, c.recipe, c.method, c.precision, c.condition, *spent, c.problems)
        grouped.setdefault(key, []).append(c)
    out = []
    for key, group in grouped.items():
        group.sort(key=lambda c: c.training_seed)
        entry = Entry(*key, cells=tuple(group))
        if len(set(entry.training_seeds)) != len(group):
            raise ReqatError(f"the plan holds a cell twice: {entry}, training seeds {entry.training_seeds}")
        out.append(entry)
    return out


@dataclass(frozen=True)
class Provenance:
    """What a caption has to say about the results under a table or figure."""

    tier: str
    title: str
    pinned: bool
    n_problems: tuple[int, ...]
    sampling_seeds: tuple[int, ...]  # numbers of seeds an evaluation used
    training_seeds: tuple[int, ...]  # numbers of seeds an entry was trained with
    splits: tuple[str, ...]  # "test", or "validation" for a sweep; the name of a benchmark
    decoding: tuple[str, ...]
    arithmetic: tuple[str, ...]
    options: tuple[str, ...]  # precisions with options that are not their names' defaults, and who has them
    commits: tuple[str, ...]  # with "+changes" where the tree was dirty

    def notes(self) -> tuple[str, ...]:
        """The footer, one short statement each."""

        def several(values: Sequence[int], one: str, many: str) -> str:
            text = str(values[0]) if len(values) == 1 else f"{values[0]} to {values[-1]}"
            return f"{text} {one if values[-1:] == (1,) else many}"

        splits = " and ".join(self.splits)
        out = [
            f"Tier {self.tier} ({'pinned' if self.pinned else 'fresh'} results): {self.title}.",
            several(self.n_problems, f"{splits} problem", f"{splits} problems")
            + ", "
            + several(self.sampling_seeds, "sampling seed", "sampling seeds")
            + f" ({'; '.join(self.decoding)}), "
            + several(self.training_seeds, "training seed", "training seeds")
            + ".",
            f"Arithmetic: {'; '.join(self.arithmetic)}.",
            *([f"Options of precisions: {'; '.join(self.options)}."] if self.options else []),
            f"Commit {', '.join(self.commits)}.",
        ]
        return tuple(out)


class Results:
    """The plan of a tier and what its evaluations and stages left under `root`.

    `root` holds `evaluations/<id>/` and `stages/<id>/`: the DAG's build folder, or a pinned run as restored.
    Files are read when asked for and kept; `outcomes` never reads the responses' text.
    """

    def __init__(
        self, plan: Plan, root: Path, *, pinned: bool = False, titles: Mapping[str, str] | None = None
    ) -> None:
        self.plan, self.root, self.pinned = plan, Path(root), pinned
        self.titles = dict(titles or {})
        self._records: dict[str, dict[str, Any]] = {}
        self._outcomes: dict[str, Outcomes] = {}
        self._estimates: dict[tuple[Any, ...], Estimate] = {}
        self._differences: dict[tuple[Any, ...], Difference] = {}

    # -- what the plan asks for --------------------------------------------------------------------------------------
    @cached_property
    def entries(self) -> list[Entry]:
        """Every entry of the plan."""
        return entries(self.plan.cells)

    def of(self, artifact: str, *, model: str | None = None) -> list[Entry]:
        """The entries of one artifact. Raises `ReqatError` if the plan has none (for this model)."""
        found = [e for e in self.entries if e.artifact == artifact and model in (None, e.model)]
        if not found:
            raise ReqatError(
                f"tier {self.plan.tier.name} has no artifact {artifact!r}"
                f"{f' for model {model}' if model else ''}; it has {', '.join(self.plan.artifacts)}. "
                f"Add it under models.<label>.artifacts in config/tiers/{self.plan.tier.name}.yaml."
            )
        return found

    def models(self, artifact: str) -> list[str]:
        """Labels of the models that an artifact is made with, in the plan's order."""
        return list(dict.fromkeys(e.model for e in self.of(artifact)))

    def title(self, artifact: str) -> str:
        """The artifact's title in `config/recipes.yaml`."""
        return self.titles.get(artifact, artifact)

    # -- files -------------------------------------------------------------------------------------------------------
    def folder(self, id: str) -> Path:
        """Where an evaluation or a stage left its results."""
        return self.root / ("evaluations" if id in self.plan.evaluations else "stages") / id

    def record(self, id: str) -> dict[str, Any]:
        """The record of an evaluation or stage. Raises `MissingResults` naming the command that makes it."""
        if id not in self._records:
            try:
                found = record.read(self.folder(id))
            except ReqatError as error:
                raise MissingResults(f"{error} {self.remedy([id])}") from None
            if found["id"] != id:
                raise MissingResults(f"{self.folder(id)} holds {found['id']}, not {id}. {self.remedy([id])}")
            self._records[id] = found
        return self._records[id]

    def metrics(self, id: str) -> dict[str, Any]:
        """The `metrics` of a record."""
        return dict(self.record(id).get("metrics") or {})

    def evaluation_outcomes(self, id: str) -> Outcomes:
        """Outcomes of one evaluation, without the responses' text.

        Raises `MissingResults` if the file is missing, is not the one that its record describes, or does not hold every
        problem under every sampling seed once.
        """
        if id not in self._outcomes:
            path = self.folder(id) / OUTCOMES
            if not path.is_file():
                raise MissingResults(f"{path}: no outcomes of {id}. {self.remedy([id])}")
            entry = self.record(id)["outputs"].get(OUTCOMES)
            # A pinned file has lost its responses; it was checked when it was restored.
            if not self.pinned and (entry is None or entry["sha256"] != record.sha256(path)):
                raise MissingResults(f"{path}: not the file that its record describes. {self.remedy([id])}")
            try:
                data = pd.read_parquet(path, columns=list(OUTCOME_COLUMNS))
            except (OSError, ValueError) as error:  # pyarrow's errors are of these kinds
                raise MissingResults(f"{path}: not outcomes ({error}). {self.remedy([id])}") from None
            self._outcomes[id] = self._checked(id, path, data)
        return self._outcomes[id]

    def _checked(self, id: str, path: Path, data: pd.DataFrame) -> Outcomes:
        from reqat.evaluation.outcomes import Outcomes

        asked = self.plan.evaluation(id)
        seeds, n = sorted(set(data["seed"])), data["problem_id"].nunique()
        whole = len(data) == n * len(seeds) and not data.duplicated(["problem_id", "seed"]).any()
        if seeds != sorted(asked.seeds) or n != asked.problems.n or not whole:
            raise MissingResults(
                f"{path}: {len(data)} outcomes of {n} problems under seeds {seeds}, where the plan asks for each of "
                f"{asked.problems.n} problems once under seeds {sorted(asked.seeds)}. {self.remedy([id])}"
            )
        return Outcomes(**{name: data[name].to_numpy() for name in OUTCOME_COLUMNS})

    def check(self, artifacts: Sequence[str] | None = None) -> None:
        """Raise `MissingResults` listing every cell (of these artifacts; None: all) whose evaluation is not there."""
        wanted = [e for e in self.entries if artifacts is None or e.artifact in artifacts]
        missing: dict[str, list[str]] = {}
        for entry in wanted:
            for cell in entry.cells:
                folder = self.folder(cell.evaluation)
                if not ((folder / record.FILE).is_file() and (folder / OUTCOMES).is_file()):
                    missing.setdefault(cell.evaluation, []).append(f"{entry}, training seed {cell.training_seed}")
        if missing:
            lines = [
                f"{self.root}: {len(missing)} of the evaluations that the plan of tier "
                f"{self.plan.tier.name} asks for are missing:"
            ]
            lines += [f"  {id}: {'; '.join(cells)}" for id, cells in list(missing.items())[:_LISTED]]
            lines += [f"  ... and {len(missing) - _LISTED} more"] if len(missing) > _LISTED else []
            raise MissingResults("\n".join([*lines, self.remedy(list(missing))]))

    def remedy(self, ids: Sequence[str]) -> str:
        """The command that makes these evaluations or stages."""
        tier = self.plan.tier.name
        if self.pinned:
            return (
                f"The pinned results do not answer the plan in config/: run tier {tier} "
                f"(snakemake --cores all --config tier={tier} -- figures/) and promote it with `reqat pin`."
            )
        verb = "evaluate" if ids[0] in self.plan.evaluations else "stage"
        return (
            f"Make what is missing with: snakemake --cores all --config tier={tier} -- figures/ "
            f"(one of them by hand: reqat {verb} {ids[0]} --tier {tier})."
        )

    # -- numbers -----------------------------------------------------------------------------------------------------
    def outcomes(self, entry: Entry, family: str | None = None) -> list[Outcomes]:
        """Outcomes of an entry, one a training seed; of one task family only, if named."""
        runs = [self.evaluation_outcomes(c.evaluation) for c in entry.cells]
        return runs if family is None else [r.select(np.array([f == family for f in r.family])) for r in runs]

    def families(self, entry: Entry) -> list[str]:
        """Task families among an entry's problems, by name."""
        return sorted(set(self.outcomes(entry)[0].family))

    def estimate(self, entry: Entry, family: str | None = None) -> Estimate:
        """Accuracy (a fraction) with its 95% interval, over all problems, sampling seeds and training seeds of an
        entry.
        """
        from reqat.evaluation.statistics import accuracy

        key = (tuple(c.evaluation for c in entry.cells), family)
        if key not in self._estimates:
            self._estimates[key] = accuracy(self.outcomes(entry, family))
        return self._estimates[key]

    def paired(self, a: Entry, b: Entry, family: str | None = None) -> Difference:
        """Accuracy of `a` minus that of `b` on the same problems and sampling seeds, with 95% interval and p-value."""
        from reqat.evaluation.statistics import paired

        a, b = self.common(a, b)
        key = (tuple(c.evaluation for c in a.cells), tuple(c.evaluation for c in b.cells), family)
        if key not in self._differences:
            self._differences[key] = paired(self.outcomes(a, family), self.outcomes(b, family))
        return self._differences[key]

    @staticmethod
    def common(a: Entry, b: Entry) -> tuple[Entry, Entry]:
        """The two entries cut to the training seeds that both were trained with, in one order.

        Where one of them trains nothing, its single model stands against every training seed of the other. Raises
        `ReqatError` if two trained entries share no training seed.
        """
        if a.total_tokens is None or b.total_tokens is None:
            runs = max(len(a.cells), len(b.cells))
            a, b = (e if len(e.cells) == runs else replace(e, cells=e.cells * runs) for e in (a, b))
            return a, b
        shared = set(a.training_seeds) & set(b.training_seeds)
        if not shared:
            raise ReqatError(f"no training seed in common: {a} has {a.training_seeds}, {b} has {b.training_seeds}")

        def cut(entry: Entry) -> Entry:
            return replace(entry, cells=tuple(c for c in entry.cells if c.training_seed in shared))

        return cut(a), cut(b)

    def frame(self, artifact: str | None = None) -> pd.DataFrame:
        """One tidy row a cell (training seeds apart): the plan's columns, then value, lo, hi (fractions) and counts."""
        chosen = self.entries if artifact is None else self.of(artifact)
        rows = []
        for entry in chosen:
            for cell in entry.cells:
                single = replace(entry, cells=(cell,))
                e = self.estimate(single)
                rows.append(
                    cell.model_dump()
                    | {
                        "value": e.value,
                        "lo": e.lo,
                        "hi": e.hi,
                        "n_problems": e.n_problems,
                        "n_sampling_seeds": e.n_seeds,
                    }
                )
        data = pd.DataFrame(rows)
        for column in ("total_tokens", "multiple"):
            data[column] = data[column].astype("Int64")
        return data

    def provenance(self, chosen: Sequence[Entry]) -> Provenance:
        """What the records of these entries' evaluations say about how they were made."""
        evaluations = [self.plan.evaluation(c.evaluation) for e in chosen for c in e.cells]
        records = [self.record(e.id) for e in evaluations]
        trained = [len(e.training_seeds) for e in chosen if e.total_tokens is not None] or [1]
        return Provenance(
            tier=self.plan.tier.name,
            title=self.plan.tier.title,
            pinned=self.pinned,
            n_problems=_ends(e.problems.n for e in evaluations),
            sampling_seeds=_ends(len(e.seeds) for e in evaluations),
            training_seeds=_ends(trained),
            splits=_unique(
                e.problems.benchmark.name if e.problems.benchmark else e.problems.split for e in evaluations
            ),
            decoding=_unique(_decoding(e.decoding) for e in evaluations),
            arithmetic=_unique(arithmetic_of(r) for r in records),
            options=self._options(chosen),
            commits=_unique(commit_of(r) for r in records),
        )

    def _options(self, chosen: Sequence[Entry]) -> tuple[str, ...]:
        """``NVFP4-W4A4KV4 with E1M2 keys and values in ReQAT-TQ`` for each such precision of these entries."""
        written = {e: str(self.plan.evaluation(e.cells[0].evaluation).precision) for e in chosen}
        found = []
        for text in dict.fromkeys(written.values()):
            name, _, asked = text.partition(":")
            if not asked:
                continue
            same = [e for e in chosen if written[e].partition(":")[0] == name]
            having = [e for e in same if written[e] == text]
            others = {e.method for e in same if written[e] != text}
            who = dict.fromkeys(f"{e.method} ({e.condition})" if e.method in others else e.method for e in having)
            where = "every method" if len(having) == len(same) else ", ".join(who)
            found.append(f"{name} with {' and '.join(option_words(part) for part in asked.split(','))} in {where}")
        return tuple(found)


_OPTIONS = {
    "kv_element": "{} keys and values",
    "rotation": "block rotation of {}",
    "kv_rotation": "queries and keys rotated in blocks of {}",
    "global_scale": "global scale: {}",
}


def option_words(option: str) -> str:
    """An option of a precision for readers: `kv_element=E1M2` -> `E1M2 keys and values`; one without words as it is."""
    name, _, value = option.partition("=")
    return _OPTIONS[name].format(value) if name in _OPTIONS else option


def _ends(values: Iterable[int]) -> tuple[int, ...]:
    found = sorted(set(values))
    return tuple(found) if len(found) < 2 else (found[0], found[-1])


def _unique(values: Iterable[str]) -> tuple[str, ...]:
    return tuple(sorted(set(values)))


def _decoding(d: Any) -> str:
    how = "greedy" if d.greedy else f"T {d.temperature:g}, top-p {d.top_p:g}"
    return f"{how}, at most {d.max_new_tokens} tokens"


def arithmetic_of(record: Mapping[str, Any]) -> str:
    """FP4 is always simulated: values rounded to the FP4 grid, computed in higher precision on the record's device."""
    device = str((record.get("hardware") or {}).get("device", "cpu"))
    return f"fake-quantized, {'CPU' if device.startswith('cpu') else 'GPU' if device.startswith('cuda') else device}"


def commit_of(record: Mapping[str, Any]) -> str:
    """The commit that a record was made at, shortened, and whether the code was changed beyond it."""
    commit = str(record.get("commit") or "unknown")
    return commit[:10] + ("+changes" if record.get("dirty") else "")
