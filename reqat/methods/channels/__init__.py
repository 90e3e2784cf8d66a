"""Searches over the channels of a network's layers (NCE, arXiv 2212.10878)."""
