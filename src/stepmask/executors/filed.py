"""Finished jobs in a folder: a killed run, started again, does only what is missing, and ends the same."""

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from stepmask.errors import InvalidRunFolder
from stepmask.executors.local import Executor
from stepmask.files import clear_leftovers, sealed, unsealed, write_whole

log = logging.getLogger(__name__)

Job = TypeVar("Job")
Result = TypeVar("Result")

MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Kind(Generic[Job, Result]):
    """A kind of job.

    Args:
        title: What is done.
        run: Does it; a pure function of what all jobs share and of one job, at the top level of a module.
        name: Of a job's file; equal jobs have equal names, and different ones different names.
        dump: What the file holds of a result.
        load: The same result from it, to the bit.
    """

    title: str
    run: Callable[[Any, Job], Result]
    name: Callable[[Job], str]
    dump: Callable[[Result], str | bytes]
    load: Callable[[bytes], Result]


def finish(
    kind: Kind[Job, Result], shared: Any, jobs: Sequence[Job], executor: Executor, folder: Path | None
) -> list[Result]:
    """The results of all jobs, in their order.

    Args:
        kind: What is done.
        shared: By `executor.share`.
        jobs: The jobs.
        executor: Where they run.
        folder: Results are read from here, and written here as soon as they are there; `None` = nowhere.

    Raises:
        InvalidRunFolder: A file in the folder is damaged.
    """
    if folder:
        clear_leftovers(folder)
    paths = [folder / kind.name(job) for job in jobs] if folder else []
    todo = absent(paths, executor) if folder else list(range(len(jobs)))
    found = {at: kept(paths[at], kind.load) for at in set(range(len(jobs))).difference(todo)}
    if found:
        log.info("%s: %d of %d are done already", kind.title, len(found), len(jobs))
    for place, result in executor.map(kind.run, shared, [jobs[at] for at in todo], title=kind.title):
        found[at := todo[place]] = result
        if paths and not paths[at].exists():
            keep(paths[at], kind.dump(result))
    return [found[at] for at in range(len(jobs))]


def absent(paths: Sequence[Path], executor: Executor) -> list[int]:
    """Which of the files any process of the run lacks, in order."""
    return sorted(executor.union({at for at, path in enumerate(paths) if not path.exists()}))


def keep(path: Path, content: str | bytes) -> None:
    """Write a file that `kept` reads: what it holds, and the hash of that.

    Raises:
        UnwritablePath: It cannot be written.
    """
    write_whole(path, sealed(content))


def kept(path: Path, load: Callable[[bytes], Result]) -> Result:
    """What a file holds that `keep` wrote.

    Args:
        path: The file.
        load: What it holds from its bytes.

    Raises:
        InvalidRunFolder: It cannot be read, or is not to the byte what was written.
    """
    try:
        return load(unsealed(path.read_bytes()))
    except Exception as error:  # whatever the format makes of it
        raise InvalidRunFolder(
            given=f"{path}, which cannot be read ({type(error).__name__}: {error})",
            expected="a file that an earlier run wrote, unchanged",
            advice="Delete it: what it holds is then done again",
        ) from error


def claim(folder: Path, run: Mapping[str, Any]) -> None:
    """Write into a folder what its results are of; refuse a folder with results of something else.

    Args:
        folder: The folder.
        run: Plain JSON values.

    Raises:
        InvalidRunFolder: It holds something else, or does not tell what.
    """
    path, told = folder / MANIFEST, json.loads(json.dumps(run))
    clear_leftovers(folder)
    if not path.exists():
        write_whole(path, json.dumps(told, indent=1))
        return
    held = _manifest(path)
    if held != told:
        differing = sorted(key for key in held.keys() | told.keys() if held.get(key) != told.get(key))
        raise InvalidRunFolder(
            given=f"{folder}, which holds results of another run: {', '.join(differing)} differ",
            expected=f"a new folder, or the run that {MANIFEST} in it describes",
            advice="Choose another folder, or delete this one",
        )


def _manifest(path: Path) -> dict[str, Any]:
    """What a folder says that its results are of."""
    try:
        held = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(held, dict):
            raise TypeError("no object")
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise InvalidRunFolder(
            given=f"{path}, which cannot be read ({type(error).__name__}: {error})",
            expected="what an earlier run wrote: it ties the results beside it to their pipeline",
            advice="Choose another folder, or delete this one: nothing tells any more what its results are of",
        ) from error
    return held
