"""The engine answers as transformers does, whatever shares its steps, and no request can hurt another."""

import asyncio
import itertools
import random
import threading

import pytest
import torch

from nightschool.engine.request import GenerationRequest, SamplingParams
from nightschool.errors import ModelError, NotLoaded, PromptTooLong, QueueFull, UsageError
from tests.support.engine_setups import (
    BOUND,
    VOCAB_SIZE,
    greedy,
    lively_model,
    loaded_model,
    random_prompt,
    request,
    running,
)
from tests.support.live_server import eventually
from tests.support.tokenizers_for_tests import byte_tokenizer

WINDOWED = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}
ARCHITECTURES = {
    "gpt-neox": ("tiny-gpt-neox", {}),
    "llama": ("tiny-llama", {}),
    "qwen3": ("tiny-qwen3", {}),
    "qwen3-moe": ("tiny-qwen3-moe", {}),
    "mixtral": ("tiny-mixtral", {}),
    "mixtral, window of 8": ("tiny-mixtral", {"sliding_window": 8}),
    "qwen3, one layer with a window of 8": ("tiny-qwen3", WINDOWED),
}


@pytest.fixture(scope="module")
def model():
    return lively_model("tiny-llama")


@pytest.fixture
def engine(model):
    with running(loaded_model(model=model), num_rows=4) as engine:
        yield engine


def hold(engine):
    """Steps of this engine wait until the returned event is set; the other says that one does wait."""
    go, held, run = threading.Event(), threading.Event(), engine._runner.run

    def waiting(*arguments):
        held.set()
        assert go.wait(30)
        return run(*arguments)

    engine._runner.run = waiting
    return go, held


# The same answers as transformers.


@pytest.mark.parametrize("prefix_cache", [True, False])
@pytest.mark.parametrize("tokens_per_step", [512, 5])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_answers_that_share_steps_are_those_of_transformers(architecture, tokens_per_step, prefix_cache):
    preset, changes = ARCHITECTURES[architecture]
    model = lively_model(preset, **changes)
    dice = random.Random(architecture)
    shared = random_prompt(dice, 70)
    prompts = [random_prompt(dice, dice.choice((1, 3, 17, 40, 90))) for _ in range(5)]
    prompts += [shared + random_prompt(dice, dice.randrange(1, 30)) for _ in range(3)] + [shared]
    dice.shuffle(prompts)
    asked = [(prompt, dice.randrange(1, 30)) for prompt in prompts]
    settings = {"num_rows": 4, "tokens_per_step": tokens_per_step, "prefix_cache": prefix_cache}
    with running(loaded_model(model=model), **settings) as engine:
        handles = []
        for prompt, most in asked:
            handles.append(engine.submit(request(prompt, most)))
            # The next one joins when one of these has got so far.
            earlier, tokens = dice.choice(handles), dice.randrange(8)
            eventually(lambda: earlier.is_finished or len(earlier._chunks) >= tokens)  # noqa: B023
        answers = [handle.result(60) for handle in handles]
        again = [engine.submit(request(prompt, most)).result(60) for prompt, most in asked]
    cached = sum(answer.usage.cached_tokens for answer in again)
    for (prompt, most), answer, second in zip(asked, answers, again, strict=True):
        expected = greedy(model, prompt, most)
        assert (answer.token_ids, second.token_ids) == (expected, expected)
        assert answer.finish_reason == "length"
        assert (answer.usage.prompt_tokens, answer.usage.generated_tokens) == (len(prompt), most)
    assert (cached > 0) == prefix_cache


def test_the_comparison_would_notice_another_model(model):
    prompt = random_prompt(random.Random(0), 20)
    assert greedy(model, prompt, 16) != greedy(lively_model("tiny-llama", seed=2), prompt, 16)


def test_rows_that_outgrow_the_memory_of_the_cache_wait_and_answer_alike(model):
    dice = random.Random(5)
    prompts = [random_prompt(dice, length) for length in (100, 10, 60, 3, 80)]
    with running(loaded_model(model=model), num_rows=4, cache_bytes=1) as engine:
        handles = [engine.submit(request(prompt, 20)) for prompt in prompts]
        assert [handle.result(60).token_ids for handle in handles] == [greedy(model, p, 20) for p in prompts]


def test_a_cached_prefix_is_never_shared_between_tenants(engine):
    prompt = random_prompt(random.Random(1), 70)
    first = engine.submit(request(prompt, binding=BOUND.of("a"))).result(60)
    assert engine.submit(request(prompt, binding=BOUND.of("b"))).result(60).usage.cached_tokens == 0
    again = engine.submit(request(prompt, binding=BOUND.of("a"))).result(60)
    assert again.usage.cached_tokens == 64
    assert again.token_ids == first.token_ids


def test_a_prefix_cache_without_room_changes_no_answer(model):
    dice = random.Random(2)
    prompts = [random_prompt(dice, 100) for _ in range(4)]
    block = 32 * 2 * 2 * 2 * 16 * 4  # tokens, layers, keys and values, heads, channels, bytes
    with running(loaded_model(model=model), prefix_cache_bytes=2 * block) as engine:
        for prompt in prompts * 2:
            assert engine.submit(request(prompt, 8)).result(60).token_ids == greedy(model, prompt, 8)
            assert engine._prefix.num_bytes <= 2 * block


# Ends.


def test_the_end_token_ends_an_answer_and_is_no_part_of_it(model):
    loaded = loaded_model(model=model)
    prompt = random_prompt(random.Random(3), 12)
    tokens = greedy(model, prompt, 16)
    place = next(i for i in range(2, 16) if tokens[i] not in tokens[:i])
    with running(loaded) as engine:
        engine._residents[None].stop_ids = frozenset({tokens[place]})
        answer = engine.submit(request(prompt, ignore_eos=False)).result(60)
        assert (answer.token_ids, answer.finish_reason) == (tokens[:place], "stop")
        assert engine.submit(request(prompt, ignore_eos=True)).result(60).token_ids == tokens


def spelling(model, text):
    """A model that answers everything with the bytes of `text`, one a token, again and again."""
    tokenizer = byte_tokenizer()
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert len(set(ids)) == len(ids), "each token says which comes next"
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                weight.zero_()
        model.lm_head.weight.zero_()
        embedding = model.get_input_embeddings().weight
        embedding.zero_()
        for place, token in enumerate(ids):
            embedding[token, place] = 1
            model.lm_head.weight[ids[(place + 1) % len(ids)], place] = 1
    return ids


@pytest.mark.parametrize(
    ("stop", "text"),
    [
        (("def",), "bc"),
        (("cx", "efg"), "bcd"),
        (("ghQ", "h☃i"), "bcdefg"),
        (("☃",), "bcdefgh"),
        (("zz",), "bcdefgh☃iabcdefgh"),
        (("hX",), "bcdefgh☃iabcdefgh"),
    ],
)
def test_a_stop_string_over_several_tokens_never_shows(stop, text):
    model = lively_model("tiny-llama")
    ids = spelling(model, "abcdefgh☃i")
    with running(loaded_model(model=model)) as engine:
        handle = engine.submit(request([ids[0]], 19, stop=stop))
        shown = ""
        for chunk in handle.chunks():
            shown += chunk.text
            assert not any(string in shown for string in stop)
            assert text.startswith(shown)
    answer = handle.result()
    assert answer.text == shown == text
    assert answer.finish_reason == ("stop" if len(text) < 17 else "length")


@pytest.mark.parametrize("most", [1, 2, 33])
def test_no_more_tokens_than_asked_for(engine, most):
    answer = engine.submit(request([5, 6, 7], most)).result(60)
    assert (len(answer.token_ids), answer.usage.generated_tokens, answer.finish_reason) == (most, most, "length")


# Chance, and what is told of it.


def test_the_same_seed_draws_the_same_answer_whatever_else_is_in_the_batch(engine):
    prompt = random_prompt(random.Random(4), 30)
    params = {"temperature": 1.3, "top_p": 0.9, "top_k": 50, "seed": 11}
    alone = engine.submit(request(prompt, 20, **params)).result(60)
    for number in range(3):
        others = [{"temperature": 0}, {"temperature": 2.0, "seed": number}, {"temperature": 1.0, "min_p": 0.1}]
        handles = [engine.submit(request(prompt[number:], 20, **other)) for other in others]
        handles.insert(number, engine.submit(request(prompt, 20, **params)))
        answers = [handle.result(60) for handle in handles]
        assert answers[number].token_ids == alone.token_ids
    assert engine.submit(request(prompt, 20, **params | {"seed": 12})).result(60).token_ids != alone.token_ids


def test_without_a_seed_every_answer_is_drawn_anew(engine):
    answers = [engine.submit(request([9, 8], 20, temperature=2.0)).result(60).token_ids for _ in range(3)]
    assert len(set(answers)) == 3


def test_logprobs_are_those_of_the_model(model, engine):
    prompt = random_prompt(random.Random(6), 25)
    noise = engine.submit(request(prompt[3:], 12, temperature=1.0))
    handle = engine.submit(request(prompt, 12, logprobs=3, temperature=1.5, seed=1, frequency_penalty=1.0))
    answer = handle.result(60)
    noise.result(60)
    with torch.inference_mode():
        logits = model(torch.tensor([[*prompt, *answer.token_ids]])).logits[0, len(prompt) - 1 : -1]
    expected = logits.log_softmax(-1)
    assert len(answer.logprobs) == 12
    for row, token_id, told in zip(expected, answer.token_ids, answer.logprobs, strict=True):
        assert told.token_id == token_id
        assert told.logprob == pytest.approx(float(row[token_id]), abs=1e-3)
        best = row.topk(3)
        assert [token for token, _ in told.top] == best.indices.tolist()
        assert [value for _, value in told.top] == pytest.approx(best.values.tolist(), abs=1e-3)
    assert engine.submit(request(prompt, 2)).result(60).logprobs is None


# Leaving.


def test_a_cancelled_request_leaves_its_row_to_the_next_at_once(model):
    with running(loaded_model(model=model), num_rows=1) as engine:
        go, held = hold(engine)
        steps = []
        engine.capture("model.layers.0", lambda context, _: steps.append(context))
        first, second = engine.submit(request([4, 5], 200)), engine.submit(request([6, 7], 5))
        assert held.wait(30)
        first.cancel()
        go.set()
        answer = first.result(30)
        # The step that was under way is finished, and no other.
        assert (answer.finish_reason, len(answer.token_ids)) == ("cancelled", 1)
        assert second.result(30).token_ids == greedy(model, [6, 7], 5)
        assert len(steps) == 1 + 5


def test_cancelling_a_waiting_or_a_finished_request_harms_nobody(model):
    with running(loaded_model(model=model), num_rows=1) as engine:
        go, held = hold(engine)
        first, waiting = engine.submit(request([4, 5], 5)), engine.submit(request([6, 7], 5))
        assert held.wait(30)
        waiting.cancel()
        waiting.cancel()
        go.set()
        assert waiting.result(30).finish_reason == "cancelled"
        assert waiting.result().token_ids == ()
        assert first.result(30).token_ids == greedy(model, [4, 5], 5)
        first.cancel()
        assert engine.submit(request([6, 7], 5)).result(30).token_ids == greedy(model, [6, 7], 5)


def test_who_leaves_the_stream_cancels(engine):
    handle = engine.submit(request([4, 5], 200))
    for _ in handle.chunks():
        break
    assert handle.result(30).finish_reason == "cancelled"

    async def leave():
        handle = engine.submit(request([4, 5], 200))
        stream = handle.stream()
        await anext(stream)
        await stream.aclose()
        return handle

    handle = asyncio.run(leave())
    assert handle.result(30).finish_reason == "cancelled"
    assert len(handle.result().token_ids) < 200


def test_a_stream_is_the_whole_answer_for_threads_and_for_asyncio(engine):
    handle = engine.submit(request([4, 5, 6], 20))

    async def read():
        return [chunk async for chunk in handle.stream()]

    chunks = asyncio.run(read())
    assert chunks == list(handle.chunks())
    assert "".join(chunk.text for chunk in chunks) == handle.result().text
    assert [chunk.finish_reason for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert chunks[-1].usage == handle.result().usage


def test_whoever_closes_chooses_between_the_answers_and_an_early_end(model):
    for drain, reason, tokens in ((True, "length", 30), (False, "cancelled", 1)):
        with running(loaded_model(model=model), num_rows=1) as engine:
            go, held = hold(engine)
            handles = [engine.submit(request([4, 5], 30)) for _ in range(3)]
            assert held.wait(30)
            closing = threading.Thread(target=engine.close, kwargs={"drain": drain})
            closing.start()
            eventually(lambda engine=engine: engine._state != "open")
            with pytest.raises(NotLoaded, match="takes no more requests"):
                engine.submit(request([4, 5], 30))
            go.set()
            closing.join(60)
            assert [handle.result(1).finish_reason for handle in handles] == [reason] * 3
            assert len(handles[0].result().token_ids) == tokens


# Failures.


def test_a_failure_ends_the_request_that_causes_it_and_no_other(model):
    with running(loaded_model(model=model), num_rows=4) as engine:
        run, broken = engine._runner.run, []

        def failing(plan, *arguments):
            if any(span.key in broken and span.start >= 6 for span in plan.spans):
                raise RuntimeError("a broken expert")
            return run(plan, *arguments)

        engine._runner.run = failing
        prompts = [[4, 5, 6], [7, 8, 9], [10, 11, 12]]
        broken.append(1)
        handles = [engine.submit(request(prompt, 12)) for prompt in prompts]
        answers = [handle.result(60) for handle in handles]
        assert [answer.finish_reason for answer in answers] == ["length", "error", "length"]
        assert "a broken expert" in answers[1].error
        assert answers[1].token_ids == greedy(model, prompts[1], 4)
        assert [answers[0].token_ids, answers[2].token_ids] == [greedy(model, prompts[p], 12) for p in (0, 2)]
        assert engine.submit(request([4, 5, 6], 12)).result(60).token_ids == answers[0].token_ids


def test_a_failure_in_one_step_for_one_moment_is_not_noticed(model):
    with running(loaded_model(model=model), num_rows=4) as engine:
        run, calls = engine._runner.run, itertools.count(1)

        def failing(*arguments):
            if next(calls) == 5:
                raise RuntimeError("once")
            return run(*arguments)

        engine._runner.run = failing
        prompts = [[4, 5, 6], [7, 8, 9], [10, 11, 12]]
        handles = [engine.submit(request(prompt, 12)) for prompt in prompts]
        assert [handle.result(60).token_ids for handle in handles] == [greedy(model, p, 12) for p in prompts]


def test_a_failure_of_the_engine_itself_leaves_nobody_waiting(model):
    with running(loaded_model(model=model), num_rows=2) as engine:
        ensure = engine._cache.ensure
        engine._cache.ensure = lambda *_: (_ for _ in ()).throw(MemoryError("no room"))
        handles = [engine.submit(request([4, 5], 5)) for _ in range(3)]
        assert {handle.result(30).finish_reason for handle in handles} == {"error"}
        engine._cache.ensure = ensure
        assert engine.submit(request([4, 5], 5)).result(30).token_ids == greedy(model, [4, 5], 5)


def test_logits_that_are_no_numbers_end_only_the_request_that_has_them(model):
    with running(loaded_model(model=model), num_rows=4, prefix_cache=False) as engine:
        run = engine._runner.run

        def poisoned(plan, cache, *arguments):
            logits = run(plan, cache, *arguments)
            answering = [span for span in plan.spans if span.answers]
            for place, span in enumerate(answering):
                if span.key == 0 and span.start >= 5:
                    logits[place] = torch.nan
                    cache.layer(0)[1][span.row, :, span.start] = torch.nan
            return logits

        engine._runner.run = poisoned
        handles = [engine.submit(request(prompt, 12)) for prompt in ([4, 5, 6], [7, 8, 9])]
        assert handles[0].result(60).finish_reason == "error"
        assert "no finite number" in handles[0].result().error
        later = [engine.submit(request([n, n, n], 12)) for n in (20, 21, 22)]
        assert handles[1].result(60).token_ids == greedy(model, [7, 8, 9], 12)
        assert [handle.result(60).token_ids for handle in later] == [greedy(model, [n] * 3, 12) for n in (20, 21, 22)]


# Limits.


def test_a_prompt_that_does_not_fit_is_refused_with_the_figures(model):
    with running(loaded_model(model=model, context_tokens=32)) as engine:
        assert len(engine.submit(request([5] * 30, 2)).result(60).token_ids) == 2
        with pytest.raises(PromptTooLong) as refused:
            engine.submit(request([5] * 30, 3))
        figures = refused.value.prompt_tokens, refused.value.max_new_tokens, refused.value.context_tokens
        assert figures == (30, 3, 32)
    with (
        running(loaded_model(model=model), context_tokens=10) as engine,
        pytest.raises(PromptTooLong, match="holds 10"),
    ):
        engine.submit(request([5] * 9, 2))


@pytest.mark.parametrize("token_id", [-1, VOCAB_SIZE])
def test_a_token_that_the_model_does_not_know_is_refused(engine, token_id):
    with pytest.raises(UsageError, match=f"{token_id}.*{VOCAB_SIZE}"):
        engine.submit(request([5, token_id]))


def test_requests_beyond_the_queue_are_told_when_to_come_back(model):
    with running(loaded_model(model=model), num_rows=1, queue_limit=2) as engine:
        go, held = hold(engine)
        handles = [engine.submit(request([4, 5], 5))]
        assert held.wait(30)
        handles += [engine.submit(request([4, 5], 5)) for _ in range(2)]
        with pytest.raises(QueueFull, match="2 requests wait") as refused:
            engine.submit(request([4, 5], 5))
        assert refused.value.retry_after_seconds >= 1
        assert engine.load() == (2, 1)
        go.set()
        assert [handle.result(30).finish_reason for handle in handles] == ["length"] * 3
        assert engine.submit(request([4, 5], 5)).result(30).finish_reason == "length"


def test_a_thousand_queued_requests_are_all_answered(model):
    expected = {number: greedy(model, [number, number + 1], 3) for number in range(10, 20)}
    with running(loaded_model(model=model), num_rows=16, queue_limit=1000) as engine:
        go, _ = hold(engine)
        handles = [engine.submit(request([10 + n % 10, 11 + n % 10], 3, request_id=f"{n}")) for n in range(1000)]
        for handle in handles[500:600]:
            handle.cancel()
        go.set()
        for number, handle in enumerate(handles):
            answer = handle.result(60)
            if 500 <= number < 600:
                assert answer.finish_reason == "cancelled"
            else:
                assert answer.token_ids == expected[10 + number % 10]
        assert engine.load() == (0, 0)


@pytest.mark.parametrize("setting", ["num_rows", "queue_limit", "tokens_per_step"])
def test_an_engine_without_room_is_refused(model, setting):
    with pytest.raises(UsageError, match=f"{setting} is 0"), running(loaded_model(model=model), **{setting: 0}):
        pass


def test_parameters_out_of_bounds_are_refused_together():
    with pytest.raises(UsageError, match=r"temperature is -1 .*; top_p is 0 .*; top_k is -1 "):
        SamplingParams(temperature=-1, top_p=0, top_k=-1)
    with pytest.raises(UsageError, match="0 tokens"):
        GenerationRequest("r", BOUND, [])


def test_a_model_that_rows_of_a_cache_cannot_serve_is_refused_with_the_reason():
    model = lively_model("tiny-llama")
    attention = model.model.layers[0].self_attn
    attention.forward = lambda hidden_states, **_: (hidden_states.cumsum(1), None)  # a state that runs on
    with pytest.raises(ModelError, match="cannot serve LlamaForCausalLM"), running(loaded_model(model=model)):
        pass
