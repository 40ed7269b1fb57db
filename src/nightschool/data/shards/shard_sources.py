"""Where token shards are: a folder, files by a pattern, or a bucket."""

from __future__ import annotations

import glob
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from nightschool.data.shards.remote_shards import open_remote_shards, remote_shards_state
from nightschool.data.shards.shards import (
    INDEX,
    OPEN_SHARDS,
    SHARD_ENDING,
    TOKENIZER_FOLDER,
    LocalShardFiles,
    Shards,
    check_size,
    index_folder,
    index_in_cache,
    read_index,
)
from nightschool.errors import DataError, NotFound
from nightschool.remotes import is_url

_LIMIT_BYTES = 50_000_000_000


@dataclass(frozen=True)
class ShardSource:
    """Shards that are there, and the folder of the tokenizer that lies beside them, if there is one."""

    shards: Shards
    tokenizer_folder: Path | None


def open_shards(
    place: str,
    *,
    root: Path,
    cache: Path,
    max_files: int | None = None,
    eos_token_id: int | None = None,
    group_shards: int = 16,
    limit_bytes: int = _LIMIT_BYTES,
    sizes: bool = True,
) -> ShardSource:
    """Find the shards that a recipe's `data.0.path` names. Reads only their index where there is one.

    Args:
        place: A folder, a pattern, one file, or an address such as gs://bucket/shards.
        root: Where relative paths begin.
        cache: Where indexes of folders that have none, and conversions, are kept.
        max_files: Take so many, in the order of their names.
        eos_token_id: What ends documents in shards whose index does not say it.
        group_shards: So many are read from at a time.
        limit_bytes: What fetched shards may take on disk.
        sizes: Whether files of another size than the index states are refused at once.

    Raises:
        NotFound: If nothing is there.
        DataError: If a file is not a shard.
        Damaged: If a file is not the one that the index describes.
    """
    if is_url(place):
        shards, fetched = open_remote_shards(
            place,
            cache=cache,
            limit_bytes=limit_bytes,
            num_open=group_shards,
            max_files=max_files,
            eos_token_id=eos_token_id,
        )
        return ShardSource(shards, fetched)
    path = root / Path(place).expanduser()
    folder = path if path.is_dir() else path.parent
    if (path / INDEX).is_file():
        index = read_index(path / INDEX).first(max_files)
        for facts in index.shards if sizes else ():
            check_size(path / facts.file, facts)
    else:
        files = _files(path, place, root)[:max_files]
        folder = path if path.is_dir() else _parent(files)
        stats = [[str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns] for file in files]
        index = index_in_cache(
            cache, stats, eos_token_id, lambda: index_folder(folder, files, cache, eos_token_id=eos_token_id)
        )
    tokenizer = folder / TOKENIZER_FOLDER
    num_open = max(group_shards, OPEN_SHARDS)
    shards = Shards(LocalShardFiles(folder, cache), index, num_open=num_open)
    return ShardSource(shards, tokenizer if tokenizer.is_dir() else None)


def is_shard_folder(path: Path) -> bool:
    """Whether this is a folder of token shards."""
    return path.is_dir() and ((path / INDEX).is_file() or any(path.glob(f"*{SHARD_ENDING}")))


def shards_state(place: str, *, root: Path, max_files: int | None = None) -> str:
    """A digest that changes when the shards do, found without reading them. Raises NotFound if there are none."""
    if is_url(place):
        return remote_shards_state(place, max_files)
    path = root / Path(place).expanduser()
    if (path / INDEX).is_file():
        return read_index(path / INDEX).first(max_files).fingerprint
    facts = [
        [file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in _files(path, place, root)[:max_files]
    ]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def _files(path: Path, place: str, root: Path) -> list[Path]:
    if path.is_dir():
        found = sorted(path.glob(f"*{SHARD_ENDING}"))
    elif path.is_file():
        found = [path]
    else:
        found = sorted(Path(one) for one in glob.glob(str(path)) if Path(one).is_file())  # noqa: PTH207 - an absolute pattern
    if not found:
        raise NotFound(
            f"data.0.path: there are no token shards ({SHARD_ENDING}) at {place} in {root}. "
            "Make some with `nightschool data tokenize FILES --out shards/`."
        )
    strange = [one.name for one in found if one.suffix != SHARD_ENDING]
    if strange:
        raise DataError(
            f"data.0.path: {strange[0]} is not a token shard ({SHARD_ENDING}), and method: pretrain learns from shards. "
            "Make some with `nightschool data tokenize FILES --out shards/`, or write method: full."
        )
    return found


def _parent(files: list[Path]) -> Path:
    parents = {file.parent for file in files}
    if len(parents) > 1:
        one, other = sorted(parents)[:2]
        raise DataError(f"data.0.path: shards of one run lie in one folder, and these lie in {one} and {other}.")
    return parents.pop()
