"""Method memory: what is drawn, that a tiny base learns to read, resumes to the bit, and is published as modules on a base."""

import json
import random

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from nightschool.config.recipe import Recipe
from nightschool.data.example import Example, Message, NeededFact
from nightschool.data.memory_batches import MemoryBatches, MemoryDraw
from nightschool.data.memory_examples import FactRanges, like_named, question_of, render_with_fact
from nightschool.errors import Damaged, DataError, ModelError, UsageError
from nightschool.events import read_events
from nightschool.layers.memory_gate import GateFeatures
from nightschool.memory.entry import NewEntry
from nightschool.memory.store import MemoryStore
from nightschool.models.load import load_base
from nightschool.models.memory_version import GATE, WEIGHTS
from nightschool.store.names import memory_path
from nightschool.store.registry import Registry
from nightschool.training.distributed.world import World
from nightschool.training.nearest_facts import nearest_facts
from nightschool.views.versions import version_story
from tests.support.tokenizers_for_tests import byte_tokenizer
from tests.support.training_setups import MiniRun, deterministic_threads
from tests.training.test_resume import assert_equal_runs

pytestmark = pytest.mark.trains
SMALL = {"knowledge_dim": 16, "gate_rank": 4, "fusion_rank": 8, "num_candidates": 4, "knowledge_length": 40}
DRAW = MemoryDraw(irrelevant_share=0.4, misled_share=0.5, num_candidates=4, redraw_values=True)


@pytest.fixture(autouse=True)
def _deterministic():
    with deterministic_threads():
        yield


def rows_of_facts(count, *, seed=0, texts=False):
    chance = random.Random(seed)
    rows = []
    for number in range(count):
        who = f"{chance.choice('ABCDE')}o {chance.choice('PQRST')}a{number}"
        relation, wording = chance.choice([("lives in", "home of"), ("works as", "job of")])
        value = chance.choice({"lives in": ["Oslo", "Rome", "Lima"], "works as": ["cook", "nurse"]}[relation])
        fact = {"subject": who, "relation": relation, "value": value}
        if texts and number % 2:
            rows.append({"text": f"{who} {relation} {value}.", "fact": fact})
        else:
            rows.append({"prompt": f"{wording} {who}?", "completion": f"{value}.", "fact": fact})
    return rows


def examples_of(rows):
    return [
        Example(
            text=row.get("text"),
            messages=() if "text" in row else (Message("user", row["prompt"]), Message("assistant", row["completion"])),
            fact=NeededFact(text="{subject} {relation} {value}.".format(**row["fact"]), **row["fact"]),
        )
        for row in rows
    ]


def a_run(folder, *, stage="joint", memory=None, rows=None, base=None, **train):
    recipe = {"method": "memory", "memory": SMALL | {"stage": stage} | (memory or {})}
    return MiniRun(
        folder,
        base=base,
        rows=rows or rows_of_facts(20, texts=True),
        held_out=rows_of_facts(6, seed=9),
        recipe=recipe,
        **train,
    )


# What is drawn.


def batches_of(rows, draw=DRAW, **settings):
    return MemoryBatches(examples_of(rows), byte_tokenizer(), draw, max_seq_len=128, seed=3, batch_size=8, **settings)


def test_values_are_drawn_anew_and_the_entry_says_what_the_answer_says():
    tokenizer, batches = byte_tokenizer(), batches_of(rows_of_facts(24, texts=True))
    seen, found = {}, 0
    for epoch in range(3):
        for index in range(batches.num_batches(epoch)):
            batch, again = batches.get(epoch, index), batches.get(epoch, index)
            assert torch.equal(batch.input_ids, again.input_ids)
            assert (batch.candidates, batch.right, batch.misled) == (again.candidates, again.right, again.misled)
            bounds = batch.cu_seqlens.tolist()
            for number, right in enumerate(batch.right[: len(batch.question_ids)]):
                labels = batch.labels[0, bounds[number] : bounds[number + 1]]
                assert (labels != -100).any() == (right >= 0)
                if right >= 0:
                    assert right in batch.candidates[number]
                    start = batch.reads_from[number]
                    assert labels[start] != -100
                    assert not (labels[:start] != -100).any()
                    answer = tokenizer.decode(labels[labels != -100].tolist()).split(".")[0].strip()
                    entry = batch.entries[right]
                    assert answer
                    assert answer in tokenizer.decode(list(entry.ids))
                    seen.setdefault(entry.keys, set()).add(answer)
                    found += 1
    assert found > 20
    assert max(map(len, seen.values())) > 1
    kept = batches_of(rows_of_facts(24), MemoryDraw(0.0, 0.0, 4, redraw_values=False))
    values = {row["fact"]["value"] for row in rows_of_facts(24)}
    for batch in (kept.get(epoch, 0) for epoch in range(2)):
        for right in (r for r in batch.right if r >= 0):
            assert any(value in tokenizer.decode(list(batch.entries[right].ids)) for value in values)


def test_where_the_entry_is_missing_a_twin_says_what_the_base_would():
    batches = batches_of(rows_of_facts(24, texts=True), MemoryDraw(1.0, 1.0, 4, redraw_values=True))
    batch = batches.get(0, 0)
    documents = len(batch.question_ids)
    assert len(batch.candidates) == 2 * documents
    assert batch.right == (-1,) * (2 * documents)
    assert all(not found for found in batch.candidates[documents:])
    assert all(wrong in found for wrong, found in zip(batch.misled, batch.candidates[:documents], strict=False))
    assert torch.equal(batch.input_ids[0, batch.places], batch.input_ids[0, batch.twins])
    assert (batch.labels == -100).all()
    assert batch.tokens_trained == batch.loss_units == len(batch.places) > 0


def test_misleading_entries_are_near_and_say_something_else():
    examples = examples_of(rows_of_facts(24))
    ranges, chance = FactRanges.of(examples), random.Random(1)
    kinds = set()
    for example in examples * 5:
        drawn = ranges.draw(example, chance)
        for fact in drawn.misleading:
            same = (fact.subject == drawn.entry.subject, fact.relation == drawn.entry.relation)
            assert same in {(True, False), (False, True)}
            assert fact.subject in fact.text
            assert fact.value in fact.text
            kinds.add(same)
    assert len(kinds) == 2


def test_what_a_gate_finds_nearest_misleads_and_is_the_same_for_the_same_gate(tmp_path):
    task = a_run(tmp_path / "run", stage="fusion").prepared().task
    tokenizer, examples = byte_tokenizer(), [*examples_of(rows_of_facts(12)), Example(text="It rained in Oslo.")]
    ranges = FactRanges.of(examples)
    found, again = (nearest_facts(task.model, tokenizer, ranges, examples) for _ in range(2))
    assert found == again
    for example, facts in zip(examples, found, strict=True):
        assert facts
        assert all(example.fact is None or fact.statement != example.fact.statement for fact in facts)
    drawn = {
        fact.statement
        for seed in range(9)
        for fact in ranges.draw(examples[-1], random.Random(seed), found[-1]).misleading
    }
    assert drawn
    assert drawn <= {fact.statement for fact in found[-1]}
    assert ranges.draw(examples[-1], random.Random(0)).misleading == ()


def test_names_that_are_like_one_have_another_number_a_word_more_a_word_less_or_another_word():
    made = {like_named("Route 66 North", "Ada Berg", random.Random(seed)) for seed in range(200)}
    assert "Route 66 North" not in made
    assert {"66 North", "Route 66", "Route 67 North", "Route North", "Route 66 Berg", "Ada Route 66 North"} <= made
    swapped = {like_named("IBM 93", "Ada Berg", random.Random(seed)) for seed in range(50)}
    assert {"IBM 39", "IBM"} <= swapped
    single = {like_named("Oslo", "Ada Berg", random.Random(seed)) for seed in range(50)}
    assert single == {"Ada Berg", "Ada Oslo", "Berg Oslo", "Oslo Ada", "Oslo Berg"}
    assert like_named("Oslo", "", random.Random(0)) == ""


def test_an_entry_is_read_in_the_words_in_which_a_memory_writes_it(tmp_path):
    rows = [
        {"prompt": f"Which is the capital of {who}?", "completion": f"{what}.",
         "fact": {"subject": who, "relation": "capital", "value": what}}
        for who, what in (("Norway", "Oslo"), ("Peru", "Lima"))
    ]  # fmt: skip
    with MemoryStore.create(tmp_path / "facts") as store:
        store.add([NewEntry("", **row["fact"]) for row in rows], author="ada")
        written = {entry.text for entry in store.entries()}
    assert "The capital of Norway is Oslo." in written
    task = a_run(tmp_path / "run", rows=rows, memory={"redraw_values": False, "knowledge_length": 64}).prepared().task
    tokenizer, batch = byte_tokenizer(), task.batch(0, 0)
    read = {tokenizer.decode(list(entry.ids)).strip(): entry for entry in batch.entries}
    assert written & read.keys()
    for text in written & read.keys():
        entry = read[text]
        assert tokenizer.decode(list(entry.ids[: entry.told])).split()[-1] == "is"


def test_loss_of_a_text_lies_on_its_value_and_what_is_asked_ends_before_it():
    (example,) = examples_of(
        [{"text": "Bo lives in Oslo.", "fact": {"subject": "Bo", "relation": "lives in", "value": "Oslo"}}]
    )
    tokenizer = byte_tokenizer()
    rendered = render_with_fact(tokenizer, example, 99)
    trained = [token for token, weight in zip(rendered.input_ids, rendered.weights, strict=True) if weight > 0]
    assert tokenizer.decode(trained) == "Oslo."
    assert question_of(example) == "Bo lives in"
    short = render_with_fact(tokenizer, example, len(rendered.input_ids) - 2)
    assert (short.cut_tokens, short.cut_trained) == (2, 2)
    assert Example.from_json(example.to_json()) == example


# Training.


@pytest.mark.parametrize("stage", ["router", "fusion", "joint"])
def test_each_stage_learns_what_is_its_own_and_every_tensor_of_it(tmp_path, stage):
    prepared = a_run(tmp_path / "run", stage=stage).prepared()
    task = prepared.task
    before = {name: p.detach().clone() for name, p in task.trainable().items()}
    parts = {name.split(".")[1] for name in before}
    assert parts == {"router": {"gate", "reader"}, "fusion": {"reader"}, "joint": {"gate", "reader"}}[stage]
    frozen = {name: p.detach().clone() for name, p in task.model.named_parameters() if name not in before}
    seen = set()
    for step in range(2):
        window = [task.batch(step, index) for index in range(4)]
        task.accumulate(window, sum(batch.loss_units for batch in window))
        seen |= {name for name, p in task.trainable().items() if p.grad is not None and p.grad.abs().max() > 0}
        task.update(1e-2, 0.0, None, task.world)
    assert seen == set(before)
    assert all(not torch.equal(before[name], p) for name, p in task.trainable().items())
    assert all(torch.equal(frozen[name], p) for name, p in task.model.named_parameters() if name not in before)


def test_a_base_that_computes_in_16_bits_is_read_in_32(tmp_path):
    task = a_run(tmp_path / "run", dtype="bf16").prepared().task
    batch = task.batch(0, 0)
    task.accumulate([batch], batch.loss_units)
    grads = [p.grad for p in task.trainable().values() if p.grad is not None]
    assert grads
    assert all(grad.isfinite().all() and grad.dtype == torch.float32 for grad in grads)


@pytest.mark.parametrize("stage", ["router", "joint"])
def test_interrupted_and_resumed_equals_uninterrupted(tmp_path, stage):
    straight = a_run(tmp_path / "straight", stage=stage).go()
    first = a_run(tmp_path / "parts", stage=stage).go(stop_after=3)
    assert_equal_runs(straight, a_run(tmp_path / "parts", stage=stage).go(resume=first.saved[-1]))


def test_stages_follow_each_other_and_publish_modules_on_the_base(tmp_path):
    """A version carries the base by name; loading it gives the base and the modules, and the next stage begins with them."""
    first = a_run(tmp_path / "router", stage="router", memory={"name": "facts"})
    with MemoryStore.create(memory_path(first.home, "facts")) as store:
        store.add([NewEntry("Ada lives in Oslo.")], author="ada")
        store.add([NewEntry("Ada lives in Rome.")], author="ada")
    first = first.go()
    registry = Registry(first.home)
    version = registry.resolve(first.run.status.candidate)
    assert (version.facts.kind, version.facts.method) == ("memory", "memory")
    assert not (version.path / "model.safetensors").exists()
    config = json.loads((version.path / "memory_config.json").read_text())
    assert (config["memory"], config["revision"]) == ("facts", 2)
    story = version_story(registry, version, {})
    assert (story["memory"], story["memory_revision"]) == ("facts", 2)
    assert config["base"] == version.facts.base == first.run.recipe()["base"]
    loaded = load_base(version.ref, first.home)
    base = load_base(config["base"], first.home)
    ids = torch.randint(0, 60, (1, 9))
    with torch.no_grad():
        assert torch.equal(loaded.model(input_ids=ids).logits, base.model(input_ids=ids).logits)
    heads = load_file(version.path / GATE)
    half = SMALL["knowledge_dim"] // 2
    shapes = {name: tuple(tensor.shape) for name, tensor in heads.items()}
    assert shapes == {
        f"{head}.{name}": shape
        for head in ("subject", "relation")
        for name, shape in (("attention", (64,)), ("projection.a", (4, 64)), ("projection.b", (half, 4)))
    }
    assert heads["subject.projection.b"].abs().max() > 0
    second = a_run(tmp_path / "next", stage="fusion", base=str(version.path)).prepared()
    for name, tensor in second.loaded.memory.gate.state_dict().items():
        assert torch.equal(tensor, heads[name]), name
    with pytest.raises(ModelError, match=r"memory\.gate_rank=4"):
        a_run(tmp_path / "other", base=str(version.path), memory={"gate_rank": 2}).prepared()
    written = (version.path / "memory_config.json").read_text()
    (version.path / "memory_config.json").write_text(json.dumps({k: v for k, v in config.items() if k != "format"}))
    with pytest.raises(ModelError, match=r"format 1, and this nightschool reads format 2.*Train them again"):
        load_base(str(version.path), first.home)
    (version.path / "memory_config.json").write_text(written)
    stored = load_file(version.path / WEIGHTS)
    (version.path / WEIGHTS).write_bytes(b"broken")
    with pytest.raises(Damaged, match="cannot be read"):
        load_base(str(version.path), first.home)
    assert stored


def test_a_tiny_base_learns_to_read_what_it_never_saw(tmp_path):
    """Held-out facts: the loss of what is read falls well below what the base says of it, and most is copied."""
    run = a_run(
        tmp_path / "run", stage="joint", rows=rows_of_facts(60, seed=2), steps_total=60, epochs=40, batch_size=8,
        accumulation_steps=1, learning_rate=5e-3, evaluate_every="30 steps",
    ).go()  # fmt: skip
    held_out = [row for row in read_events(run.run.events.path) if row["event"] == "heldout"]
    rows = list(read_events(run.run.metrics_path))
    assert rows[-1]["loss_ce"] < 0.7 * rows[0]["loss_ce"]
    assert rows[-1]["copied"] > 0.4
    assert held_out[-1]["heldout_loss"] < held_out[0]["heldout_loss"]
    assert {"loss_ce", "loss_similarity", "loss_diversity", "loss_kept", "loss_sentinel"} <= rows[-1].keys()


def test_an_encoder_without_torch_gives_the_addresses_of_the_gate(tmp_path):
    from nightschool.memory.encoders.heads import Heads, normalised, token_priors

    run = a_run(tmp_path / "run", stage="router").go()
    version = Registry(run.home).resolve(run.run.status.candidate)
    loaded = load_base(version.ref, run.home)
    table = loaded.model.get_input_embeddings().weight.detach()
    token_ids = torch.randint(0, len(table), (7,))
    heads = Heads.read(version.path / GATE, table.shape[1])
    features = normalised((table - table.mean(0))[token_ids].numpy())[None]
    for name in ("subject", "relation"):
        ours = getattr(loaded.memory.gate, name)(*GateFeatures(table)(token_ids), [7]).detach()
        theirs = getattr(heads, name).pooled(features, token_priors(len(table))[token_ids.numpy()][None], np.array([7]))
        assert np.allclose(ours.numpy(), theirs, atol=1e-5)


def labelled_rows(count, *, seed=0):
    """Questions with the entry that each means and two others, one of them as near."""
    rows = rows_of_facts(count, seed=seed)
    return [
        {
            "query": row["prompt"],
            "targets": [
                row["fact"] | {"score": 0.9},
                rows[number - 1]["fact"] | {"score": 0.9 if number % 2 else 0.5},
                {"text": f"Nobody knows {number}.", "score": 0.1},
            ],
        }
        for number, row in enumerate(rows)
    ]


def test_labelled_questions_teach_the_gate_where_entries_lie(tmp_path):
    """Shares of what a question means follow the scores, and the gate learns them."""
    run = a_run(
        tmp_path / "run", stage="router", rows=labelled_rows(60), steps_total=40, epochs=40, batch_size=8,
        accumulation_steps=1, learning_rate=2e-2,
    )  # fmt: skip
    for likely in run.prepared().task.batch(0, 0).likely:
        shares = sorted((share for _, share in likely), reverse=True)
        assert sum(shares) == pytest.approx(1)
        assert shares[0] == pytest.approx(0.5) or shares[0] > 0.99
        assert len(shares) == 3
        assert shares[2] < 1e-6
    losses = [row["loss_similarity"] for row in read_events(run.go().run.metrics_path)]
    assert sum(losses[-8:]) < 0.8 * sum(losses[:8])


@pytest.mark.parametrize("stage", ["router", "joint"])
def test_two_processes_learn_what_one_learns_from_as_many_examples(tmp_path, stage):
    """Each takes one of two micro-batches; their gradients add up to those of one process that takes both."""
    task = a_run(tmp_path / "run", stage=stage).prepared().task
    window = [task.batch(0, 0), task.batch(0, 1)]
    units = sum(batch.loss_units for batch in window)

    def gradients(window):
        task.discard_gradients()
        loss = task.accumulate(window, units)
        return float(loss), {name: p.grad.clone() for name, p in task.trainable().items() if p.grad is not None}

    loss, whole = gradients(window)
    parts = []
    for rank in range(2):
        task.world = World(rank, 2)
        parts.append(gradients([task.batch(0, 0)]))
    assert sum(part for part, _ in parts) == pytest.approx(loss, rel=1e-5)
    for name, gradient in whole.items():
        summed = sum(found.get(name, torch.zeros_like(gradient)) for _, found in parts)
        assert torch.allclose(summed, gradient, rtol=1e-3, atol=1e-6), name
    # At the end of an epoch one of them may have nothing left: it takes the step without loss.
    last = task.epoch_length(0) - 1
    idle = task.batch(0, last)
    assert idle.is_idle
    loss, found = gradients([idle])
    assert loss == 0
    assert all(not gradient.any() for gradient in found.values())


# What is refused.


def test_bad_facts_are_refused_with_their_lines(tmp_path):
    with pytest.raises(DataError, match="which fact it needs"):
        a_run(tmp_path / "none", rows=[{"query": "a?", "retrieved": "b"}] * 2).prepared()
    with pytest.raises(DataError, match=r"data\.json:1: the entry .* memory\.knowledge_length is 3"):
        a_run(tmp_path / "long", memory={"knowledge_length": 3}).prepared()
    for stage in ("fusion", "joint"):
        with pytest.raises(DataError, match=rf"data\.json:1: .*memory.stage: {stage} needs"):
            a_run(tmp_path / stage, stage=stage, rows=labelled_rows(4)).prepared()
    row = rows_of_facts(1)[0]
    for number, (fact, said) in enumerate(
        [
            ({"subject": "A", "relation": "b"}, "'fact.value' is missing"),
            (row["fact"] | {"text": "Nobody."}, "does not hold the subject and the value"),
            ([], "'fact' is empty"),
        ]
    ):
        with pytest.raises(DataError, match=said):
            a_run(tmp_path / f"bad{number}", rows=[row | {"fact": fact}]).prepared()


def test_settings_that_cannot_be_are_refused(tmp_path):
    plain = {"name": "bot", "base": "x", "method": "memory", "data": [{"path": "x"}]}
    with pytest.raises(ValueError, match="an address has two halves; write 8"):
        Recipe.model_validate(plain | {"memory": {"knowledge_dim": 7}})
    with pytest.raises(ValueError, match="zero_stage"):
        Recipe.model_validate(plain | {"train": {"zero_stage": 2}})
    with pytest.raises(ValueError, match="belongs to `method: memory`"):
        Recipe.model_validate(plain | {"method": "full", "memory": {"gate_rank": 3}})
    assert Recipe.model_validate(plain).train.learning_rate == 2e-3
    with pytest.raises(UsageError, match="needs a base that speaks"):
        a_run(tmp_path / "new", base="new:tiny-qwen3").prepared()
    with pytest.raises(UsageError, match="gradient_checkpointing"):
        a_run(tmp_path / "again", gradient_checkpointing=True).prepared()
