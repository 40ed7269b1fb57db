"""Waiting for an answer from asyncio: at every token, or only for its end."""

from __future__ import annotations

import asyncio
import threading

from nightschool.engine.binding import Binding
from nightschool.engine.handle import Handle, wake
from nightschool.engine.request import Chunk, GenerationRequest, SamplingParams, Usage


def a_handle() -> Handle:
    request = GenerationRequest(
        "r", Binding("bot@20260101_000000"), [1], SamplingParams(max_new_tokens=2, temperature=0)
    )
    return Handle(request, lambda: None)


def last_chunk() -> Chunk:
    return Chunk("b", (2,), finish_reason="stop", usage=Usage(prompt_tokens=1, generated_tokens=2))


def test_the_end_wakes_who_waits_for_it_and_a_token_does_not() -> None:
    handle = a_handle()

    async def wait() -> list[str]:
        seen: list[str] = []
        waiter = asyncio.create_task(handle.finished())
        await asyncio.sleep(0)
        wake(handle.publish(Chunk("a", (1,))))
        await asyncio.sleep(0.02)
        seen.append("early" if waiter.done() else "waiting")
        threading.Thread(target=lambda: wake(handle.publish(last_chunk()))).start()
        await asyncio.wait_for(waiter, 5)
        seen.append("ended")
        return seen

    assert asyncio.run(wait()) == ["waiting", "ended"]


def test_an_answer_that_has_ended_is_not_waited_for() -> None:
    handle = a_handle()
    wake(handle.publish(last_chunk()))
    asyncio.run(asyncio.wait_for(handle.finished(), 5))
