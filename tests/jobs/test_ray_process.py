"""Jobs on a Ray cluster, whose answers are imitated: each job is submitted once, whatever is lost on the way."""

import sys
from types import SimpleNamespace

import pytest

from nightschool.errors import Unreachable, UsageError
from nightschool.jobs import ray_process
from nightschool.jobs.device_budget import PROCESS_BYTES, Need
from nightschool.jobs.ray_cluster import RayCluster, open_cluster
from nightschool.jobs.ray_process import RayExecutor
from nightschool.jobs.worker_settings import WorkerSettings
from nightschool.store.job_files import JobFiles

GB = 1_000_000_000


class Status(str):
    def is_terminal(self):
        return self in ("STOPPED", "SUCCEEDED", "FAILED")


class FakeClient:
    """Answers as `JobSubmissionClient` does. `fails` is raised by the next request, after it was done if `is_done`."""

    def __init__(self):
        self.jobs = {}
        self.asked = {}
        self.stopped = []
        self.fails = None
        self.is_done = False

    def _fail(self):
        error, self.fails = self.fails, None
        if error is not None:
            raise error

    def submit_job(self, *, submission_id, **asked):
        if not self.is_done:
            self._fail()
        if submission_id in self.jobs:
            raise RuntimeError(
                f"Request failed with status code 500: Job with submission_id {submission_id} already exists."
            )
        self.asked[submission_id] = asked
        self.become(submission_id, "PENDING")
        self._fail()

    def become(self, submission, status, message=None, node="http://10.0.0.7:52365"):
        node_id = "765857fe788971857d69"
        self.jobs[submission] = SimpleNamespace(
            status=Status(status), message=message, driver_agent_http_address=node, driver_node_id=node_id
        )

    def get_job_info(self, submission):
        self._fail()
        if submission not in self.jobs:
            raise RuntimeError(f"Request failed with status code 404: Job {submission} does not exist.")
        return self.jobs[submission]

    def stop_job(self, submission):
        self.get_job_info(submission)
        self.stopped.append(submission)
        self.become(submission, "STOPPED")


class Setup:
    def __init__(self, path, nodes):
        self.client = FakeClient()
        self.files = JobFiles(path / "train_1")
        self.files.path.mkdir()
        self.said = []
        self.nodes = nodes
        self.executor = self.worker()

    def worker(self, device_bytes=None):
        """What the next worker has."""
        return RayExecutor(RayCluster(self.client, lambda: self.nodes), device_bytes, 60.0, self.said.append)

    def start(self, need=None):
        return self.executor.start(["python", "-m", "x", "a job's"], self.files, need)

    @property
    def only(self):
        (submission,) = self.client.jobs
        return submission


@pytest.fixture
def setup(tmp_path, monkeypatch):
    monkeypatch.setattr(ray_process, "_LOOK_SECONDS", 0.0)
    return Setup(tmp_path, [{"CPU": 4.0}, {"CPU": 2.0}])


def test_a_job_is_submitted_once_and_found_by_the_next_worker(setup):
    process = setup.start()
    assert process.lives
    assert setup.only.startswith("train_1-")
    line = setup.client.asked[setup.only]["entrypoint"]
    assert line.endswith(f"--folder {setup.files.path} --grace-seconds 60.0 -- python -m x 'a job'\"'\"'s'; exit $?")
    setup.client.become(setup.only, "RUNNING")
    found = setup.worker().find(setup.files)
    assert str(found) == f"the Ray job {setup.only} on 10.0.0.7 (765857fe7889)"
    found.leave()
    assert process.lives


def test_an_answer_that_was_lost_starts_no_second_job(setup):
    setup.client.fails, setup.client.is_done = ConnectionError("reset"), True
    assert setup.start().lives
    assert setup.start().lives  # as a worker does that tries again
    assert len(setup.client.jobs) == 1


def test_a_request_that_was_lost_is_made_again_under_the_same_id(setup):
    setup.client.fails = ConnectionError("reset")
    with pytest.raises(Unreachable, match="does not answer: reset"):
        setup.start()
    entered = setup.files.submission_path.read_text()
    assert setup.worker().find(setup.files) is None
    setup.executor = setup.worker()
    assert setup.start().lives
    assert setup.only == entered


def test_a_job_that_has_ended_is_started_again_under_another_id(setup):
    setup.start()
    setup.client.become(setup.only, "FAILED")
    assert setup.executor.find(setup.files) is None
    setup.start()
    assert len(setup.client.jobs) == 2


def test_while_the_cluster_does_not_answer_a_job_is_taken_to_go_on_and_nobody_starts_it(setup):
    process = setup.start()
    setup.client.fails = ConnectionError("refused")
    assert process.lives
    assert "does not answer: refused" in setup.said[0]
    setup.client.fails = ConnectionError("refused")
    with pytest.raises(Unreachable):
        setup.start()
    assert len(setup.client.jobs) == 1


def test_a_cluster_that_was_started_anew_has_lost_its_jobs(setup):
    process = setup.start()
    setup.client.jobs.clear()
    assert not process.lives
    process.kill()  # nothing is left to stop
    assert setup.client.stopped == []


def test_what_ray_says_of_a_death_is_in_the_log_of_the_job(setup):
    process = setup.start()
    setup.client.become(setup.only, "FAILED", "The actor died because its node has died.")
    assert not process.lives
    assert not process.lives
    assert setup.files.log_path.read_text().count("its node has died") == 1


def test_a_running_job_is_asked_to_save_and_one_that_waits_for_a_node_is_stopped(setup):
    waiting = setup.start()
    waiting.terminate()
    assert setup.client.stopped == [setup.only]
    running = setup.start()
    assert not setup.files.node_stop_path.exists()  # it was meant for the one before
    (submission,) = set(setup.client.jobs) - set(setup.client.stopped)
    setup.client.become(submission, "RUNNING")
    running.terminate()
    assert setup.files.node_stop_path.exists()
    assert running.lives
    running.kill()
    assert not running.lives


def need(**plan):
    return Need.of({"device": "cpu", "expected_peak_bytes": GB, "device_total_bytes": None} | plan)


@pytest.mark.parametrize(
    ("asked", "cpus", "gpus", "memory_bytes"),
    [
        (need(cpu_threads=3), 3.0, None, GB + PROCESS_BYTES),
        (need(cpu_threads=64), 4.0, None, GB + PROCESS_BYTES),
        (need(device_total_bytes=80 * GB, processes=2, cpu_threads=64), 2.0, 2.0, 2 * PROCESS_BYTES),
        (None, 1.0, None, None),
    ],
    ids=["cpu", "more than a node has", "two gpus", "no plan"],
)
def test_the_plan_says_what_is_asked_of_a_node(setup, asked, cpus, gpus, memory_bytes):
    setup.start(asked)
    found = setup.client.asked[setup.only]
    assert (found["entrypoint_num_cpus"], found["entrypoint_num_gpus"], found["entrypoint_memory"]) == (
        cpus,
        gpus,
        memory_bytes,
    )


def test_a_plan_is_made_on_a_gpu_where_there_is_one_and_is_not_found_again(setup):
    setup.executor.plan(["plan"], setup.files)
    setup.nodes.append({"CPU": 8.0, "GPU": 4.0})
    setup.executor.plan(["plan"], setup.files)
    assert [asked["entrypoint_num_gpus"] for asked in setup.client.asked.values()] == [None, 1.0]
    assert setup.executor.find(setup.files) is None


def test_a_limit_bounds_each_job_and_ray_does_the_rest(setup):
    limited = setup.worker(device_bytes=GB)
    room = limited.room(need(), besides=None)
    assert (room.verdict, "MAX_GPU_MEMORY_GB allows 1 GB" in room.why) == ("never", True)
    assert setup.executor.room(need(), besides=None).verdict == "fits"


def test_without_the_extra_the_worker_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray.job_submission", None)
    with pytest.raises(UsageError, match=r"nightschool\[ray\]"):
        open_cluster("http://127.0.0.1:8265")


def test_the_place_comes_from_the_environment_and_another_one_is_refused():
    given = {"NIGHTSCHOOL_EXECUTOR": "ray", "RAY_API_SERVER_ADDRESS": "http://head:8265"}
    assert WorkerSettings.from_env(given) == WorkerSettings(executor="ray", ray_address="http://head:8265")
    assert WorkerSettings.from_env(given, executor="local").executor == "local"
    with pytest.raises(UsageError, match=r"NIGHTSCHOOL_EXECUTOR is 'slurm'\. Write one of local, ray"):
        WorkerSettings.from_env({"NIGHTSCHOOL_EXECUTOR": "slurm"})
