"""Many samples as a WebDataset: a tar file for each batch, of PNG pictures with what each was told beside it."""

import json
import tarfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np

from stepmask.denoiser.identity import claim_for, digest
from stepmask.denoiser.runtime import apply
from stepmask.denoiser.sampling import Sampling
from stepmask.errors import MissingExtra, RunError
from stepmask.evaluation.metrics import Images, images_of
from stepmask.executors.local import Executor, LocalExecutor
from stepmask.files import write_whole
from stepmask.schedule.schedule import MaskSchedule


def write_shards(
    pipe: Any,
    calls: Mapping[int, Mapping[str, Any]],
    folder: str | Path,
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
    executor, folder = executor or LocalExecutor(), Path(folder)
    claim_for(pipe, folder, schedule=schedule and digest(schedule.to_json()))
    jobs = [_Batch(seed, dict(call)) for seed, call in calls.items()]
    paths = [folder / job.name for job in jobs]
    missing = sorted(executor.union({at for at, path in enumerate(paths) if not path.exists()}))
    shared, todo = executor.share((pipe, schedule)), [jobs[at] for at in missing]
    for place, content in executor.map(_drawn, shared, todo, title="sampling"):
        write_whole(paths[missing[place]], content)
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
    sampling = Sampling(pipe, batch.call, batch.seed)
    if schedule is None:
        images = images_of(sampling().output)
    else:
        with apply(pipe, schedule):
            images = images_of(sampling().output)
    if images is None:
        raise RunError(given="a pipeline without pictures", expected="images", advice="Choose another pipeline")
    return _tar({f"{batch.seed:08d}-{index:04d}.{kind}": content for index, kind, content in _files(batch, images)})


def _files(batch: _Batch, images: Images) -> Iterator[tuple[int, str, bytes]]:
    for index, image in enumerate(images):
        told = {name: _of(value, index, len(images)) for name, value in batch.call.items()}
        yield index, "png", _png(image)
        yield index, "json", json.dumps({"seed": batch.seed, **told}, default=str).encode()


def _of(value: Any, index: int, count: int) -> Any:
    """What one sample was told."""
    return value[index] if isinstance(value, list | tuple) and len(value) == count else value


def _png(image: Images) -> bytes:
    try:
        from PIL import Image
    except ImportError as error:
        raise MissingExtra(
            given="no Pillow", expected="it, for PNG files", advice="pip install 'stepmask[evaluate]'"
        ) from error
    buffer = BytesIO()
    Image.fromarray((image * 255).round().clip(0, 255).astype(np.uint8)).save(buffer, format="PNG")
    return buffer.getvalue()


def _tar(contents: Mapping[str, bytes]) -> bytes:
    """The same bytes whenever it is written."""
    buffer = BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, content in contents.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, BytesIO(content))
    return buffer.getvalue()
