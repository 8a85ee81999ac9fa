"""Where independent jobs run, and how a killed run goes on where it stopped."""

import json
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

import numpy as np
import numpy.typing as npt
from torch import nn

from stepmask.files import write_whole
from stepmask.learning.step import StepJob, learn_step
from stepmask.progress import progress

log = logging.getLogger(__name__)

Job = TypeVar("Job")
Result = TypeVar("Result")


class Executor(Protocol):
    """Maps a pure function over independent jobs."""

    def map(self, function: Callable[[Job], Result], jobs: Sequence[Job], *, title: str) -> Iterator[Result]:
        """Results in the order of the jobs, each as soon as it and those before it are done."""


@dataclass(frozen=True)
class LocalExecutor:
    """This process, one job after the other; torch uses all cores for each."""

    def map(self, function: Callable[[Job], Result], jobs: Sequence[Job], *, title: str) -> Iterator[Result]:
        """Results in order, with a progress bar on a terminal."""
        return map(function, progress(jobs, title))


def learn_rows(
    jobs: Sequence[StepJob], denoiser: nn.Module, executor: Executor, folder: Path | None
) -> npt.NDArray[np.float64]:
    """Scores of all rows, shape (jobs, blocks); with a folder, rows that are there already are not learned again.

    Each row is a small JSON file, named by the content of its job and written whole when the job is done.
    """
    paths = [folder / f"row-{job.step:03d}-{job.digest()}.json" if folder else None for job in jobs]
    rows = [_read(path) if path else None for path in paths]
    missing = [index for index, row in enumerate(rows) if row is None]
    todo = [jobs[index] for index in missing]
    if len(todo) < len(jobs):
        log.info("%d of %d rows are learned already", len(jobs) - len(todo), len(jobs))
    learned = executor.map(lambda job: learn_step(job, denoiser), todo, title="learning rows")
    for index, scores in zip(missing, learned, strict=True):
        rows[index] = scores
        if path := paths[index]:
            write_whole(path, json.dumps({"step": jobs[index].step, "scores": scores.tolist()}))
    return np.array(rows)


def _read(path: Path) -> npt.NDArray[np.float64] | None:
    return np.array(json.loads(path.read_text())["scores"]) if path.exists() else None
