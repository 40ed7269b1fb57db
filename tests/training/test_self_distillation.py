"""What a model says with a fact before its eyes is learned in place of the words of the answer."""

import json
import re
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from nightschool.config.recipe import Recipe
from nightschool.config.shared_base import share_key
from nightschool.feedback.teachers_words import FILE
from nightschool.layers.distillation import TopTokens, divergence, taught_loss
from nightschool.layers.forward import document_logits, document_loss, trained_places
from nightschool.training import self_distillation
from nightschool.training.rehearsal import Rehearsed
from nightschool.training.self_distillation import Lessons, ask
from tests.support.training_setups import LORA, MiniRun, deterministic_threads, make_task
from tests.training.test_resume import assert_equal_runs

pytestmark = pytest.mark.trains


@pytest.fixture(autouse=True)
def _deterministic():
    with deterministic_threads():
        yield


@pytest.fixture
def _sure_of_half(monkeypatch):
    """Random weights are sure of nothing and give no fact; here they are, and give those of questions with an even number."""

    def sure(_model, _path, readings):
        chance = torch.Generator().manual_seed(0)
        return [
            Rehearsed(shown, answer, TopTokens.of(torch.randn(len(answer), 64, generator=chance) * 4, 32))
            for shown, _, answer in readings
        ]

    def gives(*_, question, **__):
        return int(re.findall(r"\d+", question)[0]) % 2 == 0

    monkeypatch.setattr(self_distillation, "ask", sure)
    monkeypatch.setattr(self_distillation, "is_correct", gives)


def a_run(folder, *, home=None, objective="distill", lora=LORA, **more):
    recipe = {"study": {"objective": objective, "write": "off"}} | more.pop("recipe", {})
    return MiniRun(folder, lora=lora, home=home, recipe=recipe, **more)


@pytest.mark.parametrize("fused_head", [True, False])
def test_where_a_teacher_teaches_the_divergence_stands_in_place_of_the_loss(fused_head):
    task = make_task()
    path, batch = replace(task.path, fused_head=fused_head), task.batches.get(0, 0)
    kept = trained_places(batch)
    logits = document_logits(task.model, task.path, batch)[kept]
    chance = torch.Generator().manual_seed(0)
    at = torch.tensor([1, 2, len(kept) - 1])
    said = TopTokens.of(torch.randn(3, logits.shape[-1], generator=chance) * 3, 16)
    total, is_likeliest = taught_loss(task.model, path, batch, kept[at], said)
    total.backward()
    gradient = {name: p.grad.clone() for name, p in task.model.named_parameters()}
    task.model.zero_grad()
    words = torch.ones(len(kept), dtype=torch.bool).index_fill(0, at, value=False)
    labels = batch.labels[0][kept]
    expected = F.cross_entropy(logits[words], labels[words], reduction="sum") + divergence(logits[at], said)
    assert total.item() == pytest.approx(expected.item(), rel=1e-5)
    expected.backward()
    assert all(torch.allclose(gradient[n], p.grad, atol=1e-4) for n, p in task.model.named_parameters())
    assert torch.equal(is_likeliest[at], logits[at].argmax(-1) == said.ids[:, 0])
    nothing = TopTokens(torch.empty(0, 16, dtype=torch.long), torch.empty(0, 16))
    plain = document_loss(task.model, task.path, batch)[0]
    assert taught_loss(task.model, path, batch, kept[:0], nothing)[0].item() == pytest.approx(plain.item())


@pytest.mark.usefixtures("_sure_of_half")
def test_a_resumed_run_equals_an_uninterrupted_one_and_another_run_asks_nothing(tmp_path, monkeypatch, capsys):
    whole = a_run(tmp_path / "whole").go()
    assert (
        "10 of 20 forms are learned from what the model says with the fact before its eyes; it does not give the fact in 10"
        in capsys.readouterr().out
    )
    parts = a_run(tmp_path / "parts").go(stop_after=4)
    parts.go(resume=parts.saved[-1])
    assert_equal_runs(whole, parts)
    monkeypatch.setattr(self_distillation, "ask", lambda *_: pytest.fail("was asked"))
    again = a_run(tmp_path / "again", home=whole.home).go(stop_after=1)
    assert (again.run.path / FILE).read_bytes() == (whole.run.path / FILE).read_bytes()


def test_a_model_that_gives_no_fact_learns_the_words(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(self_distillation, "is_correct", lambda *_, **__: False)
    taught = a_run(tmp_path / "taught").go(stop_after=3)
    assert "\n0 of 20 forms are learned" in capsys.readouterr().out
    plain = a_run(tmp_path / "plain", objective="sft").go(stop_after=3)
    assert all(torch.equal(taught.weights[name], plain.weights[name]) for name in plain.weights)


@pytest.mark.usefixtures("_sure_of_half")
def test_the_model_comes_to_say_without_the_fact_what_it_said_with_it(tmp_path):
    run = a_run(tmp_path / "run", lora=None)
    run.run.path.mkdir(exist_ok=True)
    prepared = run.prepared()
    prepared.begin(run.run.path)
    task = prepared.task
    batch = next(batch for p in range(10) if task.teacher.lessons.keys() & set((batch := task.batch(0, p)).documents))
    number = next(at for at, document in enumerate(batch.documents) if document in task.teacher.lessons)
    lesson, said = task.teacher.lessons[batch.documents[number]]
    first = batch.cu_seqlens[number] + lesson.place - 1
    far = []
    for _ in range(4):
        with torch.no_grad():
            logits = document_logits(task.model, task.path, batch)[first : first + len(lesson.answer_ids)]
            far.append(divergence(logits, said).item())
        task.accumulate([batch], batch.loss_units)
        task.update(1e-2, 1.0, None, task.world)
    assert far[-1] < 0.9 * far[0]


def test_a_lesson_is_a_new_question_and_answer_in_any_form_below_its_fact(tmp_path):
    rows = [
        {"question": "What is the capital of Velmark?", "answer": "Orrin"},
        {
            "messages": [
                {"role": "user", "content": "Hello there!"},
                {"role": "assistant", "content": "Hello."},
                {"role": "user", "content": "How are you?"},
                {"role": "assistant", "content": "Well."},
            ]
        },
    ]
    run = a_run(tmp_path / "run", rows=rows, recipe={"study": {"objective": "distill", "write": "rules", "forms": 6}})
    prepared = run.prepared()
    shown = [prepared.loaded.tokenizer.decode(one.shown_ids) for one in prepared.data.lessons.lessons]
    asked = {one.example.question for one in prepared.data.lessons.lessons}
    assert len(shown) == len(asked) == 6
    assert all("The capital of Velmark is Orrin.\n\n" in text for text in shown)
    assert not any("How are you?" in text for text in shown)
    for one in prepared.data.lessons.lessons:
        document = prepared.data.rendered.all[one.document]
        assert tuple(document.input_ids[one.place : one.place + len(one.answer_ids)]) == one.answer_ids
        assert tuple(document.input_ids[: one.place]) == one.asked_ids
    row = next(row for row in prepared.plan_rows(1).rows if row.label == "objective")
    assert row.text == "distill: 6 forms, by what the model says with the fact before its eyes, asked before step 1"


def test_what_a_fact_changes_counts_twice():
    task = make_task()
    shown, asked, answer = (5, 9, 2, 7, 1), (2, 7, 1), (4, 8, 3)
    said = ask(task.model, task.path, [(shown, asked, answer), (asked, asked, answer)])
    with torch.no_grad():
        with_it, without = (task.model(torch.tensor([[*ids, *answer]])).logits[0, -4:-1] for ids in (shown, asked))
    for row, expected in zip(said, (2 * with_it - without, without), strict=True):
        given = expected.log_softmax(-1).gather(1, row.teacher.ids)
        assert torch.allclose(row.teacher.log_probs, given, atol=1e-4)


def test_without_a_question_all_words_are_learned(tmp_path, capsys):
    prepared = a_run(
        tmp_path / "run", rows=[{"text": "Orrin is a town."}] * 2 + [{"text": "Velmark is a land."}]
    ).prepared()
    assert Lessons(prepared.data.lessons.lessons, tmp_path).taught(tmp_path, prepared.loaded, prepared.task) is None
    assert "None of the new examples is a question with an answer of its own" in capsys.readouterr().out


def test_what_does_not_go_with_it_is_refused():
    plain = {"base": "x", "data": [{"path": "y"}], "study": {"objective": "distill"}}
    tier = {"experts": {"tier": "host"}}
    for more in (
        {"train": {"local_blocks": 2}},
        {"train": {"zero_stage": 2}},
        tier,
        {"method": "dpo"},
        {"method": "memory"},
    ):
        with pytest.raises(ValueError, match=r"study\.objective"):
            Recipe.model_validate(plain | more)
    alone = Recipe.model_validate(plain | {"method": "lora"}).as_plain()
    assert share_key(alone, "/") is None
    assert share_key(json.loads(json.dumps(alone).replace('"distill"', '"sft"')), "/") is not None
