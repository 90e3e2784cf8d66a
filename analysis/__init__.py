"""From records to tables and figures.

Every function here is pure: it reads the plan of a tier and the records that stages and evaluations left behind, and
returns a table or draws a figure. Nothing is trained, generated or guessed. A table cell whose evaluation is missing is
an error that names the cell and the command that makes it; it is never left out in silence.

    analysis.paper      the numbers that the paper reports
    analysis.cells      plan + records -> one tidy row a cell, with its estimate
    analysis.document   a table as a value; CSV, Markdown and LaTeX of it
    analysis.tables     Tables 1, 2, 4, 5, the PTQ and global-scale tables, the claims
    analysis.style      one look for all figures
    analysis.figures    Figures 1(b) and 1(c), losses, the Q-FIT map, Table 1 as dots and intervals
    analysis.roofline   what datasheets alone say about decoding on a GPU
    analysis.throughput the benchmark's rows -> Figure 6 and its tables
    analysis.build      build_tables(), build_figures(): what `reqat tables` and `reqat figures` call

Importing this package imports neither torch nor matplotlib.
"""

from __future__ import annotations
