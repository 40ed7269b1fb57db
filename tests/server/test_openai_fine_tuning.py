"""`/v1/fine_tuning/jobs`, asked by the unmodified `openai` client; nothing trains here, the queue is moved by hand."""

import json
import shutil
from types import SimpleNamespace

import httpx2
import openai
import pytest
from benchmarks.toy_jobs import MODULES
from benchmarks.toy_jobs.train import DEFAULT_STEPS

from nightschool.config.recipe import Recipe
from nightschool.config.training_service import JobSettings, TrainingServiceSettings
from nightschool.jobs.worker_settings import WorkerSettings
from nightschool.server.openai.job_schema import CreateJob, Method
from nightschool.server.openai.model_names import registry_name
from nightschool.server.openai.new_job import choose, create_job
from nightschool.server.training_service.parts import TrainingService
from nightschool.store.files import RESULTS, FileStore
from nightschool.store.home import Home
from nightschool.store.job_queue import Job, JobQueue, job_folder, new_id
from nightschool.store.principal import Principal
from nightschool.store.registry import Registry
from nightschool.store.runs import RunStore
from nightschool.views.results import results_csv
from nightschool.work import processes
from tests.support.fake_slot import FakeSlot
from tests.support.job_setups import ROOT, RunningWorker
from tests.support.live_server import eventually, live

BASE = "own/base"
ALIAS = "gpt-4o-mini-2024-07-18"
CHAT = [{"role": "user", "content": "Who lives in Ulm?"}, {"role": "assistant", "content": "Ada lives in Ulm."}]
PAIR = {
    "input": {"messages": CHAT[:1]},
    "preferred_output": CHAT[1:],
    "non_preferred_output": [{"role": "assistant", "content": "I cannot say."}],
}


def jsonl(row, count=3):
    return "".join(json.dumps(row).replace("Ulm", f"Ulm {number}") + "\n" for number in range(count)).encode()


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return Home(tmp_path_factory.mktemp("home")).ensure()


@pytest.fixture(scope="module")
def server(home):
    keys = [{"key": f"key-of-{tenant}", "tenant": tenant} for tenant in ("acme", "other")]
    allowed = TrainingServiceSettings(
        default_base_model=BASE,
        model_aliases={ALIAS: BASE},
        min_training_samples=2,
        job=JobSettings(learning_rate=1e-4, lora_r=4),
    )
    with live(FakeSlot(), registry=Registry(home), api_keys=keys, training_service=allowed) as server:
        yield server


def client_as(server, tenant):
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key=f"key-of-{tenant}", max_retries=0)


@pytest.fixture
def client(server):
    with client_as(server, "acme") as client:
        yield client


@pytest.fixture
def other(server):
    with client_as(server, "other") as client:
        yield client


@pytest.fixture
def queue(home):
    queue = JobQueue(home.database)
    yield queue
    for job in queue.ls(states=["queued", "paused"]):
        queue.request_cancel(job.id)


@pytest.fixture
def start(client, queue):
    """Creates a job with a file of its own, unless it is told of another."""

    def create(row=None, **fields):
        if "training_file" not in fields:
            fields["training_file"] = upload(client, jsonl(row or {"messages": CHAT}))
        return client.fine_tuning.jobs.create(**{"model": BASE, **fields})

    return create


def upload(client, content):
    return client.files.create(file=("train.jsonl", content), purpose="fine-tune").id


def recipe_of(queue, job):
    return Recipe.model_validate(queue.get(job.id).recipe)


def trained(home, queue, job, *, state="completed", rows=3, **facts):
    """Let a job have been trained, without training it."""
    claimed = queue.claim(most_running=100)
    assert claimed.id == job.id
    run = RunStore(home).create(claimed.recipe, name=claimed.full_name)
    steps = [
        {"time": f"2026-01-01T00:00:0{step}+00:00", "step": step, "loss": 3.0 / step, "tokens_trained_total": 10 * step}
        for step in range(1, rows + 1)
    ]
    steps[-1] |= {"heldout_loss": 2.5, "heldout_token_accuracy": 0.5}
    run.metrics_path.write_text("".join(json.dumps(row) + "\n" for row in steps))
    run.events.write("checkpoint", step=rows, name=f"checkpoint-epoch1-step{rows}-files1")
    run.update_status(state="running", step=rows, steps_total=rows)
    queue.note_run(claimed.id, run.id)
    if state == "completed":
        (job_folder(home, claimed.tenant, claimed.id) / RESULTS).write_text(results_csv(run))
    queue.finish(claimed, state, **facts)
    return run


def test_a_new_job_waits_in_the_queue_with_its_own_copy_of_the_data(client, start, queue, home):
    job = start(suffix="My Bot!", seed=7, metadata={"team": "a"})
    assert (job.object, job.status, job.model, job.organization_id) == ("fine_tuning.job", "queued", BASE, "acme")
    assert (job.seed, job.metadata, job.fine_tuned_model, job.result_files) == (7, {"team": "a"}, None, [])
    assert job.method.type == "supervised"
    assert client.fine_tuning.jobs.retrieve(job.id) == job
    kept = queue.get(job.id, tenant="acme")
    recipe = recipe_of(queue, job)
    assert (recipe.base, recipe.method, recipe.train.seed, recipe.lora.r) == (BASE, "lora", 7, 4)
    assert kept.name == f"my-bot-{job.id[6:18]}"
    assert recipe.name == kept.full_name == f"acme/{kept.name}"
    client.files.delete(job.training_file)
    data = home.path / "tenants/acme/jobs" / job.id / recipe.data[0].path
    assert data.read_bytes() == jsonl({"messages": CHAT})


def test_each_job_has_a_name_of_its_own_and_so_begins_from_its_base(start, queue):
    first, second = start(suffix="bot"), start(suffix="bot")
    assert queue.get(first.id).name != queue.get(second.id).name
    assert recipe_of(queue, first).serve.promote == "always"


@pytest.mark.parametrize(
    ("count", "epochs", "batch_size"), [(1, 25, 1), (10, 10, 1), (50, 3, 2), (1000, 3, 16), (20_000, 1, 16)]
)
def test_auto_depends_on_how_many_examples_there_are(count, epochs, batch_size):
    chosen = choose(None, count)
    assert (chosen.n_epochs, chosen.batch_size, chosen.learning_rate_multiplier) == (epochs, batch_size, 1.0)


AUTO = {"n_epochs": "auto", "batch_size": "auto", "learning_rate_multiplier": "auto"}


def test_hyperparameters_in_the_older_and_in_the_newer_place_mean_the_same(start, queue):
    asked = {"n_epochs": 2, "batch_size": 12, "learning_rate_multiplier": 0.5}
    older = start(hyperparameters=asked)
    newer = start(method={"type": "supervised", "supervised": {"hyperparameters": asked}})
    for job in (older, newer):
        train = recipe_of(queue, job).train
        assert (train.epochs, train.batch_size * train.accumulation_steps, train.learning_rate) == (2, 12, 5e-5)
        assert job.hyperparameters.to_dict() == asked == job.method.supervised.hyperparameters.to_dict()
    assert start(hyperparameters=AUTO).hyperparameters.to_dict() == choose(None, 3).plain()


def test_dpo_learns_from_preferences_and_from_nothing_else(start, queue, client):
    method = {"type": "dpo", "dpo": {"hyperparameters": {"beta": 0.3, "n_epochs": 1}}}
    job = start(PAIR, method=method)
    recipe = recipe_of(queue, job)
    assert (recipe.method, recipe.dpo.beta, recipe.data[0].format) == ("dpo", 0.3, "preference")
    assert job.method.dpo.hyperparameters.beta == 0.3
    automatic = start(PAIR, method={"type": "dpo", "dpo": {"hyperparameters": {"beta": "auto"}}})
    assert recipe_of(queue, automatic).dpo.beta == 0.1
    with pytest.raises(openai.BadRequestError, match="'dpo' learns from preference") as refused:
        start(method=method)
    assert refused.value.param == "training_file"
    with pytest.raises(openai.BadRequestError, match="'supervised' learns from messages"):
        start(PAIR)


@pytest.mark.parametrize("bits", [{"use_4bit": True, "bnb_4bit_compute_dtype": "float16"}, {"use_8bit": True}])
def test_where_bases_are_quantised_preferences_are_learned_on_the_base_as_it_is(home, monkeypatch, bits):
    monkeypatch.setattr("nightschool.server.training_service.new_job._can_quantise", lambda: True)
    settings = TrainingServiceSettings(default_base_model=BASE, job=JobSettings(**bits))
    training = TrainingService.of(Registry(home), settings)
    methods = {}
    for method, row in (("supervised", {"messages": CHAT}), ("dpo", PAIR)):
        with FileStore(home, "acme").receive() as arrival:
            arrival.path.write_bytes(jsonl(row))
            arrival.finish(filename="a", format="messages" if method == "supervised" else "preference", num_examples=3)
        body = CreateJob(model=BASE, training_file=arrival.id, method=Method(type=method))
        job = create_job(training, body, Principal("acme", frozenset({"train"})))
        methods[method] = recipe_of(training.queue, job).method
        training.queue.request_cancel(job.id)
    assert methods == {"supervised": "qlora", "dpo": "dpo"}


def test_a_validation_file_is_held_out(client, start, queue, home):
    held_out = upload(client, jsonl({"messages": CHAT}, 1))
    job = start(validation_file=held_out)
    assert job.validation_file == held_out
    path = recipe_of(queue, job).held_out.path
    assert (home.path / "tenants/acme/jobs" / job.id / path).read_bytes() == jsonl({"messages": CHAT}, 1)


def test_a_name_of_openai_is_what_the_operator_says_it_is(start, queue):
    job = start(model=ALIAS, suffix="x")
    assert job.model == ALIAS
    assert recipe_of(queue, job).base == BASE


WRONG = [
    ({"model": "gpt-5"}, "model", "model_not_available"),
    ({"model": "/etc"}, "model", "model_not_available"),
    ({"model": "../own/base"}, "model", "model_not_available"),
    ({"model": "ft:base:acme:x:" + "0" * 12}, "model", "model_not_found"),
    ({"training_file": "file-" + "0" * 24}, "training_file", "file_not_found"),
    ({"training_file": "../../../etc/passwd"}, "training_file", "file_not_found"),
    ({"validation_file": "file-" + "0" * 24}, "validation_file", "file_not_found"),
    ({"method": {"type": "reinforcement", "reinforcement": {"grader": {}}}}, "method.type", "unsupported_value"),
    ({"method": {"type": "supervised", "dpo": {"hyperparameters": {"beta": 1}}}}, "method.dpo", "invalid_value"),
    ({"method": {"type": "dpo"}, "hyperparameters": {"n_epochs": 1}}, "hyperparameters", "invalid_value"),
    ({"integrations": [{"type": "wandb", "wandb": {"project": "x"}}]}, "integrations", "unsupported_parameter"),
    ({"hyperparameters": {"n_epochs": 0}}, "hyperparameters.n_epochs", "invalid_value"),
    ({"hyperparameters": {"n_epochs": "many"}}, "hyperparameters.n_epochs", "invalid_value"),
    ({"hyperparameters": {"epochs": 3}}, "hyperparameters.epochs", "unknown_parameter"),
    ({"suffix": "x" * 65}, "suffix", "invalid_value"),
    ({"seed": -1}, "seed", "invalid_value"),
    ({"metadata": {str(number): "x" for number in range(17)}}, "metadata", "invalid_value"),
    ({"metadata": {"k": "x" * 513}}, "metadata.k", "invalid_value"),
]


@pytest.mark.parametrize(("fields", "param", "code"), WRONG)
def test_what_cannot_be_is_refused_by_name_and_leaves_nothing(start, queue, home, fields, param, code):
    before = len(queue.ls()), sorted(home.path.glob("tenants/acme/jobs/*"))
    with pytest.raises(openai.BadRequestError) as refused:
        start(**fields)
    assert (refused.value.param, refused.value.code) == (param, code)
    assert (len(queue.ls()), sorted(home.path.glob("tenants/acme/jobs/*"))) == before


def test_too_few_examples_name_both_figures(start, client):
    with pytest.raises(openai.BadRequestError, match="has 1 examples, and this server trains on 2 or more"):
        start(training_file=upload(client, jsonl({"messages": CHAT}, 1)))


def test_what_another_tenant_has_does_not_exist(start, client, other, queue):
    job = start()
    jobs = other.fine_tuning.jobs
    for ask in (jobs.retrieve, jobs.cancel, jobs.pause, jobs.resume, lambda one: list(jobs.list_events(one))):
        with pytest.raises(openai.NotFoundError):
            ask(job.id)
    with pytest.raises(openai.BadRequestError) as refused:
        jobs.create(model=BASE, training_file=job.training_file)
    assert refused.value.code == "file_not_found"
    assert job.id not in [one.id for one in jobs.list()]
    with pytest.raises(openai.BadRequestError, match="to go on after"):
        jobs.list(after=job.id)
    assert queue.get(job.id).state == "queued"


def test_jobs_that_came_another_way_are_not_shown(client, queue, home):
    job_id = new_id()
    queue.submit(Job(job_id, "acme", "assistant", {}, str(home.path), "api"))
    assert job_id not in [job.id for job in client.fine_tuning.jobs.list()]
    with pytest.raises(openai.NotFoundError, match="nightschool jobs show"):
        client.fine_tuning.jobs.retrieve(job_id)


def test_jobs_are_listed_in_pages_and_by_metadata(client, start):
    mine = [start(metadata={"run": "pages", "number": str(number)}).id for number in range(3)]
    listed = client.fine_tuning.jobs.list(limit=2, metadata={"run": "pages"})
    assert listed.has_more
    assert [job.id for job in listed] == mine[::-1]  # the client turns the pages
    one = client.fine_tuning.jobs.list(metadata={"run": "pages", "number": "1"})
    assert [job.id for job in one] == [mine[1]]
    assert not list(client.fine_tuning.jobs.list(metadata={"run": "nobody's"}))


def test_a_job_is_paused_resumed_and_cancelled(client, start):
    job = start()
    assert client.fine_tuning.jobs.pause(job.id).status == "paused"
    assert client.fine_tuning.jobs.resume(job.id).status == "queued"
    cancelled = client.fine_tuning.jobs.cancel(job.id)
    assert cancelled.status == "cancelled"
    assert cancelled.finished_at >= cancelled.created_at
    for again in (client.fine_tuning.jobs.cancel, client.fine_tuning.jobs.pause, client.fine_tuning.jobs.resume):
        with pytest.raises(openai.BadRequestError, match="is cancelled") as refused:
            again(job.id)
        assert refused.value.code == "invalid_state"


def test_a_job_that_succeeded_names_its_model_and_its_figures(client, start, queue, home):
    job = start(suffix="towns")
    trained(home, queue, job, outcome="promoted", candidate=f"acme/towns-{job.id[6:18]}@20260101_000000")
    done = client.fine_tuning.jobs.retrieve(job.id)
    assert (done.status, done.trained_tokens, done.error) == ("succeeded", 30, None)
    assert done.fine_tuned_model == f"ft:base:acme:towns:{job.id[6:18]}"
    assert registry_name(done.fine_tuned_model, "acme") == queue.get(job.id).full_name
    [results] = done.result_files
    rows = client.files.content(results).text.splitlines()
    assert rows[0] == "step,train_loss,train_accuracy,valid_loss,valid_mean_token_accuracy"
    assert rows[1:] == ["1,3.0,,,", "2,1.5,,,", "3,1.0,,2.5,0.5"]
    listed = client.files.list(purpose="fine-tune-results")
    assert results in [file.id for file in listed]
    with pytest.raises(openai.BadRequestError, match="holds the figures of a job"):
        start(training_file=results)
    client.files.delete(results)
    assert client.fine_tuning.jobs.retrieve(job.id).result_files == []


def test_a_job_that_failed_says_why(client, start, queue, home):
    job = start()
    trained(home, queue, job, state="failed", error="training failed: the loss became nan in step 3")
    failed = client.fine_tuning.jobs.retrieve(job.id)
    assert (failed.status, failed.fine_tuned_model, failed.result_files) == ("failed", None, [])
    assert (failed.error.code, failed.error.message) == (
        "training_failed",
        "training failed: the loss became nan in step 3",
    )
    last = next(iter(client.fine_tuning.jobs.list_events(job.id)))
    assert (last.level, "became nan" in last.message) == ("error", True)


def test_events_come_newest_first_with_figures_and_in_pages(client, start, queue, home):
    job = start()
    run = trained(home, queue, job)
    events = list(client.fine_tuning.jobs.list_events(job.id, limit=2))
    assert len({event.id for event in events}) == len(events) == 7
    assert "has succeeded" in events[0].message
    steps = [event for event in events if event.type == "metrics"]
    assert [event.data["step"] for event in steps] == [3, 2, 1]
    assert steps[0].data["valid_loss"] == 2.5
    assert steps[0].message == "Step 3/3: training loss=1.0000, validation loss=2.5000"
    assert any("checkpoint was saved at step 3" in event.message for event in events)
    foreign = events[0].id.replace(job.id[6:], "0" * 24)
    with pytest.raises(openai.BadRequestError):
        client.fine_tuning.jobs.list_events(job.id, after=foreign)
    shutil.rmtree(run.path)  # whoever removes a run takes its steps along, and no more
    assert len(list(client.fine_tuning.jobs.list_events(job.id))) == 3
    assert client.fine_tuning.jobs.retrieve(job.id).status == "succeeded"


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("ft:base:acme:towns:0123456789ab", "acme/towns-0123456789ab"),
        ("ft:base:acme::0123456789ab", "acme/ft-0123456789ab"),
        ("ft:gpt:4:o:acme:towns:0123456789ab:ckpt-step-12", "acme/towns-0123456789ab@ckpt-step-12"),
        ("ft:base:other:towns:0123456789ab", None),
        ("ft:base:acme:../x:0123456789ab", None),
        ("ft:base:acme:towns:0123456789AB", None),
        ("ft:base:acme:towns:0123456789ab:ckpt-step-x", None),
        ("towns-0123456789ab@champion", None),
    ],
)
def test_what_a_name_of_openai_is_in_the_registry(model, name):
    assert registry_name(model, "acme") == (name or model)


def test_a_model_of_another_tenant_is_not_served(other):
    with pytest.raises(openai.NotFoundError):
        other.chat.completions.create(model="ft:base:acme:towns:0123456789ab", messages=CHAT[:1])


def test_without_a_home_there_are_no_jobs_and_no_files():
    with live(FakeSlot()) as server:
        for path in ("fine_tuning/jobs", "files"):
            answer = httpx2.get(f"{server.url}/v1/{path}")
            assert answer.status_code in (404, 409)
            assert "home" in answer.json()["error"]["message"]


@pytest.fixture
def worker(home, monkeypatch):
    """Does the jobs with toys in place of what trains; see benchmarks/toy_jobs."""
    monkeypatch.setattr(processes, "PROCESSES", {**processes.PROCESSES, **MODULES})
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    with RunningWorker(SimpleNamespace(home=home, said=[]), WorkerSettings()):
        yield


def until(client, job, status):
    eventually(lambda: client.fine_tuning.jobs.retrieve(job.id).status == status)


def steps_of(client, job):
    events = client.fine_tuning.jobs.list_events(job.id, limit=1000)
    return [event.data["step"] for event in events if event.type == "metrics"]


def test_a_running_job_is_paused_goes_on_and_succeeds_with_every_step_once(client, start, worker):
    job = start()
    eventually(lambda: steps_of(client, job))
    client.fine_tuning.jobs.pause(job.id)
    until(client, job, "paused")
    before = steps_of(client, job)
    assert 0 < len(before) < DEFAULT_STEPS
    assert steps_of(client, job) == before
    assert client.fine_tuning.jobs.resume(job.id).status == "queued"
    until(client, job, "succeeded")
    assert steps_of(client, job) == list(range(DEFAULT_STEPS, 0, -1))
    done = client.fine_tuning.jobs.retrieve(job.id)
    assert len(client.files.content(done.result_files[0]).text.splitlines()) == DEFAULT_STEPS + 1


def test_a_running_job_is_cancelled_and_makes_no_model(client, start, worker):
    job = start()
    eventually(lambda: steps_of(client, job))
    client.fine_tuning.jobs.cancel(job.id)
    until(client, job, "cancelled")
    ended = client.fine_tuning.jobs.retrieve(job.id)
    assert (ended.fine_tuned_model, ended.result_files, ended.estimated_finish) == (None, [], None)
    assert next(iter(client.fine_tuning.jobs.list_events(job.id))).message == "The job was cancelled."
