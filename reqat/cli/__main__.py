"""`python -m reqat.cli`, the form that the rules use: it needs no installed script."""

from __future__ import annotations

from reqat.cli.main import main

if __name__ == "__main__":
    main()
