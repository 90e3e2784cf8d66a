# Inputs:  records of the stages that a study stands on (config/studies.yaml says which models); analysis/
# Outputs: build/studies/<id>/ with record.json and what was measured; the tables and figures of all studies of the tier
#
# A study trains nothing that anything else stands on, so it is no stage: new settings make a new study and nothing else.

if STUDIES:

    rule study:
        input:
            study_inputs,
        output:
            STUDY,
        log:
            LOG,
        conda:
            "../environment.yml"
        message:
            "study the models: {wildcards.id}"
        wildcard_constraints:
            id="study-[a-z]+-[0-9a-f]+",
        params:
            reqat=reqat,
            tier=TIER,
        threads: RESOURCES.threads
        resources:
            mem_mb=RESOURCES.train_memory_mb,
            runtime=RESOURCES.runtime_minutes,
            gpu=GPUS["evaluating"],
        shell:
            "{params.reqat} study {wildcards.id:q} --tier {params.tier:q} --threads {threads} > {log:q} 2>&1"

    rule study_report:
        input:
            STUDY_RECORDS,
            ANALYSIS,
        output:
            tables=reported(STUDY_TABLES, "csv", "Tables"),
            plots=reported(STUDY_PLOTS, "png", "Figures"),
            more_tables=expand("{table}.{suffix}", table=STUDY_TABLES, suffix=[s for s in TABLE_SUFFIXES if s != "csv"]),
            more_plots=expand("{plot}.{suffix}", plot=STUDY_PLOTS, suffix=[s for s in FIGURE_SUFFIXES if s != "png"]),
        log:
            f"{BUILD}/logs/studies-{TIER}.log",
        conda:
            "../environment.yml"
        message:
            "figures and tables of the studies"
        params:
            reqat=reqat,
            tables=table_folder,
            plots=plot_folder,
            **CAPTION,
        resources:
            mem_mb=1500,
            runtime=30,
        shell:
            "{params.reqat} report --what studies --tier {params.tier:q} --tables {params.tables:q} --plots {params.plots:q} > {log:q} 2>&1"

    rule studies:
        input:
            rules.study_report.output,
