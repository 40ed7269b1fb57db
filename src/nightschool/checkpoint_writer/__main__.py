"""`python -m nightschool.checkpoint_writer`: see `process`."""

import sys

from nightschool.checkpoint_writer.process import main

if __name__ == "__main__":
    sys.exit(main())
