"""Preference pairs: the loss is what transformers' own logits give, a run resumes bit by bit, and it learns to prefer."""

import itertools
import json

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from nightschool.config.recipe import Dpo, Lora, Recipe
from nightschool.data.example import Example, Message
from nightschool.errors import Damaged, DataError, NonFiniteLoss, StateMismatch
from nightschool.events import read_events
from nightschool.feedback.conversations import ConversationStore
from nightschool.feedback.selection import select
from nightschool.models.adapters import attach_lora
from nightschool.models.build import build_model
from nightschool.store.home import Home
from nightschool.store.registry import Registry
from nightschool.training.methods.dpo import REFERENCE
from tests.support.training_setups import LORA, MiniRun, deterministic_threads, random_pairs
from tests.training.test_resume import assert_equal_runs, rows_of

pytestmark = pytest.mark.trains
FIGURES = ("reward_accuracy", "reward_margin", "chosen_reward", "rejected_reward", "heldout_reward_accuracy")


@pytest.fixture(autouse=True)
def _deterministic():
    with deterministic_threads():
        yield


def a_run(folder, *, lora=LORA, rows=None, dpo=None, **train):
    recipe = {"method": "dpo"} | ({} if dpo is None else {"dpo": dpo})
    return MiniRun(
        folder, lora=lora, rows=rows or random_pairs(20), held_out=random_pairs(6, seed=9), recipe=recipe, **train
    )


def move_adapter(model, seed):
    """Give the second factor of each adapter numbers, so that the policy is not the reference."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.3, generator=generator)


def plain_log_probs(model, batch):
    """Each document alone, through the model's own forward: what carries loss, summed."""
    bounds = batch.cu_seqlens.tolist()
    sums = []
    for start, end in itertools.pairwise(bounds):
        logits = model(input_ids=batch.input_ids[:, start:end], use_cache=False).logits[0].float()
        labels, weights = batch.labels[0, start:end], batch.weights[0, start:end]
        nll = F.cross_entropy(logits, labels.clamp_min(0), reduction="none")
        sums.append(-(nll * weights).sum())
    return torch.stack(sums).view(-1, 2)


@pytest.mark.parametrize("dpo", [{}, {"beta": 0.4, "label_smoothing": 0.1}, {"beta": 0.3, "sft_weight": 0.5}])
@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_loss_gradients_and_figures_are_those_of_plain_logits(tmp_path, dpo, dropout):
    run = a_run(tmp_path / "run", lora=Lora(r=4, alpha=8, dropout=dropout), dpo=dpo)
    prepared = run.prepared()
    prepared.begin(run.run.path)
    task, settings = prepared.task, prepared.recipe.dpo
    move_adapter(task.model, 5)
    window = [task.batch(0, 0), task.batch(0, 1)]
    task.model.eval()
    units = sum(batch.loss_units for batch in window)
    loss = float(task.accumulate(window, units))
    gradients = {name: parameter.grad.clone() for name, parameter in task.trainable().items()}
    figures = {name: float(value) for name, value in task.figures().items()}
    task.discard_gradients()

    parts, margins = [], []
    for batch in window:
        policy = plain_log_probs(task.model, batch)
        with torch.no_grad(), task.model.disable_adapter():
            reference = plain_log_probs(task.model, batch)
        assert torch.allclose(batch.reference, reference, atol=1e-4)
        margin = settings.beta * ((policy[:, 0] - reference[:, 0]) - (policy[:, 1] - reference[:, 1]))
        smoothing = settings.label_smoothing
        each = -F.logsigmoid(margin) * (1 - smoothing) - F.logsigmoid(-margin) * smoothing
        lengths = (batch.weights[0] > 0).float()
        bounds = batch.cu_seqlens.tolist()
        tokens = torch.stack([lengths[a:b].sum() for a, b in itertools.pairwise(bounds)]).view(-1, 2)[:, 0]
        parts.append((each - settings.sft_weight * policy[:, 0] / tokens).sum())
        margins.append(margin.detach())
    expected = sum(parts) / units
    expected.backward()
    assert loss == pytest.approx(float(expected.detach()), rel=1e-4)
    for name, parameter in task.trainable().items():
        assert torch.allclose(parameter.grad, gradients[name], rtol=1e-3, atol=1e-5), name
    assert any(gradient.abs().max() > 1e-4 for gradient in gradients.values())
    margins = torch.cat(margins)
    assert figures["reward_margin"] == pytest.approx(float(margins.mean()), rel=1e-3, abs=1e-5)
    assert figures["reward_accuracy"] == pytest.approx(float((margins > 0).float().mean()))
    assert figures["chosen_reward"] - figures["rejected_reward"] == pytest.approx(figures["reward_margin"], abs=1e-4)


def test_a_fresh_adapter_prefers_nothing(tmp_path):
    run = a_run(tmp_path / "run")
    run.go(stop_after=1)
    first = next(read_events(run.run.metrics_path))
    assert first["loss"] == pytest.approx(0.6931, abs=0.05)  # dropout moves it a little
    before = next(row for row in read_events(run.run.events.path) if row["event"] == "heldout")
    assert before["heldout_loss"] == pytest.approx(0.693147, abs=1e-4)
    assert before["pairs"] == 6


def test_interrupted_and_resumed_equals_uninterrupted(tmp_path):
    """Also the figures of a row that spans the interruption, and the reference is not asked again."""
    straight = a_run(tmp_path / "straight", log_every=2).go()
    first = a_run(tmp_path / "parts", log_every=2).go(stop_after=3)
    said = (first.run.path / REFERENCE).stat().st_mtime_ns
    second = a_run(tmp_path / "parts", log_every=2).go(resume=first.saved[-1])
    assert (second.run.path / REFERENCE).stat().st_mtime_ns == said
    assert_equal_runs(straight, second)
    rows = [
        [[row.get(name) for name in FIGURES] for row in read_events(run.run.metrics_path)] for run in (straight, second)
    ]
    assert rows[0] == rows[1]
    assert any(row[-1] is not None for row in rows[0])
    assert rows_of(straight)


def test_a_reference_of_other_pairs_is_refused(tmp_path):
    first = a_run(tmp_path / "run").go(stop_after=2)
    other = a_run(tmp_path / "other", rows=random_pairs(20, seed=3)).go(stop_after=1)
    path = first.run.path / REFERENCE
    path.write_bytes((other.run.path / REFERENCE).read_bytes())
    with pytest.raises(Damaged, match="other pairs"):
        a_run(tmp_path / "run").go(resume=first.saved[-1])
    path.write_bytes(b"nothing")
    with pytest.raises(Damaged, match="cannot be read"):
        a_run(tmp_path / "run").go(resume=first.saved[-1])
    path.unlink()
    assert a_run(tmp_path / "run").go(resume=first.saved[-1]).state.step == 10


def test_another_beta_is_not_resumed(tmp_path):
    first = a_run(tmp_path / "run").go(stop_after=2)
    recipe = first.run.recipe() | {"dpo": {"beta": 0.5}}
    first.run.recipe_path.write_text(json.dumps(recipe))
    with pytest.raises(StateMismatch, match=r"dpo\.beta"):
        a_run(tmp_path / "run").go(resume=first.saved[-1])


def test_a_run_learns_to_prefer_and_publishes_an_adapter(tmp_path):
    rows = [{"prompt": f"q{n}?", "chosen": f"good {n}", "rejected": f"bad {n}"} for n in range(12)]
    run = a_run(tmp_path / "run", lora=Lora(r=4, alpha=8), rows=rows, max_grad_norm=0.0, weight_decay=0.0).go()
    last = list(read_events(run.run.metrics_path))[-1]
    assert last["reward_accuracy"] == 1.0
    assert last["reward_margin"] > 0.2
    version = Registry(run.home).resolve(run.run.status.candidate)
    assert (version.facts.kind, version.facts.method) == ("adapter", "dpo")
    reference = load_file(run.run.path / REFERENCE)
    assert {name: tuple(tensor.shape) for name, tensor in reference.items()} == {"train": (12, 2), "held_out": (6, 2)}


def test_broken_numbers_stop_the_run(tmp_path):
    run = a_run(tmp_path / "run", learning_rate=1e30)
    with pytest.raises(NonFiniteLoss, match=r"lower train\.learning_rate"):
        run.go()


# What is selected.


def recipe_of(method, source, **more):
    plain = {"name": "bot", "base": "x", "method": method, "data": [source], "held_out": {"share": 0}}
    return Recipe.model_validate(plain | more)


@pytest.fixture
def home(tmp_path):
    return Home(tmp_path / "home").ensure()


def test_corrections_of_kept_conversations_are_pairs(home, tmp_path):
    store = ConversationStore(home.database)
    for number, (rating, correction) in enumerate([("bad", "Oslo."), ("bad", None), ("good", None)]):
        store.record(f"r{number}", "bot", "v", [{"role": "user", "content": f"{number}?"}], f"Answer {number}.")
        store.feedback(f"r{number}", rating, correction)
    source = {"from": "conversations", "where": {"rating": "any", "corrected": None}}
    chosen = select(recipe_of("dpo", source), home, tmp_path)
    assert [(one.answer, one.rejected) for one in chosen.new] == [("Oslo.", "Answer 0.")]


def test_rows_without_a_rejected_answer_are_refused_with_their_lines(home, tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n{"text": "c"}\n')
    with pytest.raises(DataError, match=r"rows\.jsonl:1: this is no preference pair(.|\n)*rows\.jsonl:2: "):
        select(recipe_of("dpo", {"path": "rows.jsonl"}), home, tmp_path)


def test_other_methods_learn_the_better_answer_and_never_what_is_held_out(home, tmp_path):
    rows = [{"prompt": f"{n}?", "chosen": f"yes {n}", "rejected": f"no {n}"} for n in range(3)]
    rows.append(rows[0] | {"rejected": "another"})
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    (tmp_path / "held.json").write_text(json.dumps(rows[2:3]))
    recipe = recipe_of("lora", {"path": "rows.json"}, held_out={"path": "held.json"})
    found = select(recipe, home, tmp_path)
    assert [one.to_json().get("rejected") for one in found.new] == [None, None]
    assert found.num_duplicates == 1
    assert [one.answer for one in found.held_out] == ["yes 2"]
    pairs = select(recipe.model_copy(update={"method": "dpo"}), home, tmp_path)
    assert len(pairs.new) == 3
    assert [one.rejected for one in pairs.held_out] == ["no 2"]


def test_dpo_keeps_to_adapters():
    with pytest.raises(ValueError, match="zero_stage"):
        recipe_of("dpo", {"path": "x"}, train={"zero_stage": 2})
    with pytest.raises(ValueError, match="belongs to `method: dpo`"):
        recipe_of("lora", {"path": "x"}, dpo={"beta": 0.2})
    assert Dpo().beta == 0.1


def test_a_model_with_capped_logits_is_asked_for_its_own():
    """Where the head cannot be taken apart the likelihoods are the same."""
    from nightschool.data.chat.render import render_pieces
    from nightschool.data.pairs import PairBatches
    from nightschool.layers.forward import ForwardPath, document_log_probs, prepare
    from tests.support.tokenizers_for_tests import byte_tokenizer

    tokenizer = byte_tokenizer()
    model = attach_lora(build_model("tiny-llama", len(tokenizer), seed=1), LORA, seed=2).eval()
    example = Example((Message("user", "q?"), Message("assistant", "long answer")), rejected="no")
    batch = PairBatches(render_pieces(tokenizer, example, 99), batch_size=1, seed=0).get(0, 0)
    prepare(model)
    with torch.no_grad():
        ways = [
            document_log_probs(model, ForwardPath(packed, fused), batch)
            for packed in (True, False)
            for fused in (True, False)
        ]
        expected = plain_log_probs(model, batch).view(-1)
    for way in ways:
        assert torch.allclose(way, expected, atol=1e-4)
