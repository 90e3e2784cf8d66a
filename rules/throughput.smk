# Inputs:  config/throughput.yaml (its section of the tier); sources of the kernels and of the packed model
# Outputs: build/throughput/<id>/ with record.json and throughput.csv, one row a provider and shape; tables and Figure 6
#
# A clock must not share the machine: the job takes all cores that Snakemake has and goes first, while nothing else runs.

if BENCH:

    rule bench:
        input:
            KERNELS,
        output:
            record=f"{BENCH_FOLDER}/record.json",
            rows=f"{BENCH_FOLDER}/throughput.csv",
        log:
            f"{BUILD}/logs/{BENCH.id}.log",
        conda:
            "../environment.yml"
        params:
            reqat=REQAT,
            tier=TIER,
            id=BENCH.id,
        priority: 100
        threads: all_cores()
        resources:
            mem_mb=6000,
            runtime=60,
        shell:
            "{params.reqat} bench {params.id} --tier {params.tier} > {log} 2>&1"

    rule throughput:
        input:
            rules.bench.output,
            ANALYSIS,
        output:
            tables=reported(BENCH_TABLES, "csv", "Tables"),
            plots=reported(BENCH_PLOTS, "png", "Figures"),
            more_tables=expand("{table}.{suffix}", table=BENCH_TABLES, suffix=[s for s in TABLE_SUFFIXES if s != "csv"]),
            more_plots=expand("{plot}.{suffix}", plot=BENCH_PLOTS, suffix=[s for s in FIGURE_SUFFIXES if s != "png"]),
        log:
            f"{BUILD}/logs/throughput-{TIER}.log",
        conda:
            "../environment.yml"
        params:
            reqat=REQAT,
            tables=lambda wildcards, output: str(Path(output.tables[0]).parent),
            plots=lambda wildcards, output: str(Path(output.plots[0]).parent),
            **CAPTION,
        resources:
            mem_mb=1000,
            runtime=30,
        shell:
            "{params.reqat} throughput --tier {params.tier} --tables {params.tables} --plots {params.plots} > {log} 2>&1"
