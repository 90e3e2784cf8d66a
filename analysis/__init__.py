"""From records to tables and figures.

Every function here is pure: it reads the plan of a tier and the records that stages and evaluations left behind, and
returns a table or draws a figure. Nothing is trained, generated or guessed. A table cell whose evaluation is missing is
an error that names the cell and the command that makes it; it is never left out in silence.

    analysis.report     what tables and figures share: results, the paper's numbers, a table as a value, one look
    analysis.viewer     one page to read token traces in
    analysis.entropy    statistics of token traces
    analysis.tables     the tables, one module each
    analysis.figures    the figures, one module each
    analysis.notebooks  walks through entropies and Q-FIT
    analysis.registry   which tables and figures there are, and which of them a plan asks for
    analysis.build      writes them: what the verbs of `reqat` call

A package imports only from itself and from those above it in this list. Importing `analysis` or `analysis.registry`
imports neither torch nor pandas nor matplotlib.
"""

from __future__ import annotations
