"""The model as an engine sees it: a private copy that shares the weights, and what cannot be served exactly."""

import random
import sys

import pytest
import torch
from transformers import LlamaConfig, Phi3Config, Phi3ForCausalLM

from nightschool.engine.model_runner import exact_context
from tests.support.engine_setups import VOCAB_SIZE, greedy, lively_model, loaded_model, random_prompt, request, running


def test_an_engine_leaves_the_model_as_it_was():
    model = lively_model("tiny-llama")
    implementation, modules = model.config._attn_implementation, [type(m) for m in model.modules()]
    pointers = [p.data_ptr() for p in model.parameters()]
    with running(loaded_model(model=model)) as engine:
        answer = engine.submit(request([5, 6, 7], 12)).result(60)
        assert model.config._attn_implementation == implementation
        assert answer.token_ids == greedy(model, [5, 6, 7], 12)
        assert [p.data_ptr() for p in engine._runner._model.parameters()] == pointers
    assert [type(m) for m in model.modules()] == modules


def test_two_engines_on_one_model_share_nothing_but_its_weights():
    model = lively_model("tiny-llama")
    prompt = random_prompt(random.Random(1), 70)
    with running(loaded_model(model=model)) as first, running(loaded_model(model=model)) as second:
        assert first.submit(request(prompt, 5)).result(60).usage.cached_tokens == 0
        assert second.submit(request(prompt, 5)).result(60).usage.cached_tokens == 0
        assert first.submit(request(prompt, 5)).result(60).usage.cached_tokens == 64


def long_rope(original):
    return Phi3Config(
        vocab_size=VOCAB_SIZE,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        original_max_position_embeddings=original,
        rope_parameters={
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "short_factor": [1.0] * 8,
            "long_factor": [4.0] * 8,
            "original_max_position_embeddings": original,
        },
        pad_token_id=0,
    )


def test_a_context_in_which_rows_would_change_each_other_is_not_offered():
    assert exact_context(LlamaConfig()) == sys.maxsize
    assert exact_context(long_rope(40)) == 40
    torch.manual_seed(0)
    model = Phi3ForCausalLM(long_rope(40)).eval()
    with running(loaded_model(model=model)) as engine:
        assert engine.context_tokens == 40
        answer = engine.submit(request([5, 6, 7], 20)).result(60)
    assert answer.token_ids == greedy(model, [5, 6, 7], 20)


@pytest.mark.parametrize("broken", ["prompt", "answer"])
def test_keys_that_are_no_numbers_are_never_kept_for_others(broken, monkeypatch):
    model = lively_model("tiny-llama")
    prompt = random_prompt(random.Random(2), 70)
    expected = greedy(model, prompt, 8)
    with running(loaded_model(model=model), num_rows=1) as engine:
        run, calls = engine._runner.run, []

        def poison(plan, cache, *arguments):
            logits = run(plan, cache, *arguments)
            calls.append(plan)
            if len(calls) == (1 if broken == "prompt" else 3):
                for pool in cache._pools:
                    pool.fill_(float("nan"))
                logits = logits * float("nan")
            return logits

        monkeypatch.setattr(engine._runner, "run", poison)
        failed = engine.submit(request(prompt, 8)).result(60)
        assert failed.finish_reason == "error"
        assert "no finite number" in failed.error
        again = engine.submit(request(prompt, 8)).result(60)
        assert again.token_ids == expected
        assert again.usage.cached_tokens == (0 if broken == "prompt" else 64)
