import io
import json
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

from nightschool.config.recipe import Recipe
from nightschool.data.chat import render as render_module
from nightschool.data.chat.loss_mask_preview import Span, loss_mask, render_mask
from nightschool.data.chat.render import Rendered
from nightschool.data.chat.rendered_data import refuse_nothing_to_train
from nightschool.data.example import Example
from nightschool.data.tokenizer import train_bpe
from nightschool.errors import NothingToTrain
from nightschool.feedback.selection import Selection, sample_of
from nightschool.store.home import Home
from nightschool.training.methods.finetune import Finetune
from nightschool.training.methods.prepared import Setup
from nightschool.training.planning import plan as planning
from nightschool.training.planning import speed
from nightschool.training.planning.plan import make_plan, render_plan
from nightschool.training.planning.speed import measure
from tests.support.training_setups import deterministic_threads, differing

CHATS = [
    {"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]},
    {"messages": [{"role": "user", "content": "Count."}, {"role": "assistant", "content": "One two three four five six seven."}]},
]  # fmt: skip


@pytest.fixture(autouse=True)
def _deterministic():
    with deterministic_threads():
        yield


@pytest.fixture
def home(tmp_path):
    return Home(tmp_path / "home").ensure()


def recipe_of(tmp_path, rows, *, train=None, **more):
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {"num_threads": 1, "dtype": "fp32", "epochs": 3, "batch_size": 1, "accumulation_steps": 1}
    plain = {"base": "new:tiny-qwen3", "data": [{"path": "rows.jsonl"}], "train": settings | (train or {})}
    return Recipe.model_validate(plain | more)


def plan_for(tmp_path, home, rows, **more):
    """The figures of a plan, by name."""
    return SimpleNamespace(**make_plan(recipe_of(tmp_path, rows, **more), home, tmp_path).facts)


def text_of(tmp_path, home, **settings):
    """What a plan says to people."""
    out = io.StringIO()
    render_plan(make_plan(recipe_of(tmp_path, CHATS), home, tmp_path), Console(file=out, width=120, **settings))
    return out.getvalue()


def test_the_plan_counts_what_is_there(tmp_path, home):
    recipe = recipe_of(tmp_path, CHATS)
    plan = plan_for(tmp_path, home, CHATS)
    prepared = Finetune.prepare(Setup(recipe, home, tmp_path))
    rendered = prepared.data.rendered.all
    assert (
        plan.parameters_total == sum(p.numel() for p in prepared.task.model.parameters()) == plan.parameters_trainable
    )
    assert plan.tokens == sum(len(r.input_ids) for r in rendered)
    assert plan.tokens_trained == sum(w > 0 for r in rendered for w in r.weights)
    assert sum(role.tokens for role in plan.tokens_by_role.values()) == plan.tokens
    assert {role: counts.trained > 0 for role, counts in plan.tokens_by_role.items()} == {
        "template": False, "system": False, "user": False, "assistant": True,
    }  # fmt: skip
    assert (plan.examples_new, plan.examples_replayed, plan.examples_held_out) == (2, 0, 0)
    assert (plan.steps_per_epoch, plan.steps_total) == (2, 6)
    assert plan.formats == {"rows.jsonl": ["messages"]}
    assert plan.expected_seconds > 0
    assert plan.measured_batches == 3
    assert plan.disk_free_bytes > plan.disk_needed_bytes > 4 * plan.parameters_total


def test_the_plan_is_json_and_creates_nothing(tmp_path, home):
    before = sorted(home.path.rglob("*"))
    plan = make_plan(recipe_of(tmp_path, CHATS), home, tmp_path)
    plain = json.loads(json.dumps(plan.to_json()))
    assert plain.keys() == plan.facts.keys()
    assert plain["tokens"] == plan.facts["tokens"]
    assert plain["tokens_by_role"]["assistant"]["trained"] == plan.facts["tokens_by_role"]["assistant"].trained
    assert plain["loss_masks"][0][0].keys() == {"text", "role", "trained", "tokens"}
    assert sorted(home.path.rglob("*")) == before


def test_what_is_cut_is_named_example_by_example(tmp_path, home):
    whole = plan_for(tmp_path, home, CHATS)
    assert (whole.cut_share, whole.cut_trained_share, whole.cuts) == (0.0, 0.0, [])
    lengths = [sum(span.tokens for span in spans) for spans in whole.loss_masks]
    longest = max(lengths)
    plan = plan_for(tmp_path, home, CHATS, train={"max_seq_len": longest - 2})
    assert plan.cut_examples == 1
    assert plan.cuts[0].where == f"rows.jsonl:{lengths.index(longest) + 1}"
    assert plan.cuts[0].share == pytest.approx(2 / longest)
    assert 0 < plan.cuts[0].trained_share < 0.5
    assert plan.cut_share == pytest.approx(2 / whole.tokens)
    # One of the two is the line break after the answer's end, which carries no loss.
    assert plan.cut_trained_share == pytest.approx(1 / whole.tokens_trained)


def test_too_much_cut_does_not_start(tmp_path, home):
    with pytest.raises(
        NothingToTrain, match=r"max_seq_len=24 cuts off \d+% of the \d+ tokens.*max_cut_share allows 10%"
    ):
        plan_for(tmp_path, home, CHATS, train={"max_seq_len": 24, "max_cut_share": 0.1})


def test_everything_cut_does_not_start(tmp_path, home):
    with pytest.raises(NothingToTrain, match=r"all [0-9]+ of them are cut off by train.max_seq_len=8"):
        plan_for(tmp_path, home, CHATS, train={"max_seq_len": 8, "max_cut_share": 1.0})


def test_nothing_that_carries_loss_does_not_start():
    """The formats refuse such rows by their line; this is the last guard before step 1."""
    context_only = Rendered([1, 2, 3], [0.0, 0.0, 0.0], ["user"] * 3)
    with pytest.raises(NothingToTrain, match="the data has none"):
        refuse_nothing_to_train([context_only], 100, 1.0)
    refuse_nothing_to_train([context_only, Rendered([1, 2], [0.0, 1.0], ["user"] * 2)], 100, 1.0)


def test_long_texts_are_split_and_lose_nothing(tmp_path, home):
    text = " ".join(f"word{n}" for n in range(100))
    plan = plan_for(tmp_path, home, [{"text": text}], train={"max_seq_len": 32})
    assert plan.cut_share == 0.0
    assert plan.tokens_by_role["text"].trained == plan.tokens_trained > 100
    assert plan.steps_per_epoch > 3


def test_measuring_leaves_weights_random_state_and_gradients_as_they_were(tmp_path, home):
    recipe = recipe_of(tmp_path, CHATS)
    task = Finetune.prepare(Setup(recipe, home, tmp_path)).task
    before = {name: p.detach().clone() for name, p in task.trainable().items()}
    state = torch.get_rng_state()
    assert measure(task).tokens_per_second > 0
    assert not differing(before, {name: p.detach() for name, p in task.trainable().items()})
    assert torch.equal(state, torch.get_rng_state())
    assert all(p.grad is None for p in task.trainable().values())
    assert not task.optimizer.inner.state


@pytest.mark.parametrize("terminal", [False, True])
def test_the_plan_without_colour_marks_what_is_trained(tmp_path, home, terminal):
    text = text_of(tmp_path, home, force_terminal=terminal, no_color=True)
    assert "▏Hello.<|im_end|>▕" in text
    assert "2 new, 0 replayed, 0 general, 0 held out" in text
    assert "\x1b[32m" not in text
    assert "\x1b[1;32m" not in text


def test_the_plan_in_colour(tmp_path, home):
    text = text_of(tmp_path, home, force_terminal=True, color_system="standard", no_color=False)
    assert "\x1b[1;32mHello.<|im_end|>" in text
    assert "▏" not in text


def test_a_mask_groups_neighbours():
    tokenizer = train_bpe(["a b c"], 300)
    ids = tokenizer("a b c")["input_ids"]
    spans = loss_mask(tokenizer, ids, [0.0, 1.0, 0.5], ["user", "assistant", "assistant"])
    assert spans == [Span("a", "user", False, 1), Span(" b c", "assistant", True, 2)]
    assert render_mask(spans, colour=False).plain == "a▏ b c▕"


def test_the_probe_stops_in_time(tmp_path, home, monkeypatch):
    monkeypatch.setattr(speed, "PROBE_SECONDS", 0.0)
    assert plan_for(tmp_path, home, CHATS).measured_batches == 1


def many_chats(count):
    """Examples that differ and are equally long, so that a sample of them estimates without an error."""
    digits = [f"{number:03d}".translate(str.maketrans("0123456789", "abcdefghij")) for number in range(count)]
    return [{"query": f"{' '.join(word)}?", "retrieved": f"{' '.join(word)}."} for word in digits]


def test_a_plan_of_much_data_renders_a_sample_and_says_so(tmp_path, home, monkeypatch):
    rows = many_chats(120)
    whole = plan_for(tmp_path, home, rows, replay={"ratio": 0})
    rendered = []
    monkeypatch.setattr(planning, "SAMPLED_EXAMPLES", 30)
    monkeypatch.setattr(render_module, "_render_chats", spy(render_module._render_chats, rendered))
    sampled = plan_for(tmp_path, home, rows, replay={"ratio": 0})
    assert len(rendered) < 50, "neither what is trained nor what is held out is rendered as a whole"
    assert (whole.examples_rendered, sampled.examples_rendered) == (whole.examples_new, 30)
    assert [note for note in sampled.notes if "estimates" in note] == [
        f"30 of {whole.examples_new} examples were rendered: counts of tokens, cuts and steps are estimates."
    ]
    assert not any("estimates" in note for note in whole.notes)
    for count in ("examples_new", "examples_held_out", "steps_total", "steps_per_epoch", "formats"):
        assert getattr(sampled, count) == getattr(whole, count), count
    assert sampled.tokens_trained == pytest.approx(whole.tokens_trained, rel=0.1)
    assert sum(role.tokens for role in sampled.tokens_by_role.values()) == pytest.approx(sampled.tokens, abs=4)


def spy(whole, calls):
    def noted(*arguments):
        calls.append(arguments)
        return whole(*arguments)

    return noted


def test_a_sample_is_chosen_by_the_seed_and_keeps_the_order_and_the_first_examples():
    new = [Example(text=f"text {number}", line=number) for number in range(1000)]
    whole = Selection(new=new, replayed=new[:500], held_out=new[:100])
    one, same, other = (sample_of(whole, 150, seed=seed) for seed in (1, 1, 2))
    assert one == same
    assert one != other
    assert [example.line for example in one.new] == sorted({example.line for example in one.new})
    assert one.new[:3] == new[:3]
    assert (len(one.replayed), len(one.held_out)) == (pytest.approx(50, abs=3), pytest.approx(10, abs=3))
    assert sample_of(whole, 1500, seed=1) is whole
