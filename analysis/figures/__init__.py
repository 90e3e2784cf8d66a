"""The figures, one module each: drawn from the same entries and estimates as the tables, with the paper's numbers in
panels of their own.

A module declares the file stem of its figure, `NAME`, and what it is made of (:mod:`analysis.registry`, which finds
it), and a function `build` that returns a matplotlib figure: `build(results, model)` of evaluations, `build(studies)`,
or `build(measured)` of the benchmark. Modules whose names begin with an underscore hold what several figures share.
:mod:`analysis.build` saves figures as PNG and PDF, and their numbers as CSV (:mod:`analysis.report.drawn`).

Axes carry units, error bars and bands are 95% intervals clustered by problem, and the footer says tier, n, seeds and
arithmetic.
"""
