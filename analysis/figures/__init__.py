"""The figures: drawn from the same entries and estimates as the tables."""
