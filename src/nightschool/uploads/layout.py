"""What lies where in a bucket, and the pointer to the newest checkpoint.

<url>/<run id>/<checkpoint>/…      the files of a checkpoint; it exists when its manifest.json does
<url>/<run id>/LATEST.json         the newest checkpoint of that run
<url>/LATEST.json                  the newest checkpoint of the newest run
<url>/<checkpoint>.tar.gz          an archive, which names no run: give each run an address of its own
"""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import asdict, dataclass

from nightschool.errors import Conflict, Damaged, MadeByNewer, NameRefused, NotFound
from nightschool.remotes.remote import Remote
from nightschool.store.manifest import json_digest
from nightschool.store.names import check_key

LATEST = "LATEST.json"
ARCHIVE = ".tar.gz"
_FORMAT = 1
_ATTEMPTS = 20


@dataclass(frozen=True)
class Pointer:
    """Where the newest checkpoint is. `key` is relative to the address; `digest` is the SHA-256 of its manifest."""

    run_id: str
    name: str
    key: str
    step: int
    attempt: int
    digest: str
    updated_at: str

    @property
    def order(self) -> tuple[str, str, int, int]:
        """Later is greater. A run's id ends with when it began; clocks of machines are asked for nothing else."""
        name, _, stamp = self.run_id.rpartition("-")
        return stamp, name, self.attempt, self.step


def read_pointer(remote: Remote, key: str = LATEST) -> Pointer | None:
    """A pointer, or None if there is none.

    Raises:
        Damaged: If it has not the form of a pointer.
        MadeByNewer: If a newer nightschool wrote it.
    """
    try:
        return _parse(remote.url_of(key), remote.read(key, most_bytes=1 << 16).data)
    except NotFound:
        return None


def _parse(where: str, content: bytes) -> Pointer:
    try:
        plain = json.loads(content)
        if plain.pop("format") != _FORMAT:
            raise MadeByNewer(f"{where} was written by a newer nightschool. Use that version.")
        # Without its own digest, one that was altered on its way could point ahead of all that follow.
        stated, actual = plain.pop("sha256"), json_digest(plain)
        if stated != actual:
            raise ValueError(f"it has the SHA-256 {actual}, but states {stated}")
        pointer = Pointer(**plain)
        check_key(pointer.key)
        return pointer
    except (ValueError, TypeError, KeyError, AttributeError, NameRefused) as error:
        raise Damaged(
            f"{where} is not a pointer to a checkpoint ({error}). Remove it, or name the checkpoint that you want."
        ) from error


def move_pointer(remote: Remote, key: str, pointer: Pointer) -> bool:
    """Point to a checkpoint unless a later one is there. Returns whether it did.

    Raises:
        Conflict: If others keep moving it, which is no reason to doubt the checkpoint itself.
    """
    plain = asdict(pointer)
    content = (json.dumps({"format": _FORMAT, **plain, "sha256": json_digest(plain)}, indent=2) + "\n").encode()
    for attempt in range(_ATTEMPTS):
        try:
            found = remote.read(key, most_bytes=1 << 16)
        except NotFound:
            etag = None
        else:
            etag = found.etag
            with suppress(Damaged):  # one that cannot be read points nowhere
                present = _parse(remote.url_of(key), found.data)
                if present.order >= pointer.order:
                    return present.digest == pointer.digest
        try:
            remote.compare_and_swap(key, content, etag)
        except Conflict:
            if attempt == _ATTEMPTS - 1:
                raise
        else:
            return True
    return False


def made_when(manifest: bytes) -> str:
    """When a checkpoint was made, and at which step, for a person who must choose between two."""
    try:
        plain = json.loads(manifest)
        return f"made {plain['created_at']}, step {plain['facts'].get('step', '?')}"
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return "whose manifest cannot be read"
