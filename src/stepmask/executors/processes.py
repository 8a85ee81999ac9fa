"""`ProcessesExecutor`: the processes of torchrun or Slurm, which all run the same command and share its jobs."""

import atexit
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch.distributed as dist

from stepmask.errors import ClusterError
from stepmask.progress import progress

Job = TypeVar("Job")
Result = TypeVar("Result")


class ProcessesExecutor:
    """Every process does its part of the jobs, and gets the results of all.

        torchrun --nproc-per-node 8 -m stepmask learn …

    Each process has a pipeline of its own, and does whatever is not a job itself; all of them return the same. The rank
    is read from RANK and WORLD_SIZE, or SLURM_PROCID and SLURM_NTASKS; MASTER_ADDR and MASTER_PORT say where they meet.
    A process group that exists already is used as it is, else one is made with gloo.

    Raises:
        ClusterError: This is no such process, or they do not meet.
    """

    def __init__(self) -> None:
        if not dist.is_initialized():
            _meet()
        self.rank, self.workers = dist.get_rank(), dist.get_world_size()

    @property
    def leads(self) -> bool:
        """True for rank 0."""
        return self.rank == 0

    def share(self, value: Any) -> Any:
        """The value itself: every process has made its own."""
        return value

    def map(
        self, function: Callable[[Any, Job], Result], shared: Any, jobs: Sequence[Job], *, title: str
    ) -> Iterator[tuple[int, Result]]:
        """This process's results as they come, and then those of the others; a bar shows rank 0's part.

        An error of any process is raised in all of them, after the others have finished their parts.
        """
        own: list[tuple[int, Result]] = []
        failed: Exception | None = None
        part = range(self.rank, len(jobs), self.workers)
        for index in progress(part, title) if self.leads else part:
            try:
                own.append((index, function(shared, jobs[index])))
            except Exception as error:  # whatever it is, the others must not wait for ever
                failed = error
                break
            yield own[-1]
        for rank, (results, failure) in enumerate(self._gathered((own, failed))):
            if failure is not None:
                raise failure
            if rank != self.rank:
                yield from results

    def union(self, indices: set[int]) -> set[int]:
        """What any process names; all have said so before any goes on."""
        return set().union(*self._gathered(indices))

    def _gathered(self, value: Any) -> list[Any]:
        found: list[Any] = [None] * self.workers
        dist.all_gather_object(found, value)
        return found


def started() -> bool:
    """Whether this process is one of several that torchrun or Slurm has started."""
    return _world() > 1


def local_rank() -> int:
    """Which of the processes on its machine this is."""
    return int(os.environ.get("LOCAL_RANK") or os.environ.get("SLURM_LOCALID") or 0)


def _world() -> int:
    return int(os.environ.get("WORLD_SIZE") or os.environ.get("SLURM_NTASKS") or 0)


def _meet() -> None:
    rank = os.environ.get("RANK") or os.environ.get("SLURM_PROCID")
    try:
        if rank is None or not _world():
            raise ValueError("RANK and WORLD_SIZE are not set")
        dist.init_process_group("gloo", rank=int(rank), world_size=_world())
        atexit.register(dist.destroy_process_group)
    except (ValueError, RuntimeError) as error:
        raise ClusterError(
            given=f"a process that does not meet others ({error})",
            expected="RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT in the environment",
            advice="Start it with torchrun, or set MASTER_ADDR and MASTER_PORT for srun",
        ) from error
