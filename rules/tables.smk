# Inputs:  records and outcomes of all evaluations of the tier; analysis/
# Outputs: build/tables/<tier>/<table>.{csv,md,tex}


rule tables:
    input:
        RECORDS,
        ANALYSIS,
    output:
        reported(TABLES, "csv", "Tables"),
        expand("{table}.{suffix}", table=TABLES, suffix=[s for s in TABLE_SUFFIXES if s != "csv"]),
    log:
        f"{BUILD}/logs/tables-{TIER}.log",
    conda:
        "../environment.yml"
    message:
        "tables of the evaluations"
    params:
        reqat=reqat,
        out=folder_of_output,
        **CAPTION,
    resources:
        mem_mb=1000,
        runtime=30,
    shell:
        "{params.reqat} tables --tier {params.tier:q} --out {params.out:q} > {log:q} 2>&1"
