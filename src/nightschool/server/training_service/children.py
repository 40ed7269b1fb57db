"""Work that would hold up the server goes to a process of its own: previews and evaluations."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nightschool.errors import NightschoolError, QueueFull
from nightschool.server.errors import Refusal
from nightschool.store.home import HOME_VARIABLE, Home
from nightschool.work.processes import ProcessName, command

# A server may answer on the same cores: threads that wait must not spin.
_POLITE = {"OMP_WAIT_POLICY": "PASSIVE"}
_MOST_WAITING = 8
_MESSAGE_CHARACTERS = 2000


class Children:
    """Runs one process at a time; a few wait for their turn."""

    def __init__(self) -> None:
        self._turn = asyncio.Semaphore(1)
        self._waiting = 0

    async def run(
        self, process: ProcessName, *arguments: str, home: Home, told: Mapping[str, Any] | None = None, cwd: Path
    ) -> dict[str, Any]:
        """Run a process and return the JSON object that it printed. It is killed if whoever waits for it goes away.

        Args:
            process: Of the table in `work.processes`.
            arguments: Of its command line.
            home: The home that it works in.
            told: A JSON object for its standard input.
            cwd: Where it runs.

        Raises:
            QueueFull: If too many wait already.
            Refusal: What the process said was wrong, with the status of its exit code.
        """
        if self._waiting >= _MOST_WAITING:
            raise QueueFull(
                f"{self._waiting} previews and evaluations wait already. Try again later.", retry_after_seconds=10
            )
        self._waiting += 1
        try:
            async with self._turn:
                return await _run(command(process, *arguments), home, told, cwd)
        finally:
            self._waiting -= 1


async def _run(words: list[str], home: Home, told: Mapping[str, Any] | None, cwd: Path) -> dict[str, Any]:
    child = await asyncio.create_subprocess_exec(
        *words,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        cwd=cwd,
        env=_environment(home),
    )
    try:
        output, complaint = await child.communicate(json.dumps(told or {}).encode())
    finally:
        if child.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                child.kill()
            await asyncio.shield(child.wait())
    if child.returncode:
        # Exit codes are those of `nightschool.errors`: 2 is the request's fault, 4 something that is not there.
        status = {2: 400, 4: 404}.get(child.returncode, 422 if child.returncode == 1 else 500)
        said = _error_of(output) or complaint.decode(errors="replace").strip()[-_MESSAGE_CHARACTERS:]
        raise Refusal(status, said or f"It ended with the exit code {child.returncode}.", "process_failed")
    answer = json.loads(output)
    if not isinstance(answer, dict):
        raise NightschoolError("A process printed something other than a JSON object.")
    return answer


def _environment(home: Home) -> dict[str, str]:
    """The server's own, without its keys and without what would change the recipe of a command, which no job sees."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("NIGHTSCHOOL_")}
    return {**kept, **_POLITE, HOME_VARIABLE: str(home.path)}


def _error_of(output: bytes) -> str | None:
    """The message of `{"error": {"message": …}}`, if that is what was printed."""
    try:
        return str(json.loads(output)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return None
