"""Task families, one a file; each defines ``FAMILY``."""
