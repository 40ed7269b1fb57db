"""`nightschool data tokenize`: text → token shards."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from nightschool.cli.output import answer, note
from nightschool.errors import UsageError
from nightschool.store.home import Home
from nightschool.units import format_bytes, parse_tokens


def tokenize(
    *files: str,
    tokenizer: str,
    out: Path,
    row_tokens: Annotated[str, Parameter(help="Tokens of a row of the arrays.")] = "1024",
    shard_tokens: Annotated[str, Parameter(help="Tokens of a shard.")] = "10m tokens",
) -> None:
    """Turn text into token shards, which `method: pretrain` learns from.

    Every text file is one document; of JSON, JSONL, CSV and Parquet every row is one, its text in the field `text`. Each
    document is followed by the end-of-text token. Interrupted, the same command goes on where it stopped.

    Args:
        files: Files, folders or patterns.
        tokenizer: `train:bpe-8192` trains one on these files; else a folder, a GGUF file or a hub id.
        out: The folder of the shards.
        row_tokens: Tokens of a row of the arrays.
        shard_tokens: Tokens of a shard.
    """
    from nightschool.data.shards.shards import TOKENIZER_FOLDER, ShardInfo
    from nightschool.data.shards.tokenize import TRAIN_PREFIX, has_begun, train_tokenizer
    from nightschool.data.shards.tokenize import tokenize as write_shards
    from nightschool.data.sources.rows import expand
    from nightschool.models.load import find_tokenizer, load_tokenizer

    if not files:
        raise UsageError("There is nothing to tokenize. Write nightschool data tokenize FILES --tokenizer … --out DIR.")
    found = [path for pattern in files for path in expand(pattern, Path.cwd(), "FILES")]
    started = time.perf_counter()
    kept = out / TOKENIZER_FOLDER
    if tokenizer.startswith(TRAIN_PREFIX):
        there = load_tokenizer(kept, str(kept)) if kept.is_dir() and has_begun(out) else None
        if there is not None and tokenizer == f"{TRAIN_PREFIX}{len(there)}":
            note(f"Going on with the tokenizer of {kept}")
            chosen = there
        else:  # few texts may have given fewer entries than asked for; the same texts give the same again
            note(f"Training a tokenizer on {len(found)} files")
            chosen = train_tokenizer(found, tokenizer)
    else:
        chosen = find_tokenizer(tokenizer, Home.find(), Path.cwd())

    def on_shard(facts: ShardInfo) -> None:
        note(f"{facts.file}: {facts.tokens:,} tokens of {facts.documents:,} documents")

    done = write_shards(
        found,
        out,
        chosen,
        row_tokens=_count(row_tokens, "--row-tokens"),
        shard_tokens=_count(shard_tokens, "--shard-tokens"),
        on_shard=on_shard,
    )
    seconds, index = time.perf_counter() - started, done.index
    size = sum(shard.size_bytes for shard in index.shards)
    documents = sum(shard.documents for shard in index.shards)
    data = {
        "folder": str(out),
        "shards": len(index.shards),
        "written": done.written,
        "tokens": index.tokens,
        "documents": documents,
        "vocab_size": index.vocab_size,
        "bytes_per_token": index.bytes_per_token,
        "size_bytes": size,
        "tokenizer_fingerprint": index.tokenizer_fingerprint,
        "seconds": seconds,
    }
    answer(
        data,
        lambda: (
            f"{out}: {len(index.shards)} shards ({done.written} written now), {index.tokens:,} tokens of "
            f"{documents:,} documents, {index.bytes_per_token:.2f} bytes of text a token, {format_bytes(size)}, "
            f"in {seconds:.1f} s"
        ),
        quiet=str(index.tokens),
    )


def _count(text: str, option: str) -> int:
    try:
        count = parse_tokens(text)
    except ValueError as error:
        raise UsageError(f"{option}: {error}.") from None
    if count < 2:
        raise UsageError(f"{option} is {count}; a row has two tokens or more.")
    return count
