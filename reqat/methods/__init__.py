"""Published methods, one a file, and the stages that chain them."""
