"""What the service counts, for Prometheus."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest

from calotype.service.workers import Workers

MEDIA_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)


class Metrics:
    """The meters of one app, in a registry of its own."""

    def __init__(self, workers: Workers) -> None:
        self._registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        self.requests = Counter(
            "calotype_requests", "Answered requests; status 499 is a client that went away.",
            ["path", "status"], registry=registry,
        )  # fmt: skip
        self.seconds = Histogram(
            "calotype_request_seconds", "From a request's head to the end of its answer.",
            ["path"], buckets=_BUCKETS, registry=registry,
        )  # fmt: skip
        self.waited = Histogram(
            "calotype_wait_seconds", "From the end of a body until a worker was free.",
            buckets=_BUCKETS, registry=registry,
        )  # fmt: skip
        self.pixels = Counter("calotype_pixels", "Pixels of coded pictures.", ["path"], registry=registry)
        self.received = Counter("calotype_received_bytes", "Bytes of bodies received.", ["path"], registry=registry)
        self.sent = Counter("calotype_sent_bytes", "Bytes of results.", ["path"], registry=registry)
        self.rejected = Counter("calotype_rejected", "Refused requests by error.", ["error"], registry=registry)
        waiting = Gauge("calotype_queue_depth", "Requests that wait for a worker.", registry=registry)
        waiting.set_function(lambda: workers.waiting)
        running = Gauge("calotype_running", "Requests that are worked on.", registry=registry)
        running.set_function(lambda: workers.running)

    def text(self) -> bytes:
        """All of it in Prometheus' text form."""
        return generate_latest(self._registry)
