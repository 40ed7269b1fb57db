"""Rehearsal: what a model said to general prompts stays as likely as it was, while it learns something else."""

import json
from pathlib import Path

import pytest
import torch

from nightschool.config.recipe import Recipe
from nightschool.data.study.rewordings import wording
from nightschool.errors import Damaged
from nightschool.evaluation.general import OWN_FILE, REHEARSED_FILE, rehearsed_prompts
from nightschool.events import read_events
from nightschool.feedback.conversations import ConversationStore
from nightschool.feedback.erasure import erase, taints_of
from nightschool.feedback.rehearsed_prompts import ANSWERS_FILE, FILE
from nightschool.layers.distillation import TopTokens, divergence
from nightschool.store.home import Home
from nightschool.training import rehearsal
from nightschool.training.rehearsal import Rehearsal
from tests.support.cli_home import add_version
from tests.support.tokenizers_for_tests import byte_tokenizer
from tests.support.training_setups import LORA, MiniRun, deterministic_threads
from tests.training.test_resume import assert_equal_runs

pytestmark = pytest.mark.trains
PROMPTS = ["hello there", "abc?", "what is it", "tell me"]


@pytest.fixture(autouse=True)
def _deterministic():
    with deterministic_threads():
        yield


def a_run(folder, *, weight=1.0, home=None, prompts=True, lora=LORA, recipe=None, rehearse=None, **train):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"question": one}) + "\n" for one in PROMPTS))
    settings = {"prompts": "prompts.jsonl", "weight": weight, "max_new_tokens": 8} if prompts else {}
    rehearse = settings | (rehearse or {})
    return MiniRun(folder, lora=lora, home=home, recipe={"rehearse": rehearse} | (recipe or {}), **train)


def test_the_divergence_is_none_from_itself_and_that_of_all_tokens_where_all_are_kept():
    chance = torch.Generator().manual_seed(0)
    p, q = (torch.randn(5, 40, generator=chance) * 2 for _ in range(2))
    whole = (p.softmax(-1) * (p.log_softmax(-1) - q.log_softmax(-1))).sum()
    assert divergence(p, TopTokens.of(p, 8)).item() == pytest.approx(0, abs=1e-5)
    assert divergence(q, TopTokens.of(p, 40)).item() == pytest.approx(whole.item(), rel=1e-4)
    assert 0 < divergence(q, TopTokens.of(p, 8)).item() < whole.item()
    q.requires_grad_()
    divergence(q, TopTokens.of(p, 39)).backward()
    assert torch.allclose(q.grad, q.detach().softmax(-1) - p.softmax(-1), atol=1e-4)


def test_what_the_exam_asks_is_never_rehearsed(tmp_path):
    exam, ours = (
        {wording(json.loads(line)["question"]) for line in file.read_text().splitlines()}
        for file in (OWN_FILE, REHEARSED_FILE)
    )
    assert len(ours) > 100
    assert not exam & ours
    rows = [
        {"question": "What is frozen water called"},
        {"question": "Something else?"},
        {"question": "Something else?"},
    ]
    (tmp_path / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert rehearsed_prompts("own.jsonl", "default", tmp_path) == ["Something else?"]
    assert rehearsed_prompts(None, "default", tmp_path) == []


def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path):
    whole = a_run(tmp_path / "whole").go()
    parts = a_run(tmp_path / "parts").go(stop_after=4)
    parts.go(resume=parts.saved[-1])
    assert_equal_runs(whole, parts)
    rows = list(read_events(whole.run.metrics_path))
    assert all(row["rehearsal_divergence"] >= 0 for row in rows)
    assert rows[0]["rehearsal_divergence"] == pytest.approx(0, abs=1e-3)  # half precision, and nothing was learned yet


def test_as_many_answers_as_the_ratio_says_lie_beside_a_micro_batch(tmp_path):
    prepared = a_run(tmp_path / "run").prepared()
    rows = rehearsal.ask(prepared.task.model, prepared.task.path, prepared.loaded.tokenizer, PROMPTS, 3)
    assert all(len(row.answer_ids) <= 3 for row in rows)
    batch = prepared.task.batches.get(0, 0)
    assert len(batch.cu_seqlens) - 1 == 2  # examples
    for ratio, count in ((0.1, 1), (1.0, 2), (9.0, len(rows))):
        beside, teacher = Rehearsal(rows, ratio=ratio, weight=1, seed=0).beside(batch, 3)
        assert len(beside.cu_seqlens) - 1 == count
        assert len(teacher.ids) == beside.tokens_trained
    one = Rehearsal(rows, ratio=1.0, weight=1, seed=0)
    assert torch.equal(one.beside(batch, 1)[0].input_ids, one.beside(batch, 1)[0].input_ids)
    assert not torch.equal(one.beside(batch, 0)[0].input_ids, one.beside(batch, 1)[0].input_ids)


def test_no_more_is_asked_than_there_is_room_for(tmp_path):
    prepared = a_run(tmp_path / "run").prepared()
    wanted = prepared.data.rehearsed
    asked = [
        len(wanted.answered(tmp_path / str(room), prepared.loaded, prepared.task, room).documents)
        for room in (1, 2, None)
    ]
    assert asked[0] < asked[1] < asked[2]
    assert asked[0] == 1
    assert asked[2] <= len(PROMPTS)


def test_another_run_with_the_same_weights_asks_nothing(tmp_path, monkeypatch):
    first = a_run(tmp_path / "first").go(stop_after=1)
    monkeypatch.setattr(rehearsal, "ask", lambda *_: pytest.fail("was asked"))
    second = a_run(tmp_path / "second", home=first.home).go(stop_after=1)
    assert (second.run.path / ANSWERS_FILE).read_bytes() == (first.run.path / ANSWERS_FILE).read_bytes()


def test_a_base_is_asked_once_whatever_its_adapter_has_learned(tmp_path, monkeypatch):
    run = a_run(
        tmp_path / "run", recipe={"rehearse": {"prompts": "prompts.jsonl", "max_new_tokens": 8, "teacher": "base"}}
    )
    prepared = run.prepared()
    model, path, wanted = prepared.task.model, prepared.task.path, prepared.data.rehearsed
    before = rehearsal.ask(model, path, prepared.loaded.tokenizer, PROMPTS, 8)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    learns = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    of_base, of_champion = (
        rehearsal.ask(model, path, prepared.loaded.tokenizer, PROMPTS, 8, who) for who in ("base", "champion")
    )
    assert learns == [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert [row.answer_ids for row in of_base] == [row.answer_ids for row in before]
    assert all(torch.equal(a.teacher.log_probs, b.teacher.log_probs) for a, b in zip(of_base, before, strict=True))
    assert not torch.equal(of_champion[0].teacher.log_probs, before[0].teacher.log_probs)
    kept = wanted.answered(tmp_path / "one", prepared.loaded, prepared.task, 1)
    monkeypatch.setattr(rehearsal, "ask", lambda *_: pytest.fail("was asked"))
    with torch.no_grad():
        next(one for name, one in model.named_parameters() if "lora_B" in name).normal_()
    again = wanted.answered(tmp_path / "other", prepared.loaded, prepared.task, 2)
    assert len(again.documents) == len(kept.documents) == len(before)


def test_a_quantised_base_is_rehearsed_too(tmp_path):
    recipe = {"method": "qlora", "quantization": {"bits": 8}}
    run = a_run(tmp_path / "run", recipe=recipe).go(stop_after=2)
    assert all(row["rehearsal_divergence"] >= 0 for row in read_events(run.run.metrics_path))


@pytest.mark.parametrize("lora", [LORA, None])
def test_with_a_rehearsal_less_is_unlearned(tmp_path, lora):
    drifted = []
    for weight in (None, 5.0):
        name = "with" if weight else "without"
        run = a_run(tmp_path / name, prompts=weight is not None, weight=weight or 1.0, lora=lora)
        prepared = run.prepared()
        rows = rehearsal.ask(prepared.task.model, prepared.task.path, prepared.loaded.tokenizer, PROMPTS, 8)
        kept = Rehearsal(rows, ratio=9, weight=1, seed=0)
        run.run.path.mkdir(exist_ok=True)
        prepared.begin(run.run.path)
        task = prepared.task
        task.model.train()
        for _ in range(3):
            for place in range(task.epoch_length(0)):
                batch = task.batch(0, place)
                task.accumulate([batch], batch.loss_units)
                task.update(1e-2, 1.0, None, task.world)
        task.model.eval()
        with torch.no_grad():
            beside = kept.divergence(task.model, task.path, task.batches.get(0, 0), 0, torch.float32)
        drifted.append(beside.item())
    assert 0 < drifted[1] < 0.6 * drifted[0]


def test_a_broken_file_is_named(tmp_path):
    run = a_run(tmp_path / "run").go(stop_after=1)
    path = run.run.path / ANSWERS_FILE
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(Damaged, match=r"rehearsal\.safetensors cannot be read"):
        run.go(resume=run.saved[-1])


def test_what_rehearses_neither_shards_nor_shares(tmp_path):
    plain = {"base": "x", "data": [{"path": "y"}], "rehearse": {"prompts": "default"}}
    with pytest.raises(ValueError, match="no adapter above a base"):
        Recipe.model_validate(
            {"base": "x", "data": [{"path": "y"}], "rehearse": {"prompts": "default", "teacher": "base"}}
        )
    for method, train in (("full", {"local_blocks": 2}), ("full", {"zero_stage": 2}), ("dpo", {})):
        with pytest.raises(ValueError, match=r"rehearse\.prompts"):
            Recipe.model_validate(plain | {"method": method, "train": train})


def test_what_is_forgotten_is_in_no_run_and_in_no_cache(tmp_path):
    secret = "my code is 4711"
    home = Home(tmp_path / "home").ensure()
    store = ConversationStore(home.database)
    for request_id, question in (("req-1", secret), ("req-2", "something else")):
        store.record(request_id, "run", "v", [{"role": "user", "content": question}], "ok")
    run = a_run(tmp_path / "run", home=home, rehearse={"prompts": ["conversations"], "redact": []}).go(stop_after=1)
    plan = plan_row(run, "rehearsed")
    assert plan.facts["prompts_by_source"] == {"conversations": 2}
    run.run.update_status(state="interrupted", pid=None)
    version = add_version(home, name="run", run_id=run.run.id)
    assert found_in(home, secret) == {FILE, ANSWERS_FILE, "state.db", "cached"}
    found, _ = erase(home, "req-1")
    assert found_in(home, secret) == set()
    assert found.runs == (run.run.id,)
    assert list(taints_of(home.database, "run")) == [version.id]
    assert "something else" in (run.run.path / FILE).read_text()
    with pytest.raises(Damaged, match="other prompts than were chosen"):
        run.go(resume=run.saved[-1])


def plan_row(run, label):
    prepared = run.prepared()
    return next(row for row in prepared.plan_rows(1).rows if row.label == label)


def found_in(home, text):
    """In which files of a home a text lies, as bytes or as the tokens of a prompt that is rehearsed."""
    ids = tuple(byte_tokenizer()(text)["input_ids"])
    found = set()
    for path in filter(Path.is_file, home.path.rglob("*")):
        if text.encode() in path.read_bytes():
            found.add(path.name.removesuffix("-wal"))
        if path.name == ANSWERS_FILE or "rehearsals" in path.parts:
            held = [row.prompt_ids for row in rehearsal.read(path)]
            if any(ids == one[at : at + len(ids)] for one in held for at in range(len(one))):
                found.add(path.name if path.name == ANSWERS_FILE else "cached")
    return found
