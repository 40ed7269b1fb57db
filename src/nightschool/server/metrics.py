"""What Prometheus reads at `/metrics`. Every app has a registry of its own, so that two never mix."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, InfoMetricFamily, Metric

from nightschool.server.ports import GenerationPort

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)


class Metrics:
    """Counters and histograms of one app; gauges are read from the slot when they are asked for."""

    def __init__(self, current: Callable[[], GenerationPort | None]) -> None:
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
        registry.register(_SlotGauges(current))

    def render(self) -> bytes:
        """The text format of Prometheus."""
        return generate_latest(self.registry)


class _SlotGauges:
    """What the slot is and does at this moment."""

    def __init__(self, current: Callable[[], GenerationPort | None]) -> None:
        self._current = current

    def collect(self) -> Iterable[Metric]:
        generation = self._current()
        waiting, running = generation.engine.load() if generation is not None else (0, 0)
        yield GaugeMetricFamily("nightschool_model_loaded", "1 if a model is served.", value=float(bool(generation)))
        yield GaugeMetricFamily("nightschool_requests_waiting", "Requests in the queue.", value=waiting)
        yield GaugeMetricFamily("nightschool_rows_running", "Answers being generated.", value=running)
        if generation is not None:
            version = InfoMetricFamily("nightschool_version", "The version that is served.")
            version.add_metric([], {"name": generation.version.name, "version": generation.version.id})
            yield version
