"""`python -m tests.bench`: whole models on the CPU; with --cuda, single ops on a GPU."""

from __future__ import annotations

import sys

if "--cuda" in sys.argv:
    # Apart: a machine with a GPU may have torch and nothing of what whole models need.
    sys.argv.remove("--cuda")
    from tests.bench.cuda import main
else:
    from tests.bench.wholemodels import main

main()
