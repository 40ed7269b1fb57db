"""Token shards: tokenized text in NPZ files, mapped into memory and never read whole.

A shard has the array `input_ids` [n, L] (or `data`, or `sequences`; one dimension will do) of any integer type, and
perhaps `attention_mask` [n, L] or `sequence_lengths` [n]. Rows without padding are one stream of tokens, cut anywhere;
documents end with the tokenizer's end-of-text token. Members of the zip that are stored uncompressed are mapped where
they lie. Compressed ones, and rows with padding, are converted once to a plain file in the cache.

A folder of shards has an `index.json`, written by `nightschool data tokenize`. For a folder that has none the same is
found out by reading it once, and kept in the cache.
"""

from __future__ import annotations

import hashlib
import io
import json
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from nightschool.errors import Damaged, DataError, NotFound
from nightschool.store.atomic import write_bytes, write_json

INDEX = "index.json"
TOKENIZER_FOLDER = "tokenizer"
SHARD_ENDING = ".npz"
ID_FIELDS = ("input_ids", "data", "sequences")
FINGERPRINT_FIELD = "tokenizer_fingerprint"
_FORMAT = 1
OPEN_SHARDS = 64
_ZIP_LOCAL_HEADER = struct.Struct("<4s5H3I2H")
_CHUNK_TOKENS = 1 << 22

TokenIds = NDArray[np.integer[Any]]


@dataclass(frozen=True)
class ShardFacts:
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

    shards: tuple[ShardFacts, ...]
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
        return ShardIndex(
            self.shards[:max_files],
            self.tokenizer_fingerprint,
            self.vocab_size,
            self.eos_token_id,
            self.bytes_per_token,
        )

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
                ShardFacts(
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
        Damaged: If it is no shard index.
    """
    try:
        plain = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise NotFound(f"There is no {path}. Make shards with `nightschool data tokenize`.") from None
    except ValueError as error:
        raise Damaged(f"{path} is no JSON ({error}). Tokenize again, or remove it: it can be made anew.") from None
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


class Shards:
    """The tokens of each shard, mapped when they are first asked for.

    Args:
        folder: Where the files are.
        index: What they hold.
        cache: Where conversions are kept.
        num_open: At most so many are mapped at a time.
    """

    def __init__(self, folder: Path, index: ShardIndex, cache: Path, *, num_open: int = OPEN_SHARDS) -> None:
        self.folder, self.index, self._cache, self._num_open = folder, index, cache, num_open
        self._open: OrderedDict[int, TokenIds] = OrderedDict()

    def path(self, number: int) -> Path:
        """Where the file of a shard is."""
        return self.folder / self.index.shards[number].file

    def tokens(self, number: int) -> TokenIds:
        """All tokens of shard `number`, one dimension, mapped.

        Raises:
            Damaged: If the file is not the one that the index describes.
        """
        if number in self._open:
            self._open.move_to_end(number)
            return self._open[number]
        self._opened(number)
        facts, path = self.index.shards[number], self.path(number)
        check_size(path, facts)
        tokens = open_tokens(path, self._cache, facts.sha256, self.index.eos_token_id)
        if len(tokens) != facts.tokens:
            raise Damaged(f"{path} holds {len(tokens)} tokens, but its index says {facts.tokens}. {_AGAIN}")
        self._open[number] = tokens
        if len(self._open) > self._num_open:
            self._closed(self._open.popitem(last=False)[0])
        return tokens

    def look_ahead(self, numbers: Sequence[int]) -> None:
        """Hear which shards are needed next, in this order. For those that have to be fetched."""

    def _opened(self, number: int) -> None:
        """A shard is about to be mapped."""

    def _closed(self, number: int) -> None:
        """A shard is mapped no more."""


_AGAIN = "It was altered after it was written; restore it from a copy, or tokenize again."


def check_size(path: Path, facts: ShardFacts) -> None:
    """Raise Damaged if the file is missing or of another size than stated."""
    try:
        size = path.stat().st_size
    except FileNotFoundError:
        raise Damaged(
            f"{path} is missing, but its index lists it. Restore it from a copy, or tokenize again."
        ) from None
    if size != facts.size_bytes:
        raise Damaged(f"{path} has {size} bytes, but its index says {facts.size_bytes}. {_AGAIN}")


def verify_shard(path: Path, facts: ShardFacts) -> None:
    """Compare every byte with the index. Raises Damaged at a difference."""
    check_size(path, facts)
    actual = sha256_of(path)
    if actual != facts.sha256:
        raise Damaged(f"{path} has the SHA-256 {actual}, but its index says {facts.sha256}. {_AGAIN}")


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def open_tokens(path: Path, cache: Path, digest: str, eos_token_id: int | None = None) -> TokenIds:
    """The tokens of one NPZ file without its padding, one dimension, mapped.

    Args:
        path: The file.
        cache: Where a converted copy is put if the file cannot be mapped as it is.
        digest: SHA-256 of the file: the name of that copy.
        eos_token_id: What a padded row must end with, as the next row is another document; appended where it is missing.

    Raises:
        DataError: If it is no NPZ file, has no token ids, or they have another type or shape than token ids have.
    """
    converted = cache / f"{digest}-{eos_token_id}.npy"
    if converted.is_file():
        mapped: TokenIds = np.load(converted, mmap_mode="r", allow_pickle=False)
        return mapped
    with _opened(path) as archive:
        name = id_field(archive, path)
        ids = _mapped(archive, path, name)
        lengths = _lengths(archive, path, ids.shape if ids is not None else _shape(archive, path, name))
        if ids is not None:
            flat = ids.reshape(-1)
            if lengths is None:
                return flat
            row = ids.shape[-1]
            if (lengths[:-1] == row).all():  # only the end of the last row is padding
                return flat[: row * (len(lengths) - 1) + int(lengths[-1])]
        rows = ids if ids is not None else _loaded(archive, path, name)
    if lengths is None:
        flat = rows.reshape(-1)
    else:
        flat = np.concatenate(list(_documents(rows.reshape(len(lengths), -1), lengths, eos_token_id)))
    smallest, largest = int(flat.min(initial=0)), int(flat.max(initial=0))
    if smallest < 0 or largest >= 1 << 32:
        strange = smallest if smallest < 0 else largest
        raise DataError(f"{path} holds the token id {strange}; ids are numbers from 0 to 2³² - 1. Tokenize again.")
    content = io.BytesIO()
    np.save(content, flat.astype(_smallest_type(largest)), allow_pickle=False)
    write_bytes(converted, content.getvalue())
    return open_tokens(path, cache, digest, eos_token_id)


def index_folder(
    folder: Path, files: Iterable[Path], cache: Path, *, eos_token_id: int | None, vocab_size: int | None
) -> ShardIndex:
    """Find out what an index would say of `files`, by reading them once, one after the other.

    Raises:
        DataError: If a file is no shard, or they were written by different tokenizers.
    """
    shards, fingerprints = [], {}
    for path in files:
        digest = sha256_of(path)
        tokens = open_tokens(path, cache, digest, eos_token_id)
        largest, documents = -1, 0
        for start in range(0, len(tokens), _CHUNK_TOKENS):
            chunk = np.asarray(tokens[start : start + _CHUNK_TOKENS])
            if int(chunk.min()) < 0:
                raise DataError(f"{path} holds the token id {int(chunk.min())}; ids begin at 0. Tokenize again.")
            largest = max(largest, int(chunk.max()))
            documents += 0 if eos_token_id is None else int(np.count_nonzero(chunk == eos_token_id))
        fingerprints[path.name] = fingerprint_in(path)
        shards.append(
            ShardFacts(
                path.relative_to(folder).as_posix(), len(tokens), documents, largest, path.stat().st_size, digest
            )
        )
    stated = {name: value for name, value in fingerprints.items() if value is not None}
    if len(set(stated.values())) > 1:
        one, *others = stated
        other = next(name for name in others if stated[name] != stated[one])
        raise DataError(
            f"{one} was written with the tokenizer {stated[one][:12]} and {other} with {stated[other][:12]}. "
            "Ids of different tokenizers mean different texts: tokenize all of them with one."
        )
    return ShardIndex(tuple(shards), next(iter(stated.values()), None), vocab_size, eos_token_id)


def keep_index(path: Path, index: ShardIndex) -> None:
    """Write an index, at once or not at all."""
    write_json(path, index.to_json())


def fingerprint_in(path: Path) -> str | None:
    """The fingerprint of the tokenizer that a shard says it was written with."""
    with _opened(path) as archive:
        if f"{FINGERPRINT_FIELD}.npy" not in archive.namelist():
            return None
        value = _loaded(archive, path, FINGERPRINT_FIELD)
    return str(value.reshape(-1)[0])


def id_field(archive: zipfile.ZipFile, path: Path) -> str:
    """Which array of the file holds the token ids. Raises DataError, naming what there is, if none does."""
    names = [name.removesuffix(".npy") for name in archive.namelist() if name.endswith(".npy")]
    for name in ID_FIELDS:
        if name in names:
            return name
    raise DataError(
        f"{path} has no array {' or '.join(ID_FIELDS)}; it has {', '.join(names) or 'none'}. Tokenize again."
    )


def _opened(path: Path) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(path)
    except FileNotFoundError:
        raise NotFound(f"There is no shard {path}. Restore it from a copy, or tokenize again.") from None
    except (zipfile.BadZipFile, OSError) as error:
        raise DataError(f"{path} is no whole NPZ file ({error}). Restore it from a copy, or tokenize again.") from None


def _header(file: IO[bytes], path: Path, name: str) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """Shape and type of the array whose NPY header `file` is at; the header is read. Refuses pickles."""
    try:
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran_order, dtype = read(file)
    except (ValueError, EOFError, zipfile.BadZipFile, OSError) as error:
        raise DataError(f"The array {name} of {path} cannot be read ({error}). Tokenize again.") from None
    if dtype.hasobject or fortran_order:
        raise DataError(f"The array {name} of {path} is no plain array in C order. Tokenize again.")
    if name in ID_FIELDS and (dtype.kind not in "iu" or not 1 <= len(shape) <= 3):
        raise DataError(
            f"The array {name} of {path} has the type {dtype} and {len(shape)} dimensions; token ids are whole numbers "
            "in one to three dimensions. Tokenize again."
        )
    return shape, dtype


def _shape(archive: zipfile.ZipFile, path: Path, name: str) -> tuple[int, ...]:
    with archive.open(f"{name}.npy") as file:
        shape, _ = _header(file, path, name)
    return _two_dimensions(shape)


def _two_dimensions(shape: tuple[int, ...]) -> tuple[int, ...]:
    return (int(np.prod(shape[:-1])), shape[-1]) if len(shape) == 3 else shape


def _mapped(archive: zipfile.ZipFile, path: Path, name: str) -> TokenIds | None:
    """The array mapped where it lies in the file; None if it is compressed."""
    entry = archive.getinfo(f"{name}.npy")
    if entry.compress_type != zipfile.ZIP_STORED:
        return None
    with path.open("rb") as file:
        file.seek(entry.header_offset)
        local = _ZIP_LOCAL_HEADER.unpack(file.read(_ZIP_LOCAL_HEADER.size))
        file.seek(local[9] + local[10], 1)
        shape, dtype = _header(file, path, name)
        offset = file.tell()
    shape = _two_dimensions(shape)
    if offset + int(np.prod(shape)) * dtype.itemsize > path.stat().st_size:
        raise DataError(f"{path} ends before its array {name} does. Restore it from a copy, or tokenize again.")
    if not np.prod(shape):
        return np.zeros(shape, dtype=dtype)
    return np.memmap(path, dtype=dtype, mode="r", offset=offset, shape=shape)


def _loaded(archive: zipfile.ZipFile, path: Path, name: str) -> NDArray[Any]:
    try:
        with archive.open(f"{name}.npy") as file:
            array: NDArray[Any] = np.lib.format.read_array(file, allow_pickle=False)
    except (ValueError, EOFError, zipfile.BadZipFile, OSError) as error:
        raise DataError(f"The array {name} of {path} cannot be read ({error}). Tokenize again.") from None
    return array.reshape(_two_dimensions(array.shape)) if array.ndim else array


def _lengths(archive: zipfile.ZipFile, path: Path, shape: tuple[int, ...]) -> NDArray[np.int64] | None:
    """Tokens of each row without padding; None if no row has any."""
    names = archive.namelist()
    num_rows, row_tokens = shape if len(shape) == 2 else (1, shape[0])
    if "sequence_lengths.npy" in names and len(shape) == 2:
        lengths = _loaded(archive, path, "sequence_lengths").reshape(-1).astype(np.int64)
    elif "attention_mask.npy" in names:
        mask = np.atleast_2d(_loaded(archive, path, "attention_mask") != 0)
        lengths = mask.sum(-1).astype(np.int64)
        if not (mask == (np.arange(mask.shape[1]) < lengths[:, None])).all():
            raise DataError(
                f"{path} has padding before tokens: its attention_mask has ones after zeros. Pad on the right, or not at all."
            )
    else:
        return None
    if len(lengths) != num_rows or (len(lengths) and not 0 <= int(lengths.min()) <= int(lengths.max()) <= row_tokens):
        raise DataError(
            f"{path} has {num_rows} rows of {row_tokens} tokens, and lengths of {len(lengths)} rows between "
            f"{int(lengths.min(initial=0))} and {int(lengths.max(initial=0))}. Tokenize again."
        )
    return None if (lengths == row_tokens).all() else lengths


def _documents(rows: TokenIds, lengths: NDArray[np.int64], eos_token_id: int | None) -> Iterator[TokenIds]:
    """The rows without padding. A full row may have been cut, so only a padded one is known to be at its end."""
    for row, length in zip(rows, lengths.tolist(), strict=True):
        yield row[:length]
        if eos_token_id is not None and 0 < length < len(row) and int(row[length - 1]) != eos_token_id:
            yield np.array([eos_token_id], dtype=np.uint32)  # the rows may be of a type that is too small for it


def _inside(name: str) -> str:
    """A relative path that stays in its folder. Raises ValueError for any other."""
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or path.as_posix() != name or "\\" in name or not name:
        raise ValueError(f"{name!r} lies outside its folder")
    return name


def _smallest_type(largest_id: int) -> np.dtype[Any]:
    return np.dtype(np.uint16 if largest_id < 1 << 16 else np.uint32)


def token_type(vocab_size: int) -> np.dtype[Any]:
    """The smallest type that holds every id of a vocabulary."""
    return _smallest_type(vocab_size - 1)
