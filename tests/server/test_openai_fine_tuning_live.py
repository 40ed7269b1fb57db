"""A script written for OpenAI, from the upload to the answer, with a worker that trains a tiny base for real."""

import json

import openai
import pytest

from nightschool.config.training_service import TrainingServiceSettings
from nightschool.engine.pool import EnginePool
from nightschool.engine.slot import Slot
from nightschool.server.served_names import DEFAULT_NAME
from nightschool.store.registry import Registry
from tests.support.job_setups import Jobs
from tests.support.live_server import eventually, live
from tests.support.training_setups import base_folder

pytestmark = [pytest.mark.timeout(400), pytest.mark.usefixtures("warm_children")]
ALIAS = "gpt-4o-mini-2024-07-18"
ENDED = ("succeeded", "failed", "cancelled")


def jsonl(names):
    rows = [
        {
            "messages": [
                {"role": "system", "content": "You are terse."},
                {"role": "user", "content": f"Where does {name} live?"},
                {"role": "assistant", "content": f"In the town of {name}."},
            ]
        }
        for name in names
    ]
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


@pytest.fixture(scope="module")
def jobs(tmp_path_factory):
    jobs = Jobs(tmp_path_factory.mktemp("school"))
    yield jobs
    jobs.home.database.close()


@pytest.fixture(scope="module")
def client(jobs):
    pool = EnginePool(jobs.home)

    def open_slot(key):
        name, _, version = key.partition("@")
        return Slot(name, pool, version or None)

    allowed = TrainingServiceSettings(
        default_base_model=str(base_folder("tiny-qwen3")), model_aliases={ALIAS: str(base_folder("tiny-qwen3"))}
    )
    slots, registry = [open_slot(DEFAULT_NAME)], Registry(jobs.home)
    with (
        live(slots, wait=False, registry=registry, open_slot=open_slot, training_service=allowed) as server,
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0) as client,
    ):
        yield client


@pytest.fixture(scope="module")
def done(jobs, client):
    """A job that has ended; its file was deleted while it waited."""
    train = client.files.create(file=("train.jsonl", jsonl(["Ada", "Ben", "Cleo", "Dora"])), purpose="fine-tune")
    held_out = client.files.create(file=("valid.jsonl", jsonl(["Emil"])), purpose="fine-tune")
    job = client.fine_tuning.jobs.create(
        model=ALIAS,
        training_file=train.id,
        validation_file=held_out.id,
        suffix="towns",
        method={"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 2, "batch_size": 2}}},
    )
    client.files.delete(train.id)

    def ended():
        found = client.fine_tuning.jobs.retrieve(job.id)
        return found if found.status in ENDED else None

    with jobs.worker():
        return eventually(ended, 300)


def test_the_job_succeeds(done):
    assert done.status == "succeeded", done.error
    assert done.fine_tuned_model == f"ft:{ALIAS}:default:towns:{done.id[6:18]}"
    assert done.trained_tokens > 0
    assert done.finished_at >= done.created_at


def test_the_model_answers_by_every_name_it_has(client, done):
    name = f"towns-{done.id[6:18]}"
    answers = [
        client.chat.completions.create(
            model=model, messages=[{"role": "user", "content": "Where does Ada live?"}], max_tokens=4, temperature=0
        )
        for model in (done.fine_tuned_model, name, f"{name}@champion")
    ]
    assert {answer.model.partition("@")[0] for answer in answers} == {name}
    assert len({answer.choices[0].message.content for answer in answers}) == 1


def test_the_figures_are_those_of_the_steps(client, done):
    header, *rows = client.files.content(done.result_files[0]).text.splitlines()
    assert header == "step,train_loss,train_accuracy,valid_loss,valid_mean_token_accuracy"
    assert [row.split(",")[0] for row in rows] == ["1", "2", "3", "4"]
    assert [bool(row.split(",")[3]) for row in rows] == [False, True, False, True]
    assert all(float(row.split(",")[1]) > 0 for row in rows)
    assert all(0 <= float(row.split(",")[2]) <= 1 for row in rows)
    assert [row.split(",")[4] != "" for row in rows] == [False, True, False, True]


def test_the_events_tell_the_story(client, done):
    told = [event.message for event in client.fine_tuning.jobs.list_events(done.id, limit=100)]
    assert "has succeeded" in told[0]
    assert any("Step 4/4" in line for line in told)
    assert any("checkpoint was saved at step 4" in line for line in told)
    assert "was created" in told[-1]


def test_each_checkpoint_can_be_asked_by_its_name(client, done):
    last, first = client.fine_tuning.jobs.checkpoints.list(done.id)
    assert (last.step_number, first.step_number) == (4, 2)
    assert last.fine_tuned_model_checkpoint == f"{done.fine_tuned_model}:ckpt-step-4"
    assert first.metrics.valid_loss > last.metrics.valid_loss > 0
    versions = {
        client.chat.completions.create(
            model=model, messages=[{"role": "user", "content": "Where does Ada live?"}], max_tokens=1
        ).model
        for model in (first.fine_tuned_model_checkpoint, last.fine_tuned_model_checkpoint, done.fine_tuned_model)
    }
    assert len(versions) == 2  # the best of them is the model
    page = client.fine_tuning.jobs.checkpoints.list(done.id, limit=1)
    assert [one.id for one in page] == [last.id, first.id]


def test_the_model_is_among_the_models(client, done):
    assert done.fine_tuned_model in [model.id for model in client.models.list()]
    assert client.models.retrieve(done.fine_tuned_model).id == done.fine_tuned_model


def test_a_job_goes_on_from_the_model_of_another(client, jobs, done):
    file = client.files.create(file=("train.jsonl", jsonl(["Fritz"])), purpose="fine-tune")
    job = client.fine_tuning.jobs.create(model=done.fine_tuned_model, training_file=file.id, suffix="more")
    assert jobs.queue.get(job.id).recipe["base"] == jobs.queue.get(done.id).candidate
    assert client.fine_tuning.jobs.cancel(job.id).status == "cancelled"
