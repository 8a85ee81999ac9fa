"""Many samples as a WebDataset: a tar file for each batch, of PNG pictures with what each was told beside it."""

import json
import tarfile
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

from stepmask.denoiser.identity import claim_for, digest
from stepmask.denoiser.runtime import apply
from stepmask.denoiser.sampling import Sampling
from stepmask.evaluation.metrics import Images
from stepmask.evaluation.pictures import pictures_of, png
from stepmask.executors.filed import absent
from stepmask.executors.local import Executor, LocalExecutor
from stepmask.files import as_path, write_whole
from stepmask.schedule.schedule import MaskSchedule


def write_shards(
    pipe: Any,
    calls: Mapping[int, Mapping[str, Any]],
    folder: str | bytes | Path,
    *,
    schedule: MaskSchedule | None = None,
    executor: Executor | None = None,
) -> list[Path]:
    """Draw batches and write each to FOLDER/SEED.tar; those that are there are not drawn again.

        paths = write_shards(pipe, {seed: {"class_labels": [seed] * 8} for seed in range(100)}, "samples")

    Args:
        pipe: A pipeline.
        calls: Arguments of the pipeline by seed, a batch each.
        folder: Where to; it belongs to this pipeline, schedule and calls.
        schedule: What is applied; `None` = nothing, the reference.
        executor: Where batches are drawn; `None` = `LocalExecutor()`.

    Returns:
        The path of each batch.

    Raises:
        ScheduleMismatch: The schedule is for another denoiser or sampler.
        InvalidRunFolder: The folder holds other samples, or arguments have no name (pictures, functions).
        RunError: The pipeline gives no pictures.
        ClusterError: The executor cannot hand out jobs.
        MissingExtra: Pillow is not installed.
    """
    executor, folder = executor or LocalExecutor(), as_path(folder)
    claim_for(pipe, folder, schedule=schedule and digest(schedule.to_json()))
    jobs = [_Batch(seed, dict(call)) for seed, call in calls.items()]
    paths = [folder / job.name for job in jobs]
    todo, shared = absent(paths, executor), executor.share((pipe, schedule))
    for place, content in executor.map(_drawn, shared, [jobs[at] for at in todo], title="sampling"):
        write_whole(paths[todo[place]], content)
    return paths


@dataclass(frozen=True)
class _Batch:
    seed: int
    call: Mapping[str, Any]

    @property
    def name(self) -> str:
        return f"{self.seed:08d}-{digest(self.call)}.tar"


def _drawn(shared: tuple[Any, MaskSchedule | None], batch: _Batch) -> bytes:
    """The tar file of a batch."""
    pipe, schedule = shared
    with apply(pipe, schedule) if schedule else nullcontext():
        images = pictures_of(Sampling(pipe, batch.call, batch.seed)().output)
    return _tar({f"{batch.seed:08d}-{index:04d}.{kind}": content for index, kind, content in _files(batch, images)})


def _files(batch: _Batch, images: Images) -> Iterator[tuple[int, str, bytes]]:
    for index, image in enumerate(images):
        told = {name: _of(value, index, len(images)) for name, value in batch.call.items()}
        yield index, "png", png(image)
        yield index, "json", json.dumps({"seed": batch.seed, **told}, default=str).encode()


def _of(value: Any, index: int, count: int) -> Any:
    """What one sample was told."""
    return value[index] if isinstance(value, list | tuple) and len(value) == count else value


def _tar(contents: Mapping[str, bytes]) -> bytes:
    """The same bytes whenever it is written."""
    buffer = BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, content in contents.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, BytesIO(content))
    return buffer.getvalue()
