"""Why a model that is served answers as it does with a memory, as the tool `why` of the Model Context Protocol tells it."""

from __future__ import annotations

from typing import Any

from fastapi import Request

from nightschool.data.example import Message
from nightschool.engine.recall import MemoryChoice
from nightschool.engine.request import SamplingParams
from nightschool.engine.why import Explained, shown
from nightschool.errors import NotLoaded, UsageError
from nightschool.server.errors import ClientGone, Refusal
from nightschool.server.generation import only_answer
from nightschool.server.middleware.auth import check_scope
from nightschool.server.middleware.quotas import check_tokens
from nightschool.server.middleware.route_rules import Rule
from nightschool.server.openai.model_names import registry_name
from nightschool.server.service import Service
from nightschool.server.submission import Ask
from nightschool.server.token_text import TokenText
from nightschool.store.principal import Principal


async def explained(
    service: Service,
    principal: Principal,
    request: Request,
    request_id: str,
    memory: str,
    question: str,
    model: str | None,
    max_new_tokens: int,
) -> dict[str, Any]:
    """Ask a model greedily with a memory of the principal's tenant, and why it says what it says.

    Args:
        service: What answers.
        principal: Who asks; its key must be one that may ask models, and its tenant have tokens left today.
        request: Gets what was used in `state.facts`; the answer is cancelled when its client goes away.
        request_id: Names the answer.
        memory: The memory that is read.
        question: What is asked.
        model: The model, as a request for a chat names it; None is the one that is served.
        max_new_tokens: Longest answer in tokens.

    Raises:
        NightschoolError: Why it cannot be asked, in words for whoever called the tool.
    """
    try:
        check_scope(principal, Rule("infer"))
        await check_tokens(service.access, principal, await service.access.quota(principal.tenant))
        ask = Ask(
            prompts=[[Message("user", question)]],
            params=SamplingParams(max_new_tokens, temperature=0),
            max_new_tokens=min(max_new_tokens, service.settings.max_new_tokens_limit),
            default_max_new_tokens=max_new_tokens,
            model=None if model is None else registry_name(model, principal.tenant),
            principal=principal,
            memory=MemoryChoice(memory),
            wants_why=True,
        )
        running = await service.answering.start(ask, request_id)
        answer = await only_answer(running, request)
        why = await service.answering.why(running, ask, 0, answer.token_ids)
    except ClientGone:
        raise UsageError("The client is gone, so its question was not answered.") from None
    except NotLoaded as error:
        raise UsageError(f"No model is served that could be asked: {error}") from None
    except Refusal as refusal:
        raise UsageError(refusal.message) from None
    words = TokenText(running.tokenizer)
    return Explained(running.binding.label, question, answer.text, running.recalls[0], shown(why, words.text)).to_json()
