# Inputs:  records and outcomes of all evaluations of the tier; analysis/
# Outputs: build/tables/<tier>/<table>.{csv,md,tex}; build/plots/<tier>/<figure>.{png,pdf}


rule tables:
    input:
        RECORDS,
        ANALYSIS,
    output:
        tables=reported(TABLES, "csv", "Tables"),
        plots=reported(PLOTS, "png", "Figures"),
        more_tables=expand("{table}.{suffix}", table=TABLES, suffix=[s for s in TABLE_SUFFIXES if s != "csv"]),
        more_plots=expand("{plot}.{suffix}", plot=PLOTS, suffix=[s for s in FIGURE_SUFFIXES if s != "png"]),
    log:
        f"{BUILD}/logs/tables-{TIER}.log",
    conda:
        "../environment.yml"
    message:
        "tables and figures of the evaluations"
    params:
        reqat=reqat,
        tables=table_folder,
        plots=plot_folder,
        **CAPTION,
    resources:
        mem_mb=1000,
        runtime=30,
    shell:
        "{params.reqat} report --what run --tier {params.tier:q} --tables {params.tables:q} --plots {params.plots:q} > {log:q} 2>&1"
