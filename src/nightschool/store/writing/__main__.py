"""`python -m nightschool.store.writing`: see `process`."""

import sys

from nightschool.store.writing.process import main

if __name__ == "__main__":
    sys.exit(main())
