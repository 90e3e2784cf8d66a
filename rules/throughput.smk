# Inputs:  config/throughput.yaml (its section of the tier); sources of the kernels and of the packed model
# Outputs: build/throughput/<id>/ with record.json and throughput.csv, one row a provider and shape; build/throughput/<id>.json, how
#          measuring ended; tables and Figure 6, or placeholders that say why there are none
#
# A clock must not share the machine: the job takes all cores that Snakemake has. It goes last, because of all jobs it depends most on the
# machine; and its failure is noted, not passed on, because the other figures stand without it. `--config bench=no` leaves it out.

if BENCH:

    rule bench:
        input:
            KERNELS,
            [BENCH_AGAIN] if Path(BENCH_AGAIN).exists() else [],
        output:
            BENCH_STATE,
        log:
            f"{BUILD}/logs/{BENCH.id}.log",
        conda:
            "../environment.yml"
        params:
            reqat=reqat,
            tier=TIER,
            id=BENCH.id,
        message:
            "benchmark of kernels and decoding, alone on the machine: {params.id}"
        priority: -1  # behind all others; while one of them runs, it does not get all cores
        threads: all_cores()
        resources:
            mem_mb=BENCH.memory_mb,
            runtime=150,
        shell:
            "{params.reqat} bench {params.id:q} --tier {params.tier:q} --current > {log:q} 2>&1 || "
            "{params.reqat} bench-failed {params.id:q} --code $? --log {log:q}"

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
            reqat=reqat,
            tables=table_folder,
            plots=plot_folder,
            **CAPTION,
        message:
            "Figure 6 and its tables"
        resources:
            mem_mb=1000,
            runtime=30,
        shell:
            "{params.reqat} report --what benchmark --tier {params.tier:q} --tables {params.tables:q} --plots {params.plots:q} > {log:q} 2>&1"
