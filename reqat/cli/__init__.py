"""The command line: one verb a job, each usable by hand and each what a rule of the DAG calls."""
