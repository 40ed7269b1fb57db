"""The real process, which starts toys."""

import sys

from benchmarks.toy_jobs import use_toys

from nightschool.jobs.worker import main

if __name__ == "__main__":
    use_toys()
    sys.exit(main())
