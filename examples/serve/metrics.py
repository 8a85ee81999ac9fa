"""`Metrics`: what a server counts, in Prometheus' text format."""

from collections.abc import Callable, Collection
from typing import Literal

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest

from serve.order import Drawn, Order

Outcome = Literal["drawn", "refused", "cancelled", "failed", "turned away"]

SECONDS = (0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200)


class Metrics:
    """What a server counts.

    Args:
        tiers: Their names.
        steps: For which the speed-up is told.
        bare_seconds: Of one sample in so many steps, by the bare pipeline at start-up.
    """

    def __init__(self, tiers: Collection[str], steps: int, bare_seconds: float) -> None:
        self.tiers = tiers
        self.steps = steps
        self.bare_seconds = bare_seconds
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self.requests = Counter(
            "stepmask_requests", "Requests that have ended", ["tier", "outcome"], registry=self.registry
        )
        self.refusals = Counter("stepmask_refusals", "Orders that were refused", ["error"], registry=self.registry)
        self.fallbacks = Counter(
            "stepmask_fallbacks", "Runs of the bare pipeline, by the tier asked for", ["tier"], registry=self.registry
        )
        self.evaluations = Counter(
            "stepmask_evaluations", "Evaluations of the denoiser", ["tier"], registry=self.registry
        )
        self.macs = Counter(
            "stepmask_computed_evaluations",
            "Evaluations that the computed MACs would have been enough for; over stepmask_evaluations the share",
            ["tier"],
            registry=self.registry,
        )
        self.seconds = Histogram(
            "stepmask_seconds",
            "Of a pipeline's call that was not cancelled",
            ["tier"],
            buckets=SECONDS,
            registry=self.registry,
        )
        self.waited = Histogram(
            "stepmask_waited_seconds", "From a request to its run", buckets=SECONDS, registry=self.registry
        )
        self.speedup = Gauge(
            "stepmask_speedup",
            f"Seconds of the bare pipeline for one sample in {steps} steps, measured once at start-up with nothing "
            "beside, over the mean of such runs under the tier, with whatever ran beside them",
            ["tier"],
            registry=self.registry,
        )
        Gauge("stepmask_bare_seconds", f"Of one sample in {steps} steps, at start-up", registry=self.registry).set(
            bare_seconds
        )
        self._compared: dict[str, tuple[float, int]] = {}

    def watch(self, name: str, what: str, tell: Callable[[], float]) -> None:
        """Ask a function for a number whenever somebody reads the metrics."""
        Gauge(f"stepmask_{name}", what, registry=self.registry).set_function(tell)

    def ended(self, order: Order, outcome: Outcome) -> None:
        """A request has ended."""
        known = order.tier if order.tier in self.tiers else "unknown"  # no series for whatever a client makes up
        self.requests.labels(known, outcome).inc()

    def refused(self, error: Exception) -> None:
        """The library has refused an order."""
        self.refusals.labels(type(error).__name__).inc()

    def drawn(self, order: Order, drawn: Drawn) -> None:
        """A run has ended with pictures. The threads of several pipelines may tell of theirs at once."""
        self.evaluations.labels(drawn.tier).inc(drawn.evaluations)
        self.macs.labels(drawn.tier).inc(drawn.evaluations * drawn.macs_share)
        self.seconds.labels(drawn.tier).observe(drawn.seconds)
        if drawn.refusal is not None:
            self.refused(drawn.refusal)
            self.fallbacks.labels(str(order.tier)).inc()
        elif order.steps == self.steps and order.count == 1 and order.guidance is None:
            self._compare(drawn)

    def text(self) -> bytes:
        """All of it, as Prometheus reads it."""
        return generate_latest(self.registry)

    def _compare(self, drawn: Drawn) -> None:
        seconds, runs = self._compared.get(drawn.tier, (0.0, 0))
        self._compared[drawn.tier] = seconds + drawn.seconds, runs + 1
        self.speedup.labels(drawn.tier).set(self.bare_seconds * (runs + 1) / (seconds + drawn.seconds))
