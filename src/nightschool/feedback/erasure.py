"""Deleting a conversation: where it went, what learned it, and what is marked for it.

A conversation is copied into the folders of the runs that selected it or rehearse what was asked in it, and learned by the versions that they made; every
version that grew from one of these may know it, too. Its tenant may have sent it back as data of a job, or in a file. Deleting
takes the copies away (`copies.py`) and marks the versions as tainted; only training anew takes it out of weights.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from nightschool.data.example import Example
from nightschool.data.sources.problems import Problems
from nightschool.data.study.forms import every_wording
from nightschool.data.study.rewordings import wording
from nightschool.errors import Conflict, Damaged
from nightschool.events import now
from nightschool.feedback import rehearsed_prompts, teachers_words
from nightschool.feedback.conversation_examples import examples_of
from nightschool.feedback.conversations import Conversation, ConversationStore
from nightschool.feedback.copies import Sought, Wanted, cut, holds, rows_of_runs, rows_of_tenants
from nightschool.feedback.rejected_forms import RejectedForms
from nightschool.feedback.selection_files import (
    CONTRADICTIONS,
    GENERAL,
    HELD_OUT,
    NEW,
    REPLAYED,
    STUDY,
    drop_forms_of_nothing,
    read_forms,
)
from nightschool.feedback.written_forms import forget_cached, forms_written
from nightschool.store.atomic import read_json, write_json
from nightschool.store.database import Database
from nightschool.store.files import FileStore, StoredFile
from nightschool.store.home import Home
from nightschool.store.job_queue import Job, JobQueue, job_folder
from nightschool.store.names import full_name, home_of, is_name, split_name
from nightschool.store.registry import Registry, Version
from nightschool.store.runs import Run, RunStore
from nightschool.store.tables import accepted_examples, is_name_in, key_of, tainted_versions

_LEARNED = (NEW, REPLAYED, GENERAL)
_COPIES = (*_LEARNED, STUDY, CONTRADICTIONS, HELD_OUT)


@dataclass(frozen=True)
class Traces:
    """Where a conversation went: runs, jobs and uploaded files whose data hold it, and versions that learned it or grew from
    one that did. `replayed` are the accepted examples made of it, by their numbers in the database, `memories` the entries of memories that
    came from it, as `facts/m12`: whoever knows memories fills them in.
    """

    request_id: str
    tenant: str
    runs: tuple[str, ...]
    jobs: tuple[str, ...]
    files: tuple[str, ...]
    versions: tuple[str, ...]
    replayed: tuple[int, ...]
    memories: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        kinds = ("runs", "jobs", "files", "memories", "versions")
        shown: dict[str, tuple[str, ...]] = {kind: getattr(self, kind) for kind in kinds}
        return {"request_id": self.request_id, **{kind: list(ids) for kind, ids in shown.items()}}


def traces_of(home: Home, conversation: Conversation, *, by_content: bool = True) -> Traces:
    """Where a conversation went, of its tenant's runs, jobs, files and versions. Reads the data of all: seconds, where there is much.

    Without `by_content` only what was selected by its id counts as a copy, so that nobody can name data by repeating them.
    """
    tenant, sought = split_name(conversation.model)[0], Sought.of(conversation, by_content=by_content)
    all_runs = RunStore(home).ls(tenant)
    rehearsed_in = {run.id for run in all_runs if rehearsed_prompts.rehearses(run.path, sought.request_id)}
    runs = [run for run in all_runs if run.id in rehearsed_in or _in_any(run, _COPIES, sought)]
    learned_in = rehearsed_in | {run.id for run in runs if _in_any(run, _LEARNED, sought)}
    accepted, numbers = _accepted(home.database, tenant, sought)
    return Traces(
        request_id=sought.request_id,
        tenant=tenant,
        runs=tuple(run.id for run in runs),
        jobs=tuple(
            folder.name
            for folder in _job_folders(home, tenant)
            if any(holds(file, sought, rows_of_tenants) for file in _data_of(folder))
        ),
        files=tuple(file.id for file in _files(home, tenant) if holds(file.path, sought, rows_of_tenants)),
        versions=tuple(_grown_from(Registry(home), tenant, learned_in, accepted)),
        replayed=numbers,
    )


def versions_that_learned(home: Home, tenant: str, sought: Wanted) -> list[str]:
    """The versions of a tenant that learned an example which has what is looked for, or grew from one that did.

    Reads the data of all its runs: seconds, where there is much.
    """
    learned_in = {run.id for run in RunStore(home).ls(tenant) if _in_any(run, _LEARNED, sought)}
    return _grown_from(Registry(home), tenant, learned_in, _accepted(home.database, tenant, sought)[0])


def erase(
    home: Home,
    request_id: str,
    *,
    owner: str | None = None,
    tenant: str | None = None,
    by_content: bool = True,
    besides: Callable[[Traces], None] = lambda _: None,
) -> tuple[Traces, int]:
    """Delete a conversation, its feedback, and its copies in the data of runs, jobs and files, and mark what may know it.

    A run whose data were cut cannot be resumed or proven any more. A file that held nothing else is deleted. Where it is
    cut off, it can be done again.

    Args:
        home: Where it is.
        request_id: Of the answer.
        owner: Who asks, if not everybody may; see `ConversationStore.feedback`.
        tenant: Whose it must be, if not anybody's.
        by_content: As `traces_of` has it.
        besides: Deletes what is kept of it elsewhere, just before the conversation itself; what it raises, leaves that one there.

    Returns:
        Where it was, and how many accepted examples were deleted with it.

    Raises:
        NotFound: If there is no such conversation, or it is another's.
        Conflict: If a run or a job that holds it is at work.
    """
    store = ConversationStore(home.database)
    conversation = store.get(request_id, owner=owner, tenant=tenant)
    found = traces_of(home, conversation, by_content=by_content)
    sought = Sought.of(conversation, by_content=by_content)
    runs = [RunStore(home).get(run_id) for run_id in found.runs]
    for run in runs:
        _refuse_living(run, request_id)
    _refuse_running(JobQueue(home.database).ls(tenant=found.tenant, states=("running",)), found)
    taint(home.database, found.versions, found.request_id)
    wordings = _wordings_of(conversation)
    for run in runs:
        before = [*read_forms(run.path), *forms_written(run.path)]
        for file in _COPIES:
            cut(run.path / file, sought, rows_of_runs)
        drop_forms_of_nothing(run.path)
        studied = {form.id for form in [*read_forms(run.path), *forms_written(run.path)]}
        wordings |= {wording(form.example.question or "") for form in before if form.id not in studied}
        rehearsed_prompts.forget_in(run.path, request_id)
        teachers_words.forget(home, run.path)
        _cut_plan(run)
    RejectedForms(home.database).forget(found.tenant, wordings)
    forget_cached(home)
    rehearsed_prompts.forget_cached(home)
    for job_id in found.jobs:
        for path in _data_of(job_folder(home, found.tenant, job_id)):
            cut(path, sought, rows_of_tenants)
    files = FileStore(home, found.tenant)
    for file_id in found.files:
        left = cut(files.get(file_id).path, sought, rows_of_tenants)
        files.recount(file_id, left)
    with home.database.write() as connection:
        connection.execute(accepted_examples.delete().where(accepted_examples.c.id.in_(found.replayed)))
    besides(found)
    store.forget(request_id, owner=owner)
    return found, len(found.replayed)


def taint(database: Database, refs: Sequence[str], deleted: str) -> None:
    """Note for good that versions may know something that was deleted: a conversation by its id, a memory's entry as `facts/m12`."""
    moment = now()
    with database.write() as connection:
        for ref in refs:
            name, _, version = ref.partition("@")
            row = {**key_of(name), "version": version, "request_id": deleted}
            there = sa.and_(*(tainted_versions.c[column] == value for column, value in row.items()))
            if connection.execute(sa.select(tainted_versions.c.version).where(there)).first() is None:
                connection.execute(tainted_versions.insert().values(**row, tainted_at=moment))


def tainted_by_entries(database: Database, tenant: str, memory: str) -> dict[str, list[str]]:
    """The versions of a tenant that may know purged entries of its memory, by the entry's id."""
    column = tainted_versions.c.request_id
    query = sa.select(tainted_versions).where(
        tainted_versions.c.tenant == tenant, column.startswith(f"{memory}/", autoescape=True)
    )
    found: dict[str, list[str]] = {}
    with database.read() as connection:
        for row in connection.execute(query.order_by(tainted_versions.c.tainted_at)):
            ref = f"{full_name(row.tenant, row.name)}@{row.version}"
            found.setdefault(row.request_id.rpartition("/")[2], []).append(ref)
    return found


def taints_of(database: Database, name: str) -> dict[str, list[str]]:
    """What was deleted and versions of a name may know, by the version's id: conversations, and entries of memories as `facts/m12`."""
    query = (
        sa.select(tainted_versions).where(*is_name_in(tainted_versions, name)).order_by(tainted_versions.c.tainted_at)
    )
    found: dict[str, list[str]] = {}
    with database.read() as connection:
        for row in connection.execute(query):
            found.setdefault(row.version, []).append(row.request_id)
    return found


def _grown_from(registry: Registry, tenant: str, runs: set[str], learned: set[str]) -> list[str]:
    """The versions of a tenant that these runs made, that learned, or that grew from or stand on one of them."""
    versions = [version for name in registry.names(tenant) for version in registry.versions(name)]
    knows = {version.ref for version in versions if version.ref in learned or _fact(version, "run_id") in runs}
    while True:
        more = {v.ref for v in versions if {_fact(v, "parent"), _fact(v, "base")} & knows} - knows
        if not more:
            return sorted(knows)
        knows |= more


def _fact(version: Version, field: str) -> str | None:
    try:
        value = getattr(version.facts, field)
    except Damaged:
        return None
    return str(value) if value is not None else None


def _wordings_of(conversation: Conversation) -> set[str]:
    """In which forms it may have been studied."""
    examples = examples_of([conversation], Problems()).examples
    return {one for example in examples for one in every_wording(example)}


def _in_any(run: Run, files: Sequence[str], sought: Wanted) -> bool:
    return any(holds(run.path / file, sought, rows_of_runs) for file in files)


def _accepted(database: Database, tenant: str, sought: Wanted) -> tuple[set[str], tuple[int, ...]]:
    """The versions of a tenant that were promoted with a copy, and the numbers of these examples."""
    versions, numbers = set(), []
    with database.read() as connection:
        query = (
            sa.select(accepted_examples).where(accepted_examples.c.tenant == tenant).order_by(accepted_examples.c.id)
        )
        for row in connection.execute(query):
            if sought.is_in(Example.from_json(row.example)):
                versions.add(f"{full_name(row.tenant, row.name)}@{row.version}")
                numbers.append(int(row.id))
    return versions, tuple(numbers)


def _job_folders(home: Home, tenant: str) -> list[Path]:
    folder = home_of(home, tenant).jobs
    return sorted(path for path in folder.iterdir() if is_name(path.name)) if folder.is_dir() else []


def _data_of(folder: Path) -> list[Path]:
    """What came with a job: what it trains, and what is held out."""
    return sorted(folder.glob("*.jsonl"))


def _files(home: Home, tenant: str) -> list[StoredFile]:
    return [file for file in FileStore(home, tenant).ls() if file.purpose == "fine-tune"]


def _cut_plan(run: Run) -> None:
    """Take the examples that a plan shows out of it: they are the first ones, whatever they say."""
    path = run.path / "plan.json"
    if path.is_file():
        plan = read_json(path)
        write_json(path, plan | {key: [] for key in ("loss_masks", "forms", "contradictions") if key in plan})


def _refuse_living(run: Run, request_id: str) -> None:
    if run.status.process_lives:
        raise Conflict(
            f"The run {run.id} is learning {request_id} now. Stop it with nightschool runs stop {run.id}, or wait."
        )


def _refuse_running(running: Sequence[Job], found: Traces) -> None:
    for job in running:
        if job.id in found.jobs:
            raise Conflict(
                f"The job {job.id} is learning {found.request_id} now. Cancel it with nightschool jobs cancel {job.id}, or wait."
            )
