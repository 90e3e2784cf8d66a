# Inputs:  results/<tier>/ (pinned); for `compare` also a fresh run
# Outputs: build/pinned/{tables,plots}/<tier>/, drawn without running anything else


rule pinned:
    input:
        ANALYSIS,
        ancient(f"results/{PINNED}/plan.json"),
    output:
        tables=directory(f"{BUILD}/pinned/tables/{PINNED}"),
        plots=directory(f"{BUILD}/pinned/plots/{PINNED}"),
    log:
        f"{BUILD}/logs/pinned-{PINNED}.log",
    conda:
        "../environment.yml"
    params:
        draw=drawing_pinned,
    shell:
        "({params.draw}) > {log:q} 2>&1"


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
