"""`Pool`: masked pipelines, each in a thread of its own, and the orders that wait for them."""

import logging
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from threading import Condition, Event, Thread
from time import monotonic
from typing import Literal

from serve.masked_pipeline import Cancelled, MaskedPipeline
from serve.metrics import Metrics, Outcome
from serve.order import Drawn, Order
from stepmask.errors import StepmaskError

State = Literal["waiting", "running"]

log = logging.getLogger("serve")


class Full(Exception):
    """As many orders wait as may."""


class Closed(Exception):
    """A pool that takes no orders any more."""


class Taken(Exception):
    """An order with the id of another one that has not ended."""


class Job:
    """An order, and what becomes of it.

    Args:
        order: With all its settings.
    """

    def __init__(self, order: Order) -> None:
        self.order = order
        self.cancelled = Event()
        self.asked = monotonic()
        self.drawn: Future[Drawn] = Future()
        self.drawn.set_running_or_notify_cancel()  # only `Pool.cancel` cancels it


class Pool:
    """Masked pipelines, each in a thread of its own, and the orders that wait for them, first come first served.

    Args:
        pipelines: One each.
        waiting: The most orders that wait.
        metrics: Where all of it is counted.
    """

    def __init__(self, pipelines: Sequence[MaskedPipeline], waiting: int, metrics: Metrics) -> None:
        self.pipelines = pipelines
        self.most_waiting = waiting
        self.metrics = metrics
        self._changed = Condition()
        self._closed = False
        self._waiting: deque[Job] = deque()
        self._jobs: dict[str, Job] = {}  # all that have not ended, by id
        self._threads = [Thread(target=self._work, args=(pipeline,), daemon=True) for pipeline in pipelines]
        self._watch()
        for thread in self._threads:
            thread.start()

    def submit(self, order: Order) -> Job:
        """Have an order wait for its turn.

        Raises:
            Full: Too many wait.
            Closed: The pool has been closed.
            Taken: Its id is that of another one.
        """
        job = Job(order)
        with self._changed:
            try:
                self._check_room(order)
            except (Full, Closed, Taken):
                self.metrics.ended(order, "turned away")
                raise
            self._jobs[order.id] = job
            self._waiting.append(job)
            self._changed.notify()
        return job

    def cancel(self, name: str) -> bool:
        """Cancel an order: one that waits leaves its place, one that is drawn ends with its next step.

        Returns:
            Whether there was such an order.
        """
        with self._changed:
            job = self._jobs.get(name)
            if job is None:
                return False
            job.cancelled.set()
            if job in self._waiting:
                self._waiting.remove(job)
                self._end(job, "cancelled")
                job.drawn.set_exception(Cancelled())
            return True

    def close(self) -> None:
        """Take no orders any more, cancel those that there are, and wait until the threads have ended."""
        self._give_up()
        for thread in self._threads:
            thread.join()
        for pipeline in self.pipelines:
            pipeline.masked.remove()

    def state(self, name: str) -> State | None:
        """Where an order is, by its id; `None` = there is none that has not ended."""
        with self._changed:
            job = self._jobs.get(name)
            if job is None:
                return None
            return "waiting" if job in self._waiting else "running"

    @property
    def waiting(self) -> int:
        """How many orders wait."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """How many orders are drawn now."""
        return len(self._jobs) - len(self._waiting)

    @property
    def is_healthy(self) -> bool:
        """Whether all threads live, and take orders."""
        return not self._closed and all(thread.is_alive() for thread in self._threads)

    def _check_room(self, order: Order) -> None:
        if self._closed:
            raise Closed
        if len(self._waiting) >= self.most_waiting:
            raise Full
        if order.id in self._jobs:
            raise Taken

    def _work(self, pipeline: MaskedPipeline) -> None:
        """Draw one order after the other, until the pool is closed. A pipeline without its schedules draws no more."""
        while pipeline.is_masked and (job := self._next()) is not None:
            self.metrics.waited.observe(monotonic() - job.asked)
            self._draw(pipeline, job)
            del job  # its pictures, or what the error has hold of, are not kept until the next one comes
        if not any(other.is_masked for other in self.pipelines):
            self._give_up()

    def _give_up(self) -> None:
        """Take no orders any more, and cancel those that there are."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
            names = list(self._jobs)
        for name in names:
            self.cancel(name)

    def _next(self) -> Job | None:
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._closed)
            return self._waiting.popleft() if self._waiting else None

    def _draw(self, pipeline: MaskedPipeline, job: Job) -> None:
        """Draw an order, and tell what became of it to whoever waits and to the metrics."""
        try:
            drawn = pipeline.draw(job.order, job.cancelled)
        except Exception as error:
            outcome = _outcome(error)
            if outcome == "failed":
                log.exception("Order %s failed", job.order.id)
            if isinstance(error, StepmaskError):
                self.metrics.refused(error)
            self._end(job, outcome)
            job.drawn.set_exception(error.with_traceback(None))
        else:
            self.metrics.drawn(job.order, drawn)
            self._end(job, "drawn")
            job.drawn.set_result(drawn)

    def _end(self, job: Job, outcome: Outcome) -> None:
        """Forget a job, before whoever waits is told: the id is free then, and all is counted."""
        with self._changed:
            del self._jobs[job.order.id]
        self.metrics.ended(job.order, outcome)

    def _watch(self) -> None:
        """What the metrics ask for themselves."""
        watch = self.metrics.watch
        watch("waiting", "Orders that wait", lambda: self.waiting)
        watch("running", "Orders that are drawn now", lambda: self.running)
        watch("store_bytes", "What the stores hold now", lambda: sum(each.stored_bytes for each in self.pipelines))
        watch(
            "store_peak_bytes",
            "The most that each store has held, all together",
            lambda: sum(each.peak_stored_bytes for each in self.pipelines),
        )


def _outcome(error: Exception) -> Outcome:
    if isinstance(error, Cancelled):
        return "cancelled"
    return "refused" if isinstance(error, StepmaskError) else "failed"
