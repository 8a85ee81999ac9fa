"""`Executor`, the seam behind which jobs run, and `LocalExecutor`: this process."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from stepmask.progress import progress

Job = TypeVar("Job")
Result = TypeVar("Result")


class Executor(Protocol):
    """Maps a function of the shared and a job over independent jobs, somewhere."""

    @property
    def workers(self) -> int:
        """How many jobs run at once."""

    @property
    def leads(self) -> bool:
        """Whether this process speaks to the user; of those that run the same command only one does."""

    def share(self, value: Any) -> Any:
        """What all jobs need, as `map` takes it: it goes to each worker once, however often `map` is called."""

    def map(
        self, function: Callable[[Any, Job], Result], shared: Any, jobs: Sequence[Job], *, title: str
    ) -> Iterator[tuple[int, Result]]:
        """The index and the result of each job, as soon as it is done.

        Args:
            function: Pure, of the shared value and a job; at the top level of a module, so that it can be sent.
            shared: By `share`.
            jobs: The jobs.
            title: What is done, for the progress bar and for the names of tasks.
        """

    def union(self, indices: set[int]) -> set[int]:
        """What any of the processes that run the same command names."""


@dataclass(frozen=True)
class LocalExecutor:
    """This process, one job after the other; torch uses all cores for each."""

    workers: int = 1
    leads: bool = True

    def share(self, value: Any) -> Any:
        """The value itself."""
        return value

    def map(
        self, function: Callable[[Any, Job], Result], shared: Any, jobs: Sequence[Job], *, title: str
    ) -> Iterator[tuple[int, Result]]:
        """Results in the order of the jobs, with a progress bar on a terminal."""
        shown = progress(jobs, title) if len(jobs) > 1 else jobs  # a single job has a bar of its own, if it needs one
        return ((index, function(shared, job)) for index, job in enumerate(shown))

    def union(self, indices: set[int]) -> set[int]:
        """The indices themselves."""
        return indices
