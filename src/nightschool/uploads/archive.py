"""`.tar.gz` archives of checkpoints: made the same way each time, and unpacked without trust."""

from __future__ import annotations

import gzip
import tarfile
from pathlib import Path

from nightschool.errors import Damaged, NameRefused
from nightschool.store.atomic import make_folder, replacing, room_needed
from nightschool.store.names import check_key, path_below

# Weights hardly shrink at any level; the quickest one is enough.
_LEVEL = 1
_MOST_FILES = 10_000


def make_archive(folder: Path, target: Path) -> None:
    """Pack a folder; its files lie in the archive below its name. Equal folders make equal archives.

    Raises:
        DiskFull: If there is no room; nothing of the target remains.
    """
    with (
        replacing(target) as handle,
        open(handle, "wb", closefd=False) as raw,
        gzip.GzipFile(filename="", mode="wb", compresslevel=_LEVEL, fileobj=raw, mtime=0) as packed,
        tarfile.open(fileobj=packed, mode="w", format=tarfile.PAX_FORMAT) as archive,
    ):
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                facts = tarfile.TarInfo(f"{folder.name}/{path.relative_to(folder).as_posix()}")
                facts.size = path.stat().st_size
                with path.open("rb") as file:
                    archive.addfile(facts, file)


def unpack_archive(archive: Path, folder: Path) -> str:
    """Unpack the one folder that an archive holds into `folder`, which exists and is empty; returns its name.

    Raises:
        Damaged: If it is no such archive, or holds an absolute path, `..`, a link, a device, or several folders.
        DiskFull: If there is no room.
    """
    names: set[str] = set()
    num_files = 0
    with room_needed(folder):
        try:
            with tarfile.open(archive, mode="r|gz") as packed:
                for member in packed:
                    num_files += 1
                    if num_files > _MOST_FILES:
                        raise Damaged(f"{archive.name} holds more than {_MOST_FILES} files. It is not a checkpoint.")
                    parts = _checked(archive, member)
                    names.add(parts[0])
                    if len(names) > 1:
                        raise Damaged(
                            f"{archive.name} holds several folders ({', '.join(sorted(names))}), but a checkpoint is "
                            f"one. Unpack it yourself, and look."
                        )
                    if not member.isfile():
                        continue
                    if len(parts) == 1:
                        raise Damaged(f"{archive.name} holds {member.name!r} outside a folder. It is not a checkpoint.")
                    target = path_below(folder, "/".join(parts[1:]))
                    make_folder(target.parent)
                    source = packed.extractfile(member)
                    assert source is not None, "it is a file"
                    with target.open("xb") as file:
                        while chunk := source.read(1 << 20):
                            file.write(chunk)
        except (tarfile.TarError, EOFError, gzip.BadGzipFile, FileExistsError) as error:
            raise Damaged(f"{archive.name} cannot be unpacked ({error}). Take another copy.") from error
    if not names:
        raise Damaged(f"{archive.name} is empty. Take another copy.")
    return names.pop()


def _checked(archive: Path, member: tarfile.TarInfo) -> list[str]:
    """The parts of a member's path.

    Raises:
        Damaged: If it could leave the folder, or is anything but a file or a folder.
    """
    if not (member.isfile() or member.isdir()):
        raise Damaged(
            f"{archive.name} holds {member.name!r}, a link or a device; a checkpoint holds only files. "
            f"Nothing of it was unpacked where it could be used."
        )
    name = member.name.removeprefix("./").rstrip("/")
    try:
        return check_key(name).split("/")
    except NameRefused as error:
        raise Damaged(
            f"{archive.name} holds {member.name!r}, which would lie outside its folder. "
            f"Nothing of it was unpacked where it could be used."
        ) from error
