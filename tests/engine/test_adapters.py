"""Adapters on one base answer as each does alone and as peft does, and leave the base's own rows as they are."""

import json
import random

import pytest
import torch
from torch import nn

from nightschool.engine import weights
from nightschool.engine.adapters import AdapterLinear
from nightschool.engine.binding import Binding
from nightschool.engine.model_runner import ModelRunner
from nightschool.engine.scheduler import Span, StepPlan
from nightschool.engine.step_context import StepContext
from nightschool.engine.weights import BLOCKS, LaidOutLinear
from nightschool.errors import NotLoaded
from nightschool.models.unmerged import NeedsMerging, UnmergedAdapter, read_lora, why_merged
from tests.support.adapter_setups import lively_adapter, save_adapter
from tests.support.engine_setups import BOUND, greedy, lively_model, loaded_model, random_prompt, request, running
from tests.support.live_server import eventually
from tests.support.tokenizers_for_tests import byte_tokenizer

CONFIGS = {
    "all linear layers": {},
    "attention only": {"target_modules": ["q_proj", "v_proj"]},
    "rsLoRA": {"use_rslora": True, "lora_alpha": 4},
    "ranks by pattern": {"rank_pattern": {"q_proj": 2, "down_proj": 7}},
    "one layer of two": {"layers_to_transform": [1], "target_modules": ["q_proj", "up_proj"]},
    "the output head too": {"target_modules": ["o_proj", "lm_head"]},
    "dropout, which is for training": {"lora_dropout": 0.5},
}


def unmerged(wrapped, folder, ref="bot@2"):
    return UnmergedAdapter(ref, byte_tokenizer(), read_lora(save_adapter(wrapped, folder)))


def steps(runner, prompts, numbers):
    """Logits [S,V] of the last tokens of prompts that are read in two steps beside each other, with these adapters."""
    cache = runner.make_cache(len(prompts), 1 << 16)
    cache.ensure(len(prompts), max(map(len, prompts)))
    bindings = tuple(Binding("b", str(number)) for number in numbers)
    firsts = tuple(Span(row, row, 0, len(p) - 1, answers=False) for row, p in enumerate(prompts))
    lasts = tuple(Span(row, row, len(p) - 1, 1) for row, p in enumerate(prompts))
    logits = None
    for plan in (StepPlan((), firsts), StepPlan(lasts, ())):
        context = StepContext(plan.spans, bindings, tuple(numbers))
        with torch.inference_mode():
            logits = runner.run(plan, cache, lambda span: prompts[span.row][span.start :][: span.length], context)
    return logits


def peft_logits(wrapped, prompt):
    with torch.inference_mode():
        return wrapped(input_ids=torch.tensor([prompt])).logits[0, -1]


@pytest.mark.parametrize("preset", ["tiny-llama", "tiny-gpt-neox", "tiny-qwen3"])
@pytest.mark.parametrize("layout", [weights.PLAIN, BLOCKS, "bf16"])
def test_every_row_of_a_step_gets_the_logits_of_its_own_adapter(preset, layout, tmp_path, monkeypatch):
    monkeypatch.setattr(weights, "_MEASURED", {})
    monkeypatch.setattr(weights, "_fastest_with", lambda *given: layout if layout in given[-1] else weights.PLAIN)
    monkeypatch.setattr(weights, "_LEAST_NUMBERS", 1)
    # Numbers that 16 bits hold, so that every layout can.
    base = lively_model(preset).bfloat16().float()
    one, two = (lively_adapter(preset, seed=seed, r=r).bfloat16().float() for seed, r in ((1, 4), (2, 9)))
    runner = ModelRunner(base, layout_bytes=1 << 30)
    first, second = (runner.add_adapter(unmerged(w, tmp_path / str(n)).weights) for n, w in enumerate((one, two)))
    kinds = {type(module.layer) for module in runner._model.modules() if isinstance(module, AdapterLinear)}
    assert kinds == {nn.Linear if layout == weights.PLAIN else LaidOutLinear}
    assert runner.layouts.keys() == {layout} - {weights.PLAIN}
    dice = random.Random(0)
    prompts = [random_prompt(dice, length) for length in (9, 4, 30, 12, 7)]
    logits = steps(runner, prompts, (first, second, 0, second, first))
    for row, wrapped in enumerate((one, two, base, two, one)):
        expected = peft_logits(wrapped, prompts[row])
        torch.testing.assert_close(logits[row], expected, atol=2e-4 * float(expected.abs().max()), rtol=0)
        for other in {one, two, base} - {wrapped}:
            assert (logits[row] - peft_logits(other, prompts[row])).abs().max() > 0.01 * expected.abs().max()


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_what_peft_can_write_and_we_read_gives_the_same_logits(config, tmp_path):
    runner, wrapped = ModelRunner(lively_model("tiny-llama")), lively_adapter(**config)
    number = runner.add_adapter(unmerged(wrapped, tmp_path).weights)
    prompt = random_prompt(random.Random(1), 20)
    expected = peft_logits(wrapped, prompt)
    [actual] = steps(runner, [prompt], (number,))
    torch.testing.assert_close(actual, expected, atol=2e-4 * float(expected.abs().max()), rtol=0)


def test_rows_without_an_adapter_are_those_of_the_base_bit_for_bit(tmp_path):
    runner = ModelRunner(lively_model("tiny-llama"))
    dice = random.Random(2)
    prompts = [random_prompt(dice, length) for length in (6, 19, 11)]
    alone = steps(runner, prompts, (0, 0, 0))
    number = runner.add_adapter(unmerged(lively_adapter(), tmp_path).weights)
    beside = steps(runner, prompts, (0, number, 0))
    assert torch.equal(beside[[0, 2]], alone[[0, 2]])
    assert not torch.equal(beside[1], alone[1])
    assert torch.equal(steps(runner, prompts, (0, 0, 0)), alone)


def test_an_adapter_that_is_gone_leaves_the_layers_as_they_were(tmp_path):
    runner = ModelRunner(lively_model("tiny-llama"))
    before = dict(runner._model.named_modules())
    numbers = [runner.add_adapter(unmerged(lively_adapter(seed=n), tmp_path / str(n)).weights) for n in (1, 2)]
    for number in numbers:
        assert dict(runner._model.named_modules()) != before
        runner.remove_adapter(number)
    assert dict(runner._model.named_modules()) == before


REFUSED = {
    "DoRA": ({"use_dora": True}, "use_dora"),
    "biases": ({"bias": "lora_only"}, "bias"),
    "whole modules": ({"modules_to_save": ["lm_head"], "target_modules": ["q_proj"]}, "modules_to_save"),
    "an embedding": ({"target_modules": ["embed_tokens"]}, "lora_embedding"),
    "PiSSA": ({"init_lora_weights": "pissa"}, "init_lora_weights"),
    "alphas by pattern": ({"alpha_pattern": {"q_proj": 3}}, "alpha_pattern"),
}


@pytest.mark.parametrize(("config", "reason"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_kept_apart_is_refused_by_name(config, reason, tmp_path):
    wrapped = lively_adapter(**config)
    if "init_lora_weights" not in config:
        folder = save_adapter(wrapped, tmp_path)
    else:  # peft would write it in another form
        folder = save_adapter(lively_adapter(), tmp_path)
        path = folder / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | config))
    assert reason in why_merged(folder)
    with pytest.raises(NeedsMerging, match=reason):
        read_lora(folder)


def test_a_field_that_nobody_knows_is_refused_unless_it_asks_for_nothing(tmp_path):
    path = save_adapter(lively_adapter(), tmp_path) / "adapter_config.json"
    config = json.loads(path.read_text())
    for value, refused in ((None, False), (False, False), ({}, False), (True, True), ({"x": 1}, True)):
        path.write_text(json.dumps(config | {"of_next_year": value}))
        assert (why_merged(tmp_path) is not None) == refused


@pytest.mark.parametrize(("preset", "reason"), [("tiny-gpt-neox", "is not in the base"), ("wide", "and the layer is")])
def test_an_adapter_of_another_base_is_refused_and_changes_nothing(preset, reason, tmp_path):
    model = lively_model("tiny-llama", hidden_size=32) if preset == "wide" else lively_model(preset)
    runner = ModelRunner(model)
    before = dict(runner._model.named_modules())
    with pytest.raises(NeedsMerging, match=reason):
        runner.add_adapter(unmerged(lively_adapter(), tmp_path).weights)
    assert dict(runner._model.named_modules()) == before


# Through an engine.


def test_answers_over_many_adapters_are_those_of_each_alone(tmp_path):
    dice = random.Random(7)
    models = {f"bot@{n}": lively_adapter(seed=n, r=1 + n) for n in range(1, 5)}
    asked = [(dice.choice([None, *models]), random_prompt(dice, dice.randrange(1, 60))) for _ in range(14)]
    base = lively_model("tiny-llama")
    with running(loaded_model(model=lively_model("tiny-llama")), num_rows=5, max_adapters=3) as engine:
        bindings = {None: engine.binding}
        for ref, wrapped in models.items():
            bindings[ref] = engine.open(unmerged(wrapped, tmp_path / ref, ref))
        for _ in range(2):  # the second time with prefixes that are known
            handles = [engine.submit(request(p, 8, binding=bindings[ref])) for ref, p in asked]
            answers = [handle.result(60) for handle in handles]
            for (ref, prompt), answer in zip(asked, answers, strict=True):
                assert answer.token_ids == greedy(models.get(ref, base), prompt, 8)
                assert answer.version == (ref or BOUND.base)
        assert any(answer.usage.cached_tokens for answer in answers)


def test_an_adapter_reads_no_prefix_of_its_base(tmp_path):
    prompt = random_prompt(random.Random(8), 70)
    with running(loaded_model(model=lively_model("tiny-llama"))) as engine:
        binding = engine.open(unmerged(lively_adapter(), tmp_path))
        engine.submit(request(prompt, 2)).result(60)
        assert engine.submit(request(prompt, 2, binding=binding)).result(60).usage.cached_tokens == 0
        assert engine.submit(request(prompt, 2, binding=binding)).result(60).usage.cached_tokens == 64


def test_a_retired_adapter_answers_what_it_took_and_nothing_more(tmp_path):
    wrapped = lively_adapter()
    with running(loaded_model(model=lively_model("tiny-llama")), num_rows=2) as engine:
        binding = engine.open(unmerged(wrapped, tmp_path))
        taken = [engine.submit(request([n, 5, 6], 60, binding=binding)) for n in range(4)]
        engine.retire(binding)
        assert [handle.result(0).token_ids for handle in taken] == [greedy(wrapped, [n, 5, 6], 60) for n in range(4)]
        assert not any(isinstance(module, AdapterLinear) for module in engine._runner._model.modules())
        with pytest.raises(NotLoaded, match="bot@2 takes no more requests"):
            engine.submit(request([5], binding=binding))
        assert engine.submit(request([5, 6], 5)).result(60).token_ids == greedy(lively_model("tiny-llama"), [5, 6], 5)


def test_retiring_without_draining_cancels_its_requests_and_nobody_elses(tmp_path):
    with running(loaded_model(model=lively_model("tiny-llama")), num_rows=4) as engine:
        binding = engine.open(unmerged(lively_adapter(), tmp_path))
        own, other = engine.submit(request([5], 200, binding=binding)), engine.submit(request([5], 200))
        eventually(lambda: own._chunks and other._chunks)
        engine.retire(binding, drain=False)
        assert own.result(0).finish_reason == "cancelled"
        assert other.result(60).finish_reason == "length"


def test_a_binding_that_nobody_opened_is_not_answered():
    with running(loaded_model(model=lively_model("tiny-llama"))) as engine:
        for binding in (Binding("another@1"), Binding(BOUND.base, "bot@9")):
            with pytest.raises(NotLoaded, match=binding.label):
                engine.submit(request([5], binding=binding))
