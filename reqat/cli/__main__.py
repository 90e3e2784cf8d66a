"""`python -m reqat.cli`, the form that the rules use: it needs no installed script."""

from __future__ import annotations

import sys

from reqat.cli.warm import handed_over

if __name__ == "__main__":
    code = handed_over(sys.argv[1:])
    if code is not None:
        sys.exit(code)
    from reqat.cli.main import main

    main()
