"""The manifest: which files a published folder holds, their sizes and SHA-256 digests, and facts about the whole.

It is written last. A folder without one does not exist; a folder that differs from its manifest is damaged.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from nightschool.errors import Damaged, MadeByNewer, NameRefused, NotFound
from nightschool.events import now
from nightschool.store.atomic import parse_json, write_json
from nightschool.store.names import check_key

MANIFEST = "manifest.json"
_FORMAT = 1


@dataclass(frozen=True)
class FileInfo:
    """What one file was when it was published."""

    sha256: str
    size_bytes: int


@dataclass(frozen=True)
class Manifest:
    """`files` by path relative to the folder, with `/`; `facts` is what the writer wanted to say about the whole."""

    created_at: datetime
    facts: dict[str, Any]
    files: dict[str, FileInfo]

    @property
    def size_bytes(self) -> int:
        """All files together, without the manifest."""
        return sum(file.size_bytes for file in self.files.values())


def write_manifest(folder: Path, **facts: Any) -> Manifest:
    """Describe every file below `folder` in `manifest.json`, durably. `facts` must be plain JSON values.

    Raises:
        Damaged: If the folder holds a link or a special file: a published folder stands on its own.
        DiskFull: If there is no room.
    """
    files = {name: FileInfo(file_sha256(folder / name), (folder / name).stat().st_size) for name in _files_in(folder)}
    return seal(folder, files, facts)


def digests_of(folder: Path) -> dict[str, str]:
    """The SHA-256 of every file below `folder`, as its manifest would have it. Raises Damaged as `write_manifest` does."""
    return {name: file_sha256(folder / name) for name in _files_in(folder)}


def seal(folder: Path, files: dict[str, FileInfo], facts: dict[str, Any]) -> Manifest:
    """Write `manifest.json` with digests that were computed from the bytes as they were written, durably.

    Raises:
        DiskFull: If there is no room.
    """
    manifest = Manifest(now(), facts, dict(sorted(files.items())))
    content = {"format": _FORMAT} | asdict(manifest) | {"created_at": manifest.created_at.isoformat()}
    write_json(folder / MANIFEST, content | {"digest": json_digest(content)})
    return manifest


def read_manifest(folder: Path) -> Manifest:
    """Read what `write_manifest` wrote.

    Raises:
        NotFound: If there is no manifest: then what is in the folder was never finished, and does not exist.
        MadeByNewer: If a newer version of nightschool wrote it.
        Damaged: If the manifest was altered or cut.
    """
    path = folder / MANIFEST
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise NotFound(
            f"{folder} does not exist, or was never finished: it has no {MANIFEST}. List what exists, and choose of it."
        ) from None
    return parse_manifest(content, path)


def parse_manifest(text: bytes, path: Path) -> Manifest:
    """The manifest that lies at `path`. Raises MadeByNewer and Damaged as `read_manifest` does."""
    content = parse_json(text, path)
    stated, actual = content.pop("digest", None), json_digest(content)
    if stated != actual:
        raise Damaged(f"{path} has the digest {actual}, but states {stated}. {_REMEDY}")
    if content.get("format") != _FORMAT:
        raise MadeByNewer(
            f"{path} has the format {content.get('format')!r}, but this version of nightschool reads {_FORMAT}. "
            f"Use the version of nightschool that wrote it."
        )
    try:
        return Manifest(
            created_at=datetime.fromisoformat(content["created_at"]),
            facts=dict(content["facts"]),
            files={
                check_key(name): FileInfo(str(file["sha256"]), int(file["size_bytes"]))
                for name, file in content["files"].items()
            },
        )
    except NameRefused as error:
        raise Damaged(f"{path} lists a file that lies outside its folder: {error} {_REMEDY}") from error
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise Damaged(f"{path} does not have the form of a manifest ({error!r}). {_REMEDY}") from error


def verify(folder: Path, *, digests: bool) -> Manifest:
    """Compare a folder with its manifest: names and sizes, and with `digests` every byte (about a second per GB).

    Raises:
        NotFound: If there is no manifest.
        Damaged: At the first file that is missing, additional, of another size, or altered.
    """
    manifest = read_manifest(folder)
    present = set(_files_in(folder))
    for name, stated in manifest.files.items():
        path = folder / name
        if name not in present:
            raise Damaged(
                f"{path} is missing (0 files), but its manifest lists it with {stated.size_bytes} bytes. {_REMEDY}"
            )
        size_bytes = path.stat().st_size
        if size_bytes != stated.size_bytes:
            raise Damaged(f"{path} has {size_bytes} bytes, but its manifest says {stated.size_bytes}. {_REMEDY}")
    for name in sorted(present - set(manifest.files)):
        raise Damaged(
            f"{folder / name} is additional ({(folder / name).stat().st_size} bytes): its manifest lists "
            f"{len(manifest.files)} files without it. Move it out of the folder; what is published never changes."
        )
    if digests:
        for name, stated in manifest.files.items():
            actual = file_sha256(folder / name)
            if actual != stated.sha256:
                raise Damaged(
                    f"{folder / name} has the SHA-256 {actual}, but its manifest says {stated.sha256}. {_REMEDY}"
                )
    return manifest


_REMEDY = "It was altered after it was published; restore it from a copy, or remove it."


def json_digest(content: dict[str, Any]) -> str:
    """The SHA-256 of plain values, however they are laid out as JSON."""
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(canonical.encode()).hexdigest()


def _files_in(folder: Path) -> list[str]:
    """Relative paths with `/` of all files below a folder, in order, without its own manifest."""
    names = []
    for parent, folders, files in os.walk(folder):
        for name in files + folders:
            path = Path(parent) / name
            if path.is_symlink() or not (path.is_file() or path.is_dir()):
                raise Damaged(
                    f"{path} is a link or a special file, but a published folder holds only files. "
                    f"Put a copy of the file in its place."
                )
        names += [(Path(parent) / name).relative_to(folder).as_posix() for name in files]
    return sorted(name for name in names if name != MANIFEST)


def file_sha256(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal digits. Raises Damaged if it is not there."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except FileNotFoundError:
        raise Damaged(f"{path} vanished while it was read. It was removed by another process; try again.") from None
