# Inputs:  the base's own traces (from scratch), or an installed package or local folder of weights
# Outputs: build/stages/base-<digest>/ with record.json; beside it model/
#
# Tiers that start from the pinned checkpoint in results/base/ need none of this; target `base` trains it anew.


rule base:
    input:
        [record_of(id) for id in PLAN.scratch.values()],


rule base_model:
    input:
        stage_inputs,
    output:
        STAGE,
    log:
        LOG,
    conda:
        "../environment.yml"
    message:
        "base model: {wildcards.id}"
    wildcard_constraints:
        id="base-[0-9a-f]+",
    params:
        reqat=base_command,
        tier=TIER,
        threads=RESOURCES.threads,
    threads: base_threads
    resources:
        mem_mb=RESOURCES.train_memory_mb,
        runtime=RESOURCES.runtime_minutes,
        gpu=base_gpus,
        **BASE_NODES,
    shell:
        "{params.reqat} stage {wildcards.id:q} --tier {params.tier:q} --threads {params.threads:q} > {log:q} 2>&1"
