"""The answers of the OpenAI-compatible routes, as the OpenAPI document shows them."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

FinishReason = Literal["stop", "length"]


class EntryShare(BaseModel):
    """An entry behind a token, and its share of it."""

    id: str
    weight: float


class WhyToken(BaseModel):
    """Where a token came from, and how likely it was: with all that was read, without any memory, and without each entry."""

    model_config = ConfigDict(populate_by_name=True)

    token: str
    origin: Literal["copied", "fused", "prompt", "weights"] = Field(..., alias="from")
    copied: float = Field(..., description="The share of its probability that was copied out of entries.")
    entries: list[EntryShare]
    probability: float
    without_memory: float
    without: dict[str, float] = Field(..., description="By the id of an entry.")


class PromptTokensDetails(BaseModel):
    """Which of them were not computed again."""

    cached_tokens: int


class Usage(BaseModel):
    """Tokens of all prompts, each counted once, and of all answers."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class TopLogprob(BaseModel):
    """A token that could have stood there."""

    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(TopLogprob):
    """A token of the answer. `bytes` are exact even where the token is half a character."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(BaseModel):
    """Log-probabilities (natural) of the tokens of an answer."""

    content: list[TokenLogprob]
    refusal: None = None


class CompletionLogprobs(BaseModel):
    """Log-probabilities (natural) in the older spelling."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int] = Field(..., description="Where each token begins in the answer, in characters.")


class AssistantMessage(BaseModel):
    """The answer."""

    role: Literal["assistant"]
    content: str
    refusal: None = None


class ChatChoice(BaseModel):
    """One answer."""

    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason
    why: list[WhyToken] = Field([], description="With why: where each token came from; else absent.")


class EntryRead(BaseModel):
    """An entry of a memory that was found for a prompt."""

    id: str
    text: str
    score: float


class MemoryRead(BaseModel):
    """What was read of a memory for one prompt, as one revision has it."""

    name: str
    revision: int
    read: Literal["layers", "prompt"]
    revisions: dict[str, int] = Field(
        ...,
        description="Of each memory that was looked at, the uppermost first: `shared:NAME` is one that all tenants read.",
    )
    entries: list[EntryRead]


class ChatCompletion(BaseModel):
    """The answers to a conversation; `id` is the request id that feedback takes."""

    id: str
    object: Literal["chat.completion"]
    created: int = Field(..., description="Seconds since 1970.")
    model: str = Field(..., description="name@version of the version that answered.")
    system_fingerprint: str = Field(..., description="The same name@version.")
    choices: list[ChatChoice]
    usage: Usage
    memory: list[MemoryRead] = Field([], description="What was read, for each prompt; absent where no memory was.")


class CompletionChoice(BaseModel):
    """One continuation."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReason
    why: list[WhyToken] = Field([], description="With why: where each token came from; else absent.")


class Completion(BaseModel):
    """The continuations of the prompts, `n` for each in turn."""

    id: str
    object: Literal["text_completion"]
    created: int = Field(..., description="Seconds since 1970.")
    model: str = Field(..., description="name@version of the version that answered.")
    system_fingerprint: str = Field(..., description="The same name@version.")
    choices: list[CompletionChoice]
    usage: Usage
    memory: list[MemoryRead] = Field([], description="What was read, for each prompt; absent where no memory was.")


class ModelCard(BaseModel):
    """A name under which a served version may be asked."""

    id: str
    object: Literal["model"]
    created: int = Field(..., description="Seconds since 1970 at which the version was loaded.")
    owned_by: Literal["nightschool"]


class ModelList(BaseModel):
    """What may stand in `model`; empty while nothing is loaded."""

    object: Literal["list"]
    data: list[ModelCard]
