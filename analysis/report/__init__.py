"""What tables and figures share; it imports none of them.

The modules:

    names, claims, needs      names of precisions and files; the paper's claims; what a plan has. Read by the DAG, too
    paper                     the numbers that the paper reports
    cells                     plan + records -> entries with their outcomes, estimates and paired differences
    lines, texts, rows        entries as lines of a table; numbers as text of a cell and as rows of the tidy CSV
    verdicts, summary         the claims, tested; over all models
    document                  a table as a value; CSV, Markdown and LaTeX of it
    style, plots              one look for all figures; lines and bars that several draw
    studies, study_words      finished studies, and what their footers say
    benchmark, roofline       what the benchmark measured; what datasheets say of decoding on a GPU
    keys                      keys of attention by channel, and the error over the grid of Q-FIT
"""
