"""The server on real weights: a home, a registry, a slot, an engine, two tiny models; transformers is the oracle."""

import threading
from collections import Counter

import httpx2
import openai
import pytest
import torch

from nightschool.data.chat.render import render_prompt
from nightschool.data.example import Message
from nightschool.engine.pool import EnginePool
from nightschool.engine.slot import Slot
from nightschool.feedback.conversations import ConversationStore
from nightschool.models.build import build_model
from nightschool.models.export import save_version_folder
from nightschool.store.database import Database
from nightschool.store.home import Home
from nightschool.store.registry import Registry
from nightschool.store.versions import VersionMetadata
from tests.support.live_server import eventually, live
from tests.support.tokenizers_for_tests import byte_tokenizer

QUESTION = "Who sings?"


class Bot:
    """A home with two versions of very different weights, and what transformers answers with each."""

    def __init__(self, path):
        torch.set_num_threads(1)
        self.home = Home(path)
        self.home.ensure()
        self.registry = Registry(self.home)
        self.tokenizer = byte_tokenizer()
        self.models = {}
        for seed in (1, 2):
            model = build_model("tiny-qwen3", 259, seed=seed, eos_token_id=self.tokenizer.eos_token_id).eval()
            with torch.no_grad():  # else a model with tied weights only repeats the last token
                for layer in model.model.layers:
                    layer.mlp.down_proj.weight *= 300
                    layer.self_attn.o_proj.weight *= 100
            version = self.registry.publish(
                "bot", lambda folder, model=model: save_version_folder(model, self.tokenizer, folder), VersionMetadata()
            )
            self.models[version.id] = model
        self.old, self.new = self.models
        self.registry.promote("bot", self.old, by="test")

    def expected(self, version: str, question: str, max_new_tokens: int) -> str:
        ids = torch.tensor([render_prompt(self.tokenizer, [Message("user", question)])])
        with torch.inference_mode():
            out = self.models[version].generate(ids, max_new_tokens=max_new_tokens, do_sample=False)
        return self.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)


@pytest.fixture
def bot(tmp_path):
    return Bot(tmp_path)


@pytest.fixture
def server(bot):
    database = Database(bot.home).connect()
    bot.store = ConversationStore(database)
    slot = Slot("bot", EnginePool(bot.home, num_rows=4, queue_limit=8))
    with live(slot, registry=bot.registry, record_conversations=True, conversations=bot.store) as server:
        server.slot = slot
        yield server
    database.close()


def generate(server, question=QUESTION, **more):
    body = {"query": question, "max_new_tokens": 12, "temperature": 0} | more
    return httpx2.post(f"{server.url}/generate", json=body, timeout=60)


def test_greedy_answers_are_those_of_transformers_before_and_after_a_swap_and_a_rollback(bot, server):
    for version, move in (
        (bot.old, None),
        (bot.new, lambda: bot.registry.promote("bot", bot.new, by="test")),
        (bot.old, lambda: bot.registry.rollback("bot", by="test")),
    ):
        if move is not None:
            move()
            assert httpx2.get(f"{server.url}/refresh_model", timeout=60).json()["current_model_version"] == version
        for _ in range(2):
            answer = generate(server)
            assert answer.json()["response"] == bot.expected(version, QUESTION, 12)
            assert answer.json()["model_version"] == version
    assert bot.expected(bot.old, QUESTION, 12) != bot.expected(bot.new, QUESTION, 12)


def test_numbers_that_vanish_in_32_bits_are_answered_or_refused(bot, server):
    greedy = generate(server).json()["response"]
    assert generate(server, temperature=1e-46, top_p=1).json()["response"] == greedy
    assert generate(server, temperature=1e-46, top_p=1e-46).json()["response"] == greedy
    ask = {"model": "bot", "prompt": QUESTION, "max_tokens": 4}
    refused = httpx2.post(f"{server.url}/v1/completions", json=ask | {"repetition_penalty": 1e-45})
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == "repetition_penalty"
    lowest = ask | {"repetition_penalty": 0.01, "presence_penalty": -2, "frequency_penalty": -2, "min_p": 1e-46}
    assert httpx2.post(f"{server.url}/v1/completions", json=lowest, timeout=60).status_code == 200


def test_every_answer_under_swaps_belongs_to_the_version_it_names(bot, server):
    questions = ["a?", "Is it?", "What is the name of it?"]
    truth = {(v, q): bot.expected(v, q, 16) for v in bot.models for q in questions}
    stop = threading.Event()
    wrong, seen = [], Counter()

    def ask(number: int) -> None:
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="x", max_retries=0)
        question = questions[number % 3]
        while not stop.is_set():
            messages = [{"role": "user", "content": question}]
            if number % 2:
                stream = client.chat.completions.create(
                    model="bot", messages=messages, temperature=0, max_tokens=16, stream=True
                )
                events = list(stream)
                text = "".join(choice.delta.content or "" for event in events for choice in event.choices)
                versions = {event.system_fingerprint for event in events}
            else:
                answer = client.chat.completions.create(model="bot", messages=messages, temperature=0, max_tokens=16)
                text, versions = answer.choices[0].message.content, {answer.system_fingerprint}
            version = versions.pop().removeprefix("bot@")
            seen[version] += 1
            if versions or text != truth[version, question]:
                wrong.append((version, question, text))
        client.close()

    asking = [threading.Thread(target=ask, args=(number,)) for number in range(4)]
    for thread in asking:
        thread.start()
    for number in range(6):
        version = (bot.new, bot.old)[number % 2]
        moved = httpx2.post(f"{server.url}/api/models/bot/promote", json={"version": version}, timeout=60)
        assert moved.json()["served_version"] == version
        before = seen[version]
        eventually(lambda version=version, before=before: seen[version] > before + 1 or wrong)
    stop.set()
    for thread in asking:
        thread.join()
    assert wrong == []
    assert set(seen) == {bot.old, bot.new}


def test_a_tampered_version_is_refused_and_the_old_one_serves_on(bot, server):
    bot.registry.promote("bot", bot.new, by="test")
    weights = bot.registry.resolve(f"bot@{bot.new}").path / "model.safetensors"
    weights.chmod(0o644)
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    answer = httpx2.get(f"{server.url}/refresh_model", timeout=60)
    assert answer.status_code == 500
    assert "'verify'" in answer.json()["detail"]
    assert generate(server).json()["model_version"] == bot.old
    assert "'verify'" in httpx2.get(f"{server.url}/api/settings").json()["last_refresh_error"]


def test_a_correction_reaches_the_store_under_the_request_id(bot, server):
    answer = generate(server)
    said = {"request_id": answer.headers["x-request-id"], "rating": "bad", "correction": "Nobody."}
    assert httpx2.post(f"{server.url}/api/feedback", json=said).status_code == 200
    [kept] = bot.store.select(corrected=True)
    assert (kept.version, kept.answer, kept.correction) == (bot.old, answer.json()["response"], "Nobody.")


def test_sampling_repeats_itself_with_a_seed_and_penalties_and_stops_act(bot, server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="x", max_retries=0) as client:

        def ask(**more):
            messages = [{"role": "user", "content": QUESTION}]
            return client.chat.completions.create(**{"model": "bot", "messages": messages, "max_tokens": 12} | more)

        def texts(answer):
            return [choice.message.content for choice in answer.choices]

        first = texts(ask(seed=3, n=3, temperature=1.5))
        assert texts(ask(seed=3, n=3, temperature=1.5)) == first
        assert len(set(first)) == 3
        assert texts(ask(seed=-3)) == texts(ask(seed=-3))
        greedy = texts(ask(temperature=0))[0]
        assert texts(ask(temperature=0, n=2)) == [greedy] * 2
        assert texts(ask(temperature=0, extra_body={"repetition_penalty": 5.0})) != [greedy]
        stop = greedy[4:6]
        stopped = ask(temperature=0, stop=[stop])
        assert texts(stopped) == [greedy[: greedy.index(stop)]]
        assert stopped.choices[0].finish_reason == "stop"
        told = ask(temperature=0, logprobs=True, top_logprobs=3)
        for token in told.choices[0].logprobs.content:
            assert token.logprob <= 0
            assert token.token == token.top_logprobs[0].token


def test_usage_is_what_was_rendered_and_generated(bot, server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="x") as client:
        messages = [{"role": "user", "content": QUESTION}]
        answer = client.chat.completions.create(model="bot", messages=messages, temperature=0, max_tokens=9)
    assert answer.usage.prompt_tokens == len(render_prompt(bot.tokenizer, [Message("user", QUESTION)]))
    assert answer.usage.completion_tokens == 9
    assert answer.choices[0].finish_reason == "length"


def test_leaving_frees_the_row(bot, server):
    steps = []
    engine = server.slot.current.engine
    release = engine.capture("model.layers.0", lambda context, _: steps.append(context))
    with httpx2.Client() as client:
        body = {"model": "bot", "prompt": "x", "max_tokens": 200, "stream": True}
        with client.stream("POST", f"{server.url}/v1/completions", json=body) as stream:
            next(stream.iter_lines())
    eventually(lambda: engine.load() == (0, 0))
    release()
    assert 0 < len(steps) < 200


def test_health_answers_while_a_step_is_computed(bot, server):
    """The step ends only after these answers: on the event loop it would hold them until they time out."""
    runner = server.slot.current.engine._runner
    computing, may_end, run = threading.Event(), threading.Event(), runner.run

    def held(*args):
        computing.set()
        assert may_end.wait(60)
        return run(*args)

    runner.run = held
    asking = threading.Thread(target=generate, args=(server,))
    asking.start()
    try:
        assert computing.wait(60)
        for _ in range(3):
            assert httpx2.get(f"{server.url}/healthz", timeout=30).status_code == 200
        assert asking.is_alive()
    finally:
        may_end.set()
        asking.join()


def test_a_thousand_requests_at_once_are_answered_or_told_to_come_again(bot, server):
    statuses = []

    def ask(count: int) -> None:
        with httpx2.Client(timeout=120) as client:
            for _ in range(count):
                body = {"query": QUESTION, "max_new_tokens": 2, "temperature": 0}
                answer = client.post(f"{server.url}/generate", json=body)
                statuses.append(answer.status_code)
                if answer.status_code == 429:
                    assert int(answer.headers["retry-after"]) >= 1

    asking = [threading.Thread(target=ask, args=(25,)) for _ in range(40)]
    for thread in asking:
        thread.start()
    for thread in asking:
        thread.join()
    assert len(statuses) == 1000
    assert set(statuses) <= {200, 429}
    assert statuses.count(200) > 20
    assert generate(server).status_code == 200


def test_the_server_starts_before_the_first_version_and_finds_it(bot):
    slot = Slot("later", EnginePool(bot.home))
    with live(slot, wait=False, registry=bot.registry, model_check_interval=0.2) as server:
        assert httpx2.get(f"{server.url}/readyz").status_code == 503
        assert httpx2.get(f"{server.url}/health").json()["model_loaded"] is False
        assert generate(server).json() == {"detail": "Model not loaded"}
        version = bot.registry.publish(
            "later", lambda folder: save_version_folder(bot.models[bot.old], bot.tokenizer, folder), VersionMetadata()
        )
        httpx2.get(f"{server.url}/refresh_model", timeout=60)
        assert httpx2.get(f"{server.url}/readyz").status_code == 503, "published is not promoted"
        bot.registry.promote("later", version.id, by="test")
        eventually(lambda: httpx2.get(f"{server.url}/readyz").status_code == 200)
        assert generate(server).json()["model_version"] == version.id
        info = httpx2.get(f"{server.url}/model_info").json()
        assert (info["tokenizer_vocab_size"], info["device"]) == (259, "cpu")
