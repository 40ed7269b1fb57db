"""Whoever looks at a layer sees every token of every step with the binding that it belongs to, and may say what was read."""

import random
import threading
from collections import defaultdict

import pytest
import torch

from nightschool.engine.admission import FairByTenant, FirstCome
from nightschool.engine.compute import COMPUTE
from nightschool.errors import ModelError
from tests.support.engine_setups import BOUND, greedy, lively_model, loaded_model, random_prompt, request, running


@pytest.fixture(scope="module")
def model():
    return lively_model("tiny-llama")


def hidden_states(model, token_ids, layer):
    """What `model.layers.<layer>` computes for one text alone, [T,H]."""
    with torch.inference_mode():
        return model(torch.tensor([token_ids]), output_hidden_states=True).hidden_states[layer + 1][0]


class Recorder:
    """Keeps what a layer computed, by tenant."""

    def __init__(self):
        self.seen = defaultdict(dict)

    def __call__(self, context, hidden):
        assert hidden.shape[0] == sum(span.length for span in context.spans)
        for span, binding, places in context.tokens():
            for place, vector in enumerate(hidden[places], start=span.start):
                self.seen[binding.tenant][place] = vector.clone()


def test_a_hook_sees_the_hidden_states_of_every_token_and_whose_they_are(model):
    dice, recorder = random.Random(3), Recorder()
    prompts = {name: random_prompt(dice, length) for name, length in (("a", 5), ("b", 40), ("c", 17))}
    with running(loaded_model(model=model), num_rows=3, tokens_per_step=16) as engine:
        stop = engine.capture("model.layers.0", recorder)
        handles = {n: engine.submit(request(p, 6, binding=BOUND.of(n))) for n, p in prompts.items()}
        answers = {name: handle.result(60).token_ids for name, handle in handles.items()}
        stop()
        engine.submit(request(prompts["a"], 3, binding=BOUND.of("later"))).result(60)
    assert set(recorder.seen) == set(prompts)
    for name, prompt in prompts.items():
        text = [*prompt, *answers[name]]
        seen = torch.stack([recorder.seen[name][place] for place in range(len(text) - 1)])
        # The last token of an answer never goes through the model; layer 0 of 2 is no final norm yet.
        torch.testing.assert_close(seen, hidden_states(model, text, 0)[:-1], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("admission", "is_fair"), [(FairByTenant, True), (FirstCome, False)])
def test_a_tenant_gets_no_more_turns_for_having_many_keys(model, admission, is_fair):
    order = []

    def note(context, hidden):
        for span, binding, _ in context.tokens():
            if span.start == 0:
                order.append(binding.tenant)

    hold = threading.Event()
    with running(loaded_model(model=model), num_rows=1, prefix_cache=False, admission=admission) as engine:
        engine.capture("model.layers.0", note)
        thread = threading.Thread(target=COMPUTE.call, args=(hold.wait,))
        thread.start()  # nothing is computed until all wait, so that both tenants are busy to the end
        many = [BOUND.of("many", f"key {number}") for number in range(8)]
        asked = [binding for number in range(8) for binding in (*many, BOUND.of("one"))]
        handles = [engine.submit(request([5, 6], 3, binding=binding)) for binding in asked]
        hold.set()
        thread.join()
        for handle in handles:
            handle.result(60)
    # The tenant with one key asks 8 times; until it has been answered, each has had as many turns.
    last = [place for place, tenant in enumerate(order) if tenant == "one"][-1]
    assert (last + 1 <= 17) == is_fair


def test_a_hook_that_fails_ends_the_requests_of_its_steps_and_not_the_engine(model):
    def broken(context, hidden):
        if any(binding.tenant == "unlucky" for binding in context.bindings):
            raise RuntimeError("a broken memory")

    with running(loaded_model(model=model)) as engine:
        engine.capture("model.layers.0", broken)
        unlucky, other = (engine.submit(request([5, 6], 4, binding=BOUND.of(name))) for name in ("unlucky", "other"))
        assert "a broken memory" in unlucky.result(60).error
        assert other.result(60).token_ids == greedy(model, [5, 6], 4)


def test_a_layer_that_is_not_there_is_refused_by_name(model):
    with (
        running(loaded_model(model=model)) as engine,
        pytest.raises(ModelError, match=r"no layer 'model.layers.9'.*model.layers"),
    ):
        engine.capture("model.layers.9", lambda context, hidden: None)
