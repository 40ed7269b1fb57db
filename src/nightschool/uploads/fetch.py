"""Bring a checkpoint from a bucket to a run of this home: verified by its manifest, and there as a whole or not at all."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from nightschool.errors import Conflict, Damaged, NameRefused, NightschoolError, NotFound, Unreachable, UsageError
from nightschool.events import now
from nightschool.remotes import open_remote
from nightschool.remotes.remote import Remote
from nightschool.store.atomic import make_folder, publish_directory, write_bytes, write_json
from nightschool.store.checkpoints import Checkpoint, parse_checkpoint
from nightschool.store.home import Home
from nightschool.store.locks import lock
from nightschool.store.manifest import MANIFEST, read_manifest, verify
from nightschool.store.names import check_full_name, full_name, is_stamp, path_below, split_name, stamp_of
from nightschool.store.runs import Run, RunStatus, RunStore
from nightschool.units import format_bytes
from nightschool.uploads.archive import unpack_archive
from nightschool.uploads.layout import ARCHIVE, made_when, read_pointer

Say = Callable[[str], None]

_WAIT_SECONDS = 3600.0
_SHOWN = 5


@dataclass(frozen=True)
class Located:
    """A checkpoint in a bucket. `run_id` is None where nothing there tells it."""

    remote: Remote
    key: str
    name: str
    run_id: str | None

    @property
    def is_archive(self) -> bool:
        return self.key.endswith(ARCHIVE)

    @property
    def url(self) -> str:
        return self.remote.url_of(self.key)


def locate(url: str, name: str = "latest") -> Located:
    """Find a checkpoint below an address: by `latest`, by its name, by `RUN/NAME`, or where the address itself ends.

    Raises:
        NotFound: If there is none.
        UsageError: If several runs have one of that name.
        BucketMissing, CredentialsRefused, Unreachable: As the store says.
    """
    remote = open_remote(url)
    parent, last = remote.address.parent
    if parse_checkpoint(Path(last.removesuffix(ARCHIVE))) is not None:
        above, run = parent.parent
        if name not in ("latest", last, last.removesuffix(ARCHIVE)):
            raise UsageError(f"{url} is one checkpoint, but {name!r} is asked for. Name the folder above it.")
        if last.endswith(ARCHIVE):
            return _existing(Located(open_remote(str(parent)), last, last, None))
        if _is_run_id(run):
            return _existing(Located(open_remote(str(above)), f"{run}/{last}", last, run))
        return _existing(Located(open_remote(str(parent)), last, last, None))
    if name == "latest":
        return _latest(remote, last)
    bare = name.removesuffix(ARCHIVE).rpartition("/")[2]
    if parse_checkpoint(Path(bare)) is None:
        raise NotFound(
            f"{name!r} is not a name of a checkpoint, which reads checkpoint-epoch…-step…-files…. "
            f"List what is in {url}: nightschool uploads ls --at {url}."
        )
    found = [one for one in ls_remote(remote) if name in (one.name, one.key, one.key.removesuffix(ARCHIVE))]
    if not found:
        raise NotFound(f"There is no checkpoint {name} in {url}. List them: nightschool uploads ls --at {url}.")
    if len(found) > 1:
        keys = ", ".join(one.key for one in found[:_SHOWN])
        raise UsageError(f"{len(found)} checkpoints in {url} are named {name}: {keys}. Name one as RUN/CHECKPOINT.")
    return found[0]


def ls_remote(remote: Remote) -> list[Located]:
    """The checkpoints and archives in a bucket, in order of their steps."""
    found = []
    for one in remote.list():
        folder, _, last = one.key.rpartition("/")
        if last == MANIFEST:
            key, name = folder, folder.rpartition("/")[2]
        elif last.endswith(ARCHIVE):
            key, name = one.key, last
        else:
            continue
        point = parse_checkpoint(Path(name.removesuffix(ARCHIVE)))
        run = key.rpartition("/")[0].rpartition("/")[2] or remote.address.parent[1]
        if point is not None:
            found.append((point.step, Located(remote, key, name, run if _is_run_id(run) else None)))
    return [located for _, located in sorted(found, key=lambda pair: (pair[0], pair[1].key))]


def fetch_checkpoint(home: Home, url: str, name: str = "latest", *, say: Say) -> tuple[Run, Checkpoint]:
    """Bring a checkpoint into its run of this home, which is made if it is not there.

    A transfer that breaks off goes on where it was, also in a later process.

    Raises:
        Conflict: If the run has another checkpoint of this name; both are shown.
        Damaged: If what the bucket holds is not what its manifest says.
        NotFound, UsageError, BucketMissing, CredentialsRefused, Unreachable: As `locate` does.
        DiskFull: If there is no room; nothing of it appears.
    """
    located = locate(url, name)
    staging = home.cache / "downloads" / path_below(Path(), located.url.replace("/", "_").replace(":", "_")[-200:])
    make_folder(staging)
    with lock(staging.with_name(staging.name + ".lock"), f"the download of {located.url}", wait_seconds=_WAIT_SECONDS):
        folder = _unpacked(located, staging, say) if located.is_archive else _fetched(home, located, staging, say)
        run = _run_for(home, located, folder)
        checkpoint = run.checkpoints_path / located.name.removesuffix(ARCHIVE)
        if checkpoint.exists():
            _refuse_another(located, checkpoint, folder)
        else:
            with publish_directory(checkpoint) as partial:
                for file in read_manifest(folder).files:
                    target = path_below(partial, file)
                    make_folder(target.parent)
                    shutil.move(folder / file, target)
                shutil.copyfile(folder / MANIFEST, partial / MANIFEST)
        shutil.rmtree(staging)
    point = parse_checkpoint(checkpoint)
    assert point is not None, "its name was checked"
    return run, point


def refuse_another_in_bucket(run: Run, checkpoint: Checkpoint, url: str, *, say: Say) -> None:
    """Refuse a checkpoint of which the bucket has another of the same name. What cannot be asked is only said.

    Raises:
        Conflict: If both exist and differ; both are shown.
    """
    try:
        remote = open_remote(url)
        theirs = remote.read(f"{run.id}/{checkpoint.name}/{MANIFEST}").data
    except NotFound:
        return
    except NightschoolError as error:
        if isinstance(error, Unreachable | Conflict):
            say(f"Not compared with the bucket: {error}")
            return
        raise
    mine = (checkpoint.path / MANIFEST).read_bytes()
    if theirs != mine:
        raise _conflict(checkpoint.path, mine, remote.url_of(f"{run.id}/{checkpoint.name}"), theirs)


def _latest(remote: Remote, last: str) -> Located:
    pointer = read_pointer(remote)
    if pointer is not None:
        run_id = pointer.run_id if _is_run_id(pointer.run_id) else None
        return _existing(Located(remote, pointer.key, pointer.key.rpartition("/")[2], run_id))
    # A bucket that others filled has no pointer; the highest step is what they call the latest.
    every = ls_remote(remote)
    if not every:
        raise NotFound(f"There is no checkpoint in {remote.url}. Check the address; it may be of {last or 'a bucket'}.")
    return every[-1]


def _existing(located: Located) -> Located:
    key = located.key if located.is_archive else f"{located.key}/{MANIFEST}"
    if not located.remote.exists(key):
        raise NotFound(
            f"There is no checkpoint {located.url}: it has no manifest, or does not exist. List what is there with "
            f"nightschool uploads ls --at {located.remote.url}."
        )
    return located


def _fetched(home: Home, located: Located, staging: Path, say: Say) -> Path:
    """Fetch the files of a checkpoint into the staging folder, unless the run has it already."""
    content = located.remote.read(f"{located.key}/{MANIFEST}").data
    write_bytes(staging / MANIFEST, content)
    manifest = read_manifest(staging)
    if located.run_id is not None and (RunStore(home).at(located.run_id).checkpoints_path / located.name).exists():
        return staging  # compared by the caller
    say(f"Downloading {located.url} ({format_bytes(manifest.size_bytes)})")
    for name, facts in manifest.files.items():
        target = path_below(staging, name)
        if target.exists() and target.stat().st_size == facts.size_bytes:
            continue  # what has its name was verified
        located.remote.get_to_file(f"{located.key}/{name}", target, sha256=facts.sha256, size_bytes=facts.size_bytes)
    return staging


def _unpacked(located: Located, staging: Path, say: Say) -> Path:
    archive = staging / located.name
    if not archive.exists():
        say(f"Downloading {located.url}")
        located.remote.get_to_file(located.key, archive)
    folder = staging / "unpacked"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    try:
        unpack_archive(archive, folder)
        verify(folder, digests=True)
    except NotFound:
        raise Damaged(
            f"{located.url} holds no {MANIFEST}, so nothing tells whether it is whole. If accelerate wrote it, "
            f"unpack and import it."
        ) from None
    except Damaged:
        archive.unlink()  # fetched again at the next try
        raise
    return folder


def _run_for(home: Home, located: Located, folder: Path) -> Run:
    """The run that the checkpoint belongs to: the one of its id, or a new one with the recipe that it carries."""
    manifest = read_manifest(folder)
    run_id, recipe = located.run_id, folder / "recipe.yaml"
    if run_id is not None and "/" not in run_id and recipe.is_file():
        # In a bucket, the folder above a run may be its tenant or any other; the recipe knows.
        run_id = full_name(split_name(_name_in(home, recipe, located))[0], run_id)
    if run_id is not None and RunStore(home).at(run_id).status_path.is_file():
        return RunStore(home).get(run_id)
    if not recipe.is_file():
        raise Damaged(f"{located.url} holds no recipe.yaml, so no run can be made of it. Take another checkpoint.")
    if run_id is None:
        run_id = f"{_name_in(home, recipe, located)}-{stamp_of(manifest.created_at)}"
    run = RunStore(home).at(run_id)
    if run.status_path.is_file():
        return run
    step = manifest.facts.get("step")
    status = RunStatus(
        run_id=run_id,
        name=run.name,
        state="interrupted",
        step=step if isinstance(step, int) else 0,
        finished_at=now().isoformat(),
    )
    with publish_directory(run.path) as partial:
        shutil.copyfile(recipe, partial / run.recipe_path.name)
        (partial / run.checkpoints_path.name).mkdir()
        write_json(partial / run.status_path.name, asdict(status))
    return run


def _name_in(home: Home, recipe: Path, located: Located) -> str:
    name = Run("", recipe.parent, home).recipe().get("name")
    if not isinstance(name, str):
        raise Damaged(f"The recipe.yaml of {located.url} has no name. Take another checkpoint.")
    return check_full_name(name)


def _refuse_another(located: Located, checkpoint: Path, folder: Path) -> None:
    mine, theirs = (checkpoint / MANIFEST).read_bytes(), (folder / MANIFEST).read_bytes()
    if mine != theirs:
        raise _conflict(checkpoint, mine, located.url, theirs)
    verify(checkpoint, digests=True)


def _conflict(path: Path, mine: bytes, url: str, theirs: bytes) -> Conflict:
    return Conflict(
        f"{path} ({made_when(mine)}) and {url} ({made_when(theirs)}) have one name and differ. "
        f"Remove or rename one of the two, or name the other by its address."
    )


def _is_run_id(text: str) -> bool:
    name, _, stamp = text.rpartition("-")
    try:
        return is_stamp(stamp) and bool(check_full_name(name))
    except NameRefused:
        return False
