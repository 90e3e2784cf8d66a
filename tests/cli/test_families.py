"""Settings of task families: one rule for `evaluate`, `entropy` and `traces`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from reqat.cli.app import session
from reqat.cli.families import choose
from reqat.cli.main import main
from reqat.config.errors import ReqatError
from reqat.tasks import get_family, problems

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _here(monkeypatch: pytest.MonkeyPatch) -> None:
    vars(session).pop("paths", None)
    monkeypatch.setattr(session, "root", ROOT)


def test_a_family_has_settings_of_its_own_unless_a_tier_is_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    own, of_tier = choose("chain_sum, facts", None), choose("chain_sum", "smoke")
    assert own.families == {name: get_family(name).defaults for name in ("chain_sum", "facts")}
    written = yaml.safe_load((ROOT / "config" / "tiers" / "smoke.yaml").read_text())["data"]["families"]["chain_sum"]
    assert of_tier.families == {"chain_sum": {**get_family("chain_sum").defaults, **written}}
    assert "smoke" in str(of_tier) and f"max_terms {written['max_terms']}" in str(of_tier)
    assert Path.cwd() == tmp_path  # where the other paths of the verb are relative to


def test_a_family_that_the_tier_does_not_have() -> None:
    with pytest.raises(ReqatError, match="facts.*smoke|smoke.*facts"):
        choose("facts", "smoke")


@pytest.mark.parametrize("tier", [None, "smoke"])
def test_traces_are_of_the_problems_that_the_rule_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tier: str | None
) -> None:
    monkeypatch.chdir(tmp_path)
    given = ["--root", str(ROOT), "traces", "--tasks", "chain_sum", "--n", "5", "--out", "a.jsonl"]
    with pytest.raises(SystemExit) as end:
        main(given + (["--tier", tier] if tier else []))
    assert not end.value.code
    prompts = [json.loads(line)["prompt"] for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    vars(session).pop("paths", None)
    assert prompts == [problem.prompt for problem in problems(choose("chain_sum", tier).families, "train", 5, 0)]
