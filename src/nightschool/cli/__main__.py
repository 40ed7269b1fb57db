"""`python -m nightschool.cli` is `nightschool`."""

import sys

from nightschool.cli.main import main

sys.exit(main())
