"""Damaged and senseless configuration: tiers, recipes, studies, benchmarks, plans, and what `reqat schema` writes."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import yaml

from tests.campaign.cases import Case

HUGE = 99999999999999999999
INF, NAN = float("inf"), float("nan")
LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join(['*' + before] * 9)}]\n" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)

# Key of the smoke tier, bad values, and what else the message must say (beside file and key).
TIER: tuple[tuple[str, tuple[Any, ...]], ...] = (
    ("evaluation.seeds", ([0, 0], [-1], [HUGE], [], ["a"], [0.5], [True], "0", None)),
    ("evaluation.n", (0, -1, HUGE, "ten", None, True, 1.5, [1], NAN)),
    ("evaluation.problem_seed", (-1, HUGE, "x")),
    ("evaluation.split", ("train", "dev", 1)),
    ("evaluation.global_scale", ("rows", 1, False)),
    ("evaluation.decoding.temperature", (0, -1, NAN, INF, "hot")),
    ("evaluation.decoding.top_p", (0, 1.5, NAN)),
    ("evaluation.decoding.max_new_tokens", (0, HUGE)),
    ("evaluation.decoding.batch_rows", (0, HUGE)),
    ("evaluation.families", ({"chain_sum": {"min_terms": NAN}}, {"chain_sum": 3}, {1: {}}, [1], {})),
    ("data.tokens", (0, -5, HUGE, "many", True)),
    ("data.families", ({"chain_sum": {"min_terms": INF}}, {"no_such": {}})),
    ("data.seed", (-1, HUGE)),
    ("train.qat.lr", (INF, NAN, 0, -1, "fast", True, 1e9)),
    ("train.qat.betas", ([2, 3], [0.9], [NAN, 0.9], "x")),
    ("train.qat.clip", (0, NAN)),
    ("train.qat.warmup", (1, -0.1, NAN)),
    ("train.qat.row_tokens", (0, HUGE)),
    ("train.qat.rows_per_batch", (0, HUGE, "all")),
    ("train.finetune.autocast", ("fp16", 1)),
    ("train.finetune.objective", ([{"name": "semm"}], [{"name": "sem", "percentile": 2}], [{"weight": 1}], "nll")),
    ("train.global_scale", ("all",)),
    ("budget.qat_tokens", (0, -1, HUGE, None)),
    ("budget.totals", ([2, 2], [1], [], [HUGE], "2")),
    ("budget.claim_total", (7, 0)),
    ("training_seeds", ([0, 0], [-1], [HUGE], [])),
    ("claim_seeds", ({"seeds": [1, 1]}, {"recipes": ["nope"]}, {"precisions": ["NVFP4-W4A5"]}, [1])),
    ("only", ({"recipes": ["nope"]}, {"precisions": ["X"]}, {"recipe": []})),
    ("qfit.grid", (0, HUGE)),
    ("qfit.calibration.sequences", (0, HUGE, -1)),
    ("ptq.damp", (0, NAN, INF, "small")),
    ("models", (None, [], {"testbed": None})),
    ("models.testbed.source", ("scrach", "package", "path", None)),
    ("models.testbed.artifacts", ([], ["tabel1"], "table1")),
    ("models.testbed.scratch.architecture.heads", (0, 7, HUGE, -2)),
    ("models.testbed.scratch.architecture.hidden_size", (0, "wide", HUGE)),
    ("models.testbed.scratch.tokens", (0, HUGE)),
    ("models.testbed.scratch.seed", (-1,)),
    ("resources.threads", (0, -1, HUGE)),
    ("resources.train_tokens_per_s", (0, -1, NAN)),
    ("resources.device", ("tpu",)),
    ("title", (None, True, [])),
    ("extends", ("nope", "smoke", 5, ["laptop"])),
    ("bugdet", ({},)),
)
STUDIES: tuple[tuple[str, dict[str, Any]], ...] = tuple(
    (next(iter(change)), change)
    for change in (
        {"kind": "pears"},
        {"n": 0},
        {"n": HUGE},
        {"n": True},
        {"seeds": [0, 0]},
        {"seeds": [-1]},
        {"seeds": []},
        {"seeds": [HUGE]},
        {"decoding": "beam"},
        {"decoding": "sample(temperature=nan)"},
        {"bins": 1},
        {"bins": HUGE},
        {"top": 0},
        {"top": HUGE},
        {"more_than": -1},
        {"reference": {"recipe": "nope", "precision": "BF16"}},
        {"reference": {"recipe": "ft", "precision": "X"}},
        {"reference": 5},
        {"candidate": None},
        {"sedes": [0]},
        {"reference": {"recipe": "ft", "precision": "BF16", "seed": -1}},
        {"reference": {"recipe": "ft", "precision": "BF16", "total": 99}},
        {"reference": {"recipe": "ft", "precision": "BF16", "model": "x"}},
    )
)
PAIR = {
    "kind": "pair",
    "reference": {"recipe": "ft", "precision": "BF16"},
    "candidate": {"recipe": "ft-ptq", "precision": "NVFP4-W4A4KV4"},
    "n": 8,
    "seeds": [0],
}
THROUGHPUT: tuple[tuple[str, dict[str, Any]], ...] = (
    ("threads", {"threads": 0}),
    ("threads", {"threads": HUGE}),
    ("nk", {"linear": {"m": [1], "nk": []}}),
    ("m", {"linear": {"m": [0], "nk": [64]}}),
    ("m", {"linear": {"m": [HUGE], "nk": [64]}}),
    ("rounds", {"linear": {"m": [1], "nk": [64], "rounds": 0}}),
    ("contexts", {"attention": {"batches": [1]}}),
    ("burst_ms", {"burst_ms": NAN}),
    ("burst_ms", {"burst_ms": 0}),
    ("ring_bytes", {"ring_bytes": -1}),
    ("sizes", {"fake_quantize": {"sizes": [-1]}}),
    ("shapes", {"sem_loss": {"shapes": ["z"]}}),
    ("model", {"decode": [{"model": "", "batches": [1], "output_tokens": [2]}]}),
    ("model", {"decode": [{"model": "package:", "batches": [1], "output_tokens": [2]}]}),
    ("precision", {"decode": [{"model": "pinned", "precision": "X", "batches": [1], "output_tokens": [2]}]}),
    ("linaer", {"linaer": {}}),
)
RECIPES: tuple[tuple[str, str, str], ...] = (
    ("recipes: [ft]", "recipes: [ftt]", "ftt"),
    ("tokens: 0.5 qat", "tokens: half qat", "half"),
    ("tokens: 0.5 qat", "tokens: .nan", "nan"),
    ("tokens: 0.5 qat", f"tokens: '{'9' * 400} qat'", "99999"),
    ("tokens: 0.5 qat", "tokens: -qat", "positive"),
    ("formats: [NVFP4]", "formats: [NVFP5]", "NVFP5"),
    ("variant: released", "variant: leaked", "leaked"),
    ("name: sem,", "name: semm,", "semm"),
    ("binary: true", "binary: 7", "binary"),
    ("rotation: 32", "rotation: -4", "-4"),
    ("rotation: 32", "rotation: 3", "3"),
    ("kv_rotation: 16", "kv_rotation: 1000000", "1000000"),
)
# How any file may be damaged: name, bytes from its bytes, what the message says.
DAMAGES: tuple[tuple[str, Callable[[bytes], bytes], str], ...] = (
    ("empty", lambda data: b"", ""),
    ("bad UTF-8", lambda data: b"# \xff\xfe\n" + data, "UTF-8"),
    ("a list", lambda data: b"- 1\n- 2\n", ""),
    ("cut in a bracket", lambda data: data + b"\nx: [1,\n", ""),
    ("a key twice", lambda data: data + data, "twice|duplicate"),
    ("nested deeply", lambda data: b"x: " + b"[" * 3000, "nest"),
    ("a tab", lambda data: data + b"\n\tx: 1\n", ""),
    ("a key that is a list", lambda data: data + b"\n? [1]\n: 2\n", ""),
    ("a tag that constructs", lambda data: data + b"\nx: !!python/object/apply:os.getcwd []\n", ""),
    ("binary", lambda data: bytes(range(256)), ""),
    ("no date", lambda data: data + b"\nx: 2021-13-45\n", ""),
    ("expanding aliases", lambda data: LAUGHS.encode(), ""),
)
PLAN: tuple[tuple[str, Callable[[dict[str, Any]], Any], str], ...] = (
    ("a list", lambda plan: [], ""),
    ("no stages", lambda plan: plan | {"stages": {}}, "missing"),
    ("stages a list", lambda plan: plan | {"stages": []}, "plan"),
    ("no tier", lambda plan: {k: v for k, v in plan.items() if k != "tier"}, "tier"),
    ("tier null", lambda plan: plan | {"tier": None}, "tier"),
    ("no cells", lambda plan: plan | {"cells": []}, "missing"),
    ("cells a number", lambda plan: plan | {"cells": 5}, "plan"),
    ("no evaluations", lambda plan: plan | {"evaluations": {}}, "missing"),
    ("bases a list", lambda plan: plan | {"bases": [1]}, "plan"),
    ("a base that is not there", lambda plan: plan | {"bases": {"testbed": "base-0"}}, "base-0"),
    ("another id", lambda plan: plan | {"stages": {f"x{k}": v for k, v in plan["stages"].items()}}, "xdata"),
    ("another tier", lambda plan: plan | {"tier": plan["tier"] | {"name": "laptop"}}, "laptop"),
    ("a stage null", lambda plan: plan | {"stages": dict.fromkeys(plan["stages"])}, ""),
    ("unknown key", lambda plan: plan | {"tier": plan["tier"] | {"bugdet": 1}}, "bugdet"),
)


def cases() -> Iterator[Case]:
    """All of them."""
    for key, values in TIER:
        for value in values:
            says = ("smoke.yaml|tier smoke|unknown tier|laptop", key.rsplit(".", 1)[-1])
            if key == "extends":
                says = ("tier|extends|circle",)
            if (key, value) == ("data.families", {"no_such": {}}):
                says = ("no_such",)
            yield Case("tier", f"{key} = {value!r}"[:80], says, ("plan", "--tier", "smoke"), prepare=_edit(key, value))
    for name in ("tiers/smoke.yaml", "recipes.yaml", "studies.yaml", "throughput.yaml"):
        verb = ("bench", "--tier", "smoke") if name == "throughput.yaml" else ("plan", "--tier", "smoke")
        for what, damage, says in DAMAGES:
            yield Case(
                "configuration file", f"{name}: {what}", (Path(name).name, says), verb, prepare=_damage(name, damage)
            )
        yield Case(
            "configuration file", f"{name}: a folder", (Path(name).name,), verb, prepare=_as_folder(f"config/{name}")
        )
    for key, change in STUDIES:
        says = ("studies.yaml", f"{key}|study pair")
        yield Case("study", f"{change}"[:80], says, ("plan", "--tier", "smoke"), prepare=_studies(PAIR | change))
    yield Case(
        "study", "two of one name", ("studies.yaml", "pair"), ("plan", "--tier", "smoke"), prepare=_studies(PAIR, PAIR)
    )
    for key, section in THROUGHPUT:
        says = ("throughput.yaml", key)
        yield Case("benchmark", f"{section}"[:80], says, ("bench", "--tier", "smoke"), prepare=_throughput(section))
    for old, new, says_what in RECIPES:
        says = ("recipes.yaml|recipe", says_what)
        yield Case("recipe", new[:60], says, ("plan", "--tier", "laptop"), prepare=_recipes(old, new))
    given = ("--plan", "plan.json", "plan", "--tier", "smoke")
    for what, change, says_what in PLAN:
        yield Case("plan", what, ("plan.json", says_what), given, prepare=_plan(change))
    for what, data in (
        ("cut", b'{"tier": '),
        ("not there", None),
        ("bad UTF-8", b"\xff"),
        ("empty", b""),
        ("a number", b"5"),
        ("nested deeply", b"[" * 100000),
        ("keys twice", b'{"tier": 1, "tier": 2}'),
        ("long number", b"1" * 10000),
    ):
        yield Case("plan", what, ("plan.json",), given, prepare=_write("plan.json", data))
    for verb in ("plan", "doctor"):
        for what, data in (
            ("empty", b""),
            ("a list", b"[]"),
            ("no outputs", b"{}"),
            ("outputs a list", b'{"outputs": []}'),
            ("bad UTF-8", b"\xff\xfe"),
            ("cut", b'{"outputs": {'),
        ):
            prepare = _write("results/base/record.json", data)
            yield Case("base record", f"{verb}: {what}", ("record.json",), (verb, "--tier", "testbed"), prepare=prepare)


def _edit(key: str, value: Any) -> Callable[[Path], None]:
    def prepare(folder: Path) -> None:
        path = folder / "config/tiers/smoke.yaml"
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
        inner, *rest = data, *key.split(".")
        for part in rest[:-1]:
            inner = inner.setdefault(part, {})
        inner[rest[-1]] = value
        path.write_text(yaml.safe_dump(data), encoding="utf-8")

    return prepare


def _damage(name: str, damage: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    def prepare(folder: Path) -> None:
        path = folder / "config" / name
        path.write_bytes(damage(path.read_bytes()))

    return prepare


def _as_folder(name: str) -> Callable[[Path], None]:
    def prepare(folder: Path) -> None:
        (folder / name).unlink()
        (folder / name).mkdir()

    return prepare


def _studies(*studies: dict[str, Any]) -> Callable[[Path], None]:
    def prepare(folder: Path) -> None:
        (folder / "config/studies.yaml").write_text(
            yaml.safe_dump({"tiers": {"smoke": list(studies)}}), encoding="utf-8"
        )

    return prepare


def _throughput(section: dict[str, Any]) -> Callable[[Path], None]:
    def prepare(folder: Path) -> None:
        (folder / "config/throughput.yaml").write_text(yaml.safe_dump({"tiers": {"smoke": section}}), encoding="utf-8")

    return prepare


def _recipes(old: str, new: str) -> Callable[[Path], None]:
    def prepare(folder: Path) -> None:
        path = folder / "config/recipes.yaml"
        text = path.read_text(encoding="utf-8")
        assert old in text, old
        path.write_text(text.replace(old, new), encoding="utf-8")

    return prepare


def _plan(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def prepare(folder: Path) -> None:
        path = folder / "plan.json"
        path.write_text(json.dumps(change(json.loads(path.read_text(encoding="utf-8")))), encoding="utf-8")

    return prepare


def _write(name: str, data: bytes | None) -> Callable[[Path], None]:
    def prepare(folder: Path) -> None:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        if data is not None:
            path.write_bytes(data)

    return prepare
