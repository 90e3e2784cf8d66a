"""Searches over architectures."""
