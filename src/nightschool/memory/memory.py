"""A memory as those who ask it see it: the store, its index, and the encoder that leads from one to the other.

    memory = Memory.open(memory_path(home, "facts"), encoder, vocabulary)
    [finding] = memory.find(["Where does Ada live?"], k=4)

An entry is data, whatever it says: it is found and shown, and never obeyed.
"""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Self

import numpy as np
import numpy.typing as npt

from nightschool.errors import Conflict, Damaged, Locked, NotFound
from nightschool.events import now
from nightschool.memory.encoders.encoder import AddressEncoder
from nightschool.memory.encoders.names import ACCEPTED, Question, Vocabulary
from nightschool.memory.entry import MemoryEntry
from nightschool.memory.facts.retractions import is_retraction
from nightschool.memory.following import Follower
from nightschool.memory.index.files import open_index, save_index
from nightschool.memory.index.folders import index_folder, keep_newest
from nightschool.memory.index.index import MemoryIndex
from nightschool.memory.index.rescoring import Lines
from nightschool.memory.index.verification import Verification
from nightschool.memory.lines import lines_of
from nightschool.memory.store import MemoryStore
from nightschool.memory.store.purge import INDEX_FOLDER
from nightschool.store.atomic import folder_bytes

log = logging.getLogger("nightschool.memory")

Floats = npt.NDArray[np.float32]
_TokensOfEntry = tuple[tuple[int, ...], tuple[tuple[int, ...], tuple[int, ...]] | None, int]

# A trained head's cosine of subjects that is as good as a name that stands in the question.
_TRUSTED_COSINE = 0.9
_RELATION_WEIGHT = 0.5
# Rows beyond those of the files from which on the index is written again, as a share of them.
_WORTH_WRITING = 0.25
_TOKENS_KEPT = 65_536
# Bytes of an index whose checksums are compared when it is opened: a tenth of a second.
_QUICKLY_READ = 64 << 20
# Tokens of the longest entry: the store takes 4,000 characters.
_WHOLE = 4096


@dataclass(frozen=True)
class Found:
    """An entry that a question means. `tokens` are those of its text as it stands within a sentence; `memory` is whose it is.

    `id` is the entry's, with the name of its memory before it where that is not the one that was asked.
    `address` are the tokens of its subject and of its relation, None where these cannot be told; `asked` are those of the
    question, in the spellings in which it was looked for. `told` is how many of the entry's tokens come before its value, 0 where
    that cannot be told.
    """

    entry: MemoryEntry
    score: float
    subject_cosine: float
    relation_cosine: float
    tokens: tuple[int, ...]
    memory: str
    id: str
    address: tuple[tuple[int, ...], tuple[int, ...]] | None = None
    asked: tuple[tuple[int, ...], ...] = ()
    told: int = 0


@dataclass(frozen=True)
class Findings:
    """What was found for a question at a revision, best first. Empty where the memory knows nothing of it.

    `revisions`: of each memory that was looked at, by its label, where several lie over one another.
    """

    revision: int
    found: tuple[Found, ...]
    revisions: tuple[tuple[str, int], ...]

    @property
    def abstains(self) -> bool:
        return not self.found


class Memory:
    """A memory that can be asked. For all threads of a process.

    `rebuilt` says why the index was made anew, or None. The bytes of a large index are compared with their checksums by a thread, while
    the memory is asked already: in a second for a million entries.
    """

    def __init__(
        self,
        store: MemoryStore,
        encoder: AddressEncoder,
        vocabulary: Vocabulary,
        *,
        on_purge: Callable[[], None] = lambda: None,
    ) -> None:
        self.store, self.encoder = store, encoder
        self._on_purge = on_purge
        self.rebuilt: str | None = None
        self._damaged: set[int] = set()
        self._vocabulary = vocabulary
        self._follower = Follower(store, encoder, vocabulary)
        self._made_of = {"store": store.identity, "encoder": encoder.identity, "tokenizer": vocabulary.digest}
        self._lock = threading.RLock()
        self._tokens: OrderedDict[int, _TokensOfEntry] = OrderedDict()
        self._past: tuple[int, MemoryIndex] | None = None
        self._verification: Verification | None = None
        self._index = self._opened()
        self._written = self._index.columns.length
        self.refresh()
        if self._verification is not None:
            threading.Thread(
                target=self._verify, args=(self._verification,), name=f"verify-{self.name}", daemon=True
            ).start()

    @classmethod
    def open(
        cls,
        folder: Path,
        encoder: AddressEncoder,
        vocabulary: Vocabulary,
        *,
        on_purge: Callable[[], None] = lambda: None,
    ) -> Self:
        """Open a memory. Its index is made if it is not there, is damaged, or was made of something else.

        Args:
            folder: Of the memory.
            encoder: What makes addresses.
            vocabulary: Of the base that reads the entries.
            on_purge: Called when entries are seen to have been purged, by whichever process: for whoever keeps something of them.

        Raises:
            NotFound: If there is no such memory.
        """
        return cls(MemoryStore.open(folder), encoder, vocabulary, on_purge=on_purge)

    @property
    def name(self) -> str:
        return self.store.folder.name

    @property
    def index_folder(self) -> Path:
        """Where the index lies that this encoder makes with this tokenizer."""
        return index_folder(self.store.folder / INDEX_FOLDER, self.encoder.identity, self._vocabulary.digest)

    @property
    def revision(self) -> int:
        """The revision that the next question sees."""
        return self._index.revision

    def refresh(self) -> int:
        """Follow what was written, here or by other processes. Returns the newest revision."""
        newest = self.store.revision
        if newest == self._index.revision:
            return newest
        purged = 0
        with self._lock:
            if newest > self._index.revision:
                purged = self._follower.follow(self._index, newest)
                if self._follower.is_outgrown(self._index):
                    self._index = self._follower.build(newest)
                if purged:
                    self._tokens.clear()
                    self._past = None
                grown = self._index.columns.length - self._written
                if purged or grown > _WORTH_WRITING * max(self._written, 1024):
                    self._write()
        if purged:
            self._on_purge()
        return self._index.revision

    def find(
        self,
        texts: Sequence[str],
        k: int = 16,
        *,
        at: int | None = None,
        moment: datetime | None = None,
    ) -> list[Findings]:
        """The entries that each question means; none where no entry is about what it names.

        Args:
            texts: Questions.
            k: How many entries at most.
            at: Look at this revision; None is the newest.
            moment: Leave out what does not hold at this time in the world; None is now.

        Raises:
            NotFound: If there is no revision `at`.
        """
        if not texts:
            return []
        revision = self.store.revision_at(at) if at is not None else self.refresh()
        moment = moment or now()
        questions = [self._vocabulary.question(text) for text in texts]
        told = ((self.name, revision),)
        return [Findings(revision, tuple(found), told) for found in self._found(questions, k, revision, moment)]

    def save(self) -> None:
        """Write the index, if it is not as it lies on the disk."""
        with self._lock:
            self._write()

    def take_keys(self, codebooks: Floats) -> npt.NDArray[np.int64]:
        """Make the index with these product keys [2, K, half], unit vectors, and write it. Returns how many entries lie in each cell that has some.

        They stay until there are four times the entries, when keys are fitted anew; another process that has the memory open
        goes on with its own index.

        Raises:
            Locked: If another process is writing the index.
            ValueError: If their width is not that of the encoder's addresses.
        """
        if codebooks.shape[2] * 2 != self.encoder.knowledge_dim:
            raise ValueError(f"keys of {codebooks.shape[2]} numbers for halves of {self.encoder.knowledge_dim // 2}")
        with self._lock:
            self._index = self._follower.build(self.store.revision, codebooks)
            save_index(self._index, self.index_folder, self._made_of)
            self._written = self._index.columns.length
            columns = self._index.columns
            return np.unique(columns.cells[: columns.length], return_counts=True)[1]

    def close(self) -> None:
        """Write the index if it has grown much, and give the store's connections back."""
        if self._verification is not None:
            self._verification.stop()
        with self._lock:
            if self._index.columns.length > self._written and self._is_there():
                # What was purged meanwhile, or while it is written, must not come back with it.
                self.refresh()
                self._write()
                self.refresh()
        self.store.close()

    def _is_there(self) -> bool:
        """Whether the memory was neither deleted nor made anew under its name."""
        try:
            return self.store.identity == self._made_of["store"]
        except NotFound:
            return False

    def _found(self, questions: list[Question], k: int, revision: int, moment: datetime) -> list[list[Found]]:
        subjects, relations = self.encoder.encode_queries([question.text for question in questions])
        rescorer = _Words(self.encoder, self._vocabulary, self.store, questions, subjects, relations)
        index = self._index_of(revision)
        tokens = [question.tokens for question in questions]
        hits = index.search(subjects, relations, tokens, k, revision, rescorer=rescorer)
        accepted = hits.subject_cosines >= ACCEPTED
        entries = dict(zip(rows := hits.rows[accepted].tolist(), self.store.rows(rows), strict=True))
        results = []
        for question in range(len(questions)):
            found = []
            asked = tuple(tuple(spelling.tokens.tolist()) for spelling in questions[question].spellings)
            for place in np.flatnonzero(accepted[question]).tolist():
                entry = entries[int(hits.rows[question, place])]
                if entry is not None and entry.damaged:
                    self._tell_damage(entry)
                elif entry is not None and _holds(entry, moment) and not is_retraction(entry):
                    numbers = (hits.scores, hits.subject_cosines, hits.relation_cosines)
                    score, subject, relation = (float(one[question, place]) for one in numbers)
                    text, address, told = self._tokens_of(entry)
                    found.append(
                        Found(entry, score, subject, relation, text, self.name, entry.id, address, asked, told)
                    )
            results.append(found)
        return results

    def _tell_damage(self, entry: MemoryEntry) -> None:
        with self._lock:
            is_new = entry.row not in self._damaged
            self._damaged.add(entry.row)
        if is_new:
            log.warning("The memory %r leaves an entry out of what is found. %s", self.name, entry.damage)

    def _index_of(self, revision: int) -> MemoryIndex:
        """The index, or for what was before its horizon one that is made for that revision, and kept until another is asked for."""
        with self._lock:
            if revision >= self._index.horizon:
                return self._index
            if self._past is None or self._past[0] != revision:
                self._past = (revision, self._follower.build(revision))
            return self._past[1]

    def _tokens_of(self, entry: MemoryEntry) -> _TokensOfEntry:
        """Of the text, and of subject and relation if they are known; and how many of the text come before its value."""
        with self._lock:
            tokens = self._tokens.get(entry.row)
            if tokens is None:
                known = []
                if entry.subject is not None:
                    before = entry.text[: max(0, entry.text.rfind(entry.value or ""))]
                    known = [entry.subject, entry.relation or "", before]
                text, *parts = (tuple(ids) for ids in self._vocabulary.tokens_of([entry.text, *known]))
                tokens = text, (parts[0], parts[1]) if parts else None, len(parts[2]) if parts else 0
                self._tokens[entry.row] = tokens
                if len(self._tokens) > _TOKENS_KEPT:
                    self._tokens.popitem(last=False)
            return tokens

    def _opened(self) -> MemoryIndex:
        # Who made no index yet expects none; one that is of no use any more is told.
        level = logging.WARNING
        try:
            # A small index is read whole at once, so that a flipped bit is found; a large one while it is asked already.
            is_small = _bytes_of(self.index_folder) <= _QUICKLY_READ
            index = open_index(self.index_folder, self._made_of, verify=is_small)
            if not is_small:
                self._verification = Verification(self.index_folder)
            if index.revision <= self.store.revision:
                return index
            self.rebuilt = f"the index is of revision {index.revision}, which the store does not have"
        except NotFound:
            self.rebuilt, level = "there was none", logging.INFO
        except (Conflict, Damaged) as error:
            self.rebuilt = str(error)
        log.log(level, "The index of the memory %r is made anew: %s", self.name, self.rebuilt)
        self._index = self._follower.build(self.store.revision)
        self._write()
        return self._index

    def _verify(self, verification: Verification) -> None:
        """Make the index anew if it is not what was written; who asks meanwhile waits."""
        with verification:
            damaged = verification.damaged()
        if damaged is None:
            return
        with self._lock:
            if not self._is_there():
                return
            self.rebuilt = f"{self.index_folder / damaged} is not what was written: its checksum differs."
            log.warning("The index of the memory %r is made anew: %s", self.name, self.rebuilt)
            self._index, self._past = self._follower.build(self.store.revision), None
            self._write()

    def _write(self) -> None:
        try:
            save_index(self._index, self.index_folder, self._made_of)
            keep_newest(self.index_folder.parent)
        except Locked:
            log.info("Another process is writing the index of the memory %r; this one goes on with its own", self.name)
        self._written = self._index.columns.length


class _Words:
    """Scores finalists by the words of a question, and by what the encoder says of them."""

    certain, relation_weight = ACCEPTED, _RELATION_WEIGHT

    def __init__(
        self,
        encoder: AddressEncoder,
        vocabulary: Vocabulary,
        store: MemoryStore,
        questions: list[Question],
        subjects: Floats,
        relations: Floats,
    ) -> None:
        self._encoder, self._vocabulary, self._store = encoder, vocabulary, store
        self._asked = (questions, subjects, relations)

    def __call__(self, lines: Lines) -> tuple[Floats, Floats]:
        questions, subjects, relations = self._asked
        lines = self._whole(lines)
        by_address, of_relations = self._encoder.cosines(lines, questions, subjects, relations)
        named = np.zeros(len(lines.rows), np.float32)
        for question in np.unique(lines.queries).tolist():
            mine = lines.queries == question
            named[mine] = self._vocabulary.named(questions[question], lines.tokens[mine], lines.spans[mine])
        if self._encoder.is_trained:
            named = np.maximum(named, by_address * (ACCEPTED / _TRUSTED_COSINE))
        return named, of_relations

    def _whole(self, lines: Lines) -> Lines:
        """The lines, with those of which subject and relation had no room in the index made anew from their texts."""
        full = np.flatnonzero(lines.spans[:, 1] >= lines.tokens.shape[1])
        known = [
            (place, entry)
            for place, entry in zip(full.tolist(), self._store.rows(lines.rows[full].tolist()), strict=True)
            if entry is not None
        ]
        if not known:
            return lines
        whole = lines_of([entry for _, entry in known], self._vocabulary, _WHOLE)
        width = max(lines.tokens.shape[1], int(whole.spans.max()))
        tokens = np.zeros((len(lines.rows), width), np.int32)
        tokens[:, : lines.tokens.shape[1]] = lines.tokens
        spans = lines.spans.astype(np.int64)
        places = [place for place, _ in known]
        tokens[places], spans[places] = whole.tokens[:, :width], whole.spans
        return replace(lines, tokens=tokens, spans=spans)


def _bytes_of(folder: Path) -> int:
    return folder_bytes(folder) if folder.is_dir() else 0


def _holds(entry: MemoryEntry, moment: datetime) -> bool:
    begun = entry.valid_from is None or entry.valid_from <= moment
    return begun and (entry.valid_to is None or moment < entry.valid_to)
