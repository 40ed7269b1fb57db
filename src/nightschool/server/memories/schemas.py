"""What is sent to a memory over HTTP, and what it answers."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, Strict

from nightschool.errors import UsageError
from nightschool.memory.entry import NewEntry
from nightschool.server.bodies import Body, bounded
from nightschool.server.error_schemas import JsonRpcErrorObject
from nightschool.store.names import NAME_PATTERN

MOST_ENTRIES = 1000
# At least one character that is seen.
_Text = Annotated[str, Field(max_length=4000, pattern=r"\S")]
_Name = Annotated[str, Field(max_length=500, pattern=r"\S")]
_Source = Annotated[str, Field(max_length=500)]


class NewMemory(Body):
    """A memory to be made."""

    name: str = Field(..., pattern=NAME_PATTERN, description="Such as facts.")


class Fact(Body):
    """A sentence, or subject, relation and value, or both."""

    text: _Text | None = Field(None, description="Such as Ada lives in Oslo.")
    subject: _Name | None = Field(None, description="Whom or what it is about.")
    relation: _Name | None = Field(None, description="What is said of it, such as lives in.")
    value: _Text | None = Field(None, description="What the relation leads to, such as Oslo.")
    source: _Source = Field("", description="Where it comes from, such as chat_88.")
    valid_from: datetime | None = Field(None, description="When it begins to hold in the world.")
    valid_to: datetime | None = Field(None, description="When it no longer does.")

    def as_entry(self) -> NewEntry:
        """The fact as a memory takes it. Raises UsageError if it says nothing."""
        if self.text is None and None in (self.subject, self.relation, self.value):
            raise UsageError("A fact needs a text, or subject, relation and value. Send one of the two.")
        return NewEntry(
            self.text or "",
            self.subject,
            self.relation,
            self.value,
            self.source,
            self.valid_from,
            self.valid_to,
        )


class Facts(Body):
    """Facts to be remembered, all or none."""

    entries: Annotated[list[Fact], bounded(MOST_ENTRIES)] = Field(..., description="The facts.")


class FactEdit(Body):
    """What an entry says from now on; what is left out stays."""

    text: _Text | None = Field(None, description="The new sentence.")
    value: _Text | None = Field(None, description="The new value, in place of the text.")
    source: _Source | None = Field(None, description="Where that comes from.")
    valid_from: datetime | None = Field(None, description="When it begins to hold in the world; null leaves it open.")
    valid_to: datetime | None = Field(None, description="When it no longer does; null leaves it open.")

    def changes(self) -> dict[str, Any]:
        """What was sent, by name. Raises UsageError if that is nothing, or both a text and a value."""
        sent = self.model_dump(include=self.model_fields_set)
        if self.text is not None and self.value is not None:
            raise UsageError("An entry takes a new text or a new value, not both. Send one of them.")
        if not sent:
            raise UsageError("Nothing was sent. Send what the entry says from now on: a text, or a value.")
        return sent


class Entry(BaseModel):
    """A fact, as one of its versions has it."""

    id: str
    row: int = Field(..., description="The number of this version among all versions of all entries.")
    text: str
    wording: str | None = Field(..., description="What was written, where the text is another form of it.")
    subject: str | None
    relation: str | None
    value: str | None
    source: str
    author: str
    valid_from: datetime | None
    valid_to: datetime | None
    recorded_at: datetime
    revision: int = Field(..., description="The write that made this version.")
    ended: int | None = Field(..., description="The write that ended it.")
    damaged: bool = Field(
        ..., description="Whether it is not what was written, as its checksum tells. No model reads it."
    )


class Entries(BaseModel):
    """One page of entries; `next` is the `after` of the page that follows."""

    revision: int
    entries: list[Entry]
    next: int | None


class FoundEntry(Entry):
    """An entry with the memory that it is of."""

    memory: str = Field(..., description="Which of `revisions`.")


class FoundEntries(BaseModel):
    """Entries of all memories that are read under a name."""

    revisions: dict[str, int] = Field(
        ..., description="Of each memory, the uppermost first: `shared:NAME` is one that all tenants read."
    )
    entries: list[FoundEntry]


class History(BaseModel):
    """All versions of an entry, oldest first."""

    id: str
    versions: list[Entry]


class MadeStale(BaseModel):
    """A statement that was ended, and the versions that learned it or grew from one that did."""

    id: str
    text: str
    ended: int
    versions: list[str]


class Changed(BaseModel):
    """What a write did."""

    revision: int
    added: int
    superseded: int
    removed: int
    unchanged: int
    ids: list[str] = Field(..., description="The entries that it was about, in the order of what was sent.")
    stale: list[MadeStale] = Field(..., description="What versions learned of the statements that it ended.")


class Undone(Changed):
    """What an undo did."""

    undone: int = Field(..., description="The revision that was taken back.")


class McpMessage(Body):
    """A request or a notification of the Model Context Protocol."""

    jsonrpc: Literal["2.0"] = Field(..., description="The version of JSON-RPC.")
    id: Annotated[int, Strict()] | Annotated[str, Field(max_length=200)] | None = Field(
        None, description="Stands in the answer; a notification has none."
    )
    method: str = Field(..., max_length=200, description="Such as initialize, tools/list or tools/call.")
    params: Annotated[dict[str, Any], Field(max_length=100)] | None = Field(None, description="What the method takes.")


class McpAnswer(BaseModel):
    """What the Model Context Protocol says to a request."""

    jsonrpc: Literal["2.0"]
    id: int | str
    result: dict[str, Any] | None = Field(None, description="As the method has it.")
    error: JsonRpcErrorObject | None = Field(None, description="In place of a result.")


class Memory(BaseModel):
    """A memory."""

    name: str
    revision: int
    entries: int
    shared: bool = Field(
        default=False, description="Whether all tenants read it, beneath their own of that name, and none writes it."
    )


class MemoryList(BaseModel):
    """The memories of a tenant."""

    memories: list[Memory]


class Write(BaseModel):
    """One committed write."""

    revision: int
    at: datetime
    author: str
    operation: str
    note: str
    restores: int | None = Field(..., description="The revision whose state it brought back.")
    born: int = Field(..., description="Versions of entries that it made.")
    ended: int = Field(..., description="Versions that it ended.")


class Writes(BaseModel):
    """Committed writes, oldest first."""

    revisions: list[Write]


class Learned(BaseModel):
    """What models and adapters learned of an entry."""

    id: str
    versions: list[str] = Field(..., description="Versions that learned something it said, or grew from one that did.")


class Purged(BaseModel):
    """What is gone for good."""

    revision: int
    entries: list[str]
    rows: int = Field(..., description="How many versions they had.")
    versions: list[str] = Field(..., description="Named versions of the memory that had shown them.")
    index_dropped: bool = Field(..., description="Whether there was an index, which whoever asks next makes anew.")
    learned: list[Learned] = Field(..., description="What models learned of them, and still know.")


class Rollback(Body):
    """Where to go back to."""

    to: str = Field(..., min_length=1, max_length=64, description="A revision, or its name.")


class NewNamedRevision(Body):
    """A name for a revision."""

    name: str = Field(..., pattern=NAME_PATTERN, description="Such as before-import.")
    at: str | None = Field(None, min_length=1, max_length=64, description="A revision; without it the newest.")


class NamedRevision(BaseModel):
    """A revision that has a name."""

    name: str
    revision: int
    at: datetime
    author: str


class NamedRevisions(BaseModel):
    """The revisions that have a name."""

    versions: list[NamedRevision]


class Difference(BaseModel):
    """An entry before and after."""

    id: str
    kind: Literal["added", "removed", "changed"]
    before: Entry | None
    after: Entry | None


class Differences(BaseModel):
    """The first of the entries that differ, and how many do."""

    total: int
    entries: list[Difference]


class Conflict(BaseModel):
    """Two entries of which perhaps only one holds."""

    kind: Literal["values", "sentences"] = Field(..., description="Two values of one relation, or two close sentences.")
    a: Entry
    b: Entry


class Conflicts(BaseModel):
    """The first of the conflicts that nobody has settled, and how many there are, counted up to 10,000."""

    total: int
    conflicts: list[Conflict]


class Resolution(Body):
    """How two entries are settled."""

    a: str = Field(..., max_length=64, description="The id of one entry.")
    b: str = Field(..., max_length=64, description="The id of the other.")
    keep: Literal["a", "b", "both", "merge"] = Field(..., description="What stays; `merge` makes one of both, in `a`.")
    text: _Text | None = Field(None, description="What the merged entry says; without it, both.")


class RelationSetting(Body):
    """How many values a relation has."""

    relation: _Name = Field(..., description="Such as speaks.")
    cardinality: Literal["single", "multi"] | None = Field(
        ..., description="One value at a time, or several; null forgets it."
    )


class Cardinalities(BaseModel):
    """The relations whose number of values was set here, in their normalised form."""

    relations: dict[str, Literal["single", "multi"]]


class CheckFinding(BaseModel):
    """Something that is not as it was written."""

    message: str
    entry: str | None
    row: int | None
    file: str | None = Field(
        ..., description="The file of an index that is damaged; the next question makes that index anew."
    )


class CheckReport(BaseModel):
    """What a check looked at, and the first hundred things that it found."""

    ok: bool
    rows: int
    revisions: int
    findings: list[CheckFinding]
