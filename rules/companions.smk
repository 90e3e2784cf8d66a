# Inputs:  config/companions.yaml (its section of the tier); packages of data and models that users install, and the pinned base
# Outputs: build/packaged/<source>/ with record.json; build/companions/<id>/ with record.json and rows.csv, a part each; beside both
#          <name>.json, how the last attempt ended; the tables and figures of each companion
#
# Target `companions` makes all of a tier's. A package that is not installed costs the parts that read it: their notes say so, and so do
# the tables. The next run looks for it again. Whatever else fails stops its companion alone with --keep-going (`make companions`).


rule source:
    input:
        source_again,
    output:
        f"{BUILD}/packaged/{{source}}.json",
    log:
        f"{BUILD}/logs/source-{{source}}.log",
    conda:
        "../environment.yml"
    message:
        "prepare a source of companions: {wildcards.source}"
    wildcard_constraints:
        source="[a-z][a-z0-9-]*",
    params:
        reqat=reqat,
        tier=TIER,
    resources:
        mem_mb=2500,
        runtime=60,
    shell:
        "{params.reqat} source {wildcards.source:q} --tier {params.tier:q} --note-missing > {log:q} 2>&1"


rule companion:
    input:
        companion_inputs,
    output:
        f"{BUILD}/companions/{{id}}.json",
    log:
        LOG,
    conda:
        "../environment.yml"
    message:
        "companion: {wildcards.id}"
    wildcard_constraints:
        id="companion-[A-Za-z0-9._-]+",
    params:
        reqat=reqat,
        tier=TIER,
    threads: 1
    resources:
        mem_mb=companion_mb,
        runtime=RESOURCES.runtime_minutes,
    shell:
        "{params.reqat} companion {wildcards.id:q} --tier {params.tier:q} --threads {threads} --note-missing > {log:q} 2>&1"


for KIND, (COMPANION_TABLES, COMPANION_PLOTS) in COMPANION_FILES.items():

    rule:
        name:
            f"companion_report_{KIND}"
        input:
            [COMPANION.format(id=id) for id, part in COMPANIONS.items() if part.kind == KIND],
            ANALYSIS,
        output:
            tables=reported(COMPANION_TABLES, "csv", "Tables"),
            plots=reported(COMPANION_PLOTS, "png", "Figures"),
            more_tables=expand("{table}.{suffix}", table=COMPANION_TABLES, suffix=[s for s in TABLE_SUFFIXES if s != "csv"]),
            more_plots=expand("{plot}.{suffix}", plot=COMPANION_PLOTS, suffix=[s for s in FIGURE_SUFFIXES if s != "png"]),
        log:
            f"{BUILD}/logs/companion-{KIND}-{TIER}.log",
        conda:
            "../environment.yml"
        message:
            "tables and figures of a companion: {params.kind}"
        params:
            reqat=reqat,
            kind=KIND,
            tables=table_folder,
            plots=plot_folder,
            **CAPTION,
        resources:
            mem_mb=1000,
            runtime=30,
        shell:
            "{params.reqat} report --what companions --companion {params.kind:q} --tier {params.tier:q} --tables {params.tables:q} "
            "--plots {params.plots:q} > {log:q} 2>&1"


rule companions:
    input:
        [f"{table}.{suffix}" for tables, _ in COMPANION_FILES.values() for table in tables for suffix in TABLE_SUFFIXES],
        [f"{plot}.{suffix}" for _, plots in COMPANION_FILES.values() for plot in plots for suffix in FIGURE_SUFFIXES],
