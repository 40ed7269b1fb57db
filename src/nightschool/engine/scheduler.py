"""Which request takes part in the next step, with which of its tokens. No tensors: numbers in, numbers out.

A request waits in a queue, then takes a row of the cache, reads its prompt in chunks, and from then on makes one token a
step, until it is finished or cancelled. Every step takes the next token of all answering rows first, so that a long
prompt delays them by at most one chunk; what is left of the step's tokens is shared among the prompts being read: each
gets an equal part, and what short ones leave goes to the longer ones. An `AdmissionPolicy` says who is next. The adapters
of the rows in use are bounded: who needs one more waits, and others may pass it, but not for ever.

Rows in use are kept dense, 0 … n-1: whoever frees a row makes room for the next request, or else for the last row.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from nightschool.engine.admission import AdmissionPolicy, FirstCome
from nightschool.errors import QueueFull
from nightschool.store.principal import DEFAULT_TENANT

# While many rows answer, prompts still advance by this much a step.
_LEAST_PROMPT_TOKENS = 16
_MOST_RETRY_SECONDS = 60
# A request whose adapter has no place is passed by this many others, at most.
_MOST_PASSED_BY = 16


@dataclass(slots=True)
class ScheduledRequest:
    """A request as the scheduler sees it. `key` is unique; `row` is None while it waits; `adapter` is None without one.

    The first `cached_tokens` of the prompt came with the row; `held_tokens` of prompt and answer are in it.
    """

    key: int
    prompt_tokens: int
    max_new_tokens: int
    tenant: str = DEFAULT_TENANT
    adapter: str | None = None
    passed_by: int = 0
    row: int | None = None
    held_tokens: int = 0
    cached_tokens: int = 0

    @property
    def needed_tokens(self) -> int:
        """Places in the cache that it may come to need."""
        return self.prompt_tokens + self.max_new_tokens

    @property
    def is_answering(self) -> bool:
        return self.held_tokens >= self.prompt_tokens


@dataclass(frozen=True, slots=True)
class Admission:
    """A request gets a row."""

    key: int
    row: int


@dataclass(frozen=True, slots=True)
class Move:
    """Row `source` becomes row `target`, with the `tokens` that it holds."""

    source: int
    target: int
    tokens: int


@dataclass(frozen=True, slots=True)
class Span:
    """Tokens `start` … `start + length - 1` of one request, which go through the model in this step.

    `answers` says whether the token after them is wanted.
    """

    key: int
    row: int
    start: int
    length: int
    answers: bool = True


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One step: one token each of rows that answer, in the order of the rows, and chunks of prompts."""

    decode: tuple[Span, ...] = ()
    prefill: tuple[Span, ...] = ()

    @property
    def spans(self) -> tuple[Span, ...]:
        return self.decode + self.prefill


class Scheduler:
    """Queue, rows and steps of one engine. Not thread-safe.

    Args:
        num_rows: Requests that take part at once, at most.
        queue_limit: Requests that may wait.
        tokens_per_step: Tokens that go through the model in one step, at most, apart from `num_rows`.
        cache_tokens: Places in the cache: rows in use times the longest need among them stays within it, unless only one
            row is in use.
        max_adapters: Different adapters among the rows in use, at most.
        admission: Who of those that wait is next; first come, first served without it.
        clock: Seconds, rising.
    """

    def __init__(
        self,
        *,
        num_rows: int,
        queue_limit: int,
        tokens_per_step: int,
        cache_tokens: int,
        max_adapters: int = 8,
        admission: AdmissionPolicy | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.num_rows = num_rows
        self.queue_limit = queue_limit
        self._tokens_per_step = tokens_per_step
        self._cache_tokens = cache_tokens
        self._max_adapters = max_adapters
        self._admission: AdmissionPolicy = admission or FirstCome()
        self._clock = clock
        self._waiting: dict[int, ScheduledRequest] = {}
        self._running: dict[int, ScheduledRequest] = {}
        self._rows: list[int | None] = [None] * num_rows
        # When the last ones finished, for the answer to "when shall I come back?".
        self._finished_at: deque[float] = deque(maxlen=32)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def is_idle(self) -> bool:
        return not self._waiting and not self._running

    @property
    def longest_need_tokens(self) -> int:
        """What the neediest of the running requests may come to hold; 0 if none runs."""
        return max((request.needed_tokens for request in self._running.values()), default=0)

    def submit(
        self,
        key: int,
        prompt_tokens: int,
        max_new_tokens: int,
        *,
        tenant: str = DEFAULT_TENANT,
        adapter: str | None = None,
    ) -> None:
        """Queue a request.

        Raises:
            QueueFull: If as many wait as may.
        """
        assert key not in self._waiting, f"the key {key} waits already"
        assert key not in self._running, f"the key {key} runs already"
        if len(self._waiting) >= self.queue_limit:
            finished = self._finished_at
            pace = (self._clock() - finished[0]) / len(finished) if finished else 1.0
            raise QueueFull(
                f"{len(self._waiting)} requests wait, and the queue holds {self.queue_limit}. Send this one again later.",
                retry_after_seconds=min(_MOST_RETRY_SECONDS, max(1, math.ceil(pace * len(self._waiting)))),
            )
        present = {other.tenant for others in (self._waiting, self._running) for other in others.values()}
        self._admission.arrived(tenant, present)
        self._waiting[key] = ScheduledRequest(key, prompt_tokens, max_new_tokens, tenant, adapter)

    def finish(self, key: int) -> int | None:
        """Forget a request, finished or cancelled, waiting or running; return the row that it leaves, if it had one."""
        if self._waiting.pop(key, None) is not None:
            return None
        request = self._running.pop(key, None)
        if request is None:
            return None
        assert request.row is not None
        self._rows[request.row] = None
        self._finished_at.append(self._clock())
        return request.row

    def admit(self) -> list[Admission]:
        """Give rows to those who are next, as far as rows, adapters and cache go."""
        admissions = []
        while self._waiting and len(self._running) < self.num_rows:
            request, passed = self._next()
            if request is None:
                break
            need = max(request.needed_tokens, self.longest_need_tokens)
            if self._running and need * (len(self._running) + 1) > self._cache_tokens:
                break
            for other in passed:
                other.passed_by += 1
            del self._waiting[request.key]
            self._admission.served(request.tenant, request.prompt_tokens)
            request.row = self._rows.index(None)
            self._rows[request.row] = request.key
            self._running[request.key] = request
            admissions.append(Admission(request.key, request.row))
        return admissions

    def _next(self) -> tuple[ScheduledRequest | None, list[ScheduledRequest]]:
        """The first whose adapter has a place, and those that it passes."""
        present = {request.adapter for request in self._running.values()} - {None}
        passed: list[ScheduledRequest] = []
        for request in self._admission.order(self._waiting.values()):
            if request.adapter is None or request.adapter in present or len(present) < self._max_adapters:
                return request, passed
            if request.passed_by >= _MOST_PASSED_BY:
                break
            passed.append(request)
        return None, []

    def compact(self) -> list[Move]:
        """Make the rows in use dense by moving the last ones into the holes."""
        moves = []
        count = len(self._running)
        holes = (row for row in range(count) if self._rows[row] is None)
        for source in range(count, self.num_rows):
            key = self._rows[source]
            if key is not None:
                target = next(holes)
                self._rows[target], self._rows[source] = key, None
                self._running[key].row = target
                moves.append(Move(source, target, self._running[key].held_tokens))
        return moves

    def reuse(self, key: int, tokens: int) -> None:
        """Note that the row of a request just admitted holds the first tokens of its prompt already."""
        request = self._running[key]
        assert request.held_tokens == 0
        assert 0 <= tokens < request.prompt_tokens, "the last token of a prompt is always computed"
        request.held_tokens = request.cached_tokens = tokens
        self._admission.served(request.tenant, -tokens)

    def plan(self) -> StepPlan:
        """What goes through the model next; empty if nobody has a row. `advance` says that it did."""
        requests = [self._running[key] for key in self._rows if key is not None]
        decode = tuple(self._span(request, 1) for request in requests if request.is_answering)
        reading = [request for request in requests if not request.is_answering]
        budget = max(self._tokens_per_step - len(decode), _LEAST_PROMPT_TOKENS, len(reading))
        shares = _shares([request.prompt_tokens - request.held_tokens for request in reading], budget)
        prefill = tuple(self._span(request, share) for request, share in zip(reading, shares, strict=True) if share)
        return StepPlan(decode, prefill)

    def advance(self, plan: StepPlan) -> None:
        """Note that a step is done. Requests that were finished meanwhile are passed over."""
        for span in plan.spans:
            request = self._running.get(span.key)
            if request is None:
                continue
            if request.is_answering:  # its prompt was counted when it was admitted
                self._admission.served(request.tenant, span.length)
            request.held_tokens = span.start + span.length

    def _span(self, request: ScheduledRequest, length: int) -> Span:
        assert request.row is not None
        start = request.held_tokens
        return Span(request.key, request.row, start, length, answers=start + length >= request.prompt_tokens)


def _shares(wanted: list[int], budget: int) -> list[int]:
    """Divide a budget equally; what some leave goes to the others. Everybody gets at least 1 if there is that much."""
    shares = [0] * len(wanted)
    open_places = sorted(range(len(wanted)), key=lambda place: wanted[place])
    while open_places:
        place = open_places.pop(0)
        shares[place] = min(wanted[place], -(-budget // (len(open_places) + 1)))
        budget -= shares[place]
    return shares
