"""What mem0's `MemoryClient` sends, and what it is answered."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field

from nightschool.errors import UsageError
from nightschool.memory.entity_ids import KINDS, EntityIds
from nightschool.memory.entry import NewEntry
from nightschool.memory.facts.passages import sentences_of
from nightschool.server.bodies import Body, Flag, Only, bounded

PROGRAM = "mem0"
MOST_FACTS = 1000
_EntityId = Annotated[str, Field(max_length=500, pattern=r"^\s*[^\s*]")]
# A flag that may only say what is so anyway.
_ALWAYS, _NEVER = (None, True), (None, False)
_Null = Annotated[None, Only(None)]
_Object = Annotated[dict[str, Any], Field(max_length=100)]
_Words = Annotated[list[str], bounded(100)]
_Filters = _Object | None


class Ids(Body):
    """Whose memories are meant."""

    user_id: _EntityId | None = Field(None, description="A user.")
    agent_id: _EntityId | None = Field(None, description="An agent.")
    app_id: _EntityId | None = Field(None, description="An app.")
    run_id: _EntityId | None = Field(None, description="A run, such as a session.")


class SentMessage(Body):
    """A message of a conversation."""

    role: Literal["system", "user", "assistant", "tool"] = Field(..., description="Who said it.")
    content: str = Field(..., max_length=100_000, description="What was said.")


class NewMemories(Ids):
    """Messages from which memories are made."""

    messages: Annotated[list[SentMessage], bounded(MOST_FACTS)] = Field(..., description="The messages.")
    filters: _Filters = Field(None, description="The ids, if they do not stand beside it.")
    infer: Flag | None = Field(
        None,
        description="Unless it is false, each sentence of the user's is a memory, but for questions. If it is, each whole message of the "
        "user's and the assistant's is one. No model extracts anything.",
    )
    metadata: Annotated[_Object | None, Only(None, {})] = Field(None, description="Not supported.")
    timestamp: _Null = Field(None, description="Not supported.")
    expiration_date: _Null = Field(None, description="Not supported.")
    custom_categories: _Null = Field(None, description="Not supported.")
    custom_instructions: _Null = Field(None, description="Not supported: no model reads them.")
    agent_custom_instructions: _Null = Field(None, description="Not supported: no model reads them.")
    structured_data_schema: _Null = Field(None, description="Not supported.")

    def ids(self) -> EntityIds:
        """The ids. Raises UsageError if they are given twice, and differently."""
        given = {kind: getattr(self, kind) for kind in KINDS}
        return _merged([given, vars(ids_of_filters(self.filters))])

    def facts(self, source: str) -> list[NewEntry]:
        """What is to be remembered of the messages.

        Raises:
            UsageError: If that is more than `MOST_FACTS`.
        """
        if self.infer is False:
            said = [one.content for one in self.messages if one.role in ("user", "assistant") and one.content.strip()]
        else:
            passages = [one.content for one in self.messages if one.role == "user"]
            sentences = [sentence for passage in passages for sentence in sentences_of(passage)]
            said = [sentence for sentence in sentences if not sentence.endswith("?")]
        if len(said) > MOST_FACTS:
            raise UsageError(
                f"The messages have {len(said)} sentences; {MOST_FACTS} are remembered at once. Send fewer."
            )
        return [NewEntry(one, source=source) for one in said]


class MemoryFilter(Body):
    """Which memories are listed, a page at a time."""

    filters: _Filters = Field(
        None, description="The ids: one object, or AND of several; without any the memory itself."
    )
    latest_only: Annotated[bool | None, Only(*_ALWAYS)] = Field(
        None, description="The newest statements are all there are."
    )
    show_expired: Annotated[bool | None, Only(*_ALWAYS)] = Field(None, description="They are shown in any case.")
    categories: Annotated[_Words | None, Only(None, [])] = Field(None, description="Not supported.")
    start_date: _Null = Field(None, description="Not supported.")
    end_date: _Null = Field(None, description="Not supported.")


class MemorySearch(Body):
    """What is searched for."""

    query: str = Field(..., min_length=1, max_length=1000, description="Words that the memories hold.")
    filters: _Filters = Field(
        None, description="The ids: one object, or AND of several; without any the memory itself."
    )
    top_k: Annotated[int, Field(ge=1, le=1000)] | None = Field(None, description="How many at most; without it 10.")
    threshold: Annotated[float, Field(ge=0, le=1)] | None = Field(None, description="The least `score`.")
    keyword_search: Annotated[bool | None, Only(*_ALWAYS)] = Field(None, description="It is one by words in any case.")
    latest_only: Annotated[bool | None, Only(*_ALWAYS)] = Field(
        None, description="The newest statements are all there are."
    )
    show_expired: Annotated[bool | None, Only(*_ALWAYS)] = Field(None, description="They are shown in any case.")
    rerank: Annotated[bool | None, Only(*_NEVER)] = Field(None, description="Not supported.")
    metadata: Annotated[_Object | None, Only(None, {})] = Field(None, description="Not supported.")
    fields: Annotated[_Words | None, Only(None, [])] = Field(None, description="Not supported.")
    categories: Annotated[_Words | None, Only(None, [])] = Field(None, description="Not supported.")
    reference_date: _Null = Field(None, description="Not supported.")


class MemoryUpdate(Body):
    """What a memory says from now on."""

    text: Annotated[str, Field(max_length=4000, pattern=r"\S")] = Field(..., description="The new sentence.")
    metadata: Annotated[_Object | None, Only(None, {})] = Field(None, description="Not supported.")
    timestamp: _Null = Field(None, description="Not supported.")
    expiration_date: _Null = Field(None, description="Not supported.")


class Pong(BaseModel):
    """The memory is there, and the key may use it."""

    status: Literal["ok"]
    org_id: str = Field(..., description="The tenant.")
    project_id: str = Field(..., description="The memory.")


class MemoryObject(BaseModel):
    """A memory in mem0's words: an entry."""

    id: str = Field(..., description="NAME-DIGEST-mN: what comes before `-mN` is the memory that holds it.")
    memory: str = Field(..., description="What it says.")
    user_id: str | None
    agent_id: str | None
    app_id: str | None
    run_id: str | None
    metadata: dict[str, str | None] | None = Field(
        ..., description="Subject, relation and value, where they could be told."
    )
    categories: list[str] = Field(..., description="None are made.")
    created_at: str
    updated_at: str


class ScoredMemory(MemoryObject):
    """One that was found."""

    score: float = Field(..., description="The share of the query's words that it holds.")


class FoundMemories(BaseModel):
    """Those with most of the words first."""

    results: list[ScoredMemory]


class MemoryPage(BaseModel):
    """One page, oldest first."""

    count: int
    next: str | None
    previous: str | None
    results: list[MemoryObject]


class MemoryEvent(BaseModel):
    """What happened to one memory."""

    id: str
    memory: str = Field(..., description="What it says now; of DELETE, what it said.")
    event: Literal["ADD", "UPDATE", "DELETE", "NONE"]
    previous_memory: str | None = Field(..., description="Of UPDATE, what it said before.")


class MemoryEvents(BaseModel):
    """An event for each sentence, then one for each other memory that it ended."""

    results: list[MemoryEvent]


class UpdatedMemory(MemoryObject):
    """What it says now, `text` as `memory`."""

    text: str


class PastEvent(BaseModel):
    """One thing that happened to a memory."""

    id: str
    memory_id: str
    event: Literal["ADD", "UPDATE", "DELETE"]
    old_memory: str | None
    new_memory: str | None
    user_id: str | None
    agent_id: str | None
    app_id: str | None
    run_id: str | None
    metadata: dict[str, str | None] | None
    created_at: str
    updated_at: str


class Done(BaseModel):
    """What was done, in words."""

    message: str


def ids_of_filters(filters: dict[str, Any] | None) -> EntityIds:
    """The ids that filters name: `{"user_id": "ada"}`, `{"AND": [{"user_id": "ada"}, {"run_id": "7"}]}`, or none.

    Raises:
        UsageError: If they ask for anything else.
    """
    parts = [filters or {}]
    if filters and "AND" in filters:
        if len(filters) > 1 or not isinstance(filters["AND"], list):
            raise UsageError("The filter AND takes a list of objects such as {'user_id': 'ada'}, and stands alone.")
        parts = filters["AND"]
    for part in parts:
        if not isinstance(part, dict):
            raise UsageError("The filter AND takes a list of objects such as {'user_id': 'ada'}.")
        for name, value in part.items():
            if name not in KINDS:
                raise UsageError(
                    f"The filter {str(name)[:80]!r} is not supported. There are {', '.join(KINDS)}, and AND of them."
                )
            if not isinstance(value, str) or not value.strip() or value.strip().startswith("*"):
                raise UsageError(
                    f"The filter {name} takes one id. Operators and '*' are not supported: each set of ids has a memory of its own."
                )
    return _merged(parts)


def _merged(parts: list[dict[str, str | None]]) -> EntityIds:
    found: dict[str, str] = {}
    for part in parts:
        for kind, one in part.items():
            if one is not None and found.setdefault(kind, one) != one:
                raise UsageError(f"Two different values of {kind} were sent. Send one.")
    return EntityIds(**found)
