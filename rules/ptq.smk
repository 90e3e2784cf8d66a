# Inputs:  the record of the parent stage (its model) and of the trace store (calibration)
# Outputs: build/stages/ptq-<digest>/ with record.json; beside it model/ with packed weights
#
# Rounding to nearest needs no stage: an evaluation at a precision rounds the weights itself.


rule ptq:
    input:
        stage_inputs,
    output:
        STAGE,
    log:
        LOG,
    conda:
        "../environment.yml"
    message:
        "quantize after training: {wildcards.id}"
    wildcard_constraints:
        id="ptq-[0-9a-f]+",
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
