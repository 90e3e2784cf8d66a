"""`fit-reset`, `reset`, `route` and `noise`, for real, on a model of a few thousand random weights."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaForCausalLM

from reqat.cli.main import main
from reqat.data.tokenizer import build_tokenizer
from reqat.evaluation import Outcomes, accuracy, paired
from reqat.generation import Decoding
from reqat.models import save_model
from reqat.records import record
from reqat.tasks import problems, write_trace
from tests.cli.smoke_studies import nonsense

ROOT = Path(__file__).parents[2]
FAMILIES: dict[str, dict[str, Any]] = {
    "chain_sum": {"min_terms": 2, "max_terms": 3},
    "leg_counting": {"min_animals": 1, "max_animals": 2},
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with a model of the smoke tier's problems; it answers nonsense."""
    asked = (
        problems(FAMILIES, "train", 60, 0) + problems(FAMILIES, "test", 8, 1) + problems(FAMILIES, "validation", 8, 1)
    )
    texts = [p.prompt for p in asked] + [write_trace(p, random.Random(0)) or "" for p in asked]
    tokenizer = build_tokenizer(texts)
    folder = tmp_path_factory.mktemp("models") / "nonsense"
    save_model(nonsense(len(tokenizer), 0), tokenizer, folder)
    return str(folder)


@pytest.fixture(autouse=True)
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout with nothing but configuration, and the working directory in it."""
    root = tmp_path / "checkout"
    shutil.copytree(ROOT / "config", root / "config")
    monkeypatch.chdir(root)
    return root


def reqat(*arguments: object) -> int:
    """Exit code of the command."""
    with pytest.raises(SystemExit) as end:
        main([str(a) for a in arguments])
    return int(end.value.code or 0)


def conditions(folder: Path, first: str) -> dict[str, dict[str, Any]]:
    """The rows of a folder, after checking them against its outcomes and its record."""
    found = record.verify(folder)
    rows = json.loads((folder / "summary.json").read_text())
    assert found["metrics"]["conditions"] == rows and rows[0]["condition"] == first
    base = Outcomes.from_parquet(folder / f"{first}.parquet")
    for row in rows:
        outcomes = Outcomes.from_parquet(folder / f"{row['condition']}.parquet")
        made = accuracy(outcomes)
        assert (row["accuracy"], row["lo"], row["hi"]) == (made.value, made.lo, made.hi)
        assert (row["problems"], row["seeds"]) == (4, 2)
        if row["condition"] != first:
            assert row["difference"] == paired(outcomes, base).value
    return {row["condition"]: row for row in rows}


def test_reset_is_fitted_and_graded(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    told = ("--model", model, "--precision", "NVFP4-W4A4KV4", "--tier", "smoke", "-q")
    assert reqat("fit-reset", *told, "--problems", 3, "--t-low", 0.2, "--step", "sentence", "--out", "fit.json") == 0
    fit = json.loads(Path("fit.json").read_text())
    policy = Decoding.parse(fit["policy"])
    assert policy.rule is not None and policy.rule.tau0 == fit["tau0"]["value"] > 0
    assert (policy.rule.t_low, policy.rule.step, fit["tau0"]["n_problems"]) == (0.2, "sentence", 3)
    assert fit["model"]["weights"] == {"model.safetensors": record.sha256(Path(model) / "model.safetensors")}
    assert str(Path(model).parent) not in Path("fit.json").read_text()
    assert fit["policy"] in capsys.readouterr().out
    assert (
        reqat(
            "reset", *told, "--fit", "fit.json", "--n", 4, "--seeds", "0,3", "--also", "sample(top_p=1)", "--out", "o"
        )
        == 0
    )
    rows = conditions(Path("o"), "quantized")
    assert list(rows) == ["quantized", "reset", "bf16", "also-0"]
    assert rows["reset"]["decoding"] == fit["policy"]
    assert rows["also-0"]["decoding"] == "sample(temperature=0.6, top_p=1.0)"


def test_routes(model: str) -> None:
    told = ("route", "--reference", model, "--tier", "smoke", "--n", 4, "--seeds", "0,3", "-q")
    assert reqat(*told, "--threshold", "p60", "--held-out", 3, "--out", "routes") == 0
    rows = conditions(Path("routes"), "all-reference")
    assert list(rows) == ["all-reference", "low-reference", "low-candidate", "all-candidate"]
    assert 0.3 < rows["low-candidate"]["touched"] == rows["low-candidate"]["low"] < 0.9
    assert record.read(Path("routes"))["seeds"] == [0, 3]
    assert reqat(*told, "--policy", "low-candidate", "--out", "one") == 0
    assert list(conditions(Path("one"), "low-candidate")) == ["low-candidate"]


@pytest.mark.parametrize("by", ["batch", "percentile"])
def test_noise(model: str, by: str) -> None:
    told = ("noise", "--model", model, "--tier", "smoke", "--n", 4, "--seeds", "0,3", "-q", "--sigmas", "0.1,2")
    assert reqat(*told, "--by", by, "--held-out", 3, "--out", "noisy") == 0
    rows = conditions(Path("noisy"), "none")
    assert list(rows) == ["none", "low-0.1", "high-0.1", "low-2", "high-2"]
    assert all(0 < row["touched"] < 0.6 for name, row in rows.items() if name != "none")
    ends = record.read(Path("noisy"))["config"]["thresholds_nats"]
    assert ends == {"low": None, "high": None} if by == "batch" else ends["low"] < ends["high"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["fit-reset", "--step", "word"], "--step"),
        (["fit-reset", "--t-low", "0"], "--t-low 0.0"),
        (["fit-reset", "--seeds", "0,0"], "--seeds '0,0'"),
        (["fit-reset", "--precision", "NVFP4-W4A5"], "unknown precision 'NVFP4-W4A5'"),
        (["reset", "--fit", "none.json"], "none.json: no such file; `reqat fit-reset` writes one"),
        (["reset", "--fit", "config/schema.json"], "not a file of `reqat fit-reset`"),
        (["route", "--policy", "low-ref"], "unknown policy 'low-ref'. Did you mean 'low-reference'?"),
        (["route", "--threshold", "high"], "threshold 'high': write nats"),
        (["route", "--threshold", "p100"], "between p0 and p100"),
        (["noise", "--sigmas", "-1"], "--sigmas '-1'"),
        (["noise", "--sigmas", "0.1", "--by", "row"], "'row' is not one of 'batch'"),
        (["noise", "--sigmas", "0.1", "--share", "2"], "--share 2.0"),
    ],
)
def test_what_a_user_can_mend(model: str, arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    verb, *rest = arguments
    told = ["--reference" if verb == "route" else "--model", model, "--tier", "smoke", "--out", "out", "-q"]
    if verb == "fit-reset" and "--precision" not in rest:
        told += ["--precision", "BF16"]
    assert reqat(verb, *told, *rest) == 2
    err = capsys.readouterr().err
    assert says in err and "Traceback" not in err and not Path("out").exists()


def test_models_of_different_tokenizers(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = tmp_path / "other"
    save_model(LlamaForCausalLM.from_pretrained(model), build_tokenizer(["one two\n"]), other)
    assert reqat("route", "--reference", model, "--candidate", other, "--out", "o", "--tier", "smoke", "-q") == 2
    assert "different tokenizers" in capsys.readouterr().err
