"""`python -m benchmarks.toy_jobs.submit HOME JOBS`: what a server does, in a process that may be killed.

Submits jobs under ids that tell their number, each as the service does: its data first, then its row. Three of four may share
their base. Cancels every seventh a while later, pauses every fifth, and lets those go on in the end. Started again, it goes on.
Prints what it has done, which must be true from then on.
"""

import json
import sys
import time
from contextlib import suppress
from pathlib import Path

from nightschool.config.recipe import Recipe
from nightschool.errors import Conflict, NotFound
from nightschool.store.home import Home
from nightschool.store.job_queue import Job, JobQueue, job_folder

PAUSE_SECONDS = 0.2


def job_id(number: int) -> str:
    return f"train_{number:012x}"


def submit(home: Home, queue: JobQueue, number: int) -> None:
    tenant, name = f"tenant-{number % 4}", f"bot-{number // 8}"  # two jobs share each name
    folder = job_folder(home, tenant, job_id(number))
    folder.mkdir(parents=True, exist_ok=True)
    rows = [{"query": f"question {row} of {number}?", "retrieved": f"answer {row}"} for row in range(3)]
    (folder / "train.json").write_text(json.dumps(rows))
    alone = number % 4 == 3
    plain = {"name": name, "data": [{"path": "train.json"}], "train": {"max_steps": 60 if alone else 200}}
    weights = {"base": "new:tiny"} if alone else {"base": "org/base", "method": "lora"}
    recipe = Recipe(**plain, **weights).as_plain()
    queue.submit(Job(job_id(number), tenant, name, recipe, str(folder), "api"))


def main() -> None:
    home, number_of_jobs = Home(Path(sys.argv[1])), int(sys.argv[2])
    queue = JobQueue(home.database)
    for number in range(number_of_jobs):
        try:
            queue.get(job_id(number))
        except NotFound:
            submit(home, queue, number)
        print(json.dumps({"submitted": job_id(number)}), flush=True)
        if number % 7 == 6:
            cancel(queue, job_id(number - 3))
        if number % 5 == 4:
            with suppress(Conflict):  # it has ended before, or ends now
                queue.pause(job_id(number - 2))
        time.sleep(PAUSE_SECONDS)
    while paused := [job for job in queue.ls() if job.phase in ("paused", "pausing")]:
        for job in paused:
            with suppress(Conflict):
                queue.resume(job.id)


def cancel(queue: JobQueue, wanted: str) -> None:
    try:
        state = queue.request_cancel(wanted).phase
    except Conflict:  # it has ended before
        return
    print(json.dumps({"cancelled" if state == "cancelled" else "cancelling": wanted}), flush=True)


if __name__ == "__main__":
    main()
