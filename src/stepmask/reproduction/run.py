"""`reproduce`: learn within a recipe's budgets, sample with and without, measure, and set beside what is published.

Everything that is finished lies in a folder: schedules, and a file for each batch of samples with its features and the
time that it took. A killed run, started again, goes on where it stopped; pictures are never kept.
"""

import inspect
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from math import ceil
from pathlib import Path
from statistics import median
from typing import Any

import torch
from safetensors.torch import load, save

from stepmask import zoo
from stepmask.denoiser.clock import Clock
from stepmask.denoiser.conditioning import Conditioning
from stepmask.denoiser.device import device_of
from stepmask.denoiser.families import denoiser_of
from stepmask.denoiser.identity import weights_of
from stepmask.denoiser.runtime import apply
from stepmask.denoiser.sampling import Sampling
from stepmask.denoiser.seam import attached
from stepmask.denoiser.trajectory import Trajectory, recorded
from stepmask.errors import InvalidRecipe
from stepmask.evaluation.distribution import Features, Measure, best_measure, floor, joined
from stepmask.evaluation.measure import Stopwatch, machine
from stepmask.evaluation.pictures import pictures_of
from stepmask.executors.filed import Kind, absent, claim, finish
from stepmask.executors.local import Executor, LocalExecutor
from stepmask.files import as_path, write_whole
from stepmask.learning.learn import Learner, learn
from stepmask.learning.trained import TrainedForecasts
from stepmask.reproduction.outcome import Outcome, Row
from stepmask.reproduction.recipe import Recipe
from stepmask.schedule.file import FILE_NAME
from stepmask.schedule.rectify import lower
from stepmask.schedule.schedule import MaskSchedule
from stepmask.zoo.loading import Loading

REFERENCE = "reference"
FIRST_SEED = 1000
"""Of the samples that are measured; calibration runs have the seeds from 0 on."""


def load_pipeline(recipe: Recipe, source: str | None = None, device: str | None = "cpu", **options: Any) -> Any:
    """The pipeline of a recipe, in its dtype and with its sampler, on a device.

    Args:
        recipe: The recipe.
        source: Folder or hub id of another checkpoint than the recipe's.
        device: As `Loading` takes it.
        **options: Of `Loading`, all but the dtype.

    Raises:
        InvalidRecipe: No checkpoint is named, or it is a pipeline of another class.
        InvalidLoading: There is no such device, or an option does not go with it or with the checkpoint.
        NoSuchSampler: diffusers has no such scheduler, or it does not take an option.
        PipelineNotFound: Nothing loadable is there.
        MissingExtra: diffusers is not installed, or transformers, for a pipeline with a text encoder.
    """
    if (source := source or recipe.checkpoint) is None:
        raise InvalidRecipe(
            given=f"{recipe.title}, which names no checkpoint",
            expected="a diffusers folder or hub id",
            advice="Pass it as --pipeline; the recipe's notes say which",
        )
    pipe = Loading(device, recipe.dtype, **options).load(source)
    if recipe.pipeline not in (None, type(pipe).__name__):
        raise InvalidRecipe(
            given=f"{source}, a {type(pipe).__name__}",
            expected=f"a {recipe.pipeline}, as the recipe says",
            advice="Check the checkpoint",
        )
    zoo.set_sampler(pipe, recipe.sampler.name, recipe.sampler.options)
    return pipe


def reproduce(
    recipe: Recipe,
    pipe: Any,
    folder: str | bytes | Path,
    *,
    conditioning: Conditioning | None = None,
    reference: str | Path | None = None,
    measure: Measure | None = None,
    learner: Learner | None = None,
    executor: Executor | None = None,
) -> Outcome:
    """Run a recipe.

        recipe = Recipe.read("recipes/ddpm-cifar10.toml")
        print(reproduce(recipe, load_pipeline(recipe), "runs/ddpm-cifar10"))

    Args:
        recipe: The recipe; `dataclasses.replace` makes it smaller.
        pipe: Its pipeline, by `load_pipeline`.
        folder: Where finished work is kept.
        conditioning: Labels or prompts to draw from, each once before any comes again; `None` = the pipeline's own.
        reference: An .npz file of the real pictures, or of their statistics; `None` = the samples of the reference run,
            which has the same seeds.
        measure: What is measured; `None` = the best that this machine can.
        learner: `None` = the default learner.
        executor: Where it learns, samples and looks at pictures; `None` = `LocalExecutor()`.

    Raises:
        InvalidRunFolder: The folder holds another run, or damaged files.
        RunError: The pipeline gives no pictures.
        ClusterError: The executor cannot hand out jobs.
        InvalidConditioning: The pipeline must be told what to draw.
        InvalidBudget: A budget cannot be reached.
        TooFewSamples: There are too few samples for the measure.
        InvalidPictures: The reference holds no pictures, or those of another size.
    """
    device = str(device_of(denoiser_of(pipe)))
    return _Reproduction(
        recipe,
        pipe,
        as_path(folder),
        conditioning or Conditioning.of(pipe),
        measure or best_measure(recipe.samples.count, device),
        learner or TrainedForecasts(),
        executor or LocalExecutor(),
    ).run(reference)


@dataclass(frozen=True)
class _Reproduction:
    """A recipe being run."""

    recipe: Recipe
    pipe: Any
    folder: Path
    conditioning: Conditioning
    measure: Measure
    learner: Learner
    executor: Executor

    def run(self, reference: str | Path | None) -> Outcome:
        self.claim()
        tables = self.schedules()
        batches = self.sampled({REFERENCE: None, **tables})
        sets = {name: joined([batch.features for batch in found]) for name, found in batches.items()}
        real = sets[REFERENCE] if reference is None else self.measure.reference(reference)
        rows = []
        for name, features in sets.items():
            macs = lower(tables[name]).macs_share if name in tables else 1.0
            metrics = {} if features is real else self.measure.compare(features, real)
            rows.append(Row(name, macs, _speedup(batches[REFERENCE], batches[name]), metrics))
        device = device_of(denoiser_of(self.pipe))
        found_floor = floor(self.measure, real) if isinstance(real, Features) else {}
        outcome = Outcome(self.recipe, self.measure.name, reference is not None, rows, found_floor, machine(device))
        write_whole(self.folder / "outcome.json", outcome.to_json())
        return outcome

    def claim(self) -> None:
        """Write what is run into the folder, or refuse one that holds something else."""
        told = {key: value for key, value in asdict(self.recipe).items() if key not in ("published", "notes", "title")}
        pipe = {"pipeline": type(self.pipe).__name__, "weights": weights_of(self.pipe)}
        claim(self.folder, {**told, **pipe, "measure": self.measure.name, "learner": repr(self.learner)})

    def schedules(self) -> dict[str, MaskSchedule]:
        """A schedule for each budget, learned unless it lies in the folder."""
        budgets = self.recipe.calibration.budgets
        places = [self.folder / "schedules" / f"{budget:g}" for budget in budgets]
        for at in absent([place / FILE_NAME for place in places], self.executor):
            self.learn(budgets[at]).save_pretrained(places[at])
        tables = map(MaskSchedule.from_pretrained, places)
        return {f"budget {budget:g}": table for budget, table in zip(budgets, tables, strict=True)}

    def learn(self, budget: float) -> MaskSchedule:
        """A schedule within a budget; what is finished of it is kept, too."""
        folder = self.folder / "training"
        return learn(self.pipe, self.calibration, budget, learner=self.learner, executor=self.executor, folder=folder)

    @cached_property
    def calibration(self) -> list[Trajectory]:
        """The runs to learn from."""
        told = self.recipe.calibration
        sizes = [size for _, size in _parts(told.samples, told.batch)]
        calls = [self.call(self.conditioning.call(size, seed)) for seed, size in enumerate(sizes)]
        return recorded(self.pipe, dict(enumerate(calls)), executor=self.executor)

    def sampled(self, ways: Mapping[str, MaskSchedule | None]) -> "dict[str, list[_Batch]]":
        """All batches of all ways of sampling; those in the folder are not drawn again."""
        parts = enumerate(_parts(self.recipe.samples.count, self.recipe.samples.batch))
        jobs = [_Draw(index, self.call(self.told(first, size))) for index, (first, size) in parts]
        shared = self.executor.share((self.pipe, self.measure, ways))
        kind = Kind("sampling", _drawn, _Draw.name, _dump, partial(_load, self.measure.name))
        batches = finish(kind, shared, jobs, self.executor, self.folder / "samples")
        return {name: [batch[name] for batch in batches] for name in ways}

    def told(self, first: int, size: int) -> dict[str, Any]:
        """What `size` samples from the first on draw: every choice once before any comes again."""
        choices = self.conditioning.choices
        start = first % len(choices) if choices else 0
        return replace(self.conditioning, choices=choices[start:] + choices[:start]).call(size, None)

    def call(self, told: Mapping[str, Any]) -> dict[str, Any]:
        sampler, taken = self.recipe.sampler, inspect.signature(self.pipe.__call__).parameters
        guided = {} if sampler.guidance is None else {"guidance_scale": sampler.guidance}
        pictures = {"output_type": "np"} if "output_type" in taken else {}
        return {**told, **guided, **pictures, "num_inference_steps": sampler.steps}


@dataclass(frozen=True)
class _Draw:
    """A batch to be drawn in every way of sampling: on one machine, for the sake of its times.

    Args:
        index: Of the batch.
        call: Arguments of the pipeline.
    """

    index: int
    call: Mapping[str, Any]

    def name(self) -> str:
        return f"{self.index:05d}.safetensors"


@dataclass(frozen=True)
class _Batch:
    """Some samples: their features, and the seconds that they took in the denoiser."""

    features: Features
    seconds: float


def _drawn(shared: tuple[Any, Measure, Mapping[str, MaskSchedule | None]], job: _Draw) -> dict[str, _Batch]:
    pipe, measure, ways = shared
    sampling = Sampling(pipe, job.call, FIRST_SEED + job.index)
    return {name: _sampled(sampling, table, measure) for name, table in ways.items()}


def _sampled(sampling: Sampling, table: MaskSchedule | None, measure: Measure) -> _Batch:
    stopwatch = Stopwatch(Clock(device_of(sampling.denoiser)))
    with ExitStack() as stack:
        if table is not None:
            stack.enter_context(apply(sampling.pipe, table))
        stack.enter_context(attached(dict.fromkeys(sampling.denoisers, stopwatch)))
        images = pictures_of(sampling().output)
    return _Batch(measure.features(images), stopwatch.seconds)


def _dump(batches: Mapping[str, _Batch]) -> bytes:
    found: dict[str, torch.Tensor] = {}
    for way, batch in batches.items():
        tensors = {**batch.features.tensors(), "seconds": torch.tensor(batch.seconds, dtype=torch.float64)}
        found |= {f"{way}/{name}": tensor for name, tensor in tensors.items()}
    return save(found)


def _load(network: str, content: bytes) -> dict[str, _Batch]:
    by_way: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in load(content).items():
        way, _, name = key.rpartition("/")
        by_way.setdefault(way, {})[name] = tensor
    return {way: _Batch(Features.of_tensors(found, network), float(found["seconds"])) for way, found in by_way.items()}


def _parts(count: int, batch: int) -> Iterator[tuple[int, int]]:
    """First index and size of each batch."""
    return ((index * batch, min(batch, count - index * batch)) for index in range(ceil(count / batch)))


def _speedup(reference: list[_Batch], masked: list[_Batch]) -> float:
    """Median over batches of the ratio of denoiser times; the first, which warms up, counts only if it is alone."""
    ratios = [full.seconds / part.seconds for full, part in zip(reference, masked, strict=True)]
    return median(ratios[1:] or ratios)
