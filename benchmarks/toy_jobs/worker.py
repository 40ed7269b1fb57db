"""The real worker, which starts toys, and holds no death against a job: here somebody kills on purpose."""

import sys

from benchmarks.toy_jobs import use_toys

from nightschool.jobs.worker import main
from nightschool.jobs.worker_settings import WorkerSettings

if __name__ == "__main__":
    use_toys()
    sys.exit(main(settings=WorkerSettings.from_env(most_deaths=1_000_000)))
