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
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nightschool.cli.chat.backends import Reply
from nightschool.cli.chat.params import Params
from nightschool.cli.chat.server_backend import ServerBackend
from nightschool.data.example import Message
from nightschool.errors import NightschoolError
from nightschool.work.processes import command


class DemoFailed(NightschoolError, code="demo"):
    """A step of the demonstration did not do what it should; the message says which, and where its log is."""


@dataclass(frozen=True)
class Screen:
    """Where the story is told; it may wait for a key before each step."""

    pause: bool

    def step(self, title: str) -> None:
        if self.pause:
            input("\n[Enter] ")
        print(f"\n── {title} " + "─" * max(0, 76 - len(title)), flush=True)

    def say(self, text: str) -> None:
        print(text, flush=True)


def run_command(folder: Path, *words: str, expected: Collection[int] = (0,)) -> int:
    """Run `nightschool WORDS` in the folder and show what it prints; return its exit code.

    Raises:
        DemoFailed: If that is none of the expected ones.
    """
    with subprocess.Popen(
        [*command("cli"), *words],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=_environment(),
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            print("  " + line, end="", flush=True)
    if (code := process.wait()) not in expected:
        raise DemoFailed(f"`nightschool {' '.join(words)}` exited with {code}. The lines above say why.")
    return code


def ask_command(folder: Path, *words: str) -> Any:
    """Run `nightschool WORDS --json` in the folder without showing it, and return the answer.

    Raises:
        DemoFailed: If it fails.
    """
    done = subprocess.run(
        [*command("cli"), "--json", *words], cwd=folder, capture_output=True, text=True, check=False, env=_environment()
    )
    if done.returncode != 0:
        raise DemoFailed(f"`nightschool {' '.join(words)}` exited with {done.returncode}: {done.stdout}{done.stderr}")
    return json.loads(done.stdout)


def cycles_of(folder: Path, name: str) -> list[dict[str, Any]]:
    """The finished cycles of a name, oldest first."""
    cycles: list[dict[str, Any]] = ask_command(folder, "schedule", "ls", name)["cycles"]
    return [cycle for cycle in reversed(cycles) if cycle["outcome"] is not None]


def _environment() -> dict[str, str]:
    """Children find their home by their folder, whatever the caller's environment says."""
    return {key: value for key, value in os.environ.items() if key != "NIGHTSCHOOL_HOME"}


@dataclass
class Background:
    """A command that runs beside the story, its output in a log file."""

    process: subprocess.Popen[bytes]
    log: Path

    @classmethod
    def start(cls, folder: Path, *words: str) -> Background:
        log = folder / f"{words[0]}.log"
        with log.open("ab") as file:
            process = subprocess.Popen(
                [*command("cli"), *words], cwd=folder, stdout=file, stderr=subprocess.STDOUT, env=_environment()
            )
        return cls(process, log)

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


def ask(server: ServerBackend, question: str, *, max_new_tokens: int = 24) -> Reply:
    """One greedy answer.

    Raises:
        NightschoolError: If the server does not answer, or refuses.
    """
    reply = Reply()
    for _ in server.stream([Message("user", question)], Params(max_new_tokens=max_new_tokens, temperature=0), reply):
        pass
    return reply


def wait_until_ready(server: ServerBackend, process: Background, *, patience_seconds: float = 90) -> None:
    """Return as soon as a model is served.

    Raises:
        DemoFailed: If that takes too long.
    """
    deadline = time.monotonic() + patience_seconds
    while time.monotonic() < deadline:
        process.check()
        with contextlib.suppress(NightschoolError, OSError):
            server.get("/readyz")
            return
        time.sleep(0.2)
    raise DemoFailed(f"The server was not ready after {patience_seconds:.0f} s. Its log is {process.log}.")


def wait_for_version(server: ServerBackend, ref: str, *, patience_seconds: float = 30) -> None:
    """Until the server has found the new champion by itself.

    Raises:
        DemoFailed: If that takes too long.
    """
    deadline = time.monotonic() + patience_seconds
    while server.get("/health")["current_model_version"] != ref.partition("@")[2]:
        if time.monotonic() > deadline:
            raise DemoFailed(f"The server did not find {ref} within {patience_seconds:.0f} s.")
        time.sleep(0.1)


@dataclass
class Traffic:
    """Clients that ask one question after the other until they are told to stop, and what became of each request."""

    server: ServerBackend
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
                reply = ask(self.server, question)
            except (NightschoolError, OSError, ValueError, KeyError) as error:
                with self._lock:
                    self.failures.append(f"{type(error).__name__}: {error}")
                continue
            with self._lock:
                self.by_version[reply.version] += 1
                self.answers.setdefault((reply.version, question), set()).add(reply.text)
            self._stop.wait(0.05)
