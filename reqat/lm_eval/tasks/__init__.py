"""Task files of lm-eval, one a task; those that begin with an underscore are included by others."""
