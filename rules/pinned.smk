# Inputs:  results/<date>-<tier>/ (pinned); for `compare` also a fresh run
# Outputs: build/pinned/{tables,plots}/<tier>/, drawn without running anything else


rule pinned:
    input:
        ANALYSIS,
        ancient(PINNED_MANIFESTS),
    output:
        tables=directory(f"{BUILD}/pinned/tables/{PINNED}"),
        plots=directory(f"{BUILD}/pinned/plots/{PINNED}"),
    log:
        f"{BUILD}/logs/pinned-{PINNED}.log",
    conda:
        "../environment.yml"
    params:
        reqat=reqat,
        tier=PINNED,
    shell:
        "{params.reqat} report --pinned --tier {params.tier:q} --tables {output.tables:q} --plots {output.plots:q} > {log:q} 2>&1"


rule compare:
    input:
        RECORDS,
    log:
        f"{BUILD}/logs/compare-{TIER}.log",
    conda:
        "../environment.yml"
    params:
        reqat=reqat,
        tier=TIER,
    shell:
        "{params.reqat} compare --tier {params.tier:q} 2>&1 | tee {log:q}"
