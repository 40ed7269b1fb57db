"""The OpenAI-compatible routes, asked by the unmodified `openai` client over a real socket."""

import asyncio

import httpx2
import openai
import pytest

from tests.support.fake_slot import FakeSlot, byte_tokenizer
from tests.support.live_server import client_of, live

REF = "bot@20251202_115436"
HELLO = [{"role": "user", "content": "hi"}]


@pytest.fixture(scope="module")
def slot():
    return FakeSlot(answer=lambda prompt: "Grüße, 世界!")


@pytest.fixture(scope="module")
def server(slot):
    with live(slot) as server:
        yield server


@pytest.fixture
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0) as client:
        yield client


def params_of(slot):
    return slot.current.engine.handles[-1].request.params


def test_a_chat_answer_carries_version_usage_and_request_id(client):
    raw = client.chat.completions.with_raw_response.create(model="bot", messages=HELLO)
    answer = raw.parse()
    assert answer.choices[0].message.content == "Grüße, 世界!"
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].finish_reason == "stop"
    assert answer.object == "chat.completion"
    assert answer.model == answer.system_fingerprint == raw.headers["x-model-version"] == REF
    assert answer.id == raw.headers["x-request-id"]
    assert answer.id.startswith("chatcmpl-")
    assert answer.usage.completion_tokens == len("Grüße, 世界!".encode())
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def test_usage_counts_the_rendered_prompt(client, slot):
    answer = client.chat.completions.create(model="bot", messages=HELLO)
    assert answer.usage.prompt_tokens == len(slot.current.engine.handles[-1].request.prompt_ids)


def test_a_stream_gives_the_same_text_and_ends_with_done(client, server):
    events = list(client.chat.completions.create(model="bot", messages=HELLO, stream=True))
    assert "".join(event.choices[0].delta.content or "" for event in events) == "Grüße, 世界!"
    assert events[0].choices[0].delta.role == "assistant"
    assert [event.choices[0].finish_reason for event in events[:-1]] == [None] * (len(events) - 1)
    assert events[-1].choices[0].finish_reason == "stop"
    assert {event.id for event in events} == {events[0].id}
    assert {event.system_fingerprint for event in events} == {REF}
    assert all(event.usage is None for event in events)
    body = {"model": "bot", "messages": HELLO, "stream": True}
    raw = httpx2.post(f"{server.url}/v1/chat/completions", json=body)
    assert raw.headers["content-type"].startswith("text/event-stream")
    assert raw.headers["x-model-version"] == REF
    assert raw.text.endswith("data: [DONE]\n\n")
    assert "\ufffd" not in raw.text


def test_a_stream_ends_with_usage_if_it_was_asked_for(client):
    options = {"include_usage": True}
    events = list(client.chat.completions.create(model="bot", messages=HELLO, stream=True, stream_options=options))
    assert events[-1].choices == []
    assert events[-1].usage.completion_tokens == len("Grüße, 世界!".encode())
    assert all(event.usage is None for event in events[:-1])


def test_the_asynchronous_client_streams_several_answers_at_once(server):
    async def ask():
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="any") as client:
            stream = await client.chat.completions.create(model="bot", messages=HELLO, stream=True, n=3)
            texts = ["", "", ""]
            async for event in stream:
                for choice in event.choices:
                    texts[choice.index] += choice.delta.content or ""
            return texts

    assert asyncio.run(ask()) == ["Grüße, 世界!"] * 3


def test_n_answers_with_a_seed_have_seeds_of_their_own(client, slot):
    before = len(slot.current.engine.handles)
    answer = client.chat.completions.create(model="bot", messages=HELLO, n=3, seed=7)
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert [handle.request.params.seed for handle in slot.current.engine.handles[before:]] == [7, 8, 9]
    prompt_tokens = len(slot.current.engine.handles[-1].request.prompt_ids)
    assert answer.usage.prompt_tokens == prompt_tokens, "a prompt counts once, however many answers it gets"


def test_every_parameter_reaches_the_engine(client, slot):
    client.chat.completions.create(
        model="bot",
        messages=HELLO,
        max_tokens=5,
        temperature=0.25,
        top_p=0.75,
        presence_penalty=0.5,
        frequency_penalty=-0.5,
        stop=["\n", "END"],
        seed=11,
        logprobs=True,
        top_logprobs=2,
        extra_body={"top_k": 40, "min_p": 0.1, "repetition_penalty": 1.2},
    )
    params = params_of(slot)
    assert params.max_new_tokens == 5
    assert (params.temperature, params.top_p, params.top_k, params.min_p) == (0.25, 0.75, 40, 0.1)
    assert (params.presence_penalty, params.frequency_penalty, params.repetition_penalty) == (0.5, -0.5, 1.2)
    assert (params.stop, params.seed, params.logprobs) == (("\n", "END"), 11, 2)


def test_the_defaults_are_those_of_openai(client, slot):
    client.chat.completions.create(model="bot", messages=HELLO)
    params = params_of(slot)
    assert (params.temperature, params.top_p, params.stop, params.seed, params.logprobs) == (1.0, 1.0, (), None, None)
    client.chat.completions.create(model="bot", messages=HELLO, temperature=0, max_completion_tokens=3, stop="x")
    params = params_of(slot)
    assert (params.temperature, params.max_new_tokens, params.stop) == (0, 3, ("x",))
    client.completions.create(model="bot", prompt="hi")
    assert params_of(slot).max_new_tokens == 16


def test_a_length_that_is_reached_is_the_finish_reason(client):
    answer = client.chat.completions.create(model="bot", messages=HELLO, max_tokens=2)
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.completion_tokens == 2


def test_log_probabilities_have_exact_bytes_of_half_characters(client):
    answer = client.chat.completions.create(model="bot", messages=HELLO, logprobs=True, top_logprobs=2)
    content = answer.choices[0].logprobs.content
    assert bytes(byte for token in content for byte in token.bytes).decode() == "Grüße, 世界!"
    assert all(token.logprob == -0.5 and len(token.top_logprobs) == 2 for token in content)
    streamed = client.chat.completions.create(model="bot", messages=HELLO, logprobs=True, stream=True)
    pieces = [event.choices[0].logprobs for event in streamed]
    tokens = [token for piece in pieces if piece for token in piece.content]
    assert bytes(byte for token in tokens for byte in token.bytes).decode() == "Grüße, 世界!"


def test_completions_continue_texts_and_token_ids(client, slot):
    ids = byte_tokenizer()("hi")["input_ids"]
    answer = client.completions.create(model="bot", prompt="hi")
    assert answer.choices[0].text == "Grüße, 世界!"
    assert slot.current.engine.handles[-1].request.prompt_ids == ids, "no template around a text"
    assert answer.usage.prompt_tokens == 2
    assert client.completions.create(model="bot", prompt=ids).usage.prompt_tokens == 2
    several = client.completions.create(model="bot", prompt=["a", "bc"], n=2)
    assert [choice.index for choice in several.choices] == [0, 1, 2, 3]
    assert several.usage.prompt_tokens == 3
    events = list(client.completions.create(model="bot", prompt=[ids, ids], stream=True))
    for index in (0, 1):
        text = "".join(choice.text for event in events for choice in event.choices if choice.index == index)
        assert text == "Grüße, 世界!"


def test_completions_logprobs_count_offsets_in_characters(client):
    whole = client.completions.create(model="bot", prompt="hi", logprobs=1).choices[0]
    assert whole.logprobs.text_offset[:3] == [0, 1, 2]
    assert whole.logprobs.tokens[2] == "bytes:\\xc3"
    assert len(whole.logprobs.tokens) == len(whole.logprobs.token_logprobs) == len(whole.logprobs.top_logprobs)
    events = client.completions.create(model="bot", prompt="hi", logprobs=1, stream=True)
    pieces = [event.choices[0].logprobs.text_offset for event in events]
    assert [offset for piece in pieces for offset in piece] == whole.logprobs.text_offset


def test_models_are_listed_under_every_name_that_is_understood(client):
    names = [model.id for model in client.models.list()]
    assert names == ["bot", "bot@champion", REF]
    for name in names:
        assert client.models.retrieve(name).id == name
        assert client.chat.completions.create(model=name, messages=HELLO).model == REF
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-4")


@pytest.mark.parametrize("name", ["gpt-4", "bot@19990101_000000", "bot@latest", "BOT", "", "bot@"])
def test_other_models_are_not_found(client, name):
    with pytest.raises(openai.NotFoundError) as caught:
        client.chat.completions.create(model=name, messages=HELLO)
    assert caught.value.code == "model_not_found"
    assert caught.value.param == "model"
    assert REF in caught.value.message


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("tools", [{"type": "function", "function": {"name": "f"}}]),
        ("tool_choice", "auto"),
        ("response_format", {"type": "json_object"}),
        ("response_format", {"type": "json_schema", "json_schema": {"name": "x", "schema": {}}}),
        ("logit_bias", {"1": 5}),
        ("functions", [{"name": "f"}]),
        ("reasoning_effort", "low"),
        ("store", True),
        ("modalities", ["text", "audio"]),
        ("service_tier", "flex"),
        ("max_tokens", 0),
        ("max_tokens", 1_000_000),
        ("n", 9),
        ("temperature", 2.5),
        ("top_p", 0.0),
        ("top_logprobs", 3),
        ("stop", ["a", "b", "c", "d", "e"]),
        ("stop", ""),
        ("stream_options", {"include_usage": True}),
        ("logprobs", 5),
        ("frequency_penalty", 3),
        ("messages", []),
        ("messages", [{"role": "tool", "content": "x"}]),
        ("messages", [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]),
        ("messages", [{"role": "user", "content": None}]),
        ("temprature", 1.0),
    ],
)
def test_what_would_be_ignored_or_is_out_of_bounds_is_refused_by_name(client, field, value):
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="bot", messages=HELLO, extra_body={field: value})
    assert caught.value.type == "invalid_request_error"
    assert field in caught.value.message
    assert caught.value.param is None or caught.value.param.startswith(field) or field in caught.value.message


@pytest.mark.parametrize(("field", "value"), [("echo", True), ("best_of", 3), ("suffix", "x"), ("logprobs", 6)])
def test_completions_refuse_what_they_cannot_do(client, field, value):
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model="bot", prompt="hi", extra_body={field: value})
    assert caught.value.param == field


@pytest.mark.parametrize(
    "harmless",
    [
        {"tools": []},
        {"tool_choice": "none"},
        {"response_format": {"type": "text"}},
        {"logit_bias": {}},
        {"store": False},
        {"user": "u1"},
        {"metadata": {"a": "b"}},
        {"service_tier": "auto"},
        {"n": None, "stop": None, "temperature": None, "max_tokens": None, "seed": None, "stream": None},
    ],
)
def test_neutral_values_are_accepted(client, harmless):
    assert client.chat.completions.create(model="bot", messages=HELLO, extra_body=harmless).choices


def test_an_unknown_field_names_the_nearest_one(client):
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="bot", messages=HELLO, extra_body={"top_logprob": 1})
    assert caught.value.param == "top_logprob"
    assert "Did you mean 'top_logprobs'?" in caught.value.message
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="bot", messages=[{"role": "user", "content": "a", "contents": "b"}])
    assert caught.value.param == "messages.0.contents"


def test_parts_of_text_are_joined_and_developers_are_the_system():
    seen = []
    with client_of(FakeSlot(answer=lambda prompt: seen.append(prompt) or "x")) as client:
        messages = [
            {"role": "developer", "content": "Be brief."},
            {"role": "user", "content": [{"type": "text", "text": "one "}, {"type": "text", "text": "two"}]},
        ]
        assert client.post("/v1/chat/completions", json={"model": "bot", "messages": messages}).status_code == 200
    assert "system\nBe brief." in seen[0]
    assert "user\none two" in seen[0]


def test_a_context_that_is_too_short_has_openais_code():
    with live(FakeSlot(context_tokens=50)) as server, openai.OpenAI(base_url=f"{server.url}/v1", api_key="x") as client:
        with pytest.raises(openai.BadRequestError) as caught:
            client.chat.completions.create(model="bot", messages=[{"role": "user", "content": "x" * 100}])
        assert caught.value.code == "context_length_exceeded"
        assert "50" in caught.value.message
        with pytest.raises(openai.BadRequestError) as caught:
            client.chat.completions.create(model="bot", messages=HELLO, max_tokens=49)
        assert caught.value.code == "context_length_exceeded"
        answer = client.chat.completions.create(model="bot", messages=HELLO)
        assert answer.usage.total_tokens <= 50


def test_token_ids_outside_the_vocabulary_and_empty_prompts_are_refused(client):
    for prompt in ([5, 100_000], ""):
        with pytest.raises(openai.BadRequestError):
            client.completions.create(model="bot", prompt=prompt)
    with pytest.raises(openai.BadRequestError):
        client.completions.create(model="bot", prompt=["a"] * 16, n=8)


def test_no_model_a_full_queue_and_a_broken_engine_map_to_the_clients_errors():
    empty, full, broken = FakeSlot(promoted=None), FakeSlot(queue_limit=0), FakeSlot(fails_with=RuntimeError("boom"))
    for slot, error, status in (
        (empty, openai.InternalServerError, 503),
        (full, openai.RateLimitError, 429),
        (broken, openai.InternalServerError, 500),
    ):
        with live(slot) as server, openai.OpenAI(base_url=f"{server.url}/v1", api_key="x", max_retries=0) as client:
            with pytest.raises(error) as caught:
                client.chat.completions.create(model="bot", messages=HELLO)
            assert caught.value.status_code == status
            if status == 429:
                assert caught.value.response.headers["retry-after"] == "3"
            if slot is empty:
                assert client.models.list().data == []


def test_a_failure_in_the_middle_of_a_stream_reaches_the_client_as_an_error():
    slot = FakeSlot(answer=lambda prompt: "abcdef", seconds_per_token=0.01)
    with live(slot) as server, openai.OpenAI(base_url=f"{server.url}/v1", api_key="x", max_retries=0) as client:
        stream = client.chat.completions.create(model="bot", messages=HELLO, stream=True)
        got = []
        with pytest.raises(openai.APIError) as caught:  # noqa: PT012
            for event in stream:
                got.append(event)
                if len(got) == 3:
                    slot.current.engine.fails_with = RuntimeError("boom")
        assert "Generation failed: boom" in str(caught.value)


def test_of_several_answers_that_do_not_all_fit_the_queue_none_is_left_behind():
    slot = FakeSlot(queue_limit=2, seconds_per_token=0.01)
    with client_of(slot) as client:
        body = {"model": "bot", "messages": HELLO, "n": 3}
        assert client.post("/v1/chat/completions", json=body).status_code == 429
        assert [handle.cancelled for handle in slot.current.engine.handles] == [True, True]
        assert client.post("/v1/chat/completions", json=body | {"n": 2}).status_code == 200
