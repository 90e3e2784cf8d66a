"""Verbs that look: `plan`, `formats`, `schema`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Annotated, get_args

import typer

from reqat.cli.app import Tier, app, session
from reqat.config import machine, schema
from reqat.config.companions import Part, load_companions
from reqat.config.cost import hours, seconds
from reqat.config.errors import ReqatError
from reqat.config.formats import FAMILIES, bits_of
from reqat.config.paths import made
from reqat.config.plan import Plan
from reqat.config.precision import KNOWN
from reqat.config.recipe import OWN
from reqat.config.resources import Job, need
from reqat.config.stage import PTQSettings, TrainSettings
from reqat.config.studies import PlannedStudy, load_studies
from reqat.records import record


@app.command("plan")
def show_plan(
    tier: Tier = "laptop",
    as_json: Annotated[bool, typer.Option("--json", help="The whole plan as JSON.")] = False,
) -> None:
    """Print a tier's stages, evaluations, studies, companions and cost, with what is done already."""
    plan = session.plan(tier)
    if as_json:
        print(json.dumps(plan.dump(), indent=1))
        return
    print(f"tier {tier}: {plan.tier.title}\n")
    for stage in plan.stages.values():
        done = "done" if (session.paths.stage(stage) / record.FILE).exists() else ("given" if not made(stage) else "")
        words = [stage.precision.name] if stage.precision.name != "BF16" else []
        if isinstance(stage.settings, TrainSettings):
            traces, terms = stage.settings.traces, stage.settings.training.objective
            words += [f"{traces.tokens:,} tokens" + (f" after {traces.skip_tokens:,}" if traces.skip_tokens else "")]
            words += [f"{traces.epochs} epochs"] if traces.epochs > 1 else []
            words += ["+".join(term.name for term in terms)] if len(terms) > 1 else []
            words += [f"seed {stage.settings.seed}"] if stage.settings.seed else []
        if isinstance(stage.settings, PTQSettings):
            options = (f"{name}={value}" for name, value in stage.settings.options.items())
            words.append(" ".join([stage.settings.method, *options]))
        parent = f"from {stage.parent}" if stage.parent else ""
        needed = "" if stage.id in plan.needed else "(target base)"
        print("  ".join(filter(None, [f"{stage.id:<24}", f"{done:<5}", ", ".join(words), parent, needed])))
    if len(plan.needed) < len(plan.stages):
        print("\n(target base): made by `snakemake base` alone; the tier begins with the pinned result of it")
    print()
    for evaluation in plan.evaluations.values():
        done = "done" if (session.paths.evaluation(evaluation) / record.FILE).exists() else ""
        cells = [cell for cell in plan.cells if cell.evaluation == evaluation.id]
        uses = ((cell.artifact, cell.condition, cell.problems) for cell in cells)
        words = [" ".join(word for word in use if word and word != OWN) for use in sorted(set(uses))]
        method, precision = cells[0].method, evaluation.precision.name
        print(f"{evaluation.id}  {done:<5} {method:<22} {precision:<14} of {evaluation.stage}  ({', '.join(words)})")
    studies = load_studies(plan, session.paths.config)
    for study in studies.values():
        done = "done" if (session.paths.study(study.id) / record.FILE).exists() else ""
        of = ", ".join(dict.fromkeys(study.inputs.values()))
        print(f"{study.id:<28}  {done:<5} {study.settings.label:<22} of {of}")
    parts = list(load_companions(tier, session.paths.config).values())
    for part in parts:
        done = "done" if (session.paths.companion(part.id) / record.FILE).exists() else ""
        print(f"{part.id:<56}  {done:<5} {part.settings.name:<18} {', '.join(part.sources)}".rstrip())
    print("\n" + "\n".join(cost_sentences(plan, list(studies.values()), parts)))
    if plan.tier.resources.device == "cuda":
        print("\n" + gpu_hours(plan))


def cost_sentences(
    plan: Plan, studies: Sequence[PlannedStudy] = (), parts: Sequence[Part] = (), *, benchmark: bool = False
) -> list[str]:
    """What a tier's own jobs take, if it has any, and what its companions', if it has any. ``benchmark``: one that runs
    beside the jobs."""
    found = []
    if plan.needed or not parts:
        found.append(cost(plan, studies) + (", the benchmark (BENCH=no leaves it out) apart" if benchmark else ""))
    if parts:
        beside, minutes = " beside them" if found else "", sum(part.settings.part_s for part in parts) / 60
        found.append(
            f"{_count(len(parts), 'part', 'parts')} of companions{beside} (`make companions`): about {minutes:.0f} "
            "minutes of one core"
        )
    return found


def _count(number: int, one: str, several: str) -> str:
    return f"{number:,} {one if number == 1 else several}"


def cost(plan: Plan, studies: Sequence[PlannedStudy] = ()) -> str:
    """Tokens, responses, studies and a rough time on this machine's cores, from the rates that the tier states."""
    given = plan.tier.resources
    quantized = sum(stage.budget_tokens for stage in plan.needed.values() if stage.kind == "qat")
    plain = sum(stage.budget_tokens for stage in plan.needed.values()) - quantized
    responses = sum(evaluation.problems.n * len(evaluation.seeds) for evaluation in plan.evaluations.values())
    jobs = len(seconds(plan))
    total = sum(seconds(plan, studies).values())
    measured = f" and {_count(len(studies), 'study', 'studies')}" if studies else ""
    side_by_side = max(1, machine.cores() // given.threads) if given.device == "cpu" else 1
    words = f"{side_by_side} jobs side by side" if side_by_side > 1 else "one job after the other"
    return (
        f"{_count(jobs, 'job', 'jobs')}: {plain:,} tokens of BF16 training, {quantized:,} of QAT, {responses:,} "
        f"responses{measured}; about {total / 60 / side_by_side:.0f} minutes with {words}, at the tier's rates"
    )


def gpu_hours(plan: Plan) -> str:
    """What each table and figure costs, and how many GPUs a job asks for, from the rates that the tier states."""
    gpus = ", ".join(f"{n.gpus} {what}" for what in get_args(Job) if (n := need(plan, what)) is not None)
    size = plan.tier.resources.gpu_memory_gib
    lines = [
        f"GPU-hours, computed from the tier's rates and not measured (GPUs of {size:g} GiB a job: {gpus}); what tables "
        "share is in each",
        f"{'':12} {'training':>10} {'evaluating':>10} {'total':>10}",
    ]
    for name, found in hours(plan).items():
        lines.append(f"{name:12} {found.training:>10,.0f} {found.evaluating:>10,.0f} {found.total:>10,.0f}")
    return "\n".join(lines)


@app.command("formats")
def show_formats() -> None:
    """List all formats: bits, element, block, scales and rules, the default first. A precision is FORMAT-BITS, as in
    NVFP4-W4A4KV4; what is not its default follows a colon (NVFP4-W4A4:scale_rule=multiply)."""
    heads = ("format", "bits", "element", "block", "scale", "scale_rule", "rounding", "global_scale")
    lines: list[tuple[str, ...]] = [heads]
    for name, fields in FAMILIES.items():
        block = "tensor" if fields["per_tensor"][0] else str(fields["block"][0] or "row")
        choices = {field: ",".join(str(value) for value in values) for field, values in fields.items()}
        lines.append((name, str(bits_of(name)), choices["element"], block, *(choices[head] for head in heads[4:])))
    widths = [max(len(line[column]) for line in lines) for column in range(len(heads))]
    for line in lines:
        print("  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip())
    print(f"\nPrecisions of the paper and of this artifact: {', '.join(KNOWN)}")


@app.command("schema")
def export_schema(
    check: Annotated[bool, typer.Option("--check", help="Only say whether config/schema.json is up to date.")] = False,
) -> None:
    """Write config/schema.json from the configuration models."""
    path = session.paths.config / schema.FILE
    if check:
        if not path.is_file() or path.read_text(encoding="utf-8") != schema.text():
            raise ReqatError(f"{path} is not what the configuration models say; run `reqat schema`.")
        print(f"{path}: up to date")
    else:
        print(schema.write(session.paths.config))
