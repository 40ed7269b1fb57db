"""A mixture whose experts pass by while it is served: the same numbers as with all of them in memory, and fewer bytes."""

import random
from contextlib import nullcontext

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from nightschool.engine.pool import EnginePool
from nightschool.engine.slot import Slot
from nightschool.errors import ModelError, UsageError
from nightschool.layers.expert_streaming.kept import LastUsed, MostUsed
from nightschool.models.build import build_model
from nightschool.models.export import save_version_folder
from nightschool.models.load import located_version
from nightschool.store.home import Home
from nightschool.store.registry import Registry
from nightschool.store.versions import VersionMetadata
from tests.support.adapter_setups import publish_adapter
from tests.support.engine_setups import lively_model, random_prompt, request
from tests.support.live_server import client_of, server_log
from tests.support.tokenizers_for_tests import byte_tokenizer

SHAPE = {"hidden_size": 32, "num_hidden_layers": 2, "head_dim": 8, "num_experts": 6, "expert_size": 24}
PROMPTS = [random_prompt(random.Random(seed), 5 + 3 * seed) for seed in range(3)]
NUM_EXPERTS = 12


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Published: `moe`, and `dense`."""
    home = Home(tmp_path_factory.mktemp("home")).ensure()
    model = build_model("new:moe-tiny", len(byte_tokenizer()), 1, shape=SHAPE).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.copy_(torch.randn(weight.shape, generator=generator) / weight.shape[-1] ** 0.5)
    for name, one in (("moe", model), ("dense", lively_model("tiny-llama"))):
        Registry(home).publish(
            name, lambda folder, one=one: save_version_folder(one, byte_tokenizer(), folder), VersionMetadata()
        )
    return home


def version_of(home, name):
    return Registry(home).versions(name)[0]


def slot_of(home, name, **settings):
    slot = Slot(name, EnginePool(home, prefix_cache=False, **settings))
    slot.swap(version_of(home, name).ref)
    return slot


def answer(slot):
    """The log-probabilities of the likeliest first tokens after each prompt; eleven more tokens of each are made."""
    generation = slot.current
    handles = [
        generation.engine.submit(request(prompt, max_new_tokens=12, binding=generation.binding, logprobs=3))
        for prompt in PROMPTS
    ]
    return [logprob for handle in handles for _, logprob in handle.result(60).logprobs[0].top]


def logits(slot):
    ids = torch.tensor([[number % 250 for number in range(40)]])
    with torch.inference_mode():
        return slot.current.engine.loaded.model(input_ids=ids).logits


@pytest.fixture(scope="module")
def resident(home):
    """With all experts in memory: logits, and log-probabilities of answers."""
    slot = slot_of(home, "moe")
    yield logits(slot), answer(slot)
    slot.close()


@pytest.mark.parametrize("number", [2, 5, NUM_EXPERTS])
def test_a_mixture_answers_the_same_with_few_experts_in_memory(number, home, resident):
    slot = slot_of(home, "moe", experts_resident=number)
    try:
        store = slot.current.engine.experts.store
        assert store.host_bytes <= number * store.layout.stride
        assert store.taken_disk_bytes == 0, "experts are read from the version's own files"
        # Which layout of weights an engine takes, and who is answered beside whom, changes the rounding; the model alone does not.
        torch.testing.assert_close(logits(slot), resident[0], rtol=0, atol=0)
        assert answer(slot) == pytest.approx(resident[1], abs=1e-3)
        before = store.turns
        assert answer(slot) == pytest.approx(resident[1], abs=1e-3)
        hits, misses = (after - one for after, one in zip(store.turns, before, strict=True))
        assert hits > 0 or number == 2
        assert (misses == 0) is (number >= NUM_EXPERTS)
    finally:
        slot.close()


def test_what_is_loaded_counts_only_the_experts_that_have_room(home):
    version = version_of(home, "moe")
    whole, few = (EnginePool(home, experts_resident=number).needed_bytes(version) for number in (None, 3))
    assert 0 < few < whole
    slots = [slot_of(home, "moe", experts_resident=number) for number in (None, 3)]
    sizes = [slot.num_bytes for slot in slots]
    for slot in slots:
        slot.close()
    assert sizes[1] < sizes[0]


def test_the_hit_rate_is_told_where_prometheus_reads(home):
    slot = slot_of(home, "moe", experts_resident=5)
    with client_of(slot, keep_out=True) as client:
        answer(slot)
        lines = dict(line.rsplit(" ", 1) for line in client.get("/metrics").text.splitlines() if line[0] != "#")
        store = slot.current.engine.experts.store
        told = [float(lines[f'nightschool_expert_turns_total{{outcome="{outcome}"}}']) for outcome in ("hit", "miss")]
        assert told == list(store.turns)
        assert float(lines["nightschool_expert_bytes"]) == store.host_bytes


def test_a_model_that_is_no_mixture_is_served_as_always_and_the_log_says_so(home):
    with server_log() as log:
        slot = slot_of(home, "dense", experts_resident=2)
    assert slot.current.engine.experts is None
    slot.close()
    assert "no mixture whose experts could be streamed" in str(log.rows)


def test_too_few_are_refused(home):
    with pytest.raises(UsageError, match="experts_resident is 1, and experts pass by where at least 2"):
        EnginePool(home, experts_resident=1)


@pytest.mark.parametrize(("kept", "hits"), [(LastUsed(), 0), (MostUsed(3), 198)])
def test_those_that_are_used_most_stay_where_all_are_needed_in_turn(kept, hits):
    """Four records in a circle, and room for three: the one that had its turn last is needed last."""
    found = 0
    for turn in range(400):
        index = turn % 4
        found += index in kept
        if index not in kept and len(kept) == 3:
            kept.let_go()
        kept.use(index)
    assert found >= hits
    assert hits or found == 0


def test_what_was_used_long_ago_leaves():
    kept = MostUsed(2)
    for index in [0] * 50 + [1, 2] * 400:
        if index not in kept and len(kept) == 2:
            kept.let_go()
        kept.use(index)
    assert 0 not in kept


def test_an_adapter_stands_apart_on_a_mixture_whose_experts_pass_by(home):
    base = version_of(home, "moe")
    model = AutoModelForCausalLM.from_pretrained(base.path, dtype=torch.float32)
    wrapped = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
    with torch.no_grad():
        for name, weight in wrapped.named_parameters():
            if ".lora_B" in name:
                weight.normal_(std=0.5)
    publish_adapter(Registry(home), wrapped.eval(), base, name="adapted")
    slots = [slot_of(home, "adapted", experts_resident=number) for number in (None, 4)]
    assert [slot.current.engine.base for slot in slots] == [base.ref] * 2
    whole, few = (answer(slot) for slot in slots)
    assert few == pytest.approx(whole, abs=1e-3)
    assert slots[1].current.engine.experts.store.turns[0] > 0
    found = located_version(version_of(home, "adapted"))
    with pytest.raises(ModelError, match=r"is an adapter, and experts are streamed.*leave --experts-resident out"):
        EnginePool(home, experts_resident=4).bind(found, lambda _: nullcontext(), merged=True)
    plain = slot_of(home, "moe")
    assert answer(plain) != pytest.approx(whole, abs=1e-2)
    for slot in (*slots, plain):
        slot.close()
