# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""What the server counts, for Prometheus."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CONTENT_TYPE_LATEST as CONTENT_TYPE
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest

SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)  # upper ends of the histograms' buckets
SIZES = (1, 2, 4, 8, 16, 32, 64)


class Metrics:
    """Counters of one server.

    Args:
        gauges (`dict[str, tuple[str, Callable[[], float]]]`): Name -> what it says, and how it is read when asked for.
    """

    def __init__(self, gauges: dict[str, tuple[str, Callable[[], float]]]):
        self.registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)  # memory, processor time and open files
        self._requests = Counter("segcompass_requests", "Requests answered.", ["status"], registry=registry)
        self._request_seconds = Histogram(
            "segcompass_request_seconds", "From a request's head to its answer.", buckets=SECONDS, registry=registry
        )
        self._batch_questions = Histogram(
            "segcompass_batch_questions", "Questions answered together.", buckets=SIZES, registry=registry
        )
        self._batch_seconds = Histogram(
            "segcompass_batch_seconds", "Of the model, per batch.", buckets=SECONDS, registry=registry
        )
        for name, (says, read) in gauges.items():
            Gauge(f"segcompass_{name}", says, registry=registry).set_function(read)

    def count_request(self, status: int, seconds: float) -> None:
        """Count a request that was answered or refused."""
        self._requests.labels(status).inc()
        self._request_seconds.observe(seconds)

    def count_batch(self, questions: int, seconds: float) -> None:
        """Count a batch of the model."""
        self._batch_questions.observe(questions)
        self._batch_seconds.observe(seconds)

    def text(self) -> bytes:
        """All of it in Prometheus' text format, of type `CONTENT_TYPE`."""
        return generate_latest(self.registry)


__all__ = ["CONTENT_TYPE", "Metrics"]
