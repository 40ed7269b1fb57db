"""The stagehands of the demonstration: processes that are started and stopped, and clients that never stop asking."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from nightschool.errors import NightschoolError
from nightschool.work.processes import command

COMMAND = tuple(command("cli"))


class DemoFailed(NightschoolError, code="demo"):
    """A step of the demonstration did not do what it should; the message says which, and where its log is."""


def run_command(folder: Path, *words: str, expect: int = 0) -> str:
    """Run `nightschool WORDS` in the folder, show what it prints, and return it.

    Raises:
        DemoFailed: If it exits with another code than expected.
    """
    process = subprocess.Popen(
        [*COMMAND, *words], cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=_environment()
    )
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        lines.append(line)
        print("  " + line, end="", flush=True)
    if (code := process.wait()) != expect:
        raise DemoFailed(f"`nightschool {' '.join(words)}` exited with {code}, not {expect}. The lines above say why.")
    return "".join(lines)


def ask_command(folder: Path, *words: str) -> Any:
    """Run `nightschool WORDS --json` in the folder without showing it, and return the answer.

    Raises:
        DemoFailed: If it fails.
    """
    done = subprocess.run(
        [*COMMAND, "--json", *words], cwd=folder, capture_output=True, text=True, check=False, env=_environment()
    )
    if done.returncode != 0:
        raise DemoFailed(f"`nightschool {' '.join(words)}` exited with {done.returncode}: {done.stdout}{done.stderr}")
    return json.loads(done.stdout)


def _environment() -> dict[str, str]:
    """Children find their home by their folder, whatever the caller's environment says."""
    return {key: value for key, value in os.environ.items() if key != "NIGHTSCHOOL_HOME"}


@dataclass
class Background:
    """A command that runs beside the story, its output in a log file."""

    process: subprocess.Popen[bytes]
    log: Path
    file: IO[bytes]

    @classmethod
    def start(cls, folder: Path, *words: str) -> Background:
        log = folder / f"{words[0]}.log"
        file = log.open("ab")
        process = subprocess.Popen(
            [*COMMAND, *words], cwd=folder, stdout=file, stderr=subprocess.STDOUT, env=_environment()
        )
        return cls(process, log, file)

    def check(self) -> None:
        """Make sure that it still runs.

        Raises:
            DemoFailed: If it ended by itself.
        """
        if (code := self.process.poll()) is not None:
            tail = self.log.read_text(errors="replace")[-2000:]
            raise DemoFailed(f"{self.log.stem} ended with {code}; the end of {self.log}:\n{tail}")

    def stop(self, *, patience_seconds: float = 60) -> int:
        """SIGTERM, wait, and return the exit code."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(patience_seconds)
        if self.process.poll() is None:
            self.process.kill()
        self.file.close()
        return self.process.wait()


@contextlib.contextmanager
def stopped_at_the_end() -> Iterator[list[Background]]:
    """Whatever is put into the list is stopped when the story ends, however it ends."""
    running: list[Background] = []
    try:
        yield running
    finally:
        for one in reversed(running):
            one.stop(patience_seconds=30)


def free_port() -> int:
    """A port of the loopback that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass(frozen=True)
class Reply:
    """What came back, and which version says that it gave it."""

    text: str
    version: str


class Client:
    """Talks with the server in the words of the OpenAI API."""

    def __init__(self, port: int, name: str) -> None:
        self.base, self.name = f"http://127.0.0.1:{port}", name

    def get(self, path: str) -> Any:
        with urllib.request.urlopen(self.base + path, timeout=30) as answer:  # noqa: S310  our own loopback server
            return json.load(answer)

    def ask(self, question: str) -> Reply:
        """One greedy answer.

        Raises:
            OSError: If the server does not answer, or answers with an error status.
        """
        body = {
            "model": self.name,
            "messages": [{"role": "user", "content": question}],
            "temperature": 0,
            "max_tokens": 24,
        }
        request = urllib.request.Request(  # noqa: S310  our own loopback server
            self.base + "/v1/chat/completions", json.dumps(body).encode(), {"content-type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=60) as answer:  # noqa: S310
            plain = json.load(answer)
            version = answer.headers["x-model-version"]
        text: str = plain["choices"][0]["message"]["content"]
        return Reply(text.strip(), version)

    def wait_until_ready(self, server: Background, *, patience_seconds: float = 90) -> None:
        """Return as soon as a model is served.

        Raises:
            DemoFailed: If that takes too long.
        """
        deadline = time.monotonic() + patience_seconds
        while time.monotonic() < deadline:
            server.check()
            with contextlib.suppress(OSError):
                self.get("/readyz")
                return
            time.sleep(0.2)
        raise DemoFailed(f"The server was not ready after {patience_seconds:.0f} s. Its log is {server.log}.")


@dataclass
class Traffic:
    """Clients that ask one question after the other until they are told to stop, and what became of each request."""

    client: Client
    questions: Sequence[str]
    num_clients: int = 3
    failures: list[str] = field(default_factory=list)
    by_version: Counter[str] = field(default_factory=Counter)
    answers: dict[tuple[str, str], set[str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._stop, self._lock = threading.Event(), threading.Lock()
        self._threads = [threading.Thread(target=self._ask_on, args=(place,)) for place in range(self.num_clients)]

    @property
    def answered(self) -> int:
        return sum(self.by_version.values())

    @property
    def mixed(self) -> int:
        """Questions to which one version gave more than one answer: a greedy version has exactly one."""
        return sum(len(texts) > 1 for texts in self.answers.values())

    def __enter__(self) -> Traffic:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _ask_on(self, place: int) -> None:
        while not self._stop.is_set():
            question = self.questions[place % len(self.questions)]
            place += 1
            try:
                reply = self.client.ask(question)
            except (OSError, ValueError, KeyError) as error:
                with self._lock:
                    self.failures.append(f"{type(error).__name__}: {error}")
                continue
            with self._lock:
                self.by_version[reply.version] += 1
                self.answers.setdefault((reply.version, question), set()).add(reply.text)
            self._stop.wait(0.05)
