"""Recipes (floor 4): one published method a file, and the stages that chain them."""
