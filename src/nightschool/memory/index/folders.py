"""Where the indexes of one memory lie: each encoder with each tokenizer has its own, so that two who ask in turn keep theirs."""

from __future__ import annotations

import contextlib
import re
from hashlib import sha256
from pathlib import Path

from nightschool.errors import Damaged, Locked, NotFound
from nightschool.memory.index.verification import META, Verification
from nightschool.store.atomic import remove_folder

MOST_KEPT = 4
_OURS = re.compile(r"[0-9a-f]{16}")


def index_folder(indexes: Path, encoder: str, tokenizer: str) -> Path:
    """The folder among `indexes` for the index that an encoder makes of what a tokenizer gives, by their identities."""
    return indexes / sha256(f"{encoder}\n{tokenizer}".encode()).hexdigest()[:16]


def keep_newest(indexes: Path, most: int = MOST_KEPT) -> None:
    """Remove all but the indexes that were written last, and the files of the single one that older nightschools kept here.

    Whoever has a removed one open goes on with it; it is made anew when it is next opened.
    """
    for path in indexes.iterdir():
        if path.is_file():
            path.unlink(missing_ok=True)
    written = sorted((path for path in indexes.iterdir() if _OURS.fullmatch(path.name)), key=_written_at)
    for old in written[:-most]:
        # Another process writes it, which makes it no old one, or has removed it already.
        with contextlib.suppress(Locked, FileNotFoundError):
            remove_folder(old)


def damaged_files(indexes: Path) -> list[Path]:
    """The files of all indexes that are not what was written. Reads every byte of them."""
    found = []
    for folder in sorted(indexes.iterdir()) if indexes.is_dir() else ():
        if _OURS.fullmatch(folder.name):
            try:
                with Verification(folder) as verification:
                    damaged = verification.damaged()
            except NotFound:  # it was removed meanwhile
                continue
            except Damaged:
                damaged = META
            if damaged is not None:
                found.append(folder / damaged)
    return found


def _written_at(folder: Path) -> int:
    try:
        return (folder / META).stat().st_mtime_ns
    except FileNotFoundError:
        return 0
