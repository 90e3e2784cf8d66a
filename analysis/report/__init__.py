"""What tables and figures share: results, the paper's numbers, a table as a value, one look, studies, the benchmark."""
