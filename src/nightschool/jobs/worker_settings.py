"""What a worker is told by its environment and its command line."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from nightschool.errors import UsageError
from nightschool.jobs.ray_cluster import DEFAULT_RAY_ADDRESS, RAY_ADDRESS_VARIABLE

MOST_RUNNING_VARIABLE = "MAX_CONCURRENT_TRAININGS"
DEVICE_GB_VARIABLE = "MAX_GPU_MEMORY_GB"
MOST_TOGETHER_VARIABLE = "MAX_JOBS_PER_BASE"
EXECUTOR_VARIABLE = "NIGHTSCHOOL_EXECUTOR"

ExecutorName = Literal["local", "ray"]


@dataclass(frozen=True)
class WorkerSettings:
    """`most_running` jobs at once of the workers of this machine. `executor` says where they run: on this machine (`local`), where
    they take at most `device_bytes` together, or on the Ray cluster whose dashboard is at `ray_address`, where each does.

    Of those that may share a base here, `most_together` do, and count as one; 1 lets each train alone. A job that is told to
    stop has `grace_seconds` to save. One whose process died `most_deaths` times in a row without having come further has failed.
    """

    most_running: int = 2
    device_bytes: int | None = None
    grace_seconds: float = 60.0
    most_deaths: int = 3
    most_together: int = 16
    executor: ExecutorName = "local"
    ray_address: str = DEFAULT_RAY_ADDRESS

    @classmethod
    def from_env(cls, env: Mapping[str, str] | None = None, **given: int | float | str | None) -> WorkerSettings:
        """Those of the environment, and over them what is `given` and not None.

        Raises:
            UsageError: If a variable is no such number, or no place where jobs can run.
        """
        env = os.environ if env is None else env
        found: dict[str, int | float | str] = {}
        if env.get(MOST_RUNNING_VARIABLE):
            found["most_running"] = int(_number(env, MOST_RUNNING_VARIABLE, least=1))
        if env.get(MOST_TOGETHER_VARIABLE):
            found["most_together"] = int(_number(env, MOST_TOGETHER_VARIABLE, least=1))
        if env.get(DEVICE_GB_VARIABLE):
            found["device_bytes"] = int(_number(env, DEVICE_GB_VARIABLE, least=0) * 1e9)
        if env.get(EXECUTOR_VARIABLE):
            found["executor"] = _executor(env[EXECUTOR_VARIABLE])
        if env.get(RAY_ADDRESS_VARIABLE):
            found["ray_address"] = env[RAY_ADDRESS_VARIABLE]
        return cls(**found | {key: value for key, value in given.items() if value is not None})  # type: ignore[arg-type]


def _executor(name: str) -> str:
    if name not in get_args(ExecutorName):
        raise UsageError(
            f"{EXECUTOR_VARIABLE} is {name!r}. Write one of {', '.join(get_args(ExecutorName))}, or unset it."
        )
    return name


def _number(env: Mapping[str, str], name: str, *, least: int) -> float:
    try:
        number = float(env[name])
    except ValueError:
        number = -1.0
    if not least <= number < float("inf") or (least and number != int(number)):
        kind = "a whole number from 1 on" if least else "a number of gigabytes"
        raise UsageError(f"{name} is {env[name]!r}. Write {kind}, or unset it.")
    return number
