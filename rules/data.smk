# Inputs:  nothing, or the base model whose tokenizer counts the tokens; of a tier with traces of its own, their file in data/, which is no
#          input here, because its sha256 is in the id: a touched file restarts nothing, a changed one is another stage
# Outputs: build/data/<id>/ with record.json; beside it tokenizer/, manifest.json, and train.jsonl or (of a file) train.ids, train.index


rule data:
    input:
        stage_inputs,
    output:
        DATA,
    log:
        LOG,
    conda:
        "../environment.yml"
    message:
        "traces and tokenizer: {wildcards.id}"
    wildcard_constraints:
        id="data-[0-9a-f]+",
    params:
        reqat=reqat,
        tier=TIER,
    threads: RESOURCES.threads if TOKENIZED else 1
    resources:
        mem_mb=RESOURCES.evaluate_memory_mb if TOKENIZED else 2000,
        runtime=RESOURCES.runtime_minutes if TOKENIZED else 60,
    shell:
        "{params.reqat} data {wildcards.id:q} --tier {params.tier:q} > {log:q} 2>&1"
