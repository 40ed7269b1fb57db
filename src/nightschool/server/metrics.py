"""What Prometheus reads at `/metrics`. Every app has a registry of its own, so that two never mix."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily, Metric

from nightschool.layers.expert_streaming.store import ExpertStore
from nightschool.server.served_names import ServedNames

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)


class Metrics:
    """Counters and histograms of one app; gauges are read from the slots when they are asked for."""

    def __init__(self, names: ServedNames) -> None:
        registry = self.registry = CollectorRegistry()
        self.requests = Counter(
            "nightschool_http_requests", "Requests answered.", ["method", "path", "status"], registry=registry
        )
        self.seconds = Histogram(
            "nightschool_http_request_seconds",
            "Seconds until the last byte of an answer.",
            ["path"],
            buckets=_SECONDS,
            registry=registry,
        )
        self.first_token_seconds = Histogram(
            "nightschool_time_to_first_token_seconds",
            "Seconds from the submission of a prompt to its first token, of streamed answers.",
            buckets=_SECONDS,
            registry=registry,
        )
        self.prompt_tokens = Counter("nightschool_prompt_tokens", "Tokens of prompts read.", registry=registry)
        self.generated_tokens = Counter("nightschool_generated_tokens", "Tokens generated.", registry=registry)
        self.refreshes = Counter(
            "nightschool_refreshes",
            "Looks for a promoted version, by outcome: swapped, unchanged or failed.",
            ["outcome"],
            registry=registry,
        )
        self.recordings = Counter(
            "nightschool_recorded_conversations", "Conversations kept, by outcome.", ["outcome"], registry=registry
        )
        for outcome in ("swapped", "unchanged", "failed"):
            self.refreshes.labels(outcome)
        registry.register(_SlotGauges(names))

    def render(self) -> bytes:
        """The text format of Prometheus."""
        return generate_latest(self.registry)


class _SlotGauges:
    """What the slots are and do at this moment."""

    def __init__(self, names: ServedNames) -> None:
        self._names = names

    def collect(self) -> Iterable[Metric]:
        loaded = GaugeMetricFamily("nightschool_model_loaded", "1 if a version of the name is served.", labels=["name"])
        version = InfoMetricFamily("nightschool_version", "The versions that are served.")
        serving = [(slot.name, slot.current) for slot in self._names]
        for name, generation in serving:
            loaded.add_metric([name], float(generation is not None))
            if generation is not None:
                version.add_metric([], {"name": name, "version": generation.version.id})
        yield loaded
        yield version
        loaded_bytes = sum(slot.num_bytes for slot in self._names)
        on_demand = self._names.on_demand
        num_host, host_bytes, num_dropped = self._names.first.host.load()
        evicted = CounterMetricFamily(
            "nightschool_evictions", "Names that left a tier because others needed the room.", labels=["tier"]
        )
        evicted.add_metric(["device"], 0 if on_demand is None else on_demand.num_evicted)
        evicted.add_metric(["host"], num_dropped)
        yield evicted
        adapters = {(id(g.engine), g.binding.adapter) for _, g in serving if g is not None and g.binding.adapter}
        for name, what, value in (
            ("loaded_adapters", "Adapters that are served apart from their base.", len(adapters)),
            ("loaded_bytes", "Weights of the names that are loaded, bases under adapters apart.", loaded_bytes),
            ("host_adapters", "Adapters that left, and are kept in host memory.", num_host),
            ("host_bytes", "What these take.", host_bytes),
        ):
            yield GaugeMetricFamily(f"nightschool_{name}", what, value=value)
        # Names on one base share an engine, which counts once.
        engines = {id(g.engine): g.engine for _, g in serving if g is not None}.values()
        yield from _expert_figures([engine.experts.store for engine in engines if engine.experts is not None])
        loads = [engine.load() for engine in engines]
        yield GaugeMetricFamily(
            "nightschool_requests_waiting", "Requests in the queue.", value=sum(w for w, _ in loads)
        )
        yield GaugeMetricFamily("nightschool_rows_running", "Answers being generated.", value=sum(r for _, r in loads))


def _expert_figures(stores: Sequence[ExpertStore]) -> Iterable[Metric]:
    """What experts that pass by cost: nothing where all of them are in memory."""
    turns = CounterMetricFamily(
        "nightschool_expert_turns",
        "Times that an expert was computed with, by whether it was in memory: hit, or miss.",
        labels=["outcome"],
    )
    for place, outcome in enumerate(("hit", "miss")):
        turns.add_metric([outcome], sum(store.turns[place] for store in stores))
    yield turns
    yield GaugeMetricFamily(
        "nightschool_expert_bytes",
        "What experts that pass by may take in memory.",
        value=sum(store.host_bytes for store in stores),
    )
