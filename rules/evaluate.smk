# Inputs:  the record of the stage whose model is graded; of an evaluation in parts, their records
# Outputs: build/evaluations/<id>/ with record.json and outcomes.parquet, one row a problem and sampling seed
#
# A tier may share the sampling seeds of an evaluation among jobs (resources.evaluation_shards): parts `<id>-1of8` to `<id>-8of8`, which a
# cluster runs side by side, and a job that puts them together.


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
        id="evaluation-[0-9a-f]+(-[0-9]+of[0-9]+)?",
    params:
        reqat=reqat,
        tier=TIER,
    threads: RESOURCES.threads
    resources:
        mem_mb=evaluation_mb,
        runtime=RESOURCES.runtime_minutes,
        gpu=evaluation_gpus,
    shell:
        "{params.reqat} evaluate {wildcards.id:q} --tier {params.tier:q} --threads {threads} > {log:q} 2>&1"
