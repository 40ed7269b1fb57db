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

from nightschool.errors import Conflict, UsageError
from nightschool.server.run import listening, serve
from nightschool.server.settings import ServerSettings
from nightschool.store.home import Home
from tests.support.live_server import eventually

SCRIPT = """
import sys
sys.path.insert(0, sys.argv[1])
from tests.support.fake_slot import FakeSlot
from nightschool.server.app import create_app
from nightschool.server.logs import configure_logs
from nightschool.server.run import listening, run_app
from nightschool.server.settings import ServerSettings

configure_logs("info")
settings = ServerSettings(port=0, drain_seconds=5)
slot = FakeSlot(answer=lambda prompt: "x" * 50, seconds_per_token=0.01)
with listening(settings) as listener:
    run_app(create_app([slot], settings), settings, listener)
print("closed" if slot.closed else "left open", flush=True)
"""


SERVE = """
import sys
from pathlib import Path
from nightschool.errors import NightschoolError
from nightschool.server.run import serve
from nightschool.server.settings import ServerSettings
from nightschool.store.home import Home

try:
    serve(Home(Path(sys.argv[1])), "bot", ServerSettings(port=0, record_conversations=True), engine={"num_rows": 2})
except NightschoolError as error:
    print(error)
print("ended")
"""


class Process:
    def __init__(self, script: str, argument: Path, ready: int = 200) -> None:
        command = [sys.executable, "-c", script, str(argument)]
        self.popen = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=os.environ
        )
        self.lines: list[str] = []
        self.reading = threading.Thread(target=self._read)
        self.reading.start()
        self.url = eventually(self._url)
        eventually(lambda: httpx2.get(f"{self.url}/readyz").status_code == ready)

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


def test_sigterm_drains_the_running_answer_and_ends_with_0():
    process = Process(SCRIPT, Path(__file__).parent)
    answers = []
    asking = threading.Thread(
        target=lambda: answers.append(httpx2.post(f"{process.url}/generate", json={"query": "a secret"}))
    )
    asking.start()
    eventually(lambda: "nightschool_rows_running 1.0" in httpx2.get(f"{process.url}/metrics").text)
    process.popen.send_signal(signal.SIGTERM)
    asking.join()
    assert process.ended() == 0, "".join(process.lines)
    assert answers[0].json()["response"] == "x" * 50
    assert process.lines[-1] == "closed\n"
    rows = [json.loads(line) for line in process.lines[:-1]]
    assert {"listening", "serving", "successfully updated", "stopping", "stopped"} <= {row["message"] for row in rows}
    [line] = [row for row in rows if row["message"] == "request" and row["path"] == "/generate"]
    assert line["request_id"] == answers[0].headers["x-request-id"]
    assert "a secret" not in "".join(process.lines)


def test_it_serves_an_empty_home_until_ctrl_c(tmp_path):
    process = Process(SERVE, tmp_path, ready=503)
    health = httpx2.get(f"{process.url}/health").json()
    assert (health["status"], health["model_loaded"], health["device"]) == ("healthy", False, "cpu")
    assert httpx2.get(f"{process.url}/refresh_model").json()["current_model_version"] is None
    assert httpx2.get(f"{process.url}/api/settings").json()["record_conversations"] is True
    assert httpx2.get(f"{process.url}/api/models").json() == {"models": []}
    process.popen.send_signal(signal.SIGINT)
    assert process.ended() == 0, "".join(process.lines)
    assert process.lines[-1] == "ended\n"
    assert not [line for line in process.lines if "error" in line]


def test_it_never_serves_others_without_a_key(tmp_path):
    with pytest.raises(UsageError, match="NIGHTSCHOOL_API_KEY"):
        serve(Home(tmp_path), "bot", ServerSettings(host="0.0.0.0", port=0))
    assert list(tmp_path.iterdir()) == []


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
