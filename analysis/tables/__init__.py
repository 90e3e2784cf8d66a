"""The tables, one module each: from entries of the plan and their estimates to `Table` values.

A module declares the file stem of its table, `NAME`, and, where that is no artifact, what it is made of
(:mod:`analysis.registry`, which finds it), and a function `build` that returns a `Table`: `build(results, name)` of
evaluations, `build(studies)`, or `build(measured)` of the benchmark. Modules whose names begin with an underscore hold
what several tables share. An artifact without a module gets the table of `_generic`.

Accuracies are percent with 95% intervals clustered by problem; differences are percentage points from paired
comparisons on the same problems and sampling seeds; the paper's numbers stand in a block of their own, never mixed with
ours. Where the plan has no such cell (a dash), the design asks for none; a cell that the plan has and nobody has made
is an error.
"""
