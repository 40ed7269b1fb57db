"""A served name whose version can be swapped while requests are in flight.

    resolve → verify → load → warm_up → probe → switch

Everything up to `switch` happens beside the version that serves; a failure changes nothing. Then one pointer moves. A
request stays on the generation that it began with: the old one answers what it has taken, and is kept warm for a rollback
until the next swap needs the room.
"""

from __future__ import annotations

import gc
import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch

from nightschool.engine.capacity import free_bytes
from nightschool.engine.host_tier import HostTier
from nightschool.engine.pool import EnginePool, Generation, Stage
from nightschool.errors import Conflict, SwapFailed
from nightschool.models.unmerged import NeedsMerging
from nightschool.store.registry import Registry, Version
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
        version: The id of the version that `refresh` serves; the champion without it.
    """

    def __init__(self, name: str, pool: EnginePool, version: str | None = None) -> None:
        self.name = name
        self._wanted = f"{name}@{version}" if version is not None else name
        self.home = pool.home
        self._pool = pool
        self._current: Generation | None = None
        self._previous: Generation | None = None
        self._pointer = threading.Lock()
        self._swapping = threading.Lock()
        self._is_closed = False
        self._merged = False

    @property
    def is_merged(self) -> bool:
        """Whether adapters of this name are merged into a copy of their base."""
        return self._merged

    @property
    def current(self) -> Generation | None:
        """What serves now, or None before the first swap."""
        return self._current

    @property
    def previous(self) -> Generation | None:
        """What served before and is still warm, or None."""
        return self._previous

    @property
    def is_idle(self) -> bool:
        """Whether everything that was asked of it is answered."""
        return all(g is None or not g.engine.num_active(g.binding) for g in (self._current, self._previous))

    @property
    def num_bytes(self) -> int:
        """What the weights take that leave with this slot: its adapters, or weights of its own; not a base under adapters."""
        return sum(g.engine.num_bytes(g.binding) for g in (self._current, self._previous) if g is not None)

    @property
    def host(self) -> HostTier:
        """Where its adapters go that leave it to be asked for again; shared with the other slots of its pool."""
        return self._pool.host

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

    def merge(self, *, merged: bool) -> bool:
        """Serve the adapters of this name merged into a copy of their base from now on, or apart from it again.

        The present version is loaded the other way beside the one that serves, proven by its probes, and switched to:
        nobody waits, and a failure changes nothing. A version that is no adapter stays as it is.

        Returns:
            Whether anything changed.

        Raises:
            SwapFailed: With the stage; whatever served before still does, as before.
        """
        with self._swapping:
            current, before = self._current, self._merged
            if merged == before:
                return False
            self._merged = merged
            if current is None or current.version.facts.kind != "adapter":
                return True
            try:
                self._swap(current.version.ref, again=True)
            except BaseException:
                self._merged = before
                raise
            return True

    def refresh(self) -> bool:
        """Serve the champion, or the version of this slot, if another or none serves now. Returns whether that changed.

        A slot that is closed stays so.

        Raises:
            NotFound: If there is none.
            SwapFailed: With the stage; whatever served before still does.
        """
        wanted = Registry(self.home).resolve(self._wanted)
        with self._swapping:
            if self._is_closed:
                return False
            current = self._current
            return (current is None or current.version.ref != wanted.ref) and self._swap(wanted.ref).changed

    def close(self, *, drain: bool = False, timeout_seconds: float | None = None, keep: bool = False) -> None:
        """End all generations; `drain` answers first what was taken, `keep` leaves the present adapter in host memory."""
        with self._swapping:
            self._is_closed = True
            with self._pointer:
                current, previous = self._current, self._previous
                self._current = self._previous = None
            for generation in (current, previous):
                if generation is not None:
                    kept = keep and generation is current
                    self._pool.close(generation, drain=drain, timeout_seconds=timeout_seconds, keep=kept)

    def _swap(
        self, ref: str, *, is_trusted: bool = False, again: bool = False, commit: Callable[[], object] | None = None
    ) -> SwapReport:
        """`is_trusted` takes a version that is still warm without comparing its files; `again` loads the present one anew."""
        seconds: dict[str, float] = {}
        stage: Stage = partial(_stage, seconds)
        if self._is_closed:
            raise SwapFailed("resolve", f"the slot {self.name!r} is closed. Open another one.")
        with stage("resolve"):
            version = self._resolve(ref)
        before, previous = self._current, self._previous
        if before is not None and before.version.ref == version.ref and not again:
            if commit is not None:
                commit()
            return SwapReport(before.version.ref, version.ref, changed=False, seconds=seconds)
        if not is_trusted:
            with stage("verify"):
                version.verify(digests=True)
        is_warm = previous is not None and previous.version.ref == version.ref and not again
        after = previous if is_warm and previous is not None else self._load(version, stage)
        if commit is not None:
            try:
                commit()
            except BaseException:
                if not is_warm:
                    self._pool.close(after)
                raise
        with stage("switch"), self._pointer:
            dropped, self._previous = (before, self._previous) if again else (self._previous, before)
            self._current = after
        if dropped is not None and dropped is not after:
            self._let_go(dropped)
        log.info(
            "version swapped",
            extra={"facts": {"before": before and before.version.ref, "after": version.ref, "seconds": seconds}},
        )
        return SwapReport(before.version.ref if before else None, version.ref, changed=True, seconds=seconds)

    def _resolve(self, ref: str) -> Version:
        version = Registry(self.home).resolve(ref)
        if version.name != self.name:
            raise Conflict(
                f"{version.ref} is not a version of {self.name!r}, which this slot serves. Name one that is."
            )
        return version

    def _load(self, version: Version, stage: Stage) -> Generation:
        """Load a version beside the one that serves, up to and including its probes."""
        with stage("load"):
            self._make_room(version)
        generation = self._pool.open(version, stage, merged=self._merged)
        try:
            with stage("probe"):
                self._pool.proofs.prove(generation, version)
        except BaseException:
            self._pool.close(generation)
            raise
        return generation

    def _make_room(self, version: Version) -> None:
        """Drop the generation before if a third one does not fit beside it.

        Raises:
            Conflict: If there is too little room even then. Nothing was loaded.
        """
        needed, device = self._pool.needed_bytes(version, merged=self._merged), self._pool.device
        if free_bytes(device) >= needed:
            return
        with self._pointer:
            dropped, self._previous = self._previous, None
        if dropped is not None:
            ended = self._let_go(dropped)
            del dropped
            ended.join(_DRAIN_SECONDS)
        gc.collect()  # holds up every thread, so only now
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


@contextmanager
def _stage(seconds: dict[str, float], name: str) -> Iterator[None]:
    """Time a stage and name it in what goes wrong."""
    started = time.perf_counter()
    try:
        yield
    except NeedsMerging:
        raise
    # Any exception: a library may raise what it likes, and whoever asked for the swap must learn that nothing changed.
    except Exception as error:
        raise SwapFailed(name, str(error) or type(error).__name__) from error
    finally:
        seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - started
