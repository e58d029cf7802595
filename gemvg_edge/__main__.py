"""`python -m gemvg_edge` is `gemvg`."""

import sys

from gemvg_edge.cli import main

sys.exit(main())
