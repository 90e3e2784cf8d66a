"""Jobs: what a verb or a rule runs, with its lock, its inputs, its record. No parsing and no printing of tables."""
