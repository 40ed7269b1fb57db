"""One shard: the arrays of an NPZ file as one stream of tokens, mapped into memory and never read whole.

A shard has the array `input_ids` [n, L] (or `data`, or `sequences`; one dimension will do) of any integer type, and
perhaps `attention_mask` [n, L] or `sequence_lengths` [n]. Rows without padding are one stream of tokens, cut anywhere;
documents end with the tokenizer's end-of-text token. Members of the zip that are stored uncompressed are mapped where
they lie. Compressed ones, and rows with padding, are converted once to a plain file in the cache.
"""

from __future__ import annotations

import contextlib
import io
import os
import struct
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from nightschool.errors import DataError, NotFound
from nightschool.store.atomic import write_bytes

ID_FIELDS = ("input_ids", "data", "sequences")
FINGERPRINT_FIELD = "tokenizer_fingerprint"
_ZIP_LOCAL_HEADER = struct.Struct("<4s5H3I2H")

TokenIds = NDArray[np.integer[Any]]


def open_tokens(
    path: Path,
    cache: Path,
    digest: str,
    eos_token_id: int | None = None,
    *,
    keep: Callable[[Path, bytes], None] = write_bytes,
) -> TokenIds:
    """The tokens of one NPZ file without its padding, one dimension, mapped.

    Args:
        path: The file.
        cache: Where a converted copy is put if the file cannot be mapped as it is.
        digest: SHA-256 of the file: the name of that copy.
        eos_token_id: What a padded row must end with, as the next row is another document; appended where it is missing.
        keep: Writes the copy.

    Raises:
        DataError: If it is no NPZ file, has no token ids, or they have another type or shape than token ids have.
    """
    converted = cache / f"{digest}-{eos_token_id}.npy"
    # Asked by opening it: another process may drop it at any time.
    with contextlib.suppress(FileNotFoundError):
        os.utime(converted)  # used now, and so dropped last
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
    keep(converted, content.getvalue())
    return open_tokens(path, cache, digest, eos_token_id, keep=keep)


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
        if path.exists() and not path.is_file():
            raise DataError(f"{path} is no regular file, so it is no shard. Copy what it gives into a file.")
        return zipfile.ZipFile(path)
    except FileNotFoundError:
        raise NotFound(f"There is no shard {path}. Restore it from a copy, or tokenize again.") from None
    except (zipfile.BadZipFile, OSError) as error:
        raise DataError(
            f"{path} is not a whole NPZ file ({error}). Restore it from a copy, or tokenize again."
        ) from None


def _header(file: IO[bytes], path: Path, name: str) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """Shape and type of the array whose NPY header `file` is at; the header is read. Refuses pickles."""
    try:
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran_order, dtype = read(file)
    except (ValueError, EOFError, zipfile.BadZipFile, OSError) as error:
        raise DataError(f"The array {name} of {path} cannot be read ({error}). Tokenize again.") from None
    if dtype.hasobject or fortran_order:
        raise DataError(f"The array {name} of {path} is not a plain array in C order. Tokenize again.")
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


def _smallest_type(largest_id: int) -> np.dtype[Any]:
    return np.dtype(np.uint16 if largest_id < 1 << 16 else np.uint32)


def token_type(vocab_size: int) -> np.dtype[Any]:
    """The smallest type that holds every id of a vocabulary."""
    return _smallest_type(vocab_size - 1)
