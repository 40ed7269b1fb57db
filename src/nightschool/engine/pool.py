"""One engine per base, whatever number of versions and names stand on it.

A version with weights of its own is a base. An adapter is served on its base's engine, unmerged, beside the others there;
what `models.unmerged` cannot keep apart is merged into a copy of its base, as a base of its own, and the log says why.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from nightschool.engine.binding import Binding
from nightschool.engine.capacity import needed_bytes
from nightschool.engine.compute import apart
from nightschool.engine.engine import Engine
from nightschool.engine.host_tier import HostTier
from nightschool.engine.memory_table import MemoryOnBase
from nightschool.engine.packed_cache import folder_of
from nightschool.engine.proofs import Proofs
from nightschool.engine.request import GenerationRequest, SamplingParams
from nightschool.errors import Conflict, UsageError
from nightschool.events import now
from nightschool.models.folder import is_memory_folder
from nightschool.models.load import (
    LoadedModel,
    Located,
    down_to_weights,
    load_config,
    load_located,
    locate,
    located_version,
)
from nightschool.models.memory_version import MemoryVersion, read_memory_folder
from nightschool.models.streamed import FEWEST_RESIDENT, ExpertPlace, is_mixture
from nightschool.models.unmerged import NeedsMerging, UnmergedAdapter, base_under, load_unmerged, why_merged
from nightschool.store.atomic import make_folder
from nightschool.store.home import Home
from nightschool.store.registry import Version

log = logging.getLogger("nightschool.engine")

_ANSWER_SECONDS = 120.0
# Asks what a version answers when it is opened; no name of a tenant looks like it.
_NO_TENANT = "(probe)"

# Times what happens in its block and names it in what goes wrong there; `NeedsMerging` is nothing wrong and passes.
Stage = Callable[[str], AbstractContextManager[None]]


@dataclass(frozen=True, eq=False)
class BoundEngine:
    """An engine, and how it is asked for one model; `memory` is what a model that reads one stands on."""

    binding: Binding
    engine: Engine
    tokenizer: PreTrainedTokenizerBase
    memory: MemoryVersion | None = field(default=None, kw_only=True)

    def answers(self, asked: Sequence[tuple[list[int], SamplingParams]]) -> list[tuple[int, ...]]:
        """The tokens of answers that must come, made beside each other; they share no prefix with any client's.

        Raises:
            Conflict: If one ends in an error.
        """
        binding = self.binding.of(_NO_TENANT)
        handles = [
            self.engine.submit(GenerationRequest(f"probe-{number}", binding, *one, keeps_prefix=False))
            for number, one in enumerate(asked, start=1)
        ]
        found = [handle.result(_ANSWER_SECONDS) for handle in handles]
        failed = next((answer for answer in found if answer.finish_reason == "error"), None)
        if failed is not None:
            raise Conflict(f"{self.binding.label} cannot answer: {failed.error}")
        return [answer.token_ids for answer in found]


@dataclass(frozen=True, eq=False)
class Generation(BoundEngine):
    """One version while it is served, until every request that it took is answered."""

    version: Version
    loaded_at: datetime


class EnginePool:
    """The engines of one process. Methods may be called from any thread; versions are opened one after the other.

    Args:
        home: Whose registry.
        dtype: Of the parameters.
        device: Where they go.
        merge_adapters: Whether every adapter is merged into a copy of its base: as fast as a base, and as large.
        experts_resident: How many experts of a mixture are in memory at a time, those that are used most; the others are read from the
            version's files, or lie packed in a file below the home. All of them without it.
        host_bytes: What adapters that have left their engine may take in host memory, until they are asked for again.
        engine: Settings of every `Engine`, such as `num_rows`.
    """

    def __init__(
        self,
        home: Home,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        merge_adapters: bool = False,
        host_bytes: int = 0,
        experts_resident: int | None = None,
        **engine: Any,
    ) -> None:
        self.home = home
        self.device = device
        self.dtype = dtype
        self._merge_adapters = merge_adapters
        if experts_resident is not None and experts_resident < FEWEST_RESIDENT:
            raise UsageError(
                f"experts_resident is {experts_resident}, and experts pass by where at least {FEWEST_RESIDENT} have room. Raise it."
            )
        self._experts_resident = experts_resident
        self._engine_settings = engine
        self._engines: dict[str, Engine] = {}
        self._holders: dict[str, int] = {}
        self.proofs = Proofs(home)
        self.host = HostTier(host_bytes)
        self._opening = threading.Lock()
        self._lock = threading.Lock()

    def needed_bytes(self, version: Version, *, merged: bool = False) -> int:
        """What serving a version takes beside what is loaded; an adapter on a base that is loaded takes next to nothing.

        Raises:
            NotFound, ModelError, Damaged: If its base is not there, or cannot be read.
        """
        found = located_version(version)
        base = self._base_apart(found, merged=merged)
        if base is not None and why_merged(found.folder) is not None:
            base = None
        with self._lock:
            if (base or version.ref) in self._engines:
                return 0
        return needed_bytes(version, self.home, self.dtype, self._experts_resident)

    def open(self, version: Version, stage: Stage, *, merged: bool = False) -> Generation:
        """Load what is missing of a version. A new engine answers once, so that the first client pays for no first time.

        `merged` takes an adapter into a copy of its base, as `merge_adapters` does with every one.
        """
        bound = self.bind(located_version(version), stage, merged=merged)
        generation = Generation(**vars(bound), version=version, loaded_at=now())
        with stage("warm_up"):
            self._warm_up(generation)
        return generation

    def open_base(self, ref: str, *, root: Path | None = None) -> BoundEngine:
        """Load what adapters on `ref`, or beside the adapter `ref`, stand on, until it is closed; it answers once, as in `open`.

        Raises:
            NotFound, ModelError, Damaged: If it is not there, or cannot be read or served.
        """
        found = locate(ref, self.home, root)
        base = base_under(found, self.home)
        bound = self.bind(found if base is None else locate(base, self.home), lambda _: nullcontext())
        self._warm_up(bound)
        return bound

    def _warm_up(self, bound: BoundEngine) -> None:
        try:
            if not bound.engine.is_warm:
                length = min(8, bound.engine.context_tokens - 1)
                bound.answers([([0] * length, SamplingParams(max_new_tokens=1, temperature=0))])
        except BaseException:
            self.close(bound)
            raise

    def bind(self, found: Located, stage: Stage, *, merged: bool = False) -> BoundEngine:
        """Load what is missing of a model. An adapter is kept apart from its base if it can be, unless it is to be merged."""
        with self._opening:
            try:
                with stage("load"):
                    base = self._base_apart(found, merged=merged)
                if base is not None:
                    return self._bind_unmerged(found, base, stage)
            except NeedsMerging as reason:
                facts = {"version": found.ref, "reason": str(reason)}
                log.warning("an adapter is merged into a copy of its base", extra={"facts": facts})
            load = partial(self._load, found)
            with self._held(found.ref, load, stage) as engine:
                return BoundEngine(engine.open(), engine, engine.loaded.tokenizer)

    def hold(self, engine: Engine) -> BoundEngine:
        """The base of an engine alone, which stays in memory until this is closed. The engine is one that was not let go."""
        with self._lock:
            self._holders[engine.base] += 1
        return BoundEngine(engine.open(), engine, engine.loaded.tokenizer)

    def close(
        self, bound: BoundEngine, *, drain: bool = False, timeout_seconds: float | None = None, keep: bool = False
    ) -> None:
        """Let go of an engine, which ends if nothing else stands on it; `drain` answers first what was taken.

        `keep` leaves the adapter of a version in host memory, as far as there is room.
        """
        adapter = bound.engine.retire(bound.binding, drain=drain, timeout_seconds=timeout_seconds)
        if keep and isinstance(adapter, UnmergedAdapter) and isinstance(bound, Generation):
            self.host.put(adapter)
        self._let_go(bound.engine)

    def _base_apart(self, found: Located, *, merged: bool) -> str | None:
        """The base of an adapter, unless it is to be merged, and of memory modules, which cannot be."""
        is_merged = (merged or self._merge_adapters) and not is_memory_folder(found.folder)
        return None if is_merged else base_under(found, self.home)

    def _bind_unmerged(self, found: Located, base: str, stage: Stage) -> BoundEngine:
        with stage("load"):
            reason = why_merged(found.folder)
            if reason is not None:
                raise NeedsMerging(reason)
        load = partial(self._load, locate(base, self.home))
        with self._held(base, load, stage) as engine:
            if is_memory_folder(found.folder):
                with stage("load"):
                    modules, stands_on = read_memory_folder(found.folder)
                    reader = MemoryOnBase(found.ref, engine.loaded.tokenizer, modules)
                with stage("warm_up"):
                    return BoundEngine(engine.open(reader), engine, reader.tokenizer, memory=stands_on)
            with stage("load"):
                adapter = self.host.take(found.ref) or load_unmerged(found, engine.loaded)
            with stage("warm_up"):
                return BoundEngine(engine.open(adapter), engine, adapter.tokenizer)

    def _load(self, found: Located) -> LoadedModel:
        experts = self._place_of_experts(found)
        return load_located(found, self.home, dtype=self.dtype, device=self.device, experts=experts)

    def _place_of_experts(self, found: Located) -> ExpertPlace | None:
        """Where the experts of a model live while it is served, if not with all other weights."""
        if self._experts_resident is None:
            return None
        weights = down_to_weights(found, self.home)[-1]
        if not is_mixture(load_config(weights.folder, weights.ref)):
            facts = {"version": found.ref, "experts_resident": self._experts_resident}
            log.warning("no mixture whose experts could be streamed: all weights are in memory", extra={"facts": facts})
            return None
        make_folder(self.home.cache)
        return ExpertPlace("disk", self.home.cache, self._experts_resident, learns=False, serves=True)

    @contextmanager
    def _held(self, base: str, load: Callable[[], LoadedModel], stage: Stage) -> Iterator[Engine]:
        """The engine of a base, started if there is none, with one more holder unless the block fails."""
        with self._lock:
            engine = self._engines.get(base)
            if engine is not None:
                self._holders[base] += 1
        if engine is None:
            with stage("load"):
                loaded = apart(load)
            with stage("warm_up"):
                engine = Engine(loaded, base, packed_folder=folder_of(loaded, self.home), **self._engine_settings)
            with self._lock:
                self._engines[base], self._holders[base] = engine, 1
        try:
            yield engine
        except BaseException:
            self._let_go(engine)
            raise

    def _let_go(self, engine: Engine) -> None:
        with self._lock:
            self._holders[engine.base] -= 1
            is_last = not self._holders[engine.base]
            if is_last:
                del self._holders[engine.base], self._engines[engine.base]
        if is_last:
            engine.close()
