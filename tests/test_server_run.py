"""The serving process: its port, its log, its signals."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import httpx2
import pytest
from live_server import eventually

from nightschool.errors import Conflict, UsageError
from nightschool.server.run import listening
from nightschool.server.settings import ServerSettings

SCRIPT = """
import sys
sys.path.insert(0, sys.argv[1])
from fake_slot import FakeSlot
from nightschool.server.app import create_app
from nightschool.server.logs import configure_logs
from nightschool.server.run import listening, run_app
from nightschool.server.settings import ServerSettings

configure_logs("info")
settings = ServerSettings(port=0, drain_seconds=5)
slot = FakeSlot(answer=lambda prompt: "x" * 50, seconds_per_token=0.01)
with listening(settings) as listener:
    run_app(create_app(slot, settings), settings, listener)
print("closed" if slot.closed else "left open", flush=True)
"""


class Process:
    def __init__(self) -> None:
        command = [sys.executable, "-W", "error", "-c", SCRIPT, str(Path(__file__).parent)]
        self.popen = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=os.environ
        )
        self.lines: list[str] = []
        self.reading = threading.Thread(target=self._read)
        self.reading.start()
        self.url = eventually(self._url, 30)
        eventually(lambda: httpx2.get(f"{self.url}/readyz").status_code == 200, 30)

    def _read(self) -> None:
        for line in self.popen.stdout:
            self.lines.append(line)

    def _url(self) -> str | None:
        assert self.popen.poll() is None, "".join(self.lines)
        return next((json.loads(line)["url"] for line in self.lines if '"listening"' in line), None)

    def ended(self) -> int:
        code = self.popen.wait(20)
        self.reading.join()
        self.popen.stdout.close()
        return code


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_drains_the_running_answer_and_ends_with_0(number):
    process = Process()
    answers = []
    asking = threading.Thread(
        target=lambda: answers.append(httpx2.post(f"{process.url}/generate", json={"query": "a secret"}))
    )
    asking.start()
    eventually(lambda: "nightschool_rows_running 1.0" in httpx2.get(f"{process.url}/metrics").text)
    process.popen.send_signal(number)
    asking.join()
    assert process.ended() == 0, "".join(process.lines)
    assert answers[0].json()["response"] == "x" * 50
    assert process.lines[-1] == "closed\n"
    rows = [json.loads(line) for line in process.lines[:-1]]
    assert {"listening", "serving", "successfully updated", "stopping", "stopped"} <= {row["message"] for row in rows}
    [line] = [row for row in rows if row["message"] == "request" and row["path"] == "/generate"]
    assert line["request_id"] == answers[0].headers["x-request-id"]
    assert "a secret" not in "".join(process.lines)


def test_a_port_in_use_names_the_port_and_the_option():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with (
            pytest.raises(Conflict, match=rf"Port {port} of 127.0.0.1 is in use .*--port"),
            listening(ServerSettings(port=port)),
        ):
            pass


def test_two_servers_never_share_a_port():
    with listening(ServerSettings(port=0)) as first:
        port = first.getsockname()[1]
        with pytest.raises(Conflict), listening(ServerSettings(port=port)):
            pass
    with listening(ServerSettings(port=port)):
        pass


@pytest.mark.parametrize("host", ["no.such.host.invalid", "203.0.113.7"])
def test_an_address_that_is_not_here_names_the_option(host):
    with pytest.raises(UsageError, match="--host"), listening(ServerSettings(host=host, port=0)):
        pass


def test_it_listens_on_8001_of_this_machine_by_default():
    assert (ServerSettings().host, ServerSettings().port) == ("127.0.0.1", 8001)
    assert ServerSettings().model_check_interval == 3600
    with pytest.raises(ValueError, match="prot"):
        ServerSettings(prot=1)
