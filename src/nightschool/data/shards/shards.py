"""Token shards: the NPZ files of a folder, and the index that says what is in them.

A folder of shards has an `index.json`, written by `nightschool data tokenize`. For a folder that has none the same is
found out by reading it once, and kept in the cache. `nightschool.data.shards.npz` says what a file may hold.
"""

from __future__ import annotations

import hashlib
import json
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

import numpy as np

from nightschool.data.shards.npz import TokenIds, fingerprint_in, open_tokens
from nightschool.errors import Damaged, DataError, NotFound
from nightschool.store.atomic import json_fault, write_bytes, write_json
from nightschool.store.manifest import file_sha256

INDEX = "index.json"
TOKENIZER_FOLDER = "tokenizer"
SHARD_ENDING = ".npz"
_FORMAT = 1
OPEN_SHARDS = 64
_CHUNK_TOKENS = 1 << 22


@dataclass(frozen=True)
class ShardInfo:
    """One shard as its index states it. `tokens` counts no padding; `max_id` is the largest id in it."""

    file: str
    tokens: int
    documents: int
    max_id: int
    size_bytes: int
    sha256: str


@dataclass(frozen=True)
class ShardIndex:
    """All shards of a folder, by name. `eos_token_id` ends documents; None where nobody has said which one does."""

    shards: tuple[ShardInfo, ...]
    tokenizer_fingerprint: str | None
    vocab_size: int | None
    eos_token_id: int | None
    bytes_per_token: float | None = None

    @property
    def tokens(self) -> int:
        return sum(shard.tokens for shard in self.shards)

    @property
    def fingerprint(self) -> str:
        """SHA-256 over names, contents and order of the shards."""
        facts = [[shard.file, shard.tokens, shard.sha256] for shard in self.shards]
        return hashlib.sha256(json.dumps([facts, self.tokenizer_fingerprint]).encode()).hexdigest()

    def first(self, max_files: int | None) -> ShardIndex:
        """The index of the first `max_files` shards; of all without a number."""
        if max_files is None or max_files >= len(self.shards):
            return self
        return replace(self, shards=self.shards[:max_files])

    def to_json(self) -> dict[str, Any]:
        return {"format": _FORMAT, **asdict(self)}

    @classmethod
    def from_json(cls, plain: dict[str, Any], where: str) -> ShardIndex:
        """Read what `to_json` wrote. Raises Damaged if it does not have that form."""
        if plain.get("format") != _FORMAT:
            raise Damaged(
                f"{where} has the format {plain.get('format')!r}, and this version of nightschool reads {_FORMAT}. "
                "Tokenize again, or use the version that wrote it."
            )
        try:
            shards = tuple(
                ShardInfo(
                    file=_inside(shard["file"]),
                    tokens=int(shard["tokens"]),
                    documents=int(shard["documents"]),
                    max_id=int(shard["max_id"]),
                    size_bytes=int(shard["size_bytes"]),
                    sha256=str(shard["sha256"]),
                )
                for shard in plain["shards"]
            )
            return cls(
                shards,
                plain["tokenizer_fingerprint"],
                plain["vocab_size"],
                plain["eos_token_id"],
                plain.get("bytes_per_token"),
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise Damaged(f"{where} does not have the form of a shard index ({error!r}). Tokenize again.") from None


def read_index(path: Path) -> ShardIndex:
    """The index in this file.

    Raises:
        NotFound: If there is none.
        Damaged: If it is not a shard index.
    """
    try:
        plain = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise NotFound(f"There is no {path}. Make shards with `nightschool data tokenize`.") from None
    except (ValueError, RecursionError) as error:
        raise Damaged(
            f"{path} is not JSON ({json_fault(error)}). Tokenize again, or remove it: it can be made anew."
        ) from None
    if not isinstance(plain, dict):
        raise Damaged(f"{path} holds no JSON object. Tokenize again, or remove it: it can be made anew.")
    return ShardIndex.from_json(plain, str(path))


def check_index(index: ShardIndex, vocab_size: int, where: str) -> None:
    """Refuse shards that this vocabulary cannot read.

    Raises:
        DataError: If an id lies beyond the vocabulary, or there is no token at all.
    """
    if index.tokens == 0:
        raise DataError(f"The shards of {where} hold no tokens. Tokenize some text first.")
    for shard in index.shards:
        if shard.max_id >= vocab_size:
            raise DataError(
                f"{shard.file} of {where} holds the token id {shard.max_id}, and the vocabulary has {vocab_size} ids. "
                "Take the tokenizer that wrote the shard, or tokenize again."
            )


class ShardFiles(Protocol):
    """Where the files of shards are: a folder, or a bucket whose files are fetched when they are needed."""

    @property
    def folder_of_conversions(self) -> Path: ...

    def acquire(self, shard: ShardInfo) -> Path:
        """The file of a shard, on this disk until it is released.

        Raises:
            Conflict: If it was fetched, and does not fit into the cache beside those that are in use.
        """
        ...

    def release(self, shard: ShardInfo) -> None:
        """The shard is mapped no more; its file may go."""
        ...

    def write_conversion(self, path: Path, content: bytes) -> None:
        """Write the plain copy of a shard that cannot be mapped as it is."""
        ...

    def prefetch(self, shards: Sequence[ShardInfo]) -> None:
        """Hear which shards are needed next, in this order."""
        ...


@dataclass(frozen=True)
class LocalShardFiles:
    """Shards in a folder of this machine; conversions of those that cannot be mapped go to a cache."""

    folder: Path
    folder_of_conversions: Path

    def acquire(self, shard: ShardInfo) -> Path:
        return self.folder / shard.file

    def release(self, shard: ShardInfo) -> None:
        """Files of a folder stay."""

    def write_conversion(self, path: Path, content: bytes) -> None:
        write_bytes(path, content)

    def prefetch(self, shards: Sequence[ShardInfo]) -> None:
        """Files of a folder need no fetching."""


class Shards:
    """The tokens of each shard, mapped when they are first asked for.

    Args:
        files: Where the files are.
        index: What they hold.
        num_open: At most so many are mapped at a time.
    """

    def __init__(self, files: ShardFiles, index: ShardIndex, *, num_open: int = OPEN_SHARDS) -> None:
        self.index, self._files, self._num_open = index, files, num_open
        self._open: OrderedDict[int, TokenIds] = OrderedDict()

    def tokens(self, number: int) -> TokenIds:
        """All tokens of shard `number`, one dimension, mapped.

        Raises:
            Damaged: If the file is not the one that the index describes.
            Conflict: If it was fetched, and does not fit into the cache beside those that are in use.
        """
        if number in self._open:
            self._open.move_to_end(number)
            return self._open[number]
        shard = self.index.shards[number]
        path = self._files.acquire(shard)
        check_size(path, shard)
        tokens = open_tokens(
            path,
            self._files.folder_of_conversions,
            shard.sha256,
            self.index.eos_token_id,
            keep=self._files.write_conversion,
        )
        if len(tokens) != shard.tokens:
            raise Damaged(f"{path} holds {len(tokens)} tokens, but its index says {shard.tokens}. {_AGAIN}")
        self._open[number] = tokens
        if len(self._open) > self._num_open:
            self._files.release(self.index.shards[self._open.popitem(last=False)[0]])
        return tokens

    def prefetch(self, numbers: Sequence[int]) -> None:
        """Say which shards are needed next, in this order."""
        self._files.prefetch([self.index.shards[number] for number in numbers])


_AGAIN = "It was altered after it was written; restore it from a copy, or tokenize again."


def check_size(path: Path, facts: ShardInfo) -> None:
    """Raise Damaged if the file is missing or of another size than stated."""
    try:
        size = path.stat().st_size
    except FileNotFoundError:
        raise Damaged(
            f"{path} is missing, but its index lists it. Restore it from a copy, or tokenize again."
        ) from None
    if size != facts.size_bytes:
        raise Damaged(f"{path} has {size} bytes, but its index says {facts.size_bytes}. {_AGAIN}")


def verify_shard(path: Path, facts: ShardInfo) -> None:
    """Compare every byte with the index. Raises Damaged at a difference."""
    check_size(path, facts)
    actual = file_sha256(path)
    if actual != facts.sha256:
        raise Damaged(f"{path} has the SHA-256 {actual}, but its index says {facts.sha256}. {_AGAIN}")


def index_folder(
    folder: Path,
    files: Iterable[Path],
    cache: Path,
    *,
    eos_token_id: int | None,
    keep: Callable[[Path, bytes], None] = write_bytes,
) -> ShardIndex:
    """Find out what an index would say of `files`, by reading them once, one after the other.

    `keep` writes the conversions of those that cannot be mapped into `cache`.

    Raises:
        DataError: If a file is not a shard, or they were written by different tokenizers.
    """
    shards, fingerprints = [], {}
    for path in files:
        digest = file_sha256(path)
        tokens = open_tokens(path, cache, digest, eos_token_id, keep=keep)
        largest, documents = -1, 0
        for start in range(0, len(tokens), _CHUNK_TOKENS):
            chunk = np.asarray(tokens[start : start + _CHUNK_TOKENS])
            if int(chunk.min()) < 0:
                raise DataError(f"{path} holds the token id {int(chunk.min())}; ids begin at 0. Tokenize again.")
            largest = max(largest, int(chunk.max()))
            documents += 0 if eos_token_id is None else int(np.count_nonzero(chunk == eos_token_id))
        fingerprints[path.name] = fingerprint_in(path)
        shards.append(
            ShardInfo(path.relative_to(folder).as_posix(), len(tokens), documents, largest, path.stat().st_size, digest)
        )
    stated = {name: value for name, value in fingerprints.items() if value is not None}
    if len(set(stated.values())) > 1:
        one, *others = stated
        other = next(name for name in others if stated[name] != stated[one])
        raise DataError(
            f"{one} was written with the tokenizer {stated[one][:12]} and {other} with {stated[other][:12]}. "
            "Ids of different tokenizers mean different texts: tokenize all of them with one."
        )
    return ShardIndex(tuple(shards), next(iter(stated.values()), None), None, eos_token_id)


def keep_index(path: Path, index: ShardIndex) -> None:
    """Write an index, at once or not at all."""
    write_json(path, index.to_json())


def index_in_cache(
    cache: Path, facts: list[Any], eos_token_id: int | None, make: Callable[[], ShardIndex]
) -> ShardIndex:
    """The index of a place that has none, made once for the very files that `facts` tell apart from all others."""
    key = hashlib.sha256(json.dumps([facts, eos_token_id]).encode()).hexdigest()[:32]
    kept = cache / f"index-{key}.json"
    if not kept.is_file():
        keep_index(kept, make())
    return read_index(kept)


def _inside(name: str) -> str:
    """A relative path that stays in its folder. Raises ValueError for any other."""
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or path.as_posix() != name or "\\" in name or not name:
        raise ValueError(f"{name!r} lies outside its folder")
    return name
