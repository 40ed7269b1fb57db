"""One base that answers many requests at once, token by token, for all bindings that stand on it.

Requests join and leave between any two steps, which run on the thread of all engines (`compute`). The lock guards the
queue and is never held while the model runs.
"""

from __future__ import annotations

import itertools
import logging
import threading
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from nightschool.data.chat.render import stop_token_ids
from nightschool.engine.active import Active, Resident
from nightschool.engine.admission import AdmissionPolicy, FairByTenant
from nightschool.engine.answer import Answer
from nightschool.engine.binding import Binding
from nightschool.engine.capacity import free_bytes
from nightschool.engine.compute import COMPUTE
from nightschool.engine.detokenize import Vocabulary
from nightschool.engine.handle import Handle, Sleeper, wake
from nightschool.engine.memory_table import MemoryOnBase
from nightschool.engine.model_runner import LayerHook, ModelRunner, exact_context
from nightschool.engine.prefix import BLOCK, PrefixCache
from nightschool.engine.request import Chunk, GenerationRequest
from nightschool.engine.sampling import Choice, RowSampling, choose
from nightschool.engine.scheduler import Move, Scheduler, Span, StepPlan
from nightschool.engine.step_context import StepContext
from nightschool.errors import ModelError, NotLoaded, PromptTooLong, UsageError
from nightschool.layers.memory_reading import TokenSource
from nightschool.models.load import LoadedModel
from nightschool.models.memory_modules import MemoryModules
from nightschool.models.streamed import expert_stream
from nightschool.models.unmerged import UnmergedAdapter

log = logging.getLogger("nightschool.engine")

# Of the memory that is free when the engine starts: for keys and values, and for weights in further layouts.
_CACHE_SHARE = 0.25
_LAYOUT_SHARE = 0.125
_PREFIX_BYTES = 256 << 20


class Engine:
    """Continuous batching over one model, and over adapters on it.

    Args:
        loaded: The model and its tokenizer; an adapter that it came with is merged into it.
        base: The reference of these weights, which every binding that is answered here names.
        num_rows: Answers that grow at once, at most.
        context_tokens: Longest prompt and answer together; the model's own by default, and never more than it, or than
            what `runner.exact_context` says.
        queue_limit: Requests that may wait.
        prefix_cache: Whether beginnings that were read before are kept.
        prefix_cache_bytes: How much of them.
        tokens_per_step: Tokens of prompts that are read between two tokens of the answers, about.
        max_adapters: Different adapters among the answers in the making, at most.
        admission: Makes the policy that says who of those that wait is next: fair between tenants by default.
        cache_bytes: Keys and values of the answers in the making, at most, unless a single one needs more; by default a
            quarter of what is free at start.
        packed_folder: Where packed weights are kept for the next load; see `packed_cache.folder_of`.

    Raises:
        ModelError: If the model is none that the engine can serve.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        base: str,
        *,
        num_rows: int = 16,
        context_tokens: int | None = None,
        queue_limit: int = 256,
        prefix_cache: bool = True,
        prefix_cache_bytes: int = _PREFIX_BYTES,
        tokens_per_step: int = 512,
        max_adapters: int = 8,
        admission: Callable[[], AdmissionPolicy] = FairByTenant,
        cache_bytes: int | None = None,
        packed_folder: Path | None = None,
    ) -> None:
        limits = {"num_rows": num_rows, "queue_limit": queue_limit, "tokens_per_step": tokens_per_step}
        limits["max_adapters"] = max_adapters
        for name, value in limits.items():
            if value < 1:
                raise UsageError(f"{name} is {value}, and an engine needs at least 1. Raise it.")
        if loaded.adapter:
            raise ModelError(f"The adapter of {base} is kept apart. Load it with merge=True to serve it.")
        self.loaded = loaded
        self.base = base
        exact_tokens = exact_context(loaded.model.config)
        self.context_tokens = min(context_tokens or loaded.context_tokens, loaded.context_tokens, exact_tokens)
        self._residents: dict[str | None, Resident] = {}
        self.experts = expert_stream(loaded.model)
        weights = sum(parameter.nbytes for parameter in loaded.model.parameters())
        weights += 0 if self.experts is None else self.experts.store.host_bytes
        self._residents[None] = self._resident(0, loaded.tokenizer, weights)
        free = free_bytes(next(loaded.model.parameters()).device)
        self._runner = ModelRunner(loaded.model, layout_bytes=int(free * _LAYOUT_SHARE), packed_folder=packed_folder)
        facts = {"base": base, "layers": self._runner.layouts}
        log.info("layers with weights in a faster layout", extra={"facts": facts})
        cache = self._runner.make_cache(num_rows, 1)
        budget_bytes = cache_bytes or free * _CACHE_SHARE
        budget_tokens = max(1, int(budget_bytes / cache.bytes_per_token))
        self._cache = self._runner.make_cache(num_rows, budget_tokens)
        self._prefix = PrefixCache(prefix_cache_bytes) if prefix_cache else None
        self._scheduler = Scheduler(
            num_rows=num_rows,
            queue_limit=queue_limit,
            tokens_per_step=tokens_per_step,
            cache_tokens=budget_tokens,
            max_adapters=max_adapters,
            admission=admission(),
        )
        self._keys = itertools.count()
        self._active: dict[int, Active] = {}
        self._cancelled: list[int] = []
        self._sleepers: list[Sleeper] = []
        self._state = "open"
        self._lock = threading.Lock()
        self._answered = threading.Condition(self._lock)
        self._ended = threading.Event()
        # Whether it has taken a step: the first one is slow.
        self.is_warm = False
        COMPUTE.add(self)

    @property
    def binding(self) -> Binding:
        """Of requests to the base alone, by the default tenant."""
        return Binding(self.base)

    def open(self, adapter: UnmergedAdapter | MemoryOnBase | None = None) -> Binding:
        """Answer with an adapter, or with memory modules, from now on; without, with the base alone, as it does from the start.

        It does so until everybody who opened it has retired it.

        Raises:
            NeedsMerging: If the model has a layer that cannot have the adapter unmerged, with the reason.
            ModelError: If the memory modules were made for another base.
        """
        binding = Binding(self.base, adapter.ref if adapter is not None else None)
        with self._lock:
            resident = self._residents.get(binding.adapter)
            if resident is not None:
                resident.is_open = True
                resident.num_holders += 1
                self._answered.notify_all()
                return binding
        assert adapter is not None, "the base alone is always known"
        if isinstance(adapter, MemoryOnBase):
            memory = self._runner.add_memory(adapter.modules)
            resident = self._resident(0, adapter.tokenizer, adapter.num_bytes, memory)
        else:
            number = self._runner.add_adapter(adapter.weights)
            resident = self._resident(number, adapter.tokenizer, adapter.weights.num_bytes)
        resident.num_holders = 1
        with self._lock:
            self._residents[binding.adapter] = resident
        return binding

    def retire(
        self, binding: Binding, *, drain: bool = True, timeout_seconds: float | None = None
    ) -> UnmergedAdapter | MemoryOnBase | None:
        """Take no more requests of a binding, whoever the tenant, and let its adapter go once all are answered.

        While others hold it open, nothing changes. Returns the adapter that has gone; None where none has.

        Args:
            binding: One that `open` returned.
            drain: Whether requests that were taken are answered first; else they end as cancelled.
            timeout_seconds: How long draining may take, before the rest is cancelled.
        """
        with self._lock:
            resident = self._residents[binding.adapter]
            resident.num_holders = max(0, resident.num_holders - 1)
            if resident.num_holders:
                return None
            resident.is_open = False

            def is_over() -> bool:
                return resident.is_open or not resident.num_active

            if not drain or not self._answered.wait_for(is_over, timeout_seconds):
                self._cancelled += [key for key, active in self._active.items() if active.resident is resident]
        # Not under the lock: `has_work` takes it while the compute thread holds its own.
        COMPUTE.wake()
        with self._lock:
            self._answered.wait_for(is_over)
            if resident.is_open or binding.adapter is None or self._residents.get(binding.adapter) is not resident:
                return None
            del self._residents[binding.adapter]
        gone: UnmergedAdapter | MemoryOnBase
        if resident.memory is not None:
            gone = MemoryOnBase(binding.adapter, resident.tokenizer, self._runner.remove_memory(resident.memory))
        else:
            weights = self._runner.remove_adapter(resident.number)
            gone = UnmergedAdapter(binding.adapter, resident.tokenizer, weights)
        if self._prefix is not None:
            COMPUTE.call(partial(self._prefix.drop, binding.adapter))
        return gone

    def _resident(
        self, number: int, tokenizer: PreTrainedTokenizerBase, num_bytes: int, memory: int | None = None
    ) -> Resident:
        generation_config = getattr(self.loaded.model, "generation_config", None)
        # A copy, because others come and go meanwhile.
        alike = (one.vocabulary for one in list(self._residents.values()) if one.tokenizer is tokenizer)
        vocabulary = next(alike, None) or Vocabulary(tokenizer)
        stop_ids = stop_token_ids(tokenizer, generation_config)
        return Resident(number, tokenizer, vocabulary, stop_ids, num_bytes, memory)

    def submit(self, request: GenerationRequest) -> Handle:
        """Queue a request. May be called from any thread.

        Raises:
            PromptTooLong: If prompt and answer do not fit the context.
            UsageError: If a token id is not in the vocabulary.
            QueueFull: If too many wait.
            NotLoaded: If the engine is closed, or does not answer for this binding.
        """
        label, prompt_tokens, most = request.binding.label, len(request.prompt_ids), request.params.max_new_tokens
        if prompt_tokens + most > self.context_tokens:
            raise PromptTooLong(prompt_tokens, most, self.context_tokens)
        lowest, highest = min(request.prompt_ids), max(request.prompt_ids)
        if lowest < 0 or highest >= self._runner.vocab_size:
            wrong = lowest if lowest < 0 else highest
            raise UsageError(
                f"The prompt has the token id {wrong}, and the vocabulary of {label} has "
                f"{self._runner.vocab_size} tokens. Use the tokenizer of this model."
            )
        key = next(self._keys)
        handle = Handle(request, lambda: self._cancel(key))
        sampling = RowSampling(request.params, request.prompt_ids, self._runner.vocab_size, self._runner.device)
        with self._lock:
            binding = request.binding
            resident = self._residents.get(binding.adapter) if binding.base == self.base else None
            if self._state != "open" or resident is None or not resident.is_open:
                raise NotLoaded(f"{label} takes no more requests. Send this one to the version that is served.")
            answer = Answer(request, resident.vocabulary, resident.stop_ids)
            self._scheduler.submit(key, prompt_tokens, most, tenant=binding.tenant, adapter=binding.adapter)
            self._active[key] = Active(key, resident, handle, list(request.prompt_ids), answer, sampling)
            resident.num_active += 1
        COMPUTE.wake()
        return handle

    def memory_modules(self, binding: Binding) -> MemoryModules | None:
        """What a binding reads memories with; None if it reads none."""
        with self._lock:
            resident = self._residents.get(binding.adapter)
            return None if resident is None or resident.memory is None else self._runner.memory(resident.memory)

    def log_probs(self, binding: Binding, prompt_ids: Sequence[int], answer_ids: Sequence[int]) -> Tensor:
        """Log-probabilities [A] of A tokens that are given, by what answers for a binding; no memory is read in its layers.

        Raises:
            NotLoaded: If the engine answers for it no more.
        """

        def turn() -> Tensor:
            with self._lock:
                resident = self._residents.get(binding.adapter) if binding.base == self.base else None
            if resident is None:
                raise NotLoaded(f"{binding.label} is no longer served, so it cannot say why. Ask again.")
            return self._runner.log_probs(prompt_ids, answer_ids, resident.number)

        return COMPUTE.call(turn)

    def capture(self, layer: str, hook: LayerHook) -> Callable[[], None]:
        """See what a layer computes in every step; see `ModelRunner.capture`. Returns how to stop that."""
        return self._runner.capture(layer, hook)

    def load(self) -> tuple[int, int]:
        """How many requests wait, and how many are being answered."""
        with self._lock:
            return self._scheduler.num_waiting, self._scheduler.num_running

    def num_bytes(self, binding: Binding) -> int:
        """What the weights of a base, or of an adapter alone, take."""
        with self._lock:
            resident = self._residents.get(binding.adapter)
            return resident.num_bytes if resident is not None else 0

    def num_active(self, binding: Binding) -> int:
        """How many requests to a base or an adapter are not yet answered, whoever the tenant."""
        with self._lock:
            resident = self._residents.get(binding.adapter)
            return resident.num_active if resident is not None else 0

    def close(self, *, drain: bool = False, timeout_seconds: float | None = None) -> None:
        """Take no more requests, and end.

        Args:
            drain: Whether requests that were taken are answered first; else they end as cancelled.
            timeout_seconds: How long draining may take, before the rest is cancelled.
        """
        with self._lock:
            if self._state == "open":
                self._state = "draining" if drain else "closing"
            elif not drain:
                self._state = "closing"
        COMPUTE.wake()
        if not self._ended.wait(timeout_seconds):
            with self._lock:
                self._state = "closing"
            COMPUTE.wake()
            self._ended.wait()

    def _cancel(self, key: int) -> None:
        with self._lock:
            if key in self._active:
                self._cancelled.append(key)
        COMPUTE.wake()

    # What follows runs on the thread of all engines.

    def forget_entries(self) -> None:
        """Let go of what is kept of entries of memories: their states, and prompts, which may have their words."""
        self._runner.forget_entries()
        if self._prefix is not None:
            self._prefix.clear()

    def has_work(self) -> bool:
        """Whether there is something to do. For `compute`."""
        with self._lock:
            return bool(self._cancelled) or not self._scheduler.is_idle or self._state != "open"

    def turn(self) -> bool:
        """Take one step; False when all is answered after `close`. For `compute`."""
        try:
            self._step()
        except Exception as error:
            # A mistake of ours, not of a request: nobody may wait for ever, and the next request may succeed.
            log.exception("a step of the engine failed", extra={"facts": {"base": self.base}})
            self._fail_all(error)
        sleepers, self._sleepers = self._sleepers, []
        wake(sleepers)
        with self._lock:
            return self._state == "open" or bool(self._active)

    def leave(self) -> None:
        """Give the memory back and let `close` return. For `compute`."""
        self._cache.release()
        self._ended.set()

    def _step(self) -> None:
        with self._lock:
            cancelled, self._cancelled = self._cancelled, []
            if self._state == "closing":
                cancelled = list(self._active)
            gone = [self._forget(self._active[key]) for key in dict.fromkeys(cancelled) if key in self._active]
            admissions = self._scheduler.admit()
            moves = self._scheduler.compact()
        for active in gone:
            self._publish(active, active.answer.end("cancelled"))
        self._arrange(moves)
        for admission in admissions:
            self._reuse(admission.key, admission.row)
        self._encode(self._active[admission.key] for admission in admissions)
        with self._lock:
            plan = self._scheduler.plan()
        if plan.spans:
            self._answer(plan)
            self.is_warm = True

    def _arrange(self, moves: Sequence[Move]) -> None:
        """Bring the cache into the shape that the scheduler has in mind."""
        for move in moves:
            self._cache.move(move.source, move.target, move.tokens)
        if self._scheduler.num_running:
            self._cache.ensure(self._scheduler.num_running, self._scheduler.longest_need_tokens)

    def _reuse(self, key: int, row: int) -> None:
        """Fill a new row with what is known of its prompt."""
        if self._prefix is None:
            return
        active = self._active[key]
        blocks = self._prefix.match(active.prefix_binding, active.token_ids)
        for index, pieces in enumerate(blocks):
            self._cache.write(row, index * BLOCK, pieces)
        active.answer.cached_tokens = len(blocks) * BLOCK
        with self._lock:
            self._scheduler.reuse(key, len(blocks) * BLOCK)

    def _encode(self, admitted: Iterable[Active]) -> None:
        """Make what new requests read ready to be read; one whose entries cannot be ends."""
        reading = [(active, active.reading) for active in admitted if active.reading is not None]
        try:
            self._runner.encode([found for _, found in reading])
        except Exception as error:
            log.exception("entries of a memory could not be read", extra={"facts": {"base": self.base}})
            for active, _ in reading:
                self._fail(active.key, error)

    def _answer(self, plan: StepPlan) -> None:
        """Run a planned step and hand out its tokens."""
        context = self._context_of(plan)
        try:
            choices, sources = self._choose(plan, context)
        except Exception as error:
            if len(plan.spans) > 1:
                # Keys and values are only written where they belong, so the step can be repeated one by one.
                for span in plan.spans:
                    self._answer(StepPlan((span,), ()) if span in plan.decode else StepPlan((), (span,)))
                return
            log.exception("a request failed", extra={"facts": {"base": self.base}})
            self._fail(plan.spans[0].key, error)
            return
        with self._lock:
            self._scheduler.advance(plan)
        answering = [span for span in plan.spans if span.answers]
        for span, choice in zip(answering, choices, strict=True):
            try:
                self._hand_out(span, choice, sources.get(span.key))
            except Exception as error:
                log.exception("a request failed", extra={"facts": {"base": self.base}})
                if span.key in self._active:
                    self._fail(span.key, error)

    def _context_of(self, plan: StepPlan) -> StepContext:
        active = [self._active[span.key] for span in plan.spans]
        return StepContext(
            plan.spans,
            tuple(one.binding for one in active),
            tuple(one.resident.number for one in active),
            {one.key: one.reading for one in active if one.reading is not None},
        )

    def _choose(self, plan: StepPlan, context: StepContext) -> tuple[list[Choice], dict[int, TokenSource]]:
        """The next token of each answer, and by its key where it came from, if that is wanted and known."""
        logits = self._runner.run(plan, self._cache, self._tokens_of, context)
        keys = [span.key for span in plan.spans if span.answers]
        choices = choose(logits, [self._active[key].sampling for key in keys]) if keys else []
        sources = {}
        for row, (key, choice) in enumerate(zip(keys, choices, strict=True)):
            if key in context.sources and self._active[key].handle.request.wants_sources:
                log_prob = float(logits[row].float().log_softmax(-1)[choice.token_id])
                sources[key] = context.sources[key](choice.token_id, log_prob)
        return choices, sources

    def _tokens_of(self, span: Span) -> Sequence[int]:
        return self._active[span.key].token_ids[span.start : span.start + span.length]

    def _hand_out(self, span: Span, choice: Choice, source: TokenSource | None) -> None:
        """Give one token to its request, and end the request if it was the last."""
        active = self._active[span.key]
        if not choice.is_finite:
            self._cache.clear(span.row)
            self._fail(
                span.key,
                ModelError(f"{active.binding.label} computed no finite number. Roll back to another version."),
            )
            return
        if span.start < len(active.handle.request.prompt_ids):
            self._keep(active, span.row, span.start + span.length)
        active.token_ids.append(choice.token_id)
        active.sampling.note(choice.token_id)
        chunk = active.answer.add(choice.token_id, choice.logprob, source)
        if chunk.finish_reason is not None:
            self._keep(active, span.row, span.start + span.length)
            self._leave(active, chunk)
        else:
            self._publish(active, chunk)

    def _keep(self, active: Active, row: int, tokens: int) -> None:
        """Put the first tokens of a row into the prefix cache, as far as no memory was read for them."""
        reading = active.reading
        if reading is not None:
            tokens = min(tokens, reading.start)
        if self._prefix is not None and active.handle.request.keeps_prefix:
            read = partial(self._cache.read, row)
            self._prefix.insert(active.prefix_binding, active.token_ids[:tokens], read)

    def _fail(self, key: int, error: Exception) -> None:
        active = self._active[key]
        self._leave(active, active.answer.end("error", str(error) or type(error).__name__))

    def _fail_all(self, error: Exception) -> None:
        for key in list(self._active):
            self._fail(key, error)

    def _publish(self, active: Active, chunk: Chunk) -> None:
        self._sleepers += active.handle.publish(chunk)

    def _leave(self, active: Active, chunk: Chunk) -> None:
        with self._lock:
            self._forget(active)
        self._publish(active, chunk)

    def _forget(self, active: Active) -> Active:
        """Free what a request holds; the lock is held."""
        self._scheduler.finish(active.key)
        del self._active[active.key]
        active.resident.num_active -= 1
        if not active.resident.num_active:
            self._answered.notify_all()
        return active
