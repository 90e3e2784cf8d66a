# Helpers of the other files: the plan of the tier, commands, input functions. No rules.

import hashlib
import json
import os
import shlex
import sys
from pathlib import Path
from typing import get_args

from snakemake.exceptions import WorkflowError

sys.path.insert(0, str(workflow.basedir))

from analysis.registry import companion_names, figure_names, study_names, table_names, throughput_names
from analysis.report.names import FIGURE_SUFFIXES, TABLE_SUFFIXES
from reqat.cli import warm
from reqat.config import Paths, ReqatError, cost, digest, load, machine, unknown, working_folder
from reqat.config.companions import load_companions, note_of, part_called
from reqat.config.files import explaining, write_file
from reqat.config.paths import made, require_given
from reqat.config.progress import Progress
from reqat.config.resources import Job, need, require
from reqat.config.studies import load_studies, study_called
from reqat.config.throughput import load_throughput, sources
from reqat.records.pinned import MANIFEST, companions, newest

KEYS = ("tier", "build", "models", "data", "reqat", "bench")
# What Snakemake itself reads in a path: wildcards, and the end of a line in its lock files.
NOT_IN_PATHS = "{}\n"


def read_plan():
    """The configuration that --config gives, checked, as (plan, paths, studies by id, parts of companions by id, benchmark or
    None, what is pinned)."""
    for key in config:
        if key not in KEYS:
            raise unknown("key", key, KEYS, where="--config")
    defaults = (("build", "build"), ("models", "models"), ("data", "data"), ("tier", "laptop"))
    build, models, data, tier = (str(config.get(key, default)) for key, default in defaults)
    if not build.strip() or build.startswith("-") or any(sign in build for sign in NOT_IN_PATHS):
        raise ReqatError(
            f"--config build={build!r}: name a folder without braces and line breaks, which Snakemake takes for its own, and "
            "without a hyphen in front."
        )
    for folder in (Path(workflow.basedir), Path.cwd()):
        if any(sign in str(folder) for sign in NOT_IN_PATHS):
            raise ReqatError(f"{folder}: Snakemake takes braces and line breaks in a path for its own; move the clone to another folder.")
    if any(sign in tier for sign in f"{NOT_IN_PATHS}/"):
        raise ReqatError(f"--config tier={tier!r}: a tier is a file in config/tiers/, named without folder and suffix.")
    paths = Paths(build=Path(build), models=Path(models), data=Path(data))
    plan = load(tier, paths)
    bench = load_throughput(tier, paths.config) if wants_bench() else None
    return plan, paths, load_studies(plan, paths.config), load_companions(tier, paths.config), bench, newest(paths)


def wants_bench():
    """What `--config bench=` says: whether Figure 6 is asked for (the default)."""
    given = str(config.get("bench", "yes")).lower()
    if given not in ("yes", "no", "true", "false"):
        raise ReqatError(f"--config bench={given}: write bench=no to leave the benchmark and Figure 6 out, or bench=yes.")
    return given in ("yes", "true")


try:
    PLAN, PATHS, STUDIES, COMPANIONS, BENCH, KEPT = read_plan()
except ReqatError as error:
    raise WorkflowError(f"configuration: {error}") from None

TIER = PLAN.tier.name
BUILD = PATHS.build.as_posix()
RESOURCES = PLAN.tier.resources
ON_GPU = RESOURCES.device == "cuda"
# A file of traces is tokenized for hours where it is large; what the families generate takes minutes.
TOKENIZED = PLAN.tier.data.source != "generated"
# Of a training, of Q-FIT or PTQ, of an evaluation.
GPUS = {job: need(PLAN, job).gpus if ON_GPU else 0 for job in get_args(Job)}
# The command that the rules call; `--config reqat=...` replaces it (words, quoted as for a shell, which sees them quoted anew). Under
# --software-deployment-method conda, the environment's own Python.
PYTHON = "python" if workflow.deployment_settings.deployment_method else sys.executable
# Jobs read the plan as it was when the run began, so that editing config/ meanwhile does not pull it from under them.
FROZEN = PATHS.work / "plans" / f"{TIER}-{digest(PLAN.dump(), 12)}.json"
try:
    COMMAND = shlex.split(str(config["reqat"])) if "reqat" in config else [PYTHON, "-m", "reqat.cli"]
except ValueError as error:
    raise WorkflowError(f"configuration: --config reqat={config['reqat']!r}: {error}.") from None
COMMAND += ["--build", BUILD, "--models", PATHS.models.as_posix(), "--data", PATHS.data.as_posix(), "--plan", FROZEN.as_posix()]
# Shell text, quoted here once; so `{params.reqat}` is the one thing in a rule's `shell:` that is not written `{...:q}`.
REQAT = shlex.join(COMMAND)
# Of a training: in several processes where the tier says so (docs/distributed.md).
PROCESSES = RESOURCES.processes * RESOURCES.nodes
LAUNCH = [PYTHON, "-m", "reqat.cli.launch", "--nodes", str(RESOURCES.nodes), "--processes", str(RESOURCES.processes), "--"]
TRAIN = shlex.join([*LAUNCH, *COMMAND] if PROCESSES > 1 else COMMAND)
# Of a training on several machines, what profiles/slurm asks for; other executors take no notice.
TRAIN_NODES = {"nodes": RESOURCES.nodes, "tasks": RESOURCES.nodes} if RESOURCES.nodes > 1 else {}
BASE_NODES = {name: lambda wildcards: RESOURCES.nodes if trains_base(wildcards) else 1 for name in TRAIN_NODES}


def stamp(name, files):
    """A file in the build folder that is written when the content of one of `files` has changed: one input in place of
    hundreds, all of which Snakemake would look at many times whenever a job ends."""
    contents = {Path(file).as_posix(): hashlib.sha256(Path(file).read_bytes()).hexdigest() for file in files}
    text, path = digest(contents) + "\n", PATHS.work / "sources" / f"{name}.sha256"
    try:
        with explaining(path):
            if workflow.is_main_process and not (path.is_file() and path.read_text() == text):
                path.parent.mkdir(parents=True, exist_ok=True)
                write_file(path, text)
    except ReqatError as error:
        raise WorkflowError(f"build folder: {error}") from None
    return path.as_posix()


# Outputs of the jobs, and their logs.
DATA = f"{BUILD}/data/{{id}}/record.json"
STAGE = f"{BUILD}/stages/{{id}}/record.json"
EVALUATION = f"{BUILD}/evaluations/{{id}}/record.json"
STUDY = f"{BUILD}/studies/{{id}}/record.json"
OUTCOMES = f"{BUILD}/evaluations/{{id}}/outcomes.parquet"
LOG = f"{BUILD}/logs/{{id}}.log"
RECORDS = [(PATHS.evaluation(evaluation) / "record.json").as_posix() for evaluation in PLAN.evaluations.values()]
TABLES = [f"{BUILD}/tables/{TIER}/{name}" for name in table_names(PLAN)]
PLOTS = [f"{BUILD}/plots/{TIER}/{name}" for name in figure_names(PLAN)]
# Studies of the tier's models, on tiers that have some.
STUDY_RECORDS = [(PATHS.study(id) / "record.json").as_posix() for id in STUDIES]
STUDY_TABLES, STUDY_PLOTS = (
    [f"{BUILD}/{kind}/{TIER}/{name}" for name in names] for kind, names in zip(("tables", "plots"), study_names(STUDIES))
)
# Parts of companions, each by the note on how it ended; kind -> tables and figures.
COMPANION = f"{BUILD}/companions/{{id}}.json"
COMPANION_FILES = {
    kind: tuple([f"{BUILD}/{what}/{TIER}/{name}" for name in names] for what, names in zip(("tables", "plots"), made))
    for kind, made in companion_names(COMPANIONS.values()).items()
}
# The benchmark of kernels and decoding, on tiers that have one; it measures this code, so it follows its sources.
BENCH_STATE = PATHS.throughput_state(BENCH.id).as_posix() if BENCH else ""
BENCH_AGAIN = f"{BUILD}/throughput/{BENCH.id}.again" if BENCH else ""  # there once an attempt failed, and newer than it
BENCH_TABLES, BENCH_PLOTS = (
    [f"{BUILD}/{kind}/{TIER}/{name}" for name in names] for kind, names in zip(("tables", "plots"), throughput_names(BENCH))
)
KERNELS = stamp("kernels", sources(PATHS.root))
# Target `pinned`: the tier asked for if it is pinned, else the run that claims rest on, else the laptop's.
PINNED = next((tier for tier in (TIER, "overnight", "laptop") if any(name == tier for name, _ in KEPT)), TIER)
PINNED_FOLDERS = [folder for (name, _), folder in KEPT.items() if name == PINNED] + list(companions(PINNED, PATHS).values())
PINNED_MANIFESTS = sorted({(folder / MANIFEST).as_posix() for folder in PINNED_FOLDERS})
# Tables and plots cost seconds, so they follow their sources (the viewer and the notebooks make neither); trainings follow their
# settings alone.
ANALYSIS = stamp("analysis", (path for path in Path("analysis").rglob("*.py") if path.parts[1] not in ("viewer", "notebooks")))
CAPTION = {
    "tier": TIER,
    "title": PLAN.tier.title.replace("{", "{{").replace("}", "}}"),
    "problems": PLAN.tier.evaluation.n,
    "split": PLAN.tier.evaluation.benchmark or PLAN.tier.evaluation.split,
    "sampling_seeds": len(PLAN.tier.evaluation.seeds),
    "training_seeds": len(PLAN.tier.training_seeds),
    "claim_seeds": len({*PLAN.tier.training_seeds, *PLAN.tier.claim_seeds.seeds}),
}


def reported(paths, suffix, category):
    """Files as entries of the HTML report, each under its own caption (a second model's figure has that of the first)."""
    entries = []
    for path in paths:
        name = Path(path).name
        kinds = [name, *(name.removesuffix(f"-{label}") for label in PLAN.tier.models)]
        known = [kind for kind in kinds if Path(f"report/{kind}.rst").exists()]
        caption = f"../report/{known[0]}.rst" if known else f"../report/{category.lower()}.rst"
        labels = {"name": name, "tier": TIER}
        entries.append(report(f"{path}.{suffix}", caption=caption, category=category, labels=labels))
    return entries


def record_of(id):
    """Record of a stage as an input. The pinned base is `ancient`: a fresh clone's file times restart nothing (its sha256 is in the ids)."""
    stage = PLAN.stage(id)
    path = PATHS.stage(stage) / "record.json"
    if made(stage):
        return path.as_posix()
    if not path.exists():
        raise WorkflowError(
            f"tier {TIER} starts from the pinned base checkpoint, and {path.parent} holds none: "
            f"`snakemake --cores all --config tier={TIER} base` trains it, "
            f"`reqat pin --what base --model {stage.settings.name} --tier {TIER}` puts it there."
        )
    return ancient(path.as_posix())


def stage_inputs(wildcards):
    """Records of the stages that a stage stands on."""
    try:
        return [record_of(id) for id in PLAN.stage(wildcards.id).inputs.values()]
    except ReqatError as error:
        raise WorkflowError(str(error)) from None


def evaluation_inputs(wildcards):
    """Records of the stages that an evaluation reads, and of its parts, where jobs share its sampling seeds."""
    try:
        stages = [record_of(id) for id in PLAN.evaluation(wildcards.id).inputs.values()]
    except ReqatError as error:
        raise WorkflowError(str(error)) from None
    return stages + [EVALUATION.format(id=id) for id in PLAN.shards(wildcards.id)]


def trains_base(wildcards):
    """Whether a base's job trains it; the weights of others are only linked or unpacked."""
    return PLAN.stage(wildcards.id).settings.source == "scratch"


def base_gpus(wildcards):
    """GPUs of a base's job."""
    return GPUS["training"] if trains_base(wildcards) else 0


def base_threads(wildcards):
    """Cores of a base's job."""
    return RESOURCES.threads * (RESOURCES.processes if trains_base(wildcards) else 1)


def base_command(wildcards):
    """The command of a base's job: in several processes only where something is trained."""
    return TRAIN if trains_base(wildcards) else REQAT


def evaluation_gpus(wildcards):
    """GPUs of an evaluation: none for the job that puts parts together."""
    return 0 if PLAN.shards(wildcards.id) else GPUS["evaluating"]


def evaluation_mb(wildcards):
    """Memory of an evaluation, in MB."""
    return 2000 if PLAN.shards(wildcards.id) else RESOURCES.evaluate_memory_mb


def study_inputs(wildcards):
    """Records of the stages that a study stands on."""
    try:
        return [record_of(id) for id in dict.fromkeys(study_called(STUDIES, wildcards.id, TIER).inputs.values())]
    except ReqatError as error:
        raise WorkflowError(str(error)) from None


def companion_inputs(wildcards):
    """Notes on the sources that a part of a companion reads."""
    try:
        part = part_called(COMPANIONS, wildcards.id, TIER)
    except ReqatError as error:
        raise WorkflowError(str(error)) from None
    return [f"{BUILD}/packaged/{name}.json" for name in part.sources]


def companion_mb(wildcards):
    """Memory of a part of a companion, in MB."""
    return COMPANIONS[wildcards.id].settings.memory_mb if wildcards.id in COMPANIONS else 0


def source_again(wildcards):
    """A file that is newer than the last attempt at a source that was missing then; nothing otherwise."""
    again = PATHS.packaged(wildcards.source).with_suffix(".again")
    return [again.as_posix()] if again.exists() else []


def look_again():
    """Let sources that were missing at the last attempt be looked for again."""
    for name in {name for part in COMPANIONS.values() for name in part.sources}:
        if note_of(PATHS.packaged(name)) is not None:
            PATHS.packaged(name).with_suffix(".again").touch()


def table_folder(wildcards):
    """Folder of the tier's tables. A function, as `snakemake --lint` asks of what is no file."""
    return f"{BUILD}/tables/{TIER}"


def plot_folder(wildcards):
    """Folder of the tier's figures."""
    return f"{BUILD}/plots/{TIER}"


def all_cores():
    """Cores that Snakemake has; 1 where it was given none, as for a report."""
    try:
        return workflow.cores or 1
    except WorkflowError:
        return 1


def reqat(wildcards):
    """The command that a rule's `shell:` begins with. A function, because Snakemake would read braces in a text as wildcards."""
    return REQAT


def train(wildcards):
    """The same of a training."""
    return TRAIN


def freeze_plan():
    """Write the plan that this run's jobs read."""
    FROZEN.parent.mkdir(parents=True, exist_ok=True)
    draft = FROZEN.with_suffix(f".{os.getpid()}.tmp")
    draft.write_text(json.dumps(PLAN.dump(), indent=1))
    draft.replace(FROZEN)


def bench_state():
    """How the last attempt at the benchmark ended, as in its file; {} if there was none."""
    try:
        return json.loads(Path(BENCH_STATE).read_text(encoding="utf-8")) if BENCH else {}
    except (OSError, ValueError):
        return {}


def check_resources():
    """Refuse to start a tier whose models or data are missing, or for which this machine has too little. On a cluster
    each job checks its own node."""
    try:
        if ON_GPU and not workflow.non_local_exec:
            import torch

            from reqat.records import provenance

            require(PLAN, [gpu["memory_bytes"] for gpu in provenance.gpus()], provenance.memory_bytes())
        require_given(PLAN, PATHS)
    except ReqatError as error:
        raise WorkflowError(str(error)) from None
    most, free = max(RESOURCES.train_memory_mb, RESOURCES.evaluate_memory_mb), machine.usable_mb()
    if free < most and not ON_GPU and not workflow.non_local_exec:
        logger.warning(f"Only {free} MB of memory are free, and a job may take {most}: close other programs if one is killed.")


def share_memory():
    """Let jobs side by side take no more memory together than is free, unless --resources says how much."""
    if workflow.global_resources.get("mem_mb").value is None:
        workflow.register_resource("mem_mb", machine.usable_mb())


def expected_jobs():
    """Id (or rule) -> seconds that each job of this run is thought to take, on one core."""
    known = cost.seconds(PLAN, STUDIES.values()) | {"bench": cost.BENCH_S * all_cores()}
    known |= {id: part.settings.part_s for id, part in COMPANIONS.items()}
    jobs = [job.wildcards.get("id", job.rule.name) for job in workflow.dag.needrun_jobs()]
    return {str(id): known.get(str(id), cost.DRAWING_S) for id in jobs}


def show_progress():
    """Say every half minute where the run is: a job's own output goes to its log, and a training takes minutes."""
    if not is_quiet_about_progress():
        progress = Progress(expected_jobs(), all_cores() // RESOURCES.threads, lambda line: logger.info(f"-- {line}"))
        logger.addHandler(progress)
        progress.start()


def is_quiet_about_progress():
    """Whether --quiet asks for no progress."""
    return bool({"progress", "all"} & {str(kind).lower() for kind in workflow.output_settings.quiet or ()})


SERVER = None


def start_server():
    """Start the process that spares jobs their imports. Only where jobs run here, and with this Python."""
    global SERVER
    if workflow.local_exec and not workflow.non_local_exec and not ON_GPU and COMMAND[:3] == [sys.executable, "-m", "reqat.cli"]:
        SERVER = warm.start([sys.executable], Path.cwd(), PATHS.work / "logs" / "server.log")


def stop_server():
    """End it with the run."""
    warm.stop(SERVER)


def say_where():
    """Where the files of the run's target are; nothing of targets that make none for readers."""
    places = {
        "figures/": "figures/",
        "figures": "figures/",
        "companions": f"{BUILD}/tables/{TIER}/companion-* and {BUILD}/plots/{TIER}/companion-*",
        "pinned": f"{BUILD}/pinned/tables/{PINNED} and {BUILD}/pinned/plots/{PINNED}",
    }
    if "pinned" in workflow.dag_settings.targets and PINNED != TIER:
        logger.warning(f"Tier {TIER} has no pinned run; these are tier {PINNED}'s.")
    for target in workflow.dag_settings.targets:
        if target in places:
            logger.warning(f"Tables and figures: {places[target]}")


def say_what_is_missing():
    """A line for each result that was left out, at the end of a run that made all others."""
    state = bench_state()
    if state.get("state") == "failed":
        logger.warning(
            f"Figure 6 is missing, all other figures and tables are there. The benchmark failed: {state.get('reason')} "
            f"(log: {BUILD}/logs/{BENCH.id}.log). The next run tries again; bench=no leaves it out."
        )
    for reason in dict.fromkeys(filter(None, (note_of(PATHS.companion(id)) for id in COMPANIONS))):
        logger.warning(f"Parts of companions are missing: {reason} The next run looks for it again.")


# Of this machine and this run; not of jobs that Snakemake starts elsewhere, which read these files too.
if workflow.is_main_process:
    if working_folder.hold() and "--report" not in sys.argv:
        # A note of the failure is there, and placeholders; what makes Snakemake try again is a newer input.
        if bench_state().get("state") == "failed":
            Path(BENCH_AGAIN).touch()
        look_again()
    if workflow.local_exec:
        share_memory()
