"""Training, the gate and the plan in milliseconds and without torch, in processes of their own as the real ones.

They keep the same promises on disk: a lock and a status for each run, checkpoints to go on from, one published version, a
report. So everything about jobs may be killed a hundred times a minute, and only what is learned is a toy.
"""

from nightschool.work import processes

_NAMES = ("plan", "train", "train-together", "compare", "compare-in-turn", "job", "worker")
MODULES = {name: f"benchmarks.toy_jobs.{name.replace('-', '_')}" for name in _NAMES}


def use_toys() -> None:
    """Let this process start the toys in place of the real processes."""
    processes.PROCESSES = {**processes.PROCESSES, **MODULES}
