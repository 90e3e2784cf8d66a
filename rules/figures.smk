# Inputs:  records and outcomes of all evaluations of the tier; analysis/; the tables
# Outputs: build/plots/<tier>/<figure>.{png,pdf}; figures/, which only collects what was rendered elsewhere
#
# A directory() output is emptied before its rule runs, so nothing else may live in figures/.


rule plots:
    input:
        RECORDS,
        ANALYSIS,
    output:
        reported(PLOTS, "png", "Figures"),
        expand("{plot}.{suffix}", plot=PLOTS, suffix=[s for s in FIGURE_SUFFIXES if s != "png"]),
    log:
        f"{BUILD}/logs/figures-{TIER}.log",
    conda:
        "../environment.yml"
    message:
        "figures of the evaluations"
    params:
        reqat=reqat,
        out=folder_of_output,
        **CAPTION,
    resources:
        mem_mb=1000,
        runtime=30,
    shell:
        "{params.reqat} figures --tier {params.tier:q} --out {params.out:q} > {log:q} 2>&1"


rule figures:
    input:
        rules.tables.output,
        rules.plots.output if PLOTS else [],
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
