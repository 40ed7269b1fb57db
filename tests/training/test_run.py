import errno
import json
import os
import re
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from nightschool.cli.main import main as nightschool
from nightschool.config.recipe import Recipe
from nightschool.data.chat.render import render_prompt
from nightschool.data.example import Example, Message
from nightschool.events import read_events
from nightschool.feedback.replay_pool import AcceptedExamples
from nightschool.models import version_folder
from nightschool.models.load import load_base
from nightschool.store import checkpoints
from nightschool.store.database import Database
from nightschool.store.home import Home
from nightschool.store.registry import Registry
from nightschool.store.runs import RunStore
from nightschool.training import publish
from nightschool.training.checkpoint.saver import Saver
from nightschool.training.continuation import greedy_continuation
from nightschool.training.run import main
from tests.support.training_setups import NUM_THREADS, deterministic_threads, differing

pytestmark = pytest.mark.usefixtures("warm_children")

FACTS = [
    ("Where does Bela live?", "Bela lives in Rome."),
    ("Where does Toron live?", "Toron lives in Oslo."),
    ("What does Bela eat?", "Bela eats soup."),
    ("What does Mista eat?", "Mista eats plums."),
    ("Who bakes bread?", "Toron bakes bread."),
    ("Who sails?", "Nobody sails here."),
]
EPOCHS_TO_LEARN = 100
# Rounding moves what a tiny model has learned by some tenths of a logit from one CPU to the next; what is asked of it
# word by word must lead by far more. Measured over seeds, CPU capabilities and threads: 5.5 to 7.
SAFE_MARGIN = 3.0
STEPS = 2 * EPOCHS_TO_LEARN


@pytest.fixture(autouse=True)
def _deterministic():
    with deterministic_threads():
        yield


@pytest.fixture
def home(tmp_path):
    return Home(tmp_path / "home").ensure()


def write_facts(path, facts=FACTS):
    path.write_text(json.dumps([{"id": i, "query": q, "retrieved": a} for i, (q, a) in enumerate(facts)]))


def new_run(home, *, facts=FACTS, name="bot", train=None, **recipe):
    """A run of a few seconds over a few facts, as jobs create it."""
    root = home.path.parent
    write_facts(root / "facts.json", facts)
    settings = {
        "learning_rate": 1e-2,
        "warmup_steps": 5,
        "epochs": 10,
        "batch_size": 3,
        "accumulation_steps": 1,
        "num_threads": NUM_THREADS,
        "dtype": "fp32",
    }
    plain = {
        "name": name,
        "base": "new:tiny-qwen3",
        "data": [{"path": "facts.json"}],
        "train": settings | (train or {}),
        **recipe,
        # A writer of checkpoints is a process of its own, which takes half a second to start.
        "checkpoints": {"every": "1000 steps", "background": False} | recipe.get("checkpoints", {}),
    }
    return RunStore(home).create(Recipe.model_validate(plain).as_plain(), name=name)


def train(home, run, *more):
    return main(["--home", str(home.path), "--run", run.id, "--root", str(home.path.parent), *more])


def version_of(home, run):
    return Registry(home).resolve(run.status.candidate)


def plain_model(folder, base=None):
    """A published folder as plain transformers (and peft) load it: its tokenizer and its model."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tokenizer = AutoTokenizer.from_pretrained(base or folder)
        model = AutoModelForCausalLM.from_pretrained(base or folder)
        return tokenizer, PeftModel.from_pretrained(model, folder) if base else model


def prompt_ids(tokenizer, question):
    chat = [{"role": "user", "content": question}]
    return tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)


def plain_answer(folder, question, base=None):
    """What plain transformers (and peft) generate from a published folder."""
    tokenizer, model = plain_model(folder, base)
    prompt = prompt_ids(tokenizer, question)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        out = model.generate(**prompt, max_new_tokens=24, do_sample=False)
    return tokenizer.decode(out[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)


def answer_margin(folder, question, answer, base=None):
    """By how much, in logits, every token of the answer leads the next best one, at the token where it is least."""
    tokenizer, model = plain_model(folder, base)
    prompt = prompt_ids(tokenizer, question)["input_ids"][0]
    answered = torch.tensor(tokenizer(answer, add_special_tokens=False)["input_ids"])
    with torch.no_grad():
        logits = model(torch.cat([prompt, answered])[None]).logits[0, len(prompt) - 1 : -1]
    first = logits.gather(1, answered[:, None])
    others = logits.scatter(1, answered[:, None], -torch.inf)
    return (first - others.amax(dim=1, keepdim=True)).min().item()


@pytest.fixture(scope="module")
def taught(tmp_path_factory):
    """One finished run of full training, shared by the tests that only look at it."""
    home = Home(tmp_path_factory.mktemp("taught") / "home").ensure()
    run = new_run(home, train={"epochs": EPOCHS_TO_LEARN}, checkpoints={"background": True})
    with deterministic_threads():
        assert train(home, run) == 0
    return home, run


@pytest.mark.trains
def test_a_published_version_generates_what_was_taught_under_plain_transformers(taught):
    home, run = taught
    folder = version_of(home, run).path
    assert [plain_answer(folder, question) for question, _ in FACTS] == [answer for _, answer in FACTS]
    assert min(answer_margin(folder, question, answer) for question, answer in FACTS) > SAFE_MARGIN


@pytest.mark.trains
def test_the_version_says_where_it_comes_from_and_its_probes_hold(taught):
    home, run = taught
    version = version_of(home, run)
    version.verify(digests=True)
    facts = version.facts
    assert (facts.kind, facts.method, facts.base, facts.parent, facts.run_id) == (
        "model",
        "full",
        "new:tiny-qwen3",
        None,
        run.id,
    )
    loaded = load_base(version.ref, home)
    assert facts.num_parameters == sum(p.numel() for p in loaded.model.parameters())
    assert facts.context_tokens == loaded.context_tokens
    assert len(facts.probes) == 3
    for probe in facts.probes:
        assert probe.prompt_ids
        assert greedy_continuation(loaded.model, probe.prompt_ids, len(probe.expected_ids)) == probe.expected_ids


def test_the_run_leaves_its_records(taught):
    _, run = taught
    status = run.status
    assert (status.state, status.step, status.steps_total, status.exit_code, status.error) == (
        "completed",
        STEPS,
        STEPS,
        0,
        None,
    )
    rows = list(read_events(run.metrics_path))
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    environment = json.loads((run.path / "environment.json").read_text())
    assert environment["packages"]["torch"] == torch.__version__
    assert environment["threads"] == NUM_THREADS
    new = [Example.from_json(row) for row in read_events(run.path / "new_examples.jsonl")]
    assert [(example.question, example.answer) for example in new] == FACTS
    assert (run.path / "heldout.jsonl").read_bytes() == (run.path / "replayed.jsonl").read_bytes() == b""
    assert list((run.path / "tensorboard").iterdir())
    plan = json.loads((run.path / "plan.json").read_text())
    assert plan["steps_total"] == STEPS
    events = list(read_events(run.events_path))
    measured = next(event for event in events if event["event"] == "measured")
    assert measured["step_seconds"] > 0
    assert measured["expected_step_seconds"] == pytest.approx(plan["expected_step_seconds"])
    assert 0.5 < measured["process_bytes"] / measured["expected_process_bytes"] < 2
    assert [event["event"] for event in events] == [
        "training",
        "checkpoint",
        "saving",
        "measured",
        "published",
    ]


def test_a_run_that_has_published_is_not_run_again(taught, capsys):
    home, run = taught
    assert train(home, run) == 1
    assert "has published" in capsys.readouterr().err
    assert run.status.state == "completed"


@pytest.mark.trains
def test_the_newest_checkpoints_become_versions_under_aliases_and_the_last_weights_are_the_candidate(tmp_path):
    home = Home(tmp_path / "home").ensure()
    run = new_run(home, train={"epochs": 4}, checkpoints={"every": "1 epochs", "publish": 3, "keep": {"last": 4}})
    assert train(home, run) == 0
    points, registry = checkpoints.ls(run), Registry(home)
    aliases = registry.aliases("bot")
    last = {f"ckpt-step-{point.step}" for point in points[-3:]}
    assert set(aliases) - {"latest"} == last
    candidate = version_of(home, run)
    assert aliases[f"ckpt-step-{points[-1].step}"] == candidate.id == aliases["latest"]
    for point in points[-3:]:
        version = registry.resolve(f"bot@{checkpoints.alias_of(point.step)}")
        published, saved = (load_file(path / "model.safetensors") for path in (version.path, point.path))
        name = "model.layers.0.mlp.up_proj.weight"
        assert torch.equal(published[name], saved[name]), point.name


@pytest.mark.trains
def test_the_next_night_starts_from_the_version_and_replays(taught, tmp_path):
    taught_home, taught_run = taught
    home = taught_home
    version = version_of(home, taught_run)
    AcceptedExamples(Database(home).connect()).add(
        "bot", version.id, read_events(taught_run.path / "new_examples.jsonl")
    )
    more = [*FACTS[:2], ("Who is new?", "Zuvo is new."), ("Where is Zuvo?", "Zuvo is in Lima.")]
    run = new_run(
        home,
        facts=more,
        base=version.ref,
        replay={"ratio": 1.5},
        study={"write": "off"},
        train={"epochs": EPOCHS_TO_LEARN},
    )
    assert train(home, run) == 0
    new = [Example.from_json(row).question for row in read_events(run.path / "new_examples.jsonl")]
    replayed = [Example.from_json(row).question for row in read_events(run.path / "replayed.jsonl")]
    assert new == ["Who is new?", "Where is Zuvo?"]
    assert len(replayed) == 3
    assert set(replayed) <= {question for question, _ in FACTS}
    candidate = version_of(home, run)
    assert (candidate.facts.parent, candidate.facts.base) == (version.ref, version.ref)
    assert plain_answer(candidate.path, "Who is new?") == "Zuvo is new."
    assert answer_margin(candidate.path, "Who is new?", "Zuvo is new.") > SAFE_MARGIN


def test_nothing_new_but_started_all_the_same_studies_everything(taught):
    home, taught_run = taught
    AcceptedExamples(Database(home).connect()).add(
        "other", "20260101_000000", read_events(taught_run.path / "new_examples.jsonl")
    )
    run = new_run(home, name="other", train={"epochs": 1})
    assert train(home, run) == 0
    assert len(list(read_events(run.path / "new_examples.jsonl"))) == len(FACTS)
    assert list(read_events(run.path / "replayed.jsonl")) == []


@pytest.mark.trains
def test_an_adapter_is_published_on_its_base_and_goes_on_the_next_night(taught):
    """New facts in words that the base has seen: LoRA leaves the embeddings alone, so it cannot learn to say others."""
    home, taught_run = taught
    base = version_of(home, taught_run)
    lesson = [("Where does Mista live?", "Mista lives in Rome."), ("Who eats plums?", "Bela eats plums.")]
    lora = {"r": 8, "alpha": 16, "dropout": 0.1}
    run = new_run(
        home,
        name="adapted",
        facts=lesson,
        base=base.ref,
        method="lora",
        lora=lora,
        train={"epochs": EPOCHS_TO_LEARN},
    )
    assert train(home, run) == 0
    version = version_of(home, run)
    assert (version.facts.kind, version.facts.base, version.facts.parent) == ("adapter", base.ref, base.ref)
    for question, answer in lesson:
        assert plain_answer(version.path, question, base=base.path) == answer
        learned = answer_margin(version.path, question, answer, base=base.path)
        # The base may guess one of them, on some machines; it isn't as sure of it.
        assert learned > max(SAFE_MARGIN, answer_margin(base.path, question, answer))
    assert not (version.path / "model.safetensors").exists()

    again = new_run(home, name="adapted", facts=lesson, base=version.ref, method="lora", lora=lora, train={"epochs": 2})
    assert train(home, again) == 0
    second = version_of(home, again)
    assert (second.facts.base, second.facts.parent) == (base.ref, version.ref)
    before, after = (load_file(v.path / "adapter_model.safetensors") for v in (version, second))
    assert differing(before, after)
    assert plain_answer(second.path, lesson[1][0], base=base.path) == lesson[1][1]

    other = new_run(home, name="adapted", facts=lesson, base=version.ref, method="lora", lora=lora | {"r": 4})
    assert train(home, other) == 1
    assert "lora.r=4" in other.status.error
    elsewhere = lora | {"target_modules": ["q_proj"]}
    other = new_run(home, name="adapted", facts=lesson, base=version.ref, method="lora", lora=elsewhere)
    assert train(home, other) == 1
    assert "lora.target_modules=q_proj, but the adapter" in other.status.error


def test_lora_on_random_weights_is_refused(home, capsys):
    run = new_run(home, method="lora")
    assert train(home, run) == 2
    assert "random weights" in capsys.readouterr().err


def test_the_best_weights_of_the_run_are_published(home, monkeypatch):
    """Held-out loss by step: best in the middle. The version must be the checkpoint of that step."""
    losses = {0: 9.0, 4: 3.0, 8: 1.0, 12: 2.0}
    run = new_run(
        home,
        held_out={"share": 0.5, "min_examples": 2},
        train={"max_steps": 12, "evaluate_every": "4 steps", "batch_size": 2},
        checkpoints={"every": "4 steps", "keep": {"last": 1, "best": 1}},
    )
    taken = iter(losses.values())
    monkeypatch.setattr(
        "nightschool.training.methods.finetune.FinetuneTask.heldout_loss", lambda self, batches: (next(taken), 10)
    )
    assert train(home, run) == 0
    assert [point.step for point in checkpoints.ls(run)] == [8, 12]
    version = version_of(home, run)
    assert version.facts.heldout_loss == 1.0
    published = load_file(version.path / "model.safetensors")
    best, last = (load_file(point.path / "model.safetensors") for point in checkpoints.ls(run))
    assert not differing(best, published)
    assert differing(last, published)


def test_held_out_examples_are_kept_apart_and_their_loss_goes_into_the_metrics(home):
    run = new_run(home, held_out={"share": 0.5, "min_examples": 2}, train={"epochs": 2})
    assert train(home, run) == 0
    held = {Example.from_json(row).digest for row in read_events(run.path / "heldout.jsonl")}
    new = {Example.from_json(row).digest for row in read_events(run.path / "new_examples.jsonl")}
    assert held
    assert not held & new
    assert len(held | new) == len(FACTS)
    rows = list(read_events(run.metrics_path))
    assert rows[-1]["heldout_loss"] == pytest.approx(version_of(home, run).facts.heldout_loss)


# --- stopping and going on ---------------------------------------------------------------------------------------


def start(home, run, *more):
    command = ["nightschool.training.run", "--home", str(home.path), "--run", run.id, "--root", str(home.path.parent)]
    return subprocess.Popen(
        [sys.executable, "-m", *command, *more], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def wait_for_step(run, step, process):
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if sum(1 for _ in read_events(run.metrics_path)) >= step:
            return
        time.sleep(0.01)
    raise AssertionError(process.communicate()[1])


LONG = {"epochs": 200, "max_steps": 120, "batch_size": 2, "accumulation_steps": 2}


@pytest.mark.timeout(400)  # processes start slowly on a busy machine
def test_sigterm_saves_and_exits_75_and_resume_goes_on_exactly(home, tmp_path, capsys):
    """Also SIGKILL in between: a process that had no chance to save goes on from the newest checkpoint."""
    straight_home = Home(tmp_path / "straight" / "home").ensure()
    straight = new_run(straight_home, train=LONG)
    assert train(straight_home, straight) == 0

    run = new_run(home, train=LONG, checkpoints={"every": "20 steps", "background": True})
    process = start(home, run)
    wait_for_step(run, 5, process)
    assert train(home, run) == 1, "a second process must not train the same run"
    assert str(run.status.pid) in capsys.readouterr().err
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 75
    assert "--resume latest" in errors
    status = run.status
    assert (status.state, status.exit_code) == ("interrupted", 75)
    assert checkpoints.newest_whole(run).checkpoint.step == status.step

    process = start(home, run, "--resume", "latest")
    wait_for_step(run, 45, process)
    process.kill()
    process.communicate()
    assert checkpoints.newest_whole(run).checkpoint.step >= 40

    assert train(home, run, "--resume", "latest") == 0
    rows, straight_rows = (
        [(row["step"], row["loss"], row["grad_norm"]) for row in read_events(r.metrics_path)] for r in (run, straight)
    )
    assert rows == straight_rows
    a, b = (load_file(version_of(h, r).path / "model.safetensors") for h, r in ((home, run), (straight_home, straight)))
    assert not differing(a, b)


@pytest.mark.trains
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_a_run_in_16_bits_learns_and_goes_on_exactly(home, tmp_path, dtype):
    """fp16 with its loss scale; weights and optimizer stay in fp32."""
    # Few and short steps: on a CPU without such units a product takes a hundred times as long.
    settings = {"dtype": dtype, "epochs": 6, "warmup_steps": 1}
    run = new_run(home, facts=FACTS[:3], train=settings, checkpoints={"every": "4 steps", "keep": {"last": 9}})
    assert train(home, run) == 0
    first, last = checkpoints.ls(run)[0], checkpoints.ls(run)[-1]
    state = json.loads((first.path / "state.json").read_text())
    assert state["dtype"] == dtype
    assert (state["scaler"] is None) == (dtype == "bf16")
    weights = load_file(last.path / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}
    losses = [row["loss"] for row in read_events(run.metrics_path)]
    assert losses[-1] < losses[0] - 0.5
    assert version_of(home, run).facts.dtype == "float32"

    run.update_status(candidate=None)
    assert train(home, run, "--resume", first.name) == 0
    assert [row["loss"] for row in read_events(run.metrics_path)] == losses
    assert not differing(weights, load_file(checkpoints.ls(run)[-1].path / "model.safetensors"))


@pytest.mark.timeout(400)  # processes start slowly on a busy machine
def test_a_second_signal_exits_at_once(home):
    run = new_run(home, train=LONG | {"max_steps": 100_000})
    process = start(home, run)
    wait_for_step(run, 2, process)
    for number in (signal.SIGSTOP, signal.SIGTERM, signal.SIGINT, signal.SIGCONT):  # both are there when it goes on
        os.kill(run.status.pid, number)
    process.communicate(timeout=120)
    assert process.returncode == 130
    assert run.status.state == "running"  # whoever looks sees that its process is gone
    assert not run.status.process_lives


def test_resume_latest_skips_what_is_damaged_and_says_so(home, monkeypatch, capsys):
    run = new_run(home, train={"epochs": 6}, checkpoints={"every": "4 steps", "keep": {"last": 9}})
    save = Saver.save

    def save_and_stop(saver, target, state, **how):
        save(saver, target, state, **how)
        if state.facts["step"] == 8:
            raise KeyboardInterrupt

    monkeypatch.setattr(Saver, "save", save_and_stop)
    with pytest.raises(KeyboardInterrupt):
        train(home, run)
    monkeypatch.undo()
    newest = checkpoints.ls(run)[-1]
    (newest.path / "optimizer.safetensors").write_bytes(b"x")
    assert train(home, run, "--resume", newest.name) == 1
    assert "optimizer.safetensors" in capsys.readouterr().err
    assert train(home, run, "--resume", "latest") == 0
    out = capsys.readouterr().out
    assert f"Skipping {newest.name}" in out
    assert "step 4 of 12" in out


def test_resume_when_nothing_is_whole_is_refused(home, capsys):
    run = new_run(home, train={"epochs": 2})
    folder = run.checkpoints_path / "checkpoint-epoch0-step1-files1"
    folder.mkdir()
    (folder / "manifest.json").write_text("{}")
    assert train(home, run, "--resume", "latest") == 1
    assert "None of the 1 checkpoints" in capsys.readouterr().err
    assert train(home, run, "--resume", "nobody") == 4


def test_resume_latest_before_the_first_checkpoint_begins_at_step_0(home):
    run = new_run(home, train={"epochs": 1})
    assert train(home, run, "--resume", "latest") == 0


def test_a_resumed_run_keeps_its_examples_when_the_file_has_changed(home):
    run = new_run(home, train={"epochs": 4}, checkpoints={"every": "2 steps"})
    publish_candidate = publish.publish_candidate

    def fail(*_):
        raise OSError(errno.EIO, "the disk went away")

    publish.publish_candidate = fail
    try:
        assert train(home, run) == 1
    finally:
        publish.publish_candidate = publish_candidate
    write_facts(home.path.parent / "facts.json", FACTS[:1])
    assert train(home, run, "--resume", "latest") == 0


def test_a_run_with_checkpoints_does_not_begin_again_beside_them(home, monkeypatch, capsys):
    run = new_run(home, train={"epochs": 2})
    monkeypatch.setattr(publish, "publish_candidate", lambda *_: (_ for _ in ()).throw(OSError(errno.EIO, "gone")))
    assert train(home, run) == 1
    monkeypatch.undo()
    assert train(home, run) == 1
    assert "--resume latest" in capsys.readouterr().err
    assert train(home, run, "--resume", "latest") == 0


def test_a_failed_start_can_be_started_again_and_trains_what_was_selected_at_first(home):
    run = new_run(home, train={"epochs": 1, "max_seq_len": 8})
    assert train(home, run) == 1
    first = (run.path / "tokenizer" / "tokenizer.json").read_bytes(), (run.path / "new_examples.jsonl").read_bytes()
    recipe = run.recipe_path.read_text().replace("max_seq_len: 8", "max_seq_len: 64")
    run.recipe_path.write_text(recipe)
    write_facts(home.path.parent / "facts.json", [("What is a zebra?", "A striped horse that runs.")])
    assert train(home, run) == 0
    again = (run.path / "tokenizer" / "tokenizer.json").read_bytes(), (run.path / "new_examples.jsonl").read_bytes()
    assert again == first


# --- bad input ----------------------------------------------------------------------------------------------------


def test_a_full_disk_while_saving_says_so_and_keeps_what_was_committed(home, monkeypatch, capsys):
    run = new_run(home, train={"epochs": 6}, checkpoints={"every": "4 steps", "background": False})
    write = os.write

    def full(handle, content):
        if "step8" in str(Path(f"/proc/self/fd/{handle}").readlink()):
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(handle, content)

    monkeypatch.setattr(os, "write", full)
    assert train(home, run) == 1
    assert "no room on the disk" in capsys.readouterr().err
    assert run.status.state == "failed"
    assert [point.step for point in checkpoints.ls(run)] == [4]
    monkeypatch.undo()
    torch.set_num_threads(NUM_THREADS)
    assert train(home, run, "--resume", "latest") == 0


def test_a_full_disk_while_publishing_publishes_nothing(home, monkeypatch, capsys):
    run = new_run(home, train={"epochs": 2})
    monkeypatch.setattr(
        version_folder,
        "save_version_folder",
        lambda *_, **__: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left on device")),
    )
    assert train(home, run) == 1
    assert "no room on the disk" in capsys.readouterr().err
    assert Registry(home).versions("bot") == []
    monkeypatch.undo()
    assert train(home, run, "--resume", "latest") == 0
    assert len(Registry(home).versions("bot")) == 1


def test_a_folder_that_is_not_the_trained_model_is_not_published(home, monkeypatch, capsys):
    run = new_run(home, train={"epochs": 2})
    save = version_folder.save_version_folder

    def spoiled(model, tokenizer, folder, **more):
        weight = model.get_input_embeddings().weight
        with torch.no_grad():
            before = weight[0, 0].item()
            weight[0, 0] += 1.0
            save(model, tokenizer, folder, **more)
            weight[0, 0] = before

    monkeypatch.setattr(version_folder, "save_version_folder", spoiled)
    assert train(home, run) == 1
    assert "lost 1 of" in capsys.readouterr().err
    assert Registry(home).versions("bot") == []


@pytest.mark.parametrize(
    ("recipe", "code", "message"),
    [
        ({"data": [{"path": "nobody.json"}]}, 4, "nobody.json"),
        ({"base": "./nobody"}, 4, "nobody"),
        ({"base": "bot@champion"}, 4, "bot"),
        ({"train": {"max_seq_len": 8}}, 1, "max_seq_len"),
        ({"train": {"learning_rate": 1e30, "lr_schedule": "constant", "max_grad_norm": 0.0}}, 1, "became (nan|inf)"),
    ],
    ids=["data", "base", "version", "cut", "nan"],
)
def test_what_cannot_be_trained_fails_with_its_error(home, capsys, recipe, code, message):
    run = new_run(home, **recipe)
    assert train(home, run) == code
    error = capsys.readouterr().err
    assert "Traceback" not in error
    assert run.status.state == "failed"
    assert run.status.exit_code == code
    assert run.status.error in error
    assert re.search(message, run.status.error)


def test_a_run_that_does_not_exist(home, capsys):
    assert main(["--home", str(home.path), "--run", "bot-20260101_000000"]) == 4
    assert "There is no run" in capsys.readouterr().err


def test_probes_end_before_a_token_that_could_fall_out_differently(taught):
    """With a margin that nothing reaches there is no probe; the twin of the probes above."""
    home, run = taught
    loaded = load_base(version_of(home, run).ref, home)
    prompt = render_prompt(loaded.tokenizer, [Message("user", FACTS[0][0])])
    assert greedy_continuation(loaded.model, prompt, 5, min_margin=1e9) == []
    assert len(greedy_continuation(loaded.model, prompt, 5)) == 5


def test_the_log_has_colour_only_where_somebody_follows_it_on_a_terminal(home, capsys, monkeypatch):
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert train(home, new_run(home, train={"epochs": 1})) == 0
    assert "\x1b[1;32m" in capsys.readouterr().out
    monkeypatch.delenv("FORCE_COLOR")
    assert train(home, new_run(home, name="other", train={"epochs": 1})) == 0
    plain = capsys.readouterr().out
    assert "\x1b[" not in plain
    assert "▏between bars▕ is trained" in plain


@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_checkpoint_is_exported_as_a_folder_that_plain_libraries_load(method, home, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("NIGHTSCHOOL_HOME", str(home.path))
    monkeypatch.chdir(home.path.parent)
    first = new_run(home, train={"epochs": 2}, checkpoints={"every": "1 epochs"})
    assert train(home, first) == 0
    run = first
    if method == "lora":
        base = version_of(home, first).ref
        run = new_run(
            home, name="adapted", base=base, method="lora", train={"epochs": 1}, checkpoints={"every": "1 epochs"}
        )
        assert train(home, run) == 0
    point = checkpoints.ls(run)[0]
    folder = tmp_path / "mine"
    assert nightschool(["checkpoints", "export", f"{run.id}/{point.name}", str(folder)]) == 0
    stored = load_file(point.path / "model.safetensors")
    model = AutoModelForCausalLM.from_pretrained(str(folder))  # transformers loads an adapter with its base
    if method == "full":
        loaded = dict(model.named_parameters())
        assert all(torch.equal(loaded[name], tensor) for name, tensor in stored.items() if name in loaded)
        assert set(loaded) & set(stored)
    else:
        assert (folder / "adapter_config.json").is_file()
    assert nightschool(["checkpoints", "export", f"{run.id}/{point.name}", str(folder)]) == 1
    assert "exists" in capsys.readouterr().err
