"""Jobs on the nodes of a cluster: what stands between Ray and a job, and a real cluster of two nodes on this machine."""

import os
import shlex
import signal
import subprocess
import sys

import psutil
import pytest
from benchmarks.toy_jobs import MODULES

from nightschool.errors import Unreachable, UsageError
from nightschool.jobs.ray_cluster import open_cluster
from nightschool.store.job_files import JobResult
from nightschool.store.runs import RunStore
from nightschool.work import processes
from nightschool.work.processes import command
from tests.support.job_setups import ROOT, Jobs, kill, lives


@pytest.fixture
def jobs(tmp_path, monkeypatch):
    monkeypatch.setattr(processes, "PROCESSES", {**processes.PROCESSES, **MODULES})
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.delenv("DATABASE_URL", raising=False)
    return Jobs(tmp_path)


class OnNode:
    """A job as Ray runs it: a shell, the process that stands in between, the job."""

    def __init__(self, jobs, *, steps=5000):
        self._jobs = jobs
        self.job = jobs.submit(steps=steps)
        with jobs.queue._db.write() as connection:
            connection.exec_driver_sql("UPDATE jobs SET state = 'running'")
        self.files = jobs.files(self.job)
        line = command("job", "--home", str(jobs.home.path), "--job", self.job.id)
        given = ("--folder", str(self.files.path), "--grace-seconds", "20")
        self.line = shlex.join(command("job-on-node", *given, "--", *line)) + "; exit $?"
        self.shell = subprocess.Popen(self.line, shell=True, start_new_session=True)

    def until_training(self):
        return self._jobs.until_training(self.job, step=15)

    @property
    def in_between(self):
        return psutil.Process(self.shell.pid).children()[0]


def test_a_job_on_a_node_saves_and_ends_when_the_worker_asks_by_a_file(jobs):
    node = OnNode(jobs)
    trainer = node.until_training()
    node.files.node_stop_path.touch()
    assert node.shell.wait(30) == 0
    assert not lives(trainer)
    assert node.files.result().outcome == "interrupted"
    assert jobs.run(node.job).status.step >= 15
    assert subprocess.run(node.line, shell=True).returncode == 0  # it was cancelled before it began
    assert isinstance(node.files.result(), JobResult)


def test_a_job_on_a_node_that_ray_has_lost_saves_and_ends(jobs):
    node = OnNode(jobs)
    trainer, in_between = node.until_training(), node.in_between
    os.killpg(node.shell.pid, signal.SIGKILL)  # as Ray does when it has died
    node.shell.wait()
    jobs.until(lambda: not lives(in_between))
    assert not lives(trainer)
    assert node.files.result().outcome == "interrupted"


def test_a_trainer_does_not_outlive_its_job_on_a_node(jobs):
    node = OnNode(jobs)
    trainer = node.until_training()
    kill(jobs.process(node.job))
    assert node.shell.wait(30) == 1
    assert not lives(trainer)
    assert jobs.run(node.job).status.state == "interrupted"


HEAD, FIRST, SECOND = "127.0.0.2", "127.0.0.3", "127.0.0.4"
NODE = {"object_store_memory": 80_000_000}


@pytest.fixture
def cluster(jobs, monkeypatch):
    """A cluster whose head takes no jobs, with one other node. It looks for dead nodes more often than a real one."""
    cluster_utils = pytest.importorskip("ray.cluster_utils")
    for name, value in {
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_health_check_initial_delay_ms": "500",
        "RAY_health_check_period_ms": "500",
        "RAY_health_check_timeout_ms": "1000",
        "RAY_health_check_failure_threshold": "3",
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("RAY_API_SERVER_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:1")  # another one, which was not asked for
    head = {"num_cpus": 0, "include_dashboard": True, "dashboard_host": "127.0.0.1", "dashboard_port": 0}
    made = cluster_utils.Cluster(initialize_head=True, head_node_args=NODE | head | {"node_ip_address": HEAD})
    try:
        made.first = made.add_node(num_cpus=2, node_ip_address=FIRST, **NODE)
        made.url = f"http://{made.head_node.webui_url}"
        yield made
    finally:
        made.shutdown()
        monkeypatch.delenv("RAY_API_SERVER_ADDRESS", raising=False)


@pytest.mark.timeout(300)
def test_jobs_on_a_cluster_are_promoted_survive_their_worker_and_their_node_and_are_cancelled(jobs, cluster):
    on_ray = {"executor": "ray", "ray_address": cluster.url}
    short, job = jobs.submit(name="other", steps=5), jobs.submit(steps=50_000)
    environment = {"NIGHTSCHOOL_EXECUTOR": "ray", "RAY_API_SERVER_ADDRESS": cluster.url}
    line = [sys.executable, "-m", MODULES["worker"], "--home", str(jobs.home.path), "--until-eof"]
    worker = subprocess.Popen(line, cwd=ROOT, env=os.environ | environment, stdin=subprocess.PIPE)
    try:
        trainer = jobs.until_training(job)
        jobs.until(lambda: jobs.get(short).is_final)
    finally:
        worker.kill()
        worker.wait()
        worker.stdin.close()
    assert jobs.get(short).outcome == "promoted"
    assert "promoted" in jobs.files(short).log_path.read_text()
    assert lives(trainer)

    with jobs.worker(**on_ray):
        jobs.until(lambda: any(f"{job.id} is being worked on by the Ray job" in said for said in jobs.said))
        assert any(FIRST in said for said in jobs.said)
        jobs.until_training(job, step=15)
        begun = jobs.process(job)
        begun.parent().suspend()  # a machine that is gone saves nothing
        cluster.remove_node(cluster.first, allow_graceful=False)
        for process in (begun.parent(), begun, trainer):
            kill(process)
        cluster.add_node(num_cpus=2, node_ip_address=SECOND, **NODE)
        jobs.until(lambda: any(f"{job.id} goes on from step" in said for said in jobs.said))
        trainer = jobs.until_training(job)
        assert jobs.run(job).status.step >= 10
        jobs.queue.request_cancel(job.id)
        jobs.until(lambda: jobs.get(job).is_final)
    assert not lives(trainer)
    assert jobs.get(job).state == jobs.run(job).status.state == "cancelled"
    assert len(RunStore(jobs.home).ls()) == 2
    assert f"the Ray job {job.id}-" in jobs.files(job).log_path.read_text()  # with what Ray said of the dead node


def test_a_cluster_that_does_not_answer_is_refused_with_its_address():
    pytest.importorskip("ray")
    with pytest.raises(UsageError, match=r"'head:6379'\. Give that of the cluster's dashboard"):
        open_cluster("head:6379")
    with pytest.raises(Unreachable, match=r"No Ray cluster answers at http://127\.0\.0\.1:1: .*ray start --head"):
        open_cluster("http://127.0.0.1:1")
