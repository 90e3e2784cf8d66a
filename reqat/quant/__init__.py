"""Precision specs, fake quantization and rotations (floor 1: imports reqat.formats and torch alone)."""
