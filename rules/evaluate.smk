# Inputs:  the record of the stage whose model is graded
# Outputs: build/evaluations/<id>/ with record.json and outcomes.parquet, one row a problem and sampling seed


rule evaluate:
    input:
        evaluation_inputs,
    output:
        record=EVALUATION,
        outcomes=OUTCOMES,
    log:
        LOG,
    conda:
        "../environment.yml"
    message:
        "evaluate: {wildcards.id}"
    wildcard_constraints:
        id="evaluation-[0-9a-f]+",
    params:
        reqat=reqat,
        tier=TIER,
    threads: RESOURCES.threads
    resources:
        mem_mb=RESOURCES.evaluate_memory_mb,
        runtime=RESOURCES.runtime_minutes,
        gpu=min(GPUS, 1),
    shell:
        "{params.reqat} evaluate {wildcards.id:q} --tier {params.tier:q} --threads {threads} > {log:q} 2>&1"
