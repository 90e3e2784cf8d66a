"""`python -m reqat`, the form that torchrun takes: `torchrun --nproc-per-node 2 -m reqat train ...`."""

from __future__ import annotations

if __name__ == "__main__":
    from reqat.cli.main import main

    main()
