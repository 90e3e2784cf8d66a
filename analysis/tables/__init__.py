"""The tables: from entries of the plan and their estimates to `Table` values."""
