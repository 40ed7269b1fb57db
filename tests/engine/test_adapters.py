"""Adapters on one base answer as each does alone and as peft does, and leave the base's own rows as they are."""

import json
import random

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from nightschool.engine import adapters, weights
from nightschool.engine.adapter_kernel import MOST_RANK, KernelFactors, block_of
from nightschool.engine.adapter_torch import TorchFactors
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
@pytest.mark.parametrize("factors", [TorchFactors, KernelFactors])
def test_every_row_of_a_step_gets_the_logits_of_its_own_adapter(preset, layout, factors, tmp_path, monkeypatch):
    if factors is TorchFactors:
        monkeypatch.setattr(adapters, "_has_kernel", lambda like: False)
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
    assert factors in {type(m.factors) for m in runner._model.modules() if isinstance(m, AdapterLinear)}
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


def test_a_token_has_the_same_numbers_whatever_stands_beside_it(tmp_path):
    """Of what adapters add, bit for bit; what the base's library does with other numbers of rows is its own affair."""
    runner = ModelRunner(lively_model("tiny-llama"))
    numbers = [runner.add_adapter(unmerged(lively_adapter(seed=n), tmp_path / str(n)).weights) for n in range(1, 9)]
    layer = next(m for m in runner._model.modules() if isinstance(m, AdapterLinear))
    assert isinstance(layer.factors, KernelFactors)
    x_rc = torch.randn(16, layer.layer.in_features, generator=torch.Generator().manual_seed(1))
    dice = random.Random(5)
    for _ in range(20):
        whose = [dice.choice([0, *numbers]) for _ in range(16)]
        together = _added(layer, x_rc, whose)
        for row, number in enumerate(whose):
            alone = _added(layer, x_rc[row : row + 1], [number]) if number else torch.zeros_like(together[:1])
            assert torch.equal(together[row], alone[0])


def _added(layer, x_rc, whose):
    out_rc = torch.zeros(len(x_rc), layer.layer.out_features)
    layer.factors.add(x_rc, out_rc, adapters._step_rows(whose, out_rc))
    return out_rc


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(
    ("columns", "width", "rank"), [(8, 8, 1), (24, 40, 3), (64, 96, 16), (576, 1536, 9), (16, 32, 64)]
)
def test_the_kernel_adds_what_torch_adds(columns, width, rank, threads):
    generator = torch.Generator().manual_seed(rank)
    made = [KernelFactors(columns, width, block_of(columns, width)), TorchFactors()]
    for number in (1, 2, 3, 20):
        down, up = (torch.randn(shape, generator=generator) for shape in ((columns, rank), (rank, width)))
        for factors in made:
            factors.put(number, down, up)
    x_rc, out_rc = (torch.randn(11, size, generator=generator) for size in (columns, width))
    rows = adapters._step_rows([3, 0, 20, 20, 1, 7, 1, 1, 2, 0, 3], out_rc)
    outs = []
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    for factors in made:
        outs.append(out_rc.clone())
        factors.add(x_rc, outs[-1], rows)
        factors.drop(20)
        outs.append(out_rc.clone())
        factors.add(x_rc, outs[-1], rows)
    torch.set_num_threads(before)
    scale = float(outs[2].abs().max())
    for ours, theirs in ((outs[0], outs[2]), (outs[1], outs[3])):
        torch.testing.assert_close(ours, theirs, atol=1e-5 * scale, rtol=0)
    assert torch.equal(outs[0][[1, 5, 9]], out_rc[[1, 5, 9]]), "the base's rows, and those of an adapter elsewhere"
    assert not torch.equal(outs[0][2], out_rc[2])
    assert torch.equal(outs[1][2:4], out_rc[2:4])


class Calls(TorchDispatchMode):
    """Counts what torch is asked to compute."""

    count = 0

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        self.count += 1
        return function(*arguments, **(named or {}))


def test_torch_adds_to_each_row_what_its_own_adapter_gives_alone():
    generator, dice = torch.Generator().manual_seed(1), random.Random(3)
    factors, alone = TorchFactors(), {}
    for number, rank in enumerate((4, 9, 1, 4, 16), start=1):
        alone[number] = torch.randn(24, rank, generator=generator), torch.randn(rank, 40, generator=generator)
        factors.put(number, *alone[number])
    for count in (1, 3, 16, 200):
        x_rc, out_rc = (torch.randn(count, size, generator=generator) for size in (24, 40))
        # Number 7 reaches other layers only, and 0 is the base.
        whose = [dice.choice([0, 7, *alone]) for _ in range(count)]
        whose[count // 2 :] = [whose[0]] * (count - count // 2)
        actual = out_rc.clone()
        factors.add(x_rc, actual, adapters._step_rows(whose, x_rc))
        for row, number in enumerate(whose):
            down, up = alone.get(number, (torch.zeros(24, 1), torch.zeros(1, 40)))
            torch.testing.assert_close(actual[row], out_rc[row] + x_rc[row] @ down @ up, atol=1e-4, rtol=1e-5)
            assert number in alone or torch.equal(actual[row], out_rc[row])


def test_torch_is_called_as_often_for_many_adapters_as_for_two():
    counts = []
    for adapters_of_step in (2, 16):
        factors = TorchFactors()
        for number in range(1, 17):
            factors.put(number, torch.ones(8, 4), torch.ones(4, 8))
        rows = adapters._step_rows([1 + place % adapters_of_step for place in range(32)], torch.zeros(1))
        x_rc, out_rc = torch.ones(32, 8), torch.zeros(32, 8)
        factors.add(x_rc, out_rc, rows)
        with Calls() as calls:
            factors.add(x_rc, out_rc, rows)
        counts.append(calls.count)
    assert counts[0] == counts[1]


def test_sizes_that_the_kernel_cannot_have_are_left_to_torch(tmp_path):
    assert [block_of(*shape) for shape in ((12, 32), (16, 12), (8, 8), (8, 64))] == [None, None, 8, 32]
    runner = ModelRunner(lively_model("tiny-llama"))
    thick = lively_adapter(r=MOST_RANK + 1, target_modules=["q_proj"])
    with pytest.raises(NeedsMerging, match="its rank"):
        runner.add_adapter(unmerged(thick, tmp_path).weights)
    assert not any(isinstance(module, AdapterLinear) for module in runner._model.modules())


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


def test_a_given_answer_is_scored_by_what_answers_for_a_binding(tmp_path):
    dice = random.Random(9)
    prompt, answer = random_prompt(dice, 30), random_prompt(dice, 6)
    wrapped, base = lively_adapter(), lively_model("tiny-llama")
    with running(loaded_model(model=lively_model("tiny-llama"))) as engine:
        binding = engine.open(unmerged(wrapped, tmp_path))
        scores = {
            model: engine.log_probs(by, prompt, answer) for model, by in ((wrapped, binding), (base, engine.binding))
        }
        engine.retire(binding)
        with pytest.raises(NotLoaded, match="bot@2 is no longer served"):
            engine.log_probs(binding, prompt, answer)
    for model, actual in scores.items():
        with torch.inference_mode():
            logits = model(input_ids=torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
        expected = logits.log_softmax(-1)[range(len(answer)), answer]
        torch.testing.assert_close(actual, expected, atol=1e-3, rtol=1e-3)
    assert (scores[wrapped] - scores[base]).abs().max() > 0.05


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
