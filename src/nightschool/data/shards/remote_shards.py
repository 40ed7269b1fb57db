"""Token shards in a bucket: fetched ahead of their use, verified, kept on disk within a limit."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from itertools import accumulate
from pathlib import Path

from nightschool.data.shards.shards import (
    INDEX,
    SHARD_ENDING,
    TOKENIZER_FOLDER,
    ShardInfo,
    Shards,
    index_folder,
    index_in_cache,
    read_index,
)
from nightschool.errors import NotFound
from nightschool.remotes import ObjectInfo, Remote, open_remote
from nightschool.remotes.cache import FileCache


class RemoteShardFiles:
    """Shards in a bucket. One that is mapped stays on disk; others may be dropped for those that come next."""

    def __init__(self, remote: Remote, files: FileCache, prefetch_bytes: int) -> None:
        self.folder_of_conversions = files.folder_of_made
        self._remote, self._files, self._prefetch_bytes = remote, files, prefetch_bytes

    def acquire(self, shard: ShardInfo) -> Path:
        return self._files.fetch(self._remote, shard.file, shard.sha256, pin=True)

    def release(self, shard: ShardInfo) -> None:
        self._files.unpin(self._files.path_of(self._remote, shard.file))

    def write_conversion(self, path: Path, content: bytes) -> None:
        self._files.keep(path, content)

    def prefetch(self, shards: Sequence[ShardInfo]) -> None:
        # What is fetched beyond the limit would drop what is needed before it.
        together = accumulate(shard.size_bytes for shard in shards)
        wanted = [shard for shard, size in zip(shards, together, strict=True) if size <= self._prefetch_bytes]
        self._files.prefetch(self._remote, [one.file for one in wanted], {one.file: one.sha256 for one in wanted})


def open_remote_shards(
    url: str,
    *,
    cache: Path,
    limit_bytes: int,
    num_open: int,
    max_files: int | None = None,
    eos_token_id: int | None = None,
) -> tuple[Shards, Path | None]:
    """The shards below an address, and the folder that their tokenizer was fetched to, if there is one.

    A place without an index is fetched once as a whole to find out what is in it.

    Raises:
        NotFound: If there are no shards.
        CredentialsRefused, BucketMissing, Unreachable: As the store answers.
    """
    remote = open_remote(url)
    listed = sorted(remote.list(), key=lambda found: found.key)
    files = FileCache(cache / "fetched", limit_bytes)
    names = {found.key for found in listed}
    if INDEX in names:
        index = read_index(files.fetch(remote, INDEX)).first(max_files)
    else:
        shards = _shards_in(listed, url)[:max_files]
        folder = files.path_of(remote, shards[0].key).parent
        index = index_in_cache(
            cache,
            [[remote.url, one.key, one.size_bytes, one.etag] for one in shards],
            eos_token_id,
            lambda: index_folder(
                folder,
                _one_by_one(remote, shards, files),
                files.folder_of_made,
                eos_token_id=eos_token_id,
                keep=files.keep,
            ),
        )
    tokenizer = None
    for key in sorted(name for name in names if name.startswith(f"{TOKENIZER_FOLDER}/")):
        tokenizer = files.fetch(remote, key, pin=True).parent
    beside = sum(found.size_bytes for found in listed if not found.key.endswith(SHARD_ENDING))
    return Shards(RemoteShardFiles(remote, files, limit_bytes - beside), index, num_open=num_open), tokenizer


def remote_shards_state(url: str, max_files: int | None) -> str:
    """A digest that changes when the shards do, from the listing alone."""
    listed = sorted(open_remote(url).list(), key=lambda found: found.key)
    facts = [[found.key, found.size_bytes, found.etag] for found in _shards_in(listed, url)[:max_files]]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def _shards_in(listed: Sequence[ObjectInfo], url: str) -> list[ObjectInfo]:
    found = [one for one in listed if one.key.endswith(SHARD_ENDING) and "/" not in one.key]
    if not found:
        raise NotFound(
            f"data.0.path: there are no token shards ({SHARD_ENDING}) at {url}, only {len(listed)} other objects. "
            "Check the address, or upload what `nightschool data tokenize` writes."
        )
    return found


def _one_by_one(remote: Remote, shards: Sequence[ObjectInfo], files: FileCache) -> Iterator[Path]:
    """Each is fetched when it is read, and may go afterwards: all together may be more than the cache holds."""
    for one in shards:
        path = files.fetch(remote, one.key, pin=True)
        try:
            yield path
        finally:
            files.unpin(path)
