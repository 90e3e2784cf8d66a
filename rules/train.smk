# Inputs:  the record of the parent stage (its model) and of the trace store
# Outputs: build/stages/<id>/ with record.json; beside it model/
#
# A killed training leaves build/checkpoints/<id>/, from where the same job goes on. One thread a job: two trainings side by side are faster
# on two cores than one training on both.


rule train:
    input:
        stage_inputs,
    output:
        STAGE,
    log:
        LOG,
    conda:
        "../environment.yml"
    message:
        "train: {wildcards.id}"
    wildcard_constraints:
        id="(finetune|qat)-[0-9a-f]+",
    params:
        reqat=train,
        tier=TIER,
        threads=RESOURCES.threads,
    threads: RESOURCES.threads * RESOURCES.processes
    resources:
        mem_mb=RESOURCES.train_memory_mb,
        runtime=RESOURCES.runtime_minutes,
        gpu=GPUS["training"],
        **TRAIN_NODES,
    shell:
        "{params.reqat} stage {wildcards.id:q} --tier {params.tier:q} --threads {params.threads:q} > {log:q} 2>&1"


rule qfit:
    input:
        stage_inputs,
    output:
        STAGE,
    log:
        LOG,
    conda:
        "../environment.yml"
    message:
        "Q-FIT: {wildcards.id}"
    wildcard_constraints:
        id="qfit-[0-9a-f]+",
    params:
        reqat=reqat,
        tier=TIER,
    threads: RESOURCES.threads
    resources:
        mem_mb=RESOURCES.train_memory_mb,
        runtime=240,
        gpu=GPUS["calibrating"],
    shell:
        "{params.reqat} stage {wildcards.id:q} --tier {params.tier:q} --threads {threads} > {log:q} 2>&1"
