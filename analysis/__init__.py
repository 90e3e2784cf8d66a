"""From records to tables and figures.

Every function here is pure: it reads the plan of a tier and the records that stages and evaluations left behind, and
returns a table or draws a figure. Nothing is trained, generated or guessed. A table cell whose evaluation is missing is
an error that names the cell and the command that makes it; it is never left out in silence.

    analysis.report     what tables and figures share: results, the paper's numbers, a table as a value, one look
    analysis.tables     the tables
    analysis.figures    the figures
    analysis.entropy    statistics of token traces
    analysis.viewer     one page to read token traces in
    analysis.registry   which tables and figures a plan asks for
    analysis.build      build_tables(), build_figures(): what `reqat tables` and `reqat figures` call

Importing this package imports neither torch nor matplotlib.
"""

from __future__ import annotations
