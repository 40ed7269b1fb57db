"""`python -m nightschool`, which `torchrun -m nightschool train RECIPE` needs."""

import sys

from nightschool.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
