"""Training anew what may know a deleted conversation: for each tainted name a job that begins with clean weights.

Its recipe is that of the newest tainted version, its data the sources of all tainted ones, from which the conversation is gone,
and it begins where the oldest of them began. The gate decides as of any night whether its version replaces the champion.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nightschool.config.recipe import Recipe
from nightschool.errors import Conflict, NightschoolError, NotFound
from nightschool.feedback.erasure import Traces, taints_of
from nightschool.store.atomic import make_folder, read_json
from nightschool.store.home import Home
from nightschool.store.job_queue import Job, JobQueue, job_folder, new_id
from nightschool.store.names import split_name
from nightschool.store.registry import Registry
from nightschool.store.runs import Run, RunStore


@dataclass(frozen=True)
class Retraining:
    """The job of each tainted name, and why others have none."""

    jobs: Mapping[str, str]
    without: Mapping[str, str]

    def to_json(self) -> dict[str, Any]:
        return {"retrainings": dict(self.jobs), "not_retrained": dict(self.without)}


def retrain(home: Home, found: Traces, *, source: str, created_by: str | None = None) -> Retraining:
    """Queue a job for each name that has a version which may know what was deleted.

    `source` and `created_by` are those of a job. A name that cannot be trained anew keeps back no other.
    """
    queue = JobQueue(home.database)
    jobs: dict[str, str] = {}
    without: dict[str, str] = {}
    for name in dict.fromkeys(ref.partition("@")[0] for ref in found.versions):
        try:
            recipe, root = _clean_recipe(home, name)
            tenant, bare = split_name(name)
            metadata = {"retrains_without": found.request_id}
            job = Job(new_id(), tenant, bare, recipe.as_plain(), str(root), source, metadata, created_by)
            make_folder(job_folder(home, tenant, job.id))
            jobs[name] = queue.submit(job).id
        except NightschoolError as error:
            without[name] = str(error)
    return Retraining(jobs, without)


def _clean_recipe(home: Home, name: str) -> tuple[Recipe, Path]:
    """What trains a name anew, and where the relative paths of it begin.

    Raises:
        NotFound: If no run of a tainted version is there any more.
        Conflict: If the weights that it would begin with are tainted, too.
    """
    tainted, store = taints_of(home.database, name), RunStore(home)
    versions = [version for version in Registry(home).versions(name) if version.id in tainted]
    runs = [run for version in sorted(versions, key=lambda one: one.id) if (run := store.which_made(version))]
    if not runs:
        raise NotFound(f"The runs that made the tainted versions of {name} are gone, and their recipes with them.")
    recipes = [Recipe.model_validate(run.recipe()) for run in runs]
    base = recipes[0].base
    other, _, version_id = base.partition("@")
    if version_id and version_id in taints_of(home.database, other):
        raise Conflict(f"{name} stands on {base}, which is tainted itself. Train {other} anew, and then this one.")
    data = {
        json.dumps(row, sort_keys=True): row
        for run, recipe in zip(runs, recipes, strict=True)
        for row in _sources(recipe, _root_of(run))
    }
    first = {"base": base, "shape": recipes[0].as_plain()["shape"]}
    plain = recipes[-1].as_plain() | first | {"start": "base", "data": list(data.values())}
    return Recipe.model_validate(plain), _root_of(runs[-1])


def _sources(recipe: Recipe, root: Path) -> list[dict[str, Any]]:
    """The sources of a recipe as whoever begins with its first weights needs them: all of each, wherever it is read from."""
    rows: list[dict[str, Any]] = [one | {"since": "always"} for one in recipe.as_plain()["data"]]
    places = [{key: _absolute(row[key], root) for key in ("path", "folder") if row[key] is not None} for row in rows]
    return [row | place for row, place in zip(rows, places, strict=True)]


def _absolute(path: str, root: Path) -> str:
    return path if "://" in path else str(root / Path(path).expanduser())


def _root_of(run: Run) -> Path:
    """Where the relative paths of a run's recipe began.

    Raises:
        NotFound: If no cycle began it.
    """
    return Path(str(read_json(run.cycle_path)["root"]))
