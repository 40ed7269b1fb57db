"""What a client asks of an engine, and what it gets back."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from nightschool.engine.binding import Binding
from nightschool.errors import UsageError

if TYPE_CHECKING:
    from nightschool.layers.memory_reading import MemoryReading, TokenSource

FinishReason = Literal["stop", "length", "cancelled", "error"]

MAX_LOGPROBS = 20
MAX_STOP_STRINGS = 16
MAX_STOP_CHARACTERS = 1024


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How an answer is chosen, token by token.

    `temperature` 0 takes the likeliest token; then `seed`, `top_p`, `top_k` and `min_p` change nothing, penalties do.
    `top_k` 0 keeps the whole vocabulary. The penalties act before the temperature: `repetition_penalty` on tokens of
    prompt and answer (Keskar et al. 2019, arXiv 1909.05858), `presence_penalty` and `frequency_penalty` on tokens of the
    answer only, as OpenAI defines them. Without `seed` every request draws its own.
    `stop` strings end the answer and are never part of it. With `ignore_eos` only `stop` and the length end it.
    `logprobs` asks for the log-probability of each token and of that many likeliest others, before penalties and
    temperature.

    Raises:
        UsageError: If a value lies outside its bounds; the message names all that do.
    """

    max_new_tokens: int = 256
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    stop: tuple[str, ...] = ()
    seed: int | None = None
    logprobs: int | None = None
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        checks = (
            ("max_new_tokens", self.max_new_tokens, self.max_new_tokens >= 1, "at least 1"),
            ("temperature", self.temperature, 0 <= self.temperature <= 100, "from 0 to 100"),
            ("top_p", self.top_p, 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("top_k", self.top_k, self.top_k >= 0, "at least 0, which keeps all"),
            ("min_p", self.min_p, 0 <= self.min_p <= 1, "from 0 to 1"),
            ("repetition_penalty", self.repetition_penalty, 0.01 <= self.repetition_penalty <= 100, "from 0.01 to 100"),
            ("presence_penalty", self.presence_penalty, -2 <= self.presence_penalty <= 2, "from -2 to 2"),
            ("frequency_penalty", self.frequency_penalty, -2 <= self.frequency_penalty <= 2, "from -2 to 2"),
            ("seed", self.seed, self.seed is None or 0 <= self.seed < 2**64, "from 0 to 2**64 - 1"),
            ("logprobs", self.logprobs, self.logprobs is None or 0 <= self.logprobs <= MAX_LOGPROBS, f"0 to {MAX_LOGPROBS}"),
            ("stop", f"{len(self.stop)} strings", len(self.stop) <= MAX_STOP_STRINGS, f"at most {MAX_STOP_STRINGS} strings"),
            (
                "stop", "a string that is empty or too long",
                all(0 < len(text) <= MAX_STOP_CHARACTERS for text in self.stop), f"of 1 to {MAX_STOP_CHARACTERS} characters",
            ),
        )  # fmt: skip
        wrong = [f"{name} is {value} and must be {bounds}" for name, value, good, bounds in checks if not good]
        if wrong:
            raise UsageError(f"{'; '.join(wrong)}. Change the request.")

    @property
    def is_plain_greedy(self) -> bool:
        """Whether the likeliest token is all there is to know of the logits."""
        return self.temperature == 0 and self.logprobs is None and not self.has_penalties

    @property
    def has_penalties(self) -> bool:
        return self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """One prompt in token ids, what answers it, and how. `id` is for logs; it need not be unique.

    `keeps_prefix` is whether its keys and values are kept for others that begin alike. `reading` are the entries of a memory that
    were found for it, and `wants_sources` is whether its chunks say what was read.
    """

    id: str
    binding: Binding
    prompt_ids: list[int]
    params: SamplingParams = field(default_factory=SamplingParams)
    keeps_prefix: bool = True
    reading: MemoryReading | None = None
    wants_sources: bool = False

    def __post_init__(self) -> None:
        if not self.prompt_ids:
            raise UsageError("The prompt has 0 tokens. Send at least 1.")


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A token of the answer with its log-probability in nats, and the likeliest tokens at its place."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of one request. `cached_tokens` of the prompt came from the prefix cache."""

    prompt_tokens: int
    generated_tokens: int
    cached_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Chunk:
    """A piece of an answer.

    Texts of all chunks, one after the other, are the answer. Text may come later than its tokens: half characters and
    what may become a stop string are held back. `token_ids` never hold the end-of-text token. Only the last chunk has a
    `finish_reason` and `usage`; with the reason `error` it has the message in `error`. `source` is where its only token
    came from, if the request wants to know, and reads a memory.
    """

    text: str = ""
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] | None = None
    finish_reason: FinishReason | None = None
    usage: Usage | None = None
    error: str | None = None
    source: TokenSource | None = None


@dataclass(frozen=True, slots=True)
class Generated:
    """A whole answer. `version` is the reference of the version that made every token of it."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    usage: Usage
    version: str
    logprobs: tuple[TokenLogprob, ...] | None = None
    error: str | None = None
