"""The bodies of the OpenAI-compatible routes: what is understood, and what is refused rather than ignored."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Discriminator, Field, Strict, Tag, model_validator
from pydantic_core import PydanticCustomError

from nightschool.data.example import Message
from nightschool.engine.recall import MemoryChoice
from nightschool.server.bodies import Body, Flag, Number, Only, bounded, whole
from nightschool.store.names import NAME_PATTERN

MOST_CHOICES = 8
MOST_PROMPTS = 16
MOST_PROMPT_TOKENS = 262_144
MOST_MESSAGES = 2000
MOST_PARTS = 1000
MOST_STOPS = 4
MOST_METADATA = 16
MOST_LOGPROBS = 20
MAX_NEW_TOKENS = 65_536
MOST_OVERLAYS = 8

_NOT_ASKED = (None, False)
Null = Annotated[None, Only(None)]
# With the bounds inside, for `AtLeastOne`'s reason.
AnswerTokens = Annotated[int, Field(ge=1, le=MAX_NEW_TOKENS), BeforeValidator(whole), Strict()]
TopK = Annotated[int, Field(ge=0, le=1000), BeforeValidator(whole), Strict()]
Seed = Annotated[int, Field(ge=-(2**63), le=2**63 - 1), BeforeValidator(whole), Strict()]
Choices = Annotated[int, Field(ge=1, le=MOST_CHOICES), BeforeValidator(whole), Strict()]
TopLogprobs = Annotated[int, Field(ge=0, le=MOST_LOGPROBS), BeforeValidator(whole), Strict()]
Logprobs = Annotated[int, Field(ge=0, le=5), BeforeValidator(whole), Strict()]
Stop = Annotated[str, Field(min_length=1, max_length=500)]


def _text_or(otherwise: str) -> Callable[[Any], str]:
    """Which branch of a union is meant, so that only that one is tried, and only its errors are told."""
    return lambda value: otherwise if isinstance(value, list) else "text"


_Memory = Annotated[str, Field(pattern=NAME_PATTERN)]


def _kind_of_prompt(value: Any) -> str:
    first = value[0] if isinstance(value, list) and value else None
    of_list = "texts" if isinstance(first, str) else "lists" if isinstance(first, list) else "token_ids"
    return of_list if isinstance(value, list) else "text"


def _few(value: Any) -> Any:
    """Pydantic counts the entries of a dict only after it has looked at, and complained of, every one."""
    if isinstance(value, dict) and len(value) > MOST_METADATA:
        raise PydanticCustomError("too_long", f"At most {MOST_METADATA} entries are accepted.")
    return value


Metadata = Annotated[
    dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]],
    Field(max_length=MOST_METADATA),
    BeforeValidator(_few),
]


class TextPart(Body):
    """A part of a message; only text is understood."""

    type: Literal["text"]
    text: str


class ChatMessage(Body):
    """One turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant"] = Field(
        ..., description="Who speaks; `developer` is read as `system`."
    )
    content: Annotated[
        Annotated[str, Tag("text")] | Annotated[list[TextPart], bounded(MOST_PARTS), Tag("parts")],
        Discriminator(_text_or("parts")),
    ] = Field(..., description="What is said.")
    name: Null = Field(None, description="Not supported.")
    refusal: Null = Field(None, description="Not supported.")
    audio: Null = Field(None, description="Not supported.")
    function_call: Null = Field(None, description="Not supported.")
    annotations: Annotated[list[Any] | None, Only(None, [])] = Field(None, description="Not supported.")
    tool_calls: Annotated[list[Any] | None, Only(None, [])] = Field(None, description="Not supported.")

    def as_message(self) -> Message:
        """The turn as our templates read it; parts are joined as they are."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return Message("system" if self.role == "developer" else self.role, text)


class StreamOptions(Body):
    """What a stream carries besides text."""

    include_usage: Flag = Field(default=False, description="A last event with the usage, before [DONE].")
    include_obfuscation: Flag | None = Field(None, description="Accepted; nothing is obfuscated.")


class TextFormat(Body):
    """The only response format there is."""

    type: Literal["text"]


class MemoryToRead(Body):
    """A memory of the caller's tenant, and how it is read."""

    name: str | None = Field(
        None,
        pattern=NAME_PATTERN,
        description="Without it, the one that the model was trained with, or else the one that the server reads for all (`serve --memory`).",
    )
    overlay: (
        Annotated[
            Annotated[_Memory, Tag("text")] | Annotated[list[_Memory], bounded(MOST_OVERLAYS), Tag("several")],
            Discriminator(_text_or("several")),
        ]
        | None
    ) = Field(
        None,
        description="Another memory of the tenant, such as that of a user or a session, which lies over it for this request: what it "
        "says of a subject and a relation hides what is beneath. Of several each lies over those before it.",
    )
    read: Literal["layers", "prompt", "off"] | None = Field(
        None,
        description="layers: the model's own layers read the entries; prompt: they are put before the question, for any model; "
        "off: nothing is read. Without it, layers where the model can, else prompt.",
    )

    @property
    def overlays(self) -> tuple[str, ...]:
        """What lies over the memory, each over those before it."""
        return (self.overlay,) if isinstance(self.overlay, str) else tuple(self.overlay or ())


class Sampling(Body):
    """What chat and completions share."""

    model: str = Field(
        ...,
        max_length=200,
        description="The served name, name@champion, or name@version of the version that is served.",
    )
    max_tokens: AnswerTokens | None = Field(
        None, description="Most tokens of an answer; without it, what the context leaves."
    )
    temperature: Number | None = Field(None, ge=0, le=2, description="0 is greedy and repeats itself exactly.")
    top_p: Number | None = Field(None, gt=0, le=1, description="Sample from the smallest set of this probability.")
    top_k: TopK | None = Field(None, description="Sample from this many tokens; 0 from all.")
    min_p: Number | None = Field(None, ge=0, le=1, description="Drop tokens below this share of the likeliest one.")
    repetition_penalty: Number | None = Field(
        None, ge=0.01, le=10, description="Divides the scores of tokens seen in prompt or answer; 1 is none."
    )
    presence_penalty: Number | None = Field(None, ge=-2, le=2, description="Lowers the scores of tokens answered.")
    frequency_penalty: Number | None = Field(
        None, ge=-2, le=2, description="Lowers the scores of tokens answered, once for each time."
    )
    stop: (
        Annotated[
            Annotated[Stop, Tag("text")] | Annotated[list[Stop], bounded(MOST_STOPS, least=0), Tag("texts")],
            Discriminator(_text_or("texts")),
        ]
        | None
    ) = Field(None, description="Texts that end the answer; they are not part of it.")
    seed: Seed | None = Field(None, description="Makes sampling repeat itself.")
    n: Choices | None = Field(None, description="Answers to each prompt.")
    stream: Flag | None = Field(None, description="Send the answer as server-sent events while it is made.")
    stream_options: StreamOptions | None = Field(None, description="Only with stream: true.")
    memory: MemoryToRead | None = Field(None, description="An explicit memory to be read.")
    why: Flag | None = Field(
        None,
        description="Say of every token which entries of the memory it was read from, and how likely it would have been without "
        "each of them. In a stream each token says what it was read from; how likely it would have been comes at the end.",
    )
    user: str | None = Field(None, max_length=1000, description="Accepted; changes nothing.")
    logit_bias: Annotated[dict[str, Any] | None, Only(None, {})] = Field(None, description="Not supported.")

    @model_validator(mode="after")
    def _options_need_a_stream(self) -> Sampling:
        if self.stream_options is not None and not self.stream:
            raise PydanticCustomError("stream_options", "stream_options is only allowed with stream: true.")
        return self

    @property
    def choice(self) -> MemoryChoice | None:
        """The memory that is to be read, if one was named."""
        return None if self.memory is None else MemoryChoice(self.memory.name, self.memory.read, self.memory.overlays)

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop texts, however they were written."""
        return () if self.stop is None else (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)


class ChatRequest(Sampling):
    """POST /v1/chat/completions."""

    messages: Annotated[list[ChatMessage], bounded(MOST_MESSAGES)] = Field(..., description="The conversation so far.")
    max_completion_tokens: AnswerTokens | None = Field(None, description="The newer name of max_tokens; not both.")
    logprobs: Flag | None = Field(None, description="Send the log-probability of every token of the answer.")
    top_logprobs: TopLogprobs | None = Field(
        None, description="With logprobs: this many likeliest tokens at each place."
    )
    response_format: TextFormat | None = Field(None, description="Only text; JSON modes are not supported.")
    tools: Annotated[list[Any] | None, Only(None, [])] = Field(None, description="Not supported.")
    tool_choice: Annotated[str | None, Only(None, "none")] = Field(None, description="Not supported.")
    parallel_tool_calls: Flag | None = Field(None, description="Accepted; there are no tools.")
    functions: Annotated[list[Any] | None, Only(None, [])] = Field(None, description="Not supported.")
    function_call: Annotated[str | None, Only(None, "none")] = Field(None, description="Not supported.")
    modalities: Annotated[list[str] | None, Only(None, ["text"])] = Field(None, description="Only text.")
    audio: Null = Field(None, description="Not supported.")
    prediction: Null = Field(None, description="Not supported.")
    reasoning_effort: Null = Field(None, description="Not supported.")
    verbosity: Null = Field(None, description="Not supported.")
    web_search_options: Null = Field(None, description="Not supported.")
    store: Annotated[bool | None, Only(*_NOT_ASKED)] = Field(None, description="Not supported.")
    metadata: Metadata | None = Field(None, description="Accepted; changes nothing.")
    service_tier: Annotated[str | None, Only(None, "auto", "default")] = Field(None, description="There is one tier.")
    safety_identifier: str | None = Field(None, max_length=1000, description="Accepted; changes nothing.")
    prompt_cache_key: str | None = Field(None, max_length=1000, description="Accepted; changes nothing.")

    @model_validator(mode="after")
    def _one_meaning(self) -> ChatRequest:
        if self.top_logprobs is not None and not self.logprobs:
            raise PydanticCustomError("top_logprobs", "top_logprobs is only allowed with logprobs: true.")
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            raise PydanticCustomError("max_tokens", "max_tokens and max_completion_tokens are the same; send one.")
        return self


TokenIds = Annotated[list[Annotated[int, Strict(), Field(ge=0)]], bounded(MOST_PROMPT_TOKENS)]


class CompletionRequest(Sampling):
    """POST /v1/completions."""

    prompt: Annotated[
        Annotated[str, Tag("text")]
        | Annotated[TokenIds, Tag("token_ids")]
        | Annotated[list[str], bounded(MOST_PROMPTS), Tag("texts")]
        | Annotated[list[TokenIds], bounded(MOST_PROMPTS), Tag("lists")],
        Discriminator(_kind_of_prompt),
    ] = Field(..., description="A text or token ids, or several of either; a text is not put into a chat template.")
    logprobs: Logprobs | None = Field(
        None, description="Log-probabilities of the answer, with this many likeliest tokens."
    )
    best_of: Annotated[int | None, Only(None, 1)] = Field(None, description="Not supported.")
    echo: Annotated[bool | None, Only(*_NOT_ASKED)] = Field(None, description="Not supported.")
    suffix: Annotated[str | None, Only(None, "")] = Field(None, description="Not supported.")

    @property
    def prompts(self) -> list[str | list[int]]:
        """Each prompt by itself."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [[token for token in self.prompt if isinstance(token, int)]]
        return [prompt for prompt in self.prompt if not isinstance(prompt, int)]
