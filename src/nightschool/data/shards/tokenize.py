"""Text → token shards: `nightschool data tokenize`.

Documents are tokenized in order, each is followed by the end-of-text token, and the stream is cut into rows and the rows
into shards. How far it came is written beside the shards after each one, so that a run that was killed goes on with the
next shard and ends with the same bytes as one that was not.

The tokenizer works on many pieces at once, on all cores, without holding the interpreter.
"""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from nightschool.data.shards.npz import FINGERPRINT_FIELD, token_type
from nightschool.data.shards.shards import (
    INDEX,
    SHARD_ENDING,
    TOKENIZER_FOLDER,
    ShardIndex,
    ShardInfo,
    keep_index,
    read_index,
)
from nightschool.data.sources.formats import FORMATS
from nightschool.data.sources.rows import kind_of, read_rows
from nightschool.data.sources.text_input import open_data, text_chunks
from nightschool.data.tokenizer import END_OF_TEXT, train_bpe
from nightschool.errors import Conflict, DataError, UsageError
from nightschool.store.atomic import publish_directory, read_json, room_needed, write_bytes, write_json
from nightschool.store.locks import lock
from nightschool.store.manifest import file_sha256

PROGRESS = "progress.json"
LOCK = ".lock"
TRAIN_PREFIX = "train:bpe-"
DEFAULT_ROW_TOKENS, DEFAULT_SHARD_TOKENS = 1024, 10_000_000  # as `data tokenize` has it
# A long document is tokenized in pieces of about this many characters, cut after a line end, where a token ends, too.
_PIECE_CHARACTERS = 1 << 18
_PIECES_AT_ONCE = 32
_TEXT_FIELDS = ("text", "content", "document")


@dataclass(frozen=True)
class Piece:
    """A part of a document; `ends_document` says that the end-of-text token follows."""

    text: str
    ends_document: bool


@dataclass(frozen=True)
class Tokenized:
    """What a call did: the index of all shards, and how many of them it wrote itself."""

    folder: Path
    index: ShardIndex
    written: int
    resumed: int


@dataclass
class _Progress:
    """Where the next shard begins: so many pieces are in shards, and so many tokens of the one after them."""

    settings: str
    pieces: int
    tokens_of_piece: int
    shards: list[dict[str, Any]]
    text_bytes: int


def tokenize(
    files: Sequence[Path],
    out: Path,
    tokenizer: PreTrainedTokenizerBase,
    *,
    row_tokens: int = DEFAULT_ROW_TOKENS,
    shard_tokens: int = DEFAULT_SHARD_TOKENS,
    on_shard: Callable[[ShardInfo], None] | None = None,
) -> Tokenized:
    """Write the shards of `files` to the folder `out`, or go on with what another call began there.

    Args:
        files: Text, JSON, JSONL, CSV or Parquet, in this order. A text file is one document, a row of the others is one.
        out: The folder of the shards; made if it is not there.
        tokenizer: A fast one, with an end-of-text token; saved beside the shards.
        row_tokens: Tokens of a row.
        shard_tokens: Tokens of a shard; rounded down to whole rows.
        on_shard: Told of every shard that was written.

    Raises:
        Conflict: If `out` holds shards of other files, of another tokenizer, or of other sizes.
        DataError: If a file cannot be read, or holds what is no text.
        UsageError: If the tokenizer is not a fast one, or has no token that ends a text.
        DiskFull: If there is no room; the shards that were written stay, and the same call goes on with them.
        Locked: If another process writes to `out`.
    """
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise UsageError(f"{type(tokenizer).__name__} is not a fast tokenizer. Take one that has a tokenizer.json.")
    eos = end_of_text_id(tokenizer)
    with lock(out / LOCK, f"the shards in {out}"):
        return _tokenize(files, out, tokenizer, eos, row_tokens, shard_tokens, on_shard)


def _tokenize(
    files: Sequence[Path],
    out: Path,
    tokenizer: PreTrainedTokenizerFast,
    eos: int,
    row_tokens: int,
    shard_tokens: int,
    on_shard: Callable[[ShardInfo], None] | None,
) -> Tokenized:
    per_shard = max(1, shard_tokens // row_tokens) * row_tokens
    fingerprint = tokenizer_fingerprint(tokenizer)
    settings = _settings_digest(files, fingerprint, row_tokens, per_shard)
    progress = _begin(out, settings)
    if progress is not None and not progress.shards:
        # Before anything else is in the folder: whatever a killed call leaves there is known to be ours.
        write_json(out / PROGRESS, asdict(progress))
    if not (out / TOKENIZER_FOLDER).is_dir():
        with publish_directory(out / TOKENIZER_FOLDER) as partial:
            tokenizer.save_pretrained(str(partial))
    if progress is None:
        index = read_index(out / INDEX)
        return Tokenized(out, index, written=0, resumed=len(index.shards))
    resumed = len(progress.shards)
    stream = _Stream(tokenizer, eos, islice(_pieces(files), progress.pieces, None), progress)
    # A vocabulary may have gaps, and then its largest id is beyond its length.
    dtype = token_type(1 + max(cast(Any, tokenizer).get_vocab().values()))
    while True:
        tokens = stream.take(per_shard, dtype)
        if not len(tokens):
            break
        number = len(progress.shards)
        facts = write_shard(out / f"tokens_{number:05d}{SHARD_ENDING}", tokens, row_tokens, eos, fingerprint)
        progress.shards.append(asdict(facts))
        progress.pieces, progress.tokens_of_piece, progress.text_bytes = stream.place()
        write_json(out / PROGRESS, asdict(progress))
        if on_shard is not None:
            on_shard(facts)
    if not progress.shards:
        raise DataError(f"The {len(files)} files hold no text. Name files with text in them.")
    shards = tuple(ShardInfo(**shard) for shard in progress.shards)
    total = sum(shard.tokens for shard in shards)
    index = ShardIndex(shards, fingerprint, len(tokenizer), eos, bytes_per_token=progress.text_bytes / total)
    keep_index(out / INDEX, index)
    write_json(out / PROGRESS, asdict(progress) | {"finished": True})
    return Tokenized(out, index, written=len(shards) - resumed, resumed=resumed)


def has_begun(out: Path) -> bool:
    """Whether a call has written shards to this folder already, with the tokenizer that lies there."""
    return (out / PROGRESS).is_file() and bool(read_json(out / PROGRESS).get("shards"))


def train_tokenizer(files: Sequence[Path], spec: str) -> PreTrainedTokenizerFast:
    """The tokenizer that `train:bpe-SIZE` means, trained on the files.

    Raises:
        UsageError: If the size is not a number, or too small.
    """
    size = spec.removeprefix(TRAIN_PREFIX)
    if not (size.isascii() and size.isdigit()):
        raise UsageError(f"{spec!r} names no size. Write for example {TRAIN_PREFIX}8192.")
    try:
        return train_bpe((piece.text for piece in _pieces(files)), int(size), eos_token=END_OF_TEXT)
    except ValueError as error:
        raise UsageError(f"--tokenizer {spec}: {error}.") from None


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerFast) -> str:
    """SHA-256 of all that decides which ids a text gets."""
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    # How much was padded or cut last time is in there, too, and belongs to no text.
    facts = {key: value for key, value in backend.items() if key not in ("padding", "truncation")}
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def end_of_text_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id that ends a document: `<|endoftext|>` where the tokenizer has it, else its own end-of-sequence token.

    Raises:
        UsageError: If it has none.
    """
    known = cast(Any, tokenizer).get_vocab()
    if END_OF_TEXT in known:
        return int(known[END_OF_TEXT])
    eos = cast(Any, tokenizer).eos_token_id
    if eos is None:
        raise UsageError(
            "The tokenizer has neither <|endoftext|> nor an end-of-sequence token, and documents have to end. "
            "Set eos_token in its tokenizer_config.json."
        )
    return int(eos)


def write_shard(path: Path, tokens: NDArray[Any], row_tokens: int, eos: int, fingerprint: str) -> ShardInfo:
    """Write one shard, at once or not at all.

    `input_ids` [n, L] lies uncompressed in it, so that it can be mapped; `attention_mask` [n, L] and `sequence_lengths`
    [n] are compressed to almost nothing.
    """
    rows = -(-len(tokens) // row_tokens)
    ids = np.full(rows * row_tokens, eos, dtype=tokens.dtype)
    ids[: len(tokens)] = tokens
    lengths = np.full(rows, row_tokens, dtype=np.int32)
    lengths[-1] = len(tokens) - row_tokens * (rows - 1)
    mask = (np.arange(row_tokens) < lengths[:, None]).astype(np.int32)
    arrays: list[tuple[str, NDArray[Any], int]] = [
        ("input_ids", ids.reshape(rows, row_tokens), zipfile.ZIP_STORED),
        ("attention_mask", mask, zipfile.ZIP_DEFLATED),
        ("sequence_lengths", lengths, zipfile.ZIP_DEFLATED),
        (FINGERPRINT_FIELD, np.array(fingerprint), zipfile.ZIP_DEFLATED),
    ]
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        for name, array, compression in arrays:
            # A fixed moment, so that the same tokens make the same bytes.
            entry = zipfile.ZipInfo(f"{name}.npy", date_time=(1980, 1, 1, 0, 0, 0))
            entry.compress_type = compression
            with archive.open(entry, "w", force_zip64=True) as file:
                np.lib.format.write_array(file, np.ascontiguousarray(array), version=(1, 0), allow_pickle=False)
    with room_needed(path):
        write_bytes(path, content.getvalue())
    return ShardInfo(
        file=path.name,
        tokens=len(tokens),
        documents=int(np.count_nonzero(tokens == eos)),
        max_id=int(tokens.max()),
        size_bytes=path.stat().st_size,
        sha256=file_sha256(path),
    )


class _Stream:
    """The tokens of all pieces, handed out in shards; knows at which token of which piece it is."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerFast, eos: int, pieces: Iterator[Piece], progress: _Progress
    ) -> None:
        self._backend = tokenizer.backend_tokenizer
        # `<|endoftext|>` in a text is text: only we end documents.
        self._backend.encode_special_tokens = True
        # Tokenizers of encoders come with both, and would keep the first 512 tokens of each piece.
        self._backend.no_truncation()
        self._backend.no_padding()
        self._eos, self._pieces = eos, pieces
        self._done, self._taken, self._bytes = progress.pieces, 0, progress.text_bytes
        self._ready: list[tuple[NDArray[Any], int]] = []
        self._skip = progress.tokens_of_piece

    def take(self, count: int, dtype: np.dtype[Any]) -> NDArray[Any]:
        """The next `count` tokens, fewer at the end of all text."""
        parts, missing = [], count
        while missing and (self._ready or self._refill()):
            tokens, size_bytes = self._ready[0]
            part = tokens[self._taken : self._taken + missing]
            parts.append(part.astype(dtype))
            self._taken += len(part)
            missing -= len(part)
            if self._taken == len(tokens):
                self._ready.pop(0)
                self._done, self._taken, self._bytes = self._done + 1, 0, self._bytes + size_bytes
        return np.concatenate(parts) if parts else np.zeros(0, dtype=dtype)

    def place(self) -> tuple[int, int, int]:
        """Whole pieces that were handed out, tokens of the next one, bytes of text of the whole ones."""
        return self._done, self._taken, self._bytes

    def _refill(self) -> bool:
        pieces = list(islice(self._pieces, _PIECES_AT_ONCE))
        encoded = self._backend.encode_batch_fast([piece.text for piece in pieces], add_special_tokens=False)
        for piece, encoding in zip(pieces, encoded, strict=True):
            ids = [*encoding.ids, self._eos] if piece.ends_document else encoding.ids
            self._ready.append((np.array(ids, dtype=np.int64), len(piece.text.encode())))
        if pieces and self._skip:
            self._taken, self._skip = self._skip, 0
        return bool(pieces)


def _begin(out: Path, settings: str) -> _Progress | None:
    """What was done here before; None if all of it was.

    Raises:
        Conflict: If it was something else.
    """
    path = out / PROGRESS
    if not path.is_file():
        strangers = sorted(found.name for found in out.iterdir() if found.suffix == SHARD_ENDING or found.name == INDEX)
        if strangers:
            raise Conflict(f"{out} holds {strangers[0]}, which was not written here. Write to an empty folder.")
        return _Progress(settings, 0, 0, [], 0)
    plain = read_json(path)
    finished = plain.pop("finished", False)
    progress = _Progress(**plain)
    if progress.settings != settings and not progress.shards:
        # It ended before its first shard, perhaps because of the very files: nothing is lost by beginning again.
        shutil.rmtree(out / TOKENIZER_FOLDER, ignore_errors=True)
        return _Progress(settings, 0, 0, [], 0)
    if progress.settings != settings:
        raise Conflict(
            f"{out} holds {len(progress.shards)} shards of other files, of another tokenizer, or of other sizes. "
            "Write to another folder, or remove that one."
        )
    return None if finished and (out / INDEX).is_file() else progress


def _settings_digest(files: Sequence[Path], fingerprint: str, row_tokens: int, per_shard: int) -> str:
    facts = []
    for path in files:
        open_data(path).close()  # says what is wrong where it cannot be read
        facts.append([path.name, file_sha256(path)])
    return hashlib.sha256(json.dumps([facts, fingerprint, row_tokens, per_shard]).encode()).hexdigest()


def _pieces(files: Sequence[Path]) -> Iterator[Piece]:
    for path in files:
        if kind_of(path, str(path)) == "text":
            yield from _cut(text_chunks(path, str(path)))
        else:
            for row in read_rows(path):
                yield from _cut(iter([_text_of(row)]))


def _text_of(row: Any) -> str:
    for name in _TEXT_FIELDS:
        if isinstance(text := row.fields.get(name), str):
            try:
                text.encode()
            except UnicodeEncodeError as error:
                raise DataError(
                    f"{row.where}: '{name}' holds half a character ({text[error.start]!a}) at place {error.start}. "
                    "Write the whole one."
                ) from None
            return text
    raise DataError(
        f"{row.where}: a row has its text in {', '.join(_TEXT_FIELDS)}, and this one has {', '.join(row.fields) or 'nothing'}. "
        f"Rename the field. (Conversations are studied without shards: {', '.join(FORMATS)}.)"
    )


def _cut(chunks: Iterator[str]) -> Iterator[Piece]:
    """One document in pieces. A cut is after a line end that no white space follows: no token reaches across it.

    A text without such a line end in its last `_PIECE_CHARACTERS` is cut anywhere; then a token or two are shorter.
    """
    rest = ""
    for chunk in chunks:
        rest += chunk
        while len(rest) > 2 * _PIECE_CHARACTERS:
            at = _line_end(rest)
            yield Piece(rest[:at], ends_document=False)
            rest = rest[at:]
    if rest:
        yield Piece(rest, ends_document=True)


def _line_end(text: str) -> int:
    at = text.find("\n", _PIECE_CHARACTERS)
    while 0 <= at < len(text) - 1:
        if not text[at + 1].isspace():
            return at + 1
        at = text.find("\n", at + 1)
    return _PIECE_CHARACTERS
