"""The OpenAI-compatible routes, for unmodified clients of OpenAI."""

from __future__ import annotations

import contextlib
import time
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

import anyio.to_thread
from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from nightschool.engine.request import Chunk, SamplingParams
from nightschool.engine.why import shown
from nightschool.server.body_route import BodyRoute
from nightschool.server.error_schemas import openai_refusals
from nightschool.server.errors import Refusal
from nightschool.server.generation import Answer, Running, while_connected
from nightschool.server.openai.model_names import fine_tuned, fine_tuned_models, registry_name
from nightschool.server.openai.models import ChatCompletion, Completion, ModelCard, ModelList
from nightschool.server.openai.responses import ChatShape, CompletionShape, Shape
from nightschool.server.openai.schema import ChatRequest, CompletionRequest, Sampling
from nightschool.server.recording import Exchange
from nightschool.server.service import PrincipalOf, RequestId, Service, ServiceOf, owner_of, published_at
from nightschool.server.stream import EventStream
from nightschool.server.submission import Answering, Ask
from nightschool.server.token_text import TokenText
from nightschool.store.checkpoint_permissions import CheckpointPermissions
from nightschool.store.principal import Principal

router = APIRouter(prefix="/v1", tags=["OpenAI-compatible"], route_class=BodyRoute)
_STREAM: dict[str, Any] = {"content": {"text/event-stream": {}}}
_RESPONSES: dict[int | str, dict[str, Any]] = {**openai_refusals(400, 404, 408, 413, 500, 503), 200: _STREAM}
_COMPLETION_DEFAULT_TOKENS = 16
_MOST_ANSWERS = 32


@router.post("/chat/completions", response_model=ChatCompletion, responses=_RESPONSES)
async def chat_completions(
    body: ChatRequest, request: Request, service: ServiceOf, request_id: RequestId, principal: PrincipalOf
) -> Response:
    """Answer a conversation; with `stream: true` as server-sent events that end with `[DONE]`."""
    messages = [message.as_message() for message in body.messages]
    model, owner = await _model_of(body.model, service, principal)
    logprobs = (body.top_logprobs or 0) if body.logprobs else None
    ask = Ask(
        prompts=[messages],
        params=_params(body, logprobs),
        max_new_tokens=_length(body.max_completion_tokens or body.max_tokens, service),
        default_max_new_tokens=service.settings.max_new_tokens_limit,
        model=model,
        principal=principal,
        n=body.n or 1,
        owner=owner,
        memory=body.choice,
        wants_why=bool(body.why),
    )
    kept = [{"role": message.role, "content": message.content} for message in messages]
    return await _answer(body, ask, ChatShape(with_logprobs=logprobs is not None), request, service, request_id, kept)


@router.post("/completions", response_model=Completion, responses=_RESPONSES)
async def completions(
    body: CompletionRequest, request: Request, service: ServiceOf, request_id: RequestId, principal: PrincipalOf
) -> Response:
    """Continue a text as it is, without a chat template."""
    model, owner = await _model_of(body.model, service, principal)
    ask = Ask(
        prompts=body.prompts,
        params=_params(body, body.logprobs),
        max_new_tokens=_length(body.max_tokens, service),
        default_max_new_tokens=_COMPLETION_DEFAULT_TOKENS,
        model=model,
        principal=principal,
        n=body.n or 1,
        owner=owner,
        memory=body.choice,
        wants_why=bool(body.why),
    )
    if len(ask.prompts) * ask.n > _MOST_ANSWERS:
        raise Refusal(
            400,
            f"{len(ask.prompts)} prompts with n={ask.n} are {len(ask.prompts) * ask.n} answers, and at most "
            f"{_MOST_ANSWERS} are made for one request. Send fewer prompts at a time.",
            "invalid_value",
            param="n",
        )
    shape = CompletionShape(with_logprobs=body.logprobs is not None)
    return await _answer(body, ask, shape, request, service, request_id, None)


async def _model_of(model: str, service: Service, principal: Principal) -> tuple[str, str | None]:
    """What is asked for, as the registry calls it; and whose it is where another tenant lets this one ask it."""
    meant = fine_tuned(model)
    if meant is None or meant.tenant == principal.tenant or service.registry is None:
        return registry_name(model, principal.tenant), None
    permissions = CheckpointPermissions(service.registry.home.database)
    allowed = await anyio.to_thread.run_sync(permissions.allows, meant, principal.tenant)
    return (registry_name(model, meant.tenant), meant.tenant) if allowed else (model, None)


def _params(body: Sampling, logprobs: int | None) -> SamplingParams:
    return SamplingParams(
        max_new_tokens=1,  # replaced once the prompt has been counted
        temperature=1.0 if body.temperature is None else body.temperature,
        top_p=1.0 if body.top_p is None else body.top_p,
        top_k=body.top_k or 0,
        min_p=body.min_p or 0.0,
        repetition_penalty=1.0 if body.repetition_penalty is None else body.repetition_penalty,
        presence_penalty=body.presence_penalty or 0.0,
        frequency_penalty=body.frequency_penalty or 0.0,
        stop=body.stops,
        seed=None if body.seed is None else body.seed % 2**63,
        logprobs=logprobs,
    )


def _length(asked: int | None, service: Service) -> int | None:
    limit = service.settings.max_new_tokens_limit
    if asked is not None and asked > limit:
        message = f"max_tokens is {asked}, and this server makes at most {limit}. Ask for fewer."
        raise Refusal(400, message, "invalid_value", param="max_tokens")
    return asked


class _Request:
    """One request that is being answered: what all its events and its record share."""

    def __init__(
        self, body: Sampling, ask: Ask, shape: Shape, running: Running, request_id: str, answering: Answering
    ) -> None:
        self.ask, self.shape, self.running, self.answering = ask, shape, running, answering
        self.words = TokenText(running.tokenizer)
        self.with_usage = body.stream_options is not None and body.stream_options.include_usage
        self.head = {
            "id": request_id,
            "created": int(time.time()),
            "model": running.binding.label,
            "system_fingerprint": running.binding.label,
        }

    async def whole(self, answers: Sequence[Answer]) -> dict[str, Any]:
        """The body of an answer that is not streamed."""
        choices = [self.shape.choice(index, answer, self.words) for index, answer in enumerate(answers)]
        if self.ask.wants_why:
            for index, answer in enumerate(answers):
                choices[index]["why"] = await self.why(index, answer.token_ids)
        return self.head | {"object": self.shape.object, "choices": choices, "usage": self.running.usage()} | self.read

    async def why(self, index: int, answer_ids: Sequence[int]) -> list[dict[str, Any]]:
        """What each token of an answer was read from."""
        return shown(await self.answering.why(self.running, self.ask, index, answer_ids), self.words.text)

    @property
    def read(self) -> dict[str, Any]:
        """What was read of a memory, for each prompt; nothing where none was."""
        return {"memory": [found.to_json() for found in self.running.recalls]} if self.running.recalls else {}

    async def events(self, keep: Callable[[str], None]) -> AsyncIterator[dict[str, Any]]:
        """The events of a stream, all but `[DONE]`; `keep` gets the first answer when all are whole."""
        head = self.head | {"object": self.shape.stream_object}
        # OpenAI sends `usage: null` with every event but the last, if it was asked for at all.
        tail: dict[str, Any] = {"usage": None} if self.with_usage else {}
        sent = [""] * (len(self.ask.prompts) * self.ask.n)
        answer_ids: list[list[int]] = [[] for _ in sent]
        for index in range(len(sent)):
            opening = self.shape.opening(index)
            if opening is not None:
                yield head | {"choices": [opening]} | tail
        async with contextlib.aclosing(self.running.events()) as chunks:
            async for index, chunk in chunks:
                piece = self.shape.piece(index, chunk, self.words, len(sent[index]))
                if chunk.source is not None:
                    piece["why"] = [{"token": self.words.text(chunk.token_ids[0])} | chunk.source.to_json()]
                sent[index] += chunk.text
                answer_ids[index] += chunk.token_ids
                if chunk.text or chunk.finish_reason is not None or chunk.source or piece["logprobs"] is not None:
                    yield head | {"choices": [piece]} | tail
        keep(sent[0])
        if self.ask.wants_why:
            for index, ids in enumerate(answer_ids):
                why = {"why": await self.why(index, ids)}
                yield head | {"choices": [self._nothing_more(index, sent) | why]} | tail
        if self.read:
            # With a choice: only who asks for `usage` expects an event without one, and others take choices[0] of each.
            yield head | {"choices": [self._nothing_more(0, sent)]} | self.read | tail
        if self.with_usage:
            yield head | {"choices": [], "usage": self.running.usage()}

    def _nothing_more(self, index: int, sent: Sequence[str]) -> dict[str, Any]:
        """A choice of a stream that adds no text to its answer."""
        return self.shape.piece(index, Chunk(), self.words, len(sent[index]))


async def _answer(
    body: Sampling,
    ask: Ask,
    shape: Shape,
    request: Request,
    service: Service,
    request_id: str,
    kept_messages: Sequence[dict[str, str]] | None,
) -> Response:
    running = await service.answering.start(ask, request_id)
    answered = _Request(body, ask, shape, running, request_id, service.answering)
    version = running.version

    def keep(text: str) -> None:
        # Feedback names an answer by its request id alone, so only single answers can be rated, and are kept.
        # What others asked is nothing for the nights of the model's owner, nor is the model one of the asker's.
        if kept_messages is not None and ask.n == 1 and ask.owner is None:
            service.recorder.keep(
                Exchange(request_id, version.name, version.id, kept_messages, text, owner_of(request))
            )

    def at_end() -> None:
        running.cancel()
        request.state.facts = running.facts()

    headers = running.headers()
    if body.stream:
        return EventStream(answered.events(keep), headers, at_end)
    try:
        answers = await while_connected(request.receive, running.answers())
    finally:
        at_end()
    keep(answers[0].text)
    return JSONResponse(await answered.whole(answers), headers=headers)


@router.get("/models", response_model=ModelList, responses=openai_refusals())
async def models(request: Request, service: ServiceOf, principal: PrincipalOf) -> Response:
    """What may stand in `model`: each name, and the version that it means now; none of what could not answer."""
    return JSONResponse({"object": "list", "data": await _cards(request, service, principal)})


@router.get("/models/{model}", response_model=ModelCard, responses=openai_refusals(404))
async def model(model: str, request: Request, service: ServiceOf, principal: PrincipalOf) -> Response:
    """One of them."""
    cards = await _cards(request, service, principal)
    card = next((card for card in cards if card["id"] == model), None)
    if card is None:
        known = ", ".join(card["id"] for card in cards) or "none"
        raise Refusal(
            404, f"There is no model {model[:200]!r} here. There is {known}.", "model_not_found", param="model"
        )
    return JSONResponse(card)


async def _cards(request: Request, service: Service, principal: Principal) -> list[dict[str, Any]]:
    training = request.app.state.training
    names = {} if training is None else await anyio.to_thread.run_sync(fine_tuned_models, training, principal.tenant)
    return [
        {"id": id_, "object": "model", "created": int(published_at(version).timestamp()), "owned_by": "nightschool"}
        for version in await service.names.versions(principal.tenant)
        for id_ in (version.name, f"{version.name}@champion", version.ref, *names.get(version.ref, ()))
    ]
