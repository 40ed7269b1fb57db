"""A served name whose version can be swapped while requests are in flight.

    resolve → verify → load → warm_up → probe → switch

Everything up to `switch` happens beside the version that serves; a failure changes nothing. Then one pointer moves. A
request stays on the generation that it began with: the old one answers what it has taken, and is kept warm for a rollback
until the next swap needs the room.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from nightschool.engine.capacity import free_bytes
from nightschool.engine.pool import EnginePool, Generation
from nightschool.engine.request import SamplingParams
from nightschool.errors import Conflict, SwapFailed
from nightschool.models.unmerged import NeedsMerging
from nightschool.store.home import Home
from nightschool.store.registry import Registry, Version
from nightschool.store.versions import Probe
from nightschool.units import format_bytes

log = logging.getLogger("nightschool.engine")

# How long a swap that needs the room waits for the last answers of a version that was dropped.
_DRAIN_SECONDS = 30.0


@dataclass(frozen=True)
class SwapReport:
    """What a swap did: from which version to which, and the seconds of each stage."""

    before: str | None
    after: str
    changed: bool
    seconds: dict[str, float]


class Slot:
    """A served name and the generation that answers for it. May be read from any thread; swaps wait for each other.

    Args:
        name: Of the registry.
        pool: The engines that answer; several slots may share them.
    """

    def __init__(self, name: str, pool: EnginePool) -> None:
        self.name = name
        self.home = pool.home
        self._pool = pool
        self._current: Generation | None = None
        self._previous: Generation | None = None
        self._pointer = threading.Lock()
        self._swapping = threading.Lock()
        self._is_closed = False

    @property
    def current(self) -> Generation | None:
        """What serves now, or None before the first swap."""
        return self._current

    @property
    def previous(self) -> Generation | None:
        """What served before and is still warm, or None."""
        return self._previous

    def swap(self, ref: str, *, commit: Callable[[], object] | None = None) -> SwapReport:
        """Serve another version.

        Args:
            ref: `name@version`, `name@alias`, or the bare name for its champion.
            commit: What makes it official, such as moving the alias: called once the version has shown that it
                answers, right before it serves. If it raises, nothing changes.

        Raises:
            SwapFailed: With the stage; whatever served before still does.
        """
        with self._swapping:
            return self._swap(ref, commit=commit)

    def rollback(self) -> SwapReport:
        """Serve what served before, which is still warm: one pointer moves.

        Raises:
            Conflict: If there is nothing before this version.
        """
        with self._swapping:
            previous = self._previous
            if previous is None:
                raise Conflict(f"No earlier version of {self.name!r} is warm. Name one to swap to.")
            return self._swap(previous.version.ref, is_trusted=True)

    def refresh(self) -> bool:
        """Serve the registry's champion if another version, or none, serves now. Returns whether the version changed.

        Raises:
            NotFound: If the name has no champion.
            SwapFailed: With the stage; whatever served before still does.
        """
        champion = Registry(self.home).resolve(self.name)
        with self._swapping:
            current = self._current
            return (current is None or current.version.ref != champion.ref) and self._swap(champion.ref).changed

    def close(self, *, drain: bool = False, timeout_seconds: float | None = None) -> None:
        """End all generations; `drain` answers first what was taken."""
        with self._swapping:
            self._is_closed = True
            with self._pointer:
                generations = [g for g in (self._current, self._previous) if g is not None]
                self._current = self._previous = None
            for generation in generations:
                self._pool.close(generation, drain=drain, timeout_seconds=timeout_seconds)

    def _swap(self, ref: str, *, is_trusted: bool = False, commit: Callable[[], object] | None = None) -> SwapReport:
        """`is_trusted` takes a version that is still warm without comparing its files again."""
        swap = _Swap(self.name, self.home)
        if self._is_closed:
            raise SwapFailed("resolve", f"the slot {self.name!r} is closed. Open another one.")
        version = swap.resolve(ref)
        before = self._current
        if before is not None and before.version.ref == version.ref:
            if commit is not None:
                commit()
            return SwapReport(before.version.ref, version.ref, changed=False, seconds=swap.seconds)
        if not is_trusted:
            swap.verify(version)
        after = self._warm(version.ref) or self._load(swap, version)
        if commit is not None:
            try:
                commit()
            except BaseException:
                if after is not self._previous:
                    self._pool.close(after)
                raise
        with swap.stage("switch"), self._pointer:
            dropped, self._previous, self._current = self._previous, before, after
        if dropped is not None and dropped is not after:
            self._let_go(dropped)
        log.info(
            "version swapped",
            extra={"facts": {"before": before and before.version.ref, "after": version.ref, "seconds": swap.seconds}},
        )
        return SwapReport(before.version.ref if before else None, version.ref, changed=True, seconds=swap.seconds)

    def _warm(self, ref: str) -> Generation | None:
        """The previous generation, if it is of this version."""
        previous = self._previous
        return previous if previous is not None and previous.version.ref == ref else None

    def _load(self, swap: _Swap, version: Version) -> Generation:
        """Load a version beside the one that serves, up to and including its probes."""
        self._make_room(swap, version)
        generation = self._pool.open(version, swap.stage)
        try:
            swap.probe(generation)
        except BaseException:
            self._pool.close(generation)
            raise
        return generation

    def _make_room(self, swap: _Swap, version: Version) -> None:
        """Drop the generation before if a third one does not fit beside it.

        Raises:
            SwapFailed: If there is too little room even then. Nothing was loaded.
        """
        with swap.stage("load"):
            needed, device = self._pool.needed_bytes(version), self._pool.device
            if free_bytes(device) >= needed:
                return
            with self._pointer:
                dropped, self._previous = self._previous, None
            if dropped is not None:
                ended = self._let_go(dropped)
                del dropped
                ended.join(_DRAIN_SECONDS)
            free = free_bytes(device)
            if free < needed:
                where = "the GPU" if torch.device(device).type == "cuda" else "this machine"
                raise Conflict(
                    f"{version.ref} takes about {format_bytes(needed)} beside the version that is served, and "
                    f"{format_bytes(free)} of {where} are free. Free some memory, or stop the server and start it with "
                    f"{version.ref}."
                )

    def _let_go(self, generation: Generation) -> threading.Thread:
        """End a generation once it has answered what it took; the thread ends when it has."""
        # On a thread of its own, because one slow answer must not hold up the swap.
        thread = threading.Thread(target=self._pool.close, args=(generation,), kwargs={"drain": True}, daemon=True)
        thread.start()
        return thread


class _Swap:
    """The stages of one swap, timed; whatever goes wrong becomes `SwapFailed` with the stage."""

    def __init__(self, name: str, home: Home) -> None:
        self._name = name
        self._home = home
        self.seconds: dict[str, float] = {}

    def stage(self, name: str) -> _Stage:
        return _Stage(name, self.seconds)

    def resolve(self, ref: str) -> Version:
        with self.stage("resolve"):
            version = Registry(self._home).resolve(ref)
            if version.name != self._name:
                raise Conflict(
                    f"{version.ref} is not a version of {self._name!r}, which this slot serves. Name one that is."
                )
            return version

    def verify(self, version: Version) -> None:
        with self.stage("verify"):
            version.verify(digests=True)

    def probe(self, generation: Generation) -> None:
        """The golden prompts: a version that answers them otherwise is not what was published."""
        with self.stage("probe"):
            for number, probe in enumerate(generation.version.facts.probes, start=1):
                self._ask(generation, probe, number)

    @staticmethod
    def _ask(generation: Generation, probe: Probe, number: int) -> None:
        params = SamplingParams(max_new_tokens=len(probe.expected_ids), temperature=0, ignore_eos=True)
        answer = generation.answer(f"probe-{number}", list(probe.prompt_ids), params)
        if list(answer) != list(probe.expected_ids):
            raise Conflict(
                f"probe {number} of {generation.version.ref} expects the tokens {_few(probe.expected_ids)}, and the loaded version "
                f"answers {_few(answer)}. Publish it again."
            )


def _few(token_ids: list[int] | tuple[int, ...]) -> str:
    shown = ", ".join(map(str, token_ids[:12]))
    return f"[{shown}, …]" if len(token_ids) > 12 else f"[{shown}]"


class _Stage:
    """Times a stage and names it in what goes wrong."""

    def __init__(self, name: str, seconds: dict[str, float]) -> None:
        self._name = name
        self._seconds = seconds

    def __enter__(self) -> None:
        self._started = time.perf_counter()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        spent = time.perf_counter() - self._started
        self._seconds[self._name] = self._seconds.get(self._name, 0.0) + spent
        # Any exception: a library may raise what it likes, and whoever asked for the swap must learn that nothing changed.
        if isinstance(error, Exception) and not isinstance(error, NeedsMerging):
            raise SwapFailed(self._name, str(error) or type(error).__name__) from error
