# Inputs:  the tables and figures that the other rules made
# Outputs: figures/, which only collects them
#
# A directory() output is emptied before its rule runs, so nothing else may live in figures/.


rule figures:
    input:
        rules.tables.output,
        rules.study_report.output if STUDIES else [],
        rules.throughput.output if BENCH else [],
    output:
        directory("figures"),
    log:
        f"{BUILD}/logs/collect-{TIER}.log",
    conda:
        "../environment.yml"
    message:
        "collect everything in figures/"
    shell:
        "(mkdir -p {output:q} && cp {input:q} {output:q}/) > {log:q} 2>&1"
