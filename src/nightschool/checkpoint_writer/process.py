"""The writer: `python -m nightschool.checkpoint_writer --home H --run RUN_ID --channel FD --memory FD --lock FD`.

The trainer starts it. It takes orders, each a message of JSON whose bytes lie in shared memory, and answers each with
how it ended. When the trainer is gone it finishes the orders that have come, and ends. It holds the run's writing lock
for as long as it lives.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from nightschool.checkpoint_writer.commit import Contents, Order, Outcome, carry_out, say
from nightschool.checkpoint_writer.disk import Pieces
from nightschool.checkpoint_writer.shared_buffer import SharedMemory
from nightschool.store.home import Home
from nightschool.store.locks import taken_over
from nightschool.store.runs import Run, RunStore

# Training comes first; the disk is slower than a niced process anyway.
_NICENESS = 10
_LOOK_SECONDS = 1.0


def main(arguments: Sequence[str] | None = None) -> int:
    """Write what the trainer orders, until it is gone."""
    parser = argparse.ArgumentParser(prog="python -m nightschool.checkpoint_writer", description="Write checkpoints.")
    parser.add_argument("--home", type=Path, required=True, help="the home that holds the run")
    parser.add_argument("--run", required=True, help="the run whose checkpoints it writes")
    parser.add_argument("--channel", type=int, required=True, help="the socket on which orders come")
    parser.add_argument("--memory", type=int, required=True, help="the memory in which their bytes lie")
    parser.add_argument("--lock", type=int, required=True, help="the lock that says that somebody writes")
    given = parser.parse_args(arguments)
    # Whoever stops the trainer stops this process by it: what was accepted is written first.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    os.nice(_NICENESS)
    trainer = os.getppid()
    memory = SharedMemory(given.memory)
    run = RunStore(Home(given.home)).at(given.run)
    with taken_over(given.lock), Connection(given.channel) as channel:
        for order in _orders(channel, trainer):
            message = json.loads(order)
            # Pages are made here, so that training does not wait for them.
            if "reserve_bytes" in message:
                with suppress(OSError):  # the trainer finds out when it maps them
                    memory.reserve(int(message["reserve_bytes"]))
                continue
            outcome = _obey(run, message, memory)
            say(str(outcome))
            with suppress(OSError):  # the trainer may be gone; the checkpoint is there
                channel.send_bytes(json.dumps(asdict(outcome)).encode())
    return 0


def slices_of(memory: SharedMemory, files: list[list[Any]]) -> Contents:
    """The files that lie in shared memory, by name, offset and size."""

    def contents() -> Iterator[tuple[str, Pieces]]:
        with memoryview(memory.view) as view:
            for name, offset, size in files:
                with view[offset : offset + size] as piece:
                    yield str(name), [piece]

    return contents


def _obey(run: Run, message: dict[str, Any], memory: SharedMemory) -> Outcome:
    memory.attach(int(message["memory_bytes"]))
    offset, size = message["order"]
    with memoryview(memory.view) as view:
        content = json.loads(bytes(view[offset : offset + size]))
    return carry_out(run, Order(**content["order"]), slices_of(memory, content["files"]))


def _orders(channel: Connection, trainer: int) -> Iterator[bytes]:
    """The orders as they come; ends when the trainer has closed the channel or is gone, and all was read."""
    # A process that the trainer forked may hold its end open; our parent changes when the trainer dies.
    while channel.poll(_LOOK_SECONDS) or os.getppid() == trainer:
        if channel.poll():
            try:
                yield channel.recv_bytes()
            except (EOFError, OSError):
                return
