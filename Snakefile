# The DAG: traces -> base -> fine-tuning -> Q-FIT -> QAT / PTQ -> evaluations -> tables and plots -> figures/
#                         studies of the trained models -> Figures 2 to 5 and 7 to 11, their tables -> figures/
#                         benchmark of kernels and decoding -> Figure 6 and its tables -> figures/
#
#   snakemake --cores all figures/                        the default tier, `laptop`
#   snakemake --cores all --config tier=smoke -- figures/ another: smoke, testbed, overnight, converged, smollm-claims, paper
#   snakemake --cores all pinned                          tables and figures from results/ alone, in seconds
#   snakemake --cores all compare                         a fresh run against the pinned one
#   snakemake --cores all studies                         only the studies of the models: entropies, interventions, ReSET
#   snakemake --cores all throughput                      only the benchmark: its tables and Figure 6
#   snakemake --cores all companions                      sister systems beside ReQAT (config/companions.yaml)
#   snakemake --cores all base                            train the base model anew (then `reqat pin --what base`)
#   ... --config bench=no                                 without the benchmark: no Figure 6 and none of its tables
#
# What is to be done is no logic of these files: reqat.config turns config/ into a plan of stages and evaluations, each
# named by the digest of its settings, and the rules run them by calling `reqat` verbs that work by hand too.

from snakemake.utils import min_version

min_version("9.27")


report: "report/workflow.rst"


include: "rules/common.smk"


rule all:
    input:
        "figures",
    default_target: True


include: "rules/data.smk"
include: "rules/base.smk"
include: "rules/train.smk"
include: "rules/ptq.smk"
include: "rules/evaluate.smk"
include: "rules/tables.smk"
include: "rules/studies.smk"
include: "rules/throughput.smk"
include: "rules/companions.smk"
include: "rules/figures.smk"
include: "rules/pinned.smk"


onstart:
    check_resources()
    freeze_plan()
    start_server()
    show_progress()


onsuccess:
    stop_server()
    say_where()
    say_what_is_missing()


onerror:
    stop_server()
