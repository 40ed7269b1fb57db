"""A server that answers a chat."""

from __future__ import annotations

import http.client
import json
import os
import secrets
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

from nightschool.cli.chat.backends import NO_MEMORY, ContextFull, Reply, Why
from nightschool.cli.chat.params import Params
from nightschool.cli.chat.remembering import Remembered, remembered
from nightschool.data.example import Message
from nightschool.errors import Conflict, NightschoolError, NotFound, NotLoaded, PromptTooLong, QueueFull, UsageError

if TYPE_CHECKING:
    from nightschool.engine.recall import MemoryChoice

TIMEOUT_SECONDS = 600.0
KEY_VARIABLE = "NIGHTSCHOOL_API_KEY"


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

    def stream(
        self, messages: Sequence[Message], params: Params, reply: Reply, *, shorten: bool = False
    ) -> Generator[str]:
        body = {
            "model": self.model,
            "messages": [{"role": turn.role, "content": turn.content} for turn in messages],
            "temperature": params.temperature,
            "top_p": params.top_p,
            "stream": True,
        } | {sent: value for name, sent, unset in _OPTIONAL if (value := getattr(params, name)) != unset}
        if shorten:  # without a length, an answer may take what the context leaves
            del body["max_tokens"]
        if self._memory is not None:
            read, overlays = self._memory, list(self._memory.overlays)
            sent = {"name": read.name, "overlay": overlays[0] if len(overlays) == 1 else overlays, "read": read.read}
            body["memory"] = {key: value for key, value in sent.items() if value}
        if params.seed is None and params.temperature > 0:
            # So that the same can be asked again, when somebody wants to know why.
            body["seed"] = secrets.randbits(31)
        with self._open("/v1/chat/completions", body) as response, _unbroken(self._url):
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


# Of Params: its name, what a server calls it, and the value that is not sent, as OpenAI knows none of some.
_OPTIONAL = (
    ("max_new_tokens", "max_tokens", None),
    ("top_k", "top_k", 0),
    ("repetition_penalty", "repetition_penalty", 1.0),
    ("presence_penalty", "presence_penalty", 0.0),
    ("frequency_penalty", "frequency_penalty", 0.0),
    ("seed", "seed", None),
)


@contextmanager
def _unbroken(url: str) -> Iterator[None]:
    """Turn what goes wrong while an answer comes into an error that can be shown."""
    try:
        yield
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise NightschoolError(f"The answer of {url} broke off: {error}. Ask again with /retry.") from None


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
    code = None
    try:
        content = json.loads(body)
        told = content.get("error", content)
        code = told.get("code") if isinstance(told, dict) else None
        message = told.get("message") or told.get("detail") or told if isinstance(told, dict) else told
    except (ValueError, AttributeError, RecursionError):
        message = body.decode(errors="replace")[:200]
    kind = ContextFull if code == PromptTooLong.code else _REFUSALS.get(status, NightschoolError)
    return kind(f"The server answered {status}: {message}")
