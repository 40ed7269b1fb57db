"""Who answers in a chat: a model in this process, or a server that speaks the OpenAI API."""

from __future__ import annotations

import json
import os
import secrets
import urllib.error
import urllib.parse
import urllib.request
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, Protocol

from nightschool.cli.chat.remembering import Remembered, remember_here, remembered
from nightschool.data.example import Message
from nightschool.errors import Conflict, NameRefused, NightschoolError, NotFound, NotLoaded, QueueFull, UsageError
from nightschool.feedback.conversations import ConversationStore
from nightschool.store.home import Home
from nightschool.store.names import parse_ref

if TYPE_CHECKING:
    from nightschool.engine.local_model import Asked, LocalModel
    from nightschool.engine.recall import MemoryChoice

TIMEOUT_SECONDS = 600.0
NO_MEMORY = "The last answer read no memory, so all of it is from the weights. Start with nightschool chat --memory NAME to read one."
LOCAL = "local"
KEY_VARIABLE = "NIGHTSCHOOL_API_KEY"


@dataclass(frozen=True)
class Params:
    """How an answer is drawn. Temperature 0 is greedy. `seed` None draws anew each time."""

    max_new_tokens: int = 256
    temperature: float = 0.7
    top_p: float = 0.9
    seed: int | None = None

    def with_value(self, name: str, text: str) -> Params:
        """These parameters with one of them read from `text`.

        Raises:
            UsageError: If there is no such parameter, or the text is no such value.
        """
        readers = {"max_new_tokens": int, "temperature": float, "top_p": float, "seed": int}
        if name not in readers:
            raise UsageError(f"There is no parameter {name!r}. There are {', '.join(readers)}.")
        try:
            value = readers[name](text)
        except ValueError:
            raise UsageError(f"{name} cannot be {text!r}. Write a number.") from None
        bounds = {"max_new_tokens": (1, 65536), "temperature": (0, 2), "top_p": (0, 1), "seed": (0, 2**63 - 1)}
        low, high = bounds[name]
        if not low <= value <= high:
            raise UsageError(f"{name} is {text}, but lies between {low} and {high}.")
        return replace(self, **{name: value})


@dataclass
class Reply:
    """One answer while it comes. The fields other than `text` are known when it has come to its end.

    `memory` is what was read for it: the memory's name and revision, `layers` or `prompt`, and the entries; None if nothing was.
    """

    request_id: str = ""
    version: str = ""
    finish_reason: str | None = None
    parts: list[str] = field(default_factory=list)
    memory: dict[str, Any] | None = None

    @property
    def text(self) -> str:
        return "".join(self.parts)


@dataclass(frozen=True)
class Why:
    """What each token of an answer was read from, and what was read. `text` is the answer that this is told of."""

    text: str
    memory: dict[str, Any]
    tokens: list[dict[str, Any]]


class Backend(Protocol):
    """Answers, and takes what people think of answers; these members are all of it."""

    model: str

    def stream(self, messages: Sequence[Message], params: Params, reply: Reply) -> Iterator[str]:
        """Yield the answer in pieces and fill `reply`. Closing the iterator stops the answer."""

    def feedback(self, request_id: str, rating: Literal["good", "bad"], correction: str | None) -> None:
        """Mark an answer."""

    def why(self, reply: Reply) -> Why:
        """Where the last answer came from. Raises UsageError if it read no memory."""

    def remember(self, memory: str, text: str, source: str) -> Remembered:
        """Write a fact into a memory; it counts for the next question."""

    def switch(self, model: str) -> None:
        """Answer with another model from now on."""

    def close(self) -> None:
        """Free what was loaded."""


class ServerBackend:
    """A server at `url`, ours or any other that answers /v1/chat/completions. Marks go to POST /api/feedback."""

    def __init__(self, url: str, model: str | None, memory: MemoryChoice | None = None) -> None:
        self._memory = memory
        self._asked: tuple[str, dict[str, Any]] | None = None
        self._url = url.rstrip("/").removesuffix("/v1")
        if urllib.parse.urlsplit(self._url).scheme not in ("http", "https"):
            raise UsageError(f"--url {url!r} is not an address of a server. Write http://127.0.0.1:8001.")
        self.model = model or self._first_model()

    def get(self, path: str) -> Any:
        """What the server answers to a GET, from JSON."""
        with self._open(path) as response:
            return json.load(response)

    def _first_model(self) -> str:
        models = self.get("/v1/models")["data"]
        if not models:
            raise NotLoaded(f"The server at {self._url} serves no model yet. Promote one, or name one.")
        return str(models[0]["id"])

    def stream(self, messages: Sequence[Message], params: Params, reply: Reply) -> Iterator[str]:
        body = {
            "model": self.model,
            "messages": [{"role": turn.role, "content": turn.content} for turn in messages],
            "max_tokens": params.max_new_tokens,
            "temperature": params.temperature,
            "top_p": params.top_p,
            "stream": True,
        } | ({} if params.seed is None else {"seed": params.seed})
        if self._memory is not None:
            body["memory"] = {key: value for key, value in vars(self._memory).items() if value is not None}
        if params.seed is None and params.temperature > 0:
            # So that the same can be asked again, when somebody wants to know why.
            body["seed"] = secrets.randbits(31)
        with self._open("/v1/chat/completions", body) as response:
            reply.version = response.headers.get("x-model-version", "")
            for line in response:
                if not line.startswith(b"data:"):
                    continue
                data = line[5:].strip()
                if data == b"[DONE]":
                    return
                event = json.loads(data)
                if "error" in event:
                    raise NightschoolError(f"The server ended the answer: {event['error'].get('message', event)}")
                reply.request_id = event.get("id") or reply.request_id
                self._asked = (reply.request_id, body)
                reply.memory = (event.get("memory") or [reply.memory])[0]
                for choice in event.get("choices", ())[:1]:
                    reply.finish_reason = choice.get("finish_reason") or reply.finish_reason
                    text = (choice.get("delta") or {}).get("content")
                    if text:
                        reply.parts.append(text)
                        yield text

    def feedback(self, request_id: str, rating: Literal["good", "bad"], correction: str | None) -> None:
        body = {"request_id": request_id, "rating": rating} | ({"correction": correction} if correction else {})
        self._open("/api/feedback", body).close()

    def why(self, reply: Reply) -> Why:
        """Ask the same again, as it was drawn, and why."""
        if self._asked is None or self._asked[0] != reply.request_id or reply.memory is None:
            raise UsageError(NO_MEMORY)
        with self._open("/v1/chat/completions", self._asked[1] | {"stream": False, "why": True}) as response:
            told = json.load(response)
        choice = told["choices"][0]
        return Why(choice["message"]["content"] or "", told["memory"][0], choice["why"])

    def remember(self, memory: str, text: str, source: str) -> Remembered:
        entries = f"/api/memories/{urllib.parse.quote(memory, safe='')}/entries"
        with self._open(entries, {"entries": [{"text": text, "source": source}]}) as response:
            change = json.load(response)
        entry = change["ids"][0]
        versions = self.get(f"{entries}/{entry}/history")["versions"] if change["removed"] < 1 else []
        undo = f"curl -X POST {self._url}/api/memories/{memory}/undo"
        return remembered(memory, change, entry, versions, undo)

    def switch(self, model: str) -> None:
        self.model = model

    def close(self) -> None:
        """Nothing is loaded here."""

    def _open(self, path: str, body: dict[str, Any] | None = None) -> Any:
        headers = {"Content-Type": "application/json", "Accept": "application/json, text/event-stream"}
        if os.environ.get(KEY_VARIABLE):
            headers["Authorization"] = f"Bearer {os.environ[KEY_VARIABLE].split(',')[0].strip()}"
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self._url + path, data=data, headers=headers)  # noqa: S310  http(s) only, see above
        try:
            return urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS)  # noqa: S310
        except urllib.error.HTTPError as error:
            with error:
                raise _refusal(error.code, error.read()) from None
        except urllib.error.URLError as error:
            raise NotFound(
                f"No server answers at {self._url} ({error.reason}). Start one with nightschool serve, or leave --url out."
            ) from None


_REFUSALS: dict[int, type[NightschoolError]] = {
    400: UsageError,
    404: NotFound,
    409: Conflict,
    422: UsageError,
    429: QueueFull,
    503: NotLoaded,
}


def _refusal(status: int, body: bytes) -> NightschoolError:
    """What a server answered in place of an answer, as an error of ours."""
    try:
        content = json.loads(body)
        message = content.get("error", content)
        message = message.get("message") or message.get("detail") or message if isinstance(message, dict) else message
    except (ValueError, AttributeError, RecursionError):
        message = body.decode(errors="replace")[:200]
    text = f"The server answered {status}: {message}"
    return _REFUSALS.get(status, NightschoolError)(text)


class LocalBackend:
    """A model in this process. With `record`, answers are kept in the home, so that they can be marked."""

    def __init__(self, home: Home, model: str, *, record: bool, memory: MemoryChoice | None = None) -> None:
        self._home = home
        self._memory = memory
        self._asked: tuple[str, Asked] | None = None
        self._loaded: LocalModel | None = None
        self._conversations = ConversationStore(home.database) if record else None
        self.model = model
        self.switch(model)

    def stream(self, messages: Sequence[Message], params: Params, reply: Reply) -> Iterator[str]:
        from nightschool.engine.request import SamplingParams

        assert self._loaded is not None, "switch loaded a model"
        sampling = SamplingParams(
            max_new_tokens=params.max_new_tokens,
            temperature=params.temperature,
            top_p=params.top_p,
            seed=params.seed,
        )
        reply.request_id = f"chat-{uuid.uuid4().hex}"
        reply.version = self._loaded.ref
        asked = self._loaded.begin(reply.request_id, messages, sampling)
        handle, self._asked = asked.handle, (reply.request_id, asked)
        reply.memory = None if asked.found is None else asked.found.to_json()
        try:
            for chunk in handle.chunks():
                if chunk.error is not None:
                    raise NightschoolError(f"The answer ended early: {chunk.error}")
                reply.finish_reason = chunk.finish_reason
                if chunk.text:
                    reply.parts.append(chunk.text)
                    yield chunk.text
        finally:
            handle.cancel()
            self._record(messages, reply)

    def feedback(self, request_id: str, rating: Literal["good", "bad"], correction: str | None) -> None:
        if self._conversations is None:
            raise UsageError("Answers are not kept here, so you cannot mark one. Start with nightschool chat --record.")
        self._conversations.feedback(request_id, rating, correction)

    def why(self, reply: Reply) -> Why:
        from nightschool.engine.why import reasons_of

        if self._loaded is None or self._asked is None or self._asked[0] != reply.request_id or reply.memory is None:
            raise UsageError(NO_MEMORY)
        asked = self._asked[1]
        answer_ids = [token for chunk in asked.handle.chunks() for token in chunk.token_ids]
        return Why(reply.text, reply.memory, reasons_of(self._loaded, asked, answer_ids))

    def remember(self, memory: str, text: str, source: str) -> Remembered:
        return remember_here(self._home, memory, text, source)

    def switch(self, model: str) -> None:
        from nightschool.engine.local_model import LocalModel

        # The new one first: if it cannot be loaded, the old one goes on answering.
        loaded = LocalModel(self._home, model, memory=self._memory)
        try:
            _ = loaded.reads
        except BaseException:
            loaded.close()
            raise
        self.close()
        self._loaded, self.model = loaded, model

    def close(self) -> None:
        if self._loaded is not None:
            self._loaded.close()
            self._loaded = None

    def _record(self, messages: Sequence[Message], reply: Reply) -> None:
        if self._conversations is None or not reply.text:
            return
        turns = [{"role": turn.role, "content": turn.content} for turn in messages]
        name, version = _name_and_version(self.model, reply.version)
        self._conversations.record(reply.request_id, name, version, turns, reply.text)


def _name_and_version(model: str, answered: str) -> tuple[str, str]:
    """What is kept of who answered: a served name and a version id, as a server keeps them.

    What was loaded from a folder or the hub has neither, and is kept as `local` with where it came from.
    """
    try:
        parse_ref(model)
        ref = parse_ref(answered)
    except NameRefused:
        return LOCAL, answered
    return (LOCAL, answered) if ref.version is None else (ref.name, ref.version)
