"""`RayExecutor`: a cluster. Workers are actors that hold what jobs share; whoever is free takes the next job."""

import logging
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from stepmask.errors import ClusterError
from stepmask.extras import extra
from stepmask.progress import progress

Job = TypeVar("Job")
Result = TypeVar("Result")


@dataclass(eq=False)
class RayExecutor:
    """A Ray cluster; its nodes need stepmask, but no folder in common.

        schedule = stepmask.learn(pipe, trajectories, executor=stepmask.RayExecutor("auto", num_gpus=1))

    The pipeline goes to each node once and is unpacked once in each worker; it is there on the kind of device that it
    is on here. A job whose node dies is done by another one. Workers live as long as the executor.

    Args:
        address: Of the cluster: "auto" = the one that this machine belongs to, "local" = a new one on this machine;
            `None` = whichever of both there is, RAY_ADDRESS first. A connection that is there already is used as it is.
        num_cpus: Reserved for each worker; torch uses as many threads.
        num_gpus: Reserved for each worker.
        retries: How often a job is begun again after its worker died.

    Raises:
        MissingExtra: Ray is not installed.
        ClusterError: The cluster cannot be reached, has no room for a worker, or lost a job too often; or something
            cannot be sent there.
    """

    address: str | None = None
    num_cpus: float = 1
    num_gpus: float = 0
    retries: int = 3
    leads: bool = field(default=True, init=False)
    crew: list[Any] = field(default_factory=list, init=False, repr=False)

    @property
    def workers(self) -> int:
        """How many the cluster has room for now."""
        found = self._ray().cluster_resources()
        rooms = [found.get(name, 0) / each for name, each in (("CPU", self.num_cpus), ("GPU", self.num_gpus)) if each]
        if not rooms or min(rooms) < 1:
            raise ClusterError(
                given=f"a cluster with {found.get('CPU', 0):g} CPUs and {found.get('GPU', 0):g} GPUs",
                expected=f"room for a worker with {self.num_cpus:g} CPUs and {self.num_gpus:g} GPUs",
                advice="Ask for less with num_cpus and num_gpus, or start more nodes",
            )
        return int(min(rooms))

    def share(self, value: Any) -> Any:
        """A reference to a copy in the cluster."""
        try:
            return [self._ray().put(value)]  # in a list, so that Ray hands on the reference and not the value
        except (TypeError, ValueError, AttributeError) as error:  # whatever pickle makes of it
            raise ClusterError(
                given=f"a pipeline that cannot be pickled ({error})",
                expected="one that can be sent to other processes",
                advice="Take hooks, caches and offloading off it, or use LocalExecutor",
            ) from error

    def map(
        self, function: Callable[[Any, Job], Result], shared: Any, jobs: Sequence[Job], *, title: str
    ) -> Iterator[tuple[int, Result]]:
        """Results as they come, with a progress bar on a terminal; tasks are called by title and number."""
        self.crew += [self._hired() for _ in range(min(self.workers, len(jobs)) - len(self.crew))]
        calls = [(f"{title} {index}", function, shared, job) for index, job in enumerate(jobs)]
        with progress(range(len(jobs)), title) as bar:
            for done in self._work(calls):
                yield done
                bar.update()

    def union(self, indices: set[int]) -> set[int]:
        """The indices themselves: one process alone runs the command."""
        return indices

    def _work(self, calls: Sequence[tuple[Any, ...]]) -> Iterator[tuple[int, Any]]:
        """Hand jobs to whoever is free, and those of workers that die to others."""
        waiting, lost, done = deque(range(len(calls))), Counter[int](), 0
        busy: dict[Any, tuple[Any, int | None]] = {worker.ready.remote(): (worker, None) for worker in self.crew}
        while done < len(calls):
            (answer, *_), _ = self._ray().wait(list(busy), num_returns=1)
            worker, index = busy.pop(answer)
            try:
                result = self._result(answer)
            except _Died as death:
                worker = self._replaced(worker)
                busy[worker.ready.remote()] = (worker, None)
                if index is not None:
                    lost[index] += 1
                    self._check(lost[index], death)
                    waiting.appendleft(index)
                continue
            if waiting:
                name, *call = calls[following := waiting.popleft()]
                busy[worker.do.options(name=name).remote(*call)] = (worker, following)
            if index is not None:
                done += 1
                yield index, result

    def _result(self, answer: Any) -> Any:
        """What a worker answered; its own error as it was raised there."""
        from ray.exceptions import RayActorError, RayError, RayTaskError

        try:
            return self._ray().get(answer)
        except RayActorError as error:
            raise _Died(type(error).__name__) from error
        except RayTaskError as error:
            if not isinstance(error.cause, RayError):
                raise error.cause from error
            raise ClusterError(
                given=f"a worker that cannot unpack what it is sent ({str(error.cause).splitlines()[0]})",
                expected="the same packages, and the modules of your own denoiser, on every node",
                advice="Install them there, or pass them to ray.init(runtime_env=...) before",
            ) from error

    def _hired(self) -> Any:
        """A new worker."""
        return self._ray().remote(_Worker).options(num_cpus=self.num_cpus, num_gpus=self.num_gpus).remote()

    def _replaced(self, dead: Any) -> Any:
        """A new worker in the place of one that died; it waits for room, if its node is gone."""
        self.crew[self.crew.index(dead)] = worker = self._hired()
        return worker

    def _check(self, lost: int, death: Exception) -> None:
        if lost > self.retries:
            raise ClusterError(
                given=f"a job that {lost} workers died of ({death})",
                expected="nodes that live long enough to finish a job, with memory enough for it",
                advice="Raise retries or num_cpus; what is finished is kept in the folder, if one was given",
            ) from death

    def _ray(self) -> Any:
        """Ray, connected."""
        with extra("ray", "ray", "a RayExecutor"):
            import ray
        if not ray.is_initialized():
            try:
                ray.init(self.address, logging_level=logging.WARNING, log_to_driver=False)
            except (ConnectionError, ValueError, RuntimeError) as error:
                raise ClusterError(
                    given=f"no Ray cluster at {self.address!r} ({error})",
                    expected="a cluster, started with `ray start`",
                    advice="Check the address, or pass None or 'local' for this machine",
                ) from error
        return ray


class _Died(Exception):
    """A worker is gone, and its job with it."""


class _Worker:
    """What runs on a node, as an actor; it holds the last value that jobs shared."""

    def __init__(self) -> None:
        self.held: tuple[str, Any] = ("", None)

    def ready(self) -> None:
        """Answered as soon as there is room for this worker."""

    def do(self, function: Callable[[Any, Job], Result], shared: list[Any], job: Job) -> Result:
        """Do a job."""
        import ray

        (reference,) = shared
        if self.held[0] != reference.hex():
            self.held = ("", None)  # before the next one comes
            self.held = (reference.hex(), ray.get(reference))
        return function(self.held[1], job)
