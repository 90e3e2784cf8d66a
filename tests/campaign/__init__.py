"""A campaign of faults that anyone can run: ``python -m tests.campaign`` (see ``--help``).

Four parts, each with a number of tries and of failures: SIGKILLs of the whole DAG (:mod:`tests.campaign.kills`), bad
inputs to every verb and to the Python API (:mod:`tests.campaign.inputs`), random calls of the kernels' operators, and
disks that are full or may not be written. The normal tests run a sample of each.
"""
