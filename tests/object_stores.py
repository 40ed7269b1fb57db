"""Object stores for tests: moto's S3 server in a process of its own, and checkpoints to put there."""

import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from datetime import timedelta

import pytest
from cli_home import MORNING

from nightschool.config.recipe import Recipe
from nightschool.store.atomic import publish_directory
from nightschool.store.checkpoints import checkpoint_path
from nightschool.store.manifest import write_manifest
from nightschool.store.runs import RunStore

AWS = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_REGION": "us-east-1"}


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_for_http(url, *, seconds=30):
    deadline = time.monotonic() + seconds
    while True:
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except urllib.error.HTTPError:
            return
        except OSError:
            assert time.monotonic() < deadline, f"{url} never answered"
            time.sleep(0.05)


def request(method, url, data=b""):
    with urllib.request.urlopen(urllib.request.Request(url, data=data, method=method), timeout=10) as answer:
        return answer.read()


def start_moto(port):
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-m", "moto.server", "-p", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    wait_for_http(f"http://127.0.0.1:{port}/moto-api/")
    return process


@pytest.fixture(scope="session")
def moto():
    """The address of an S3 server with the bucket `bucket`."""
    port = free_port()
    process = start_moto(port)
    try:
        request("PUT", f"http://127.0.0.1:{port}/bucket")
        yield f"http://127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait()


@pytest.fixture
def s3(moto, monkeypatch):
    """An environment in which `s3://bucket` is that server; gives its address."""
    for name in list(os.environ):
        if name.startswith("AWS_"):
            monkeypatch.delenv(name)
    for name, value in AWS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("AWS_ENDPOINT_URL", moto)
    return moto


def make_run(home, *, name="bot", minutes=0, upload=None):
    """A run whose recipe uploads to that address."""
    recipe = Recipe(name=name, base="new:tiny", data=[{"path": "a.json"}], checkpoints={"upload": upload}).as_plain()
    return RunStore(home).create(recipe, name=name, moment=MORNING + timedelta(minutes=minutes))


def add_checkpoint(run, step, *, attempt=1, num_bytes=20_000, replace=False, text=b""):
    """A checkpoint with weights, optimizer and state; its content depends on the step."""
    path = checkpoint_path(run, 0, step, 1)
    with publish_directory(path, replace=replace) as folder:
        for part, name in enumerate(("model.safetensors", "optimizer.safetensors")):
            unit = f"{step} {part} ".encode() + text
            (folder / name).write_bytes((unit * (num_bytes // len(unit) + 1))[:num_bytes])
        (folder / "state.json").write_text(f'{{"step": {step}}}')
        write_manifest(folder, step=step, attempt=attempt)
    return path
