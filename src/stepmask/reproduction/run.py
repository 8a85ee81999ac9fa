"""`reproduce`: learn within a recipe's budgets, sample with and without, measure, and set beside what is published.

Everything that is finished lies in a folder: schedules, and a file for each batch of samples with its features and the
time that it took. A killed run, started again, goes on where it stopped; pictures are never kept.
"""

import inspect
import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from math import ceil
from pathlib import Path
from statistics import median
from typing import Any

import torch
from safetensors.torch import load, save

from stepmask import zoo
from stepmask.denoiser.conditioning import Conditioning
from stepmask.denoiser.families import denoiser_of
from stepmask.denoiser.runtime import apply
from stepmask.denoiser.sampling import Sampling
from stepmask.denoiser.seam import attached
from stepmask.denoiser.trajectory import Trajectory, record
from stepmask.errors import InvalidRecipe, RunError
from stepmask.evaluation.distribution import Features, Measure, best_measure, floor, joined
from stepmask.evaluation.measure import Stopwatch, machine
from stepmask.evaluation.metrics import images_of
from stepmask.files import write_whole
from stepmask.learning.learn import Learner, learn
from stepmask.learning.trained import TrainedForecasts
from stepmask.progress import progress
from stepmask.reproduction.outcome import Outcome, Row
from stepmask.reproduction.recipe import Recipe
from stepmask.schedule.file import FILE_NAME
from stepmask.schedule.rectify import lower
from stepmask.schedule.schedule import MaskSchedule

REFERENCE = "reference"
FIRST_SEED = 1000
"""Of the samples that are measured; calibration runs have the seeds from 0 on."""


def load_pipeline(recipe: Recipe, source: str | None = None, device: str = "cpu") -> Any:
    """The pipeline of a recipe, with its sampler, on a device.

    Args:
        recipe: The recipe.
        source: Folder or hub id of another checkpoint than the recipe's.
        device: Of torch.

    Raises:
        InvalidRecipe: No checkpoint is named, or it is a pipeline of another class.
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
    pipe = zoo.load(source, torch_dtype=getattr(torch, recipe.dtype)).to(device)
    if recipe.pipeline not in (None, type(pipe).__name__):
        raise InvalidRecipe(
            given=f"{source}, a {type(pipe).__name__}",
            expected=f"a {recipe.pipeline}, as the recipe says",
            advice="Check the checkpoint",
        )
    zoo.set_sampler(pipe, recipe.sampler.name, recipe.sampler.options)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def reproduce(
    recipe: Recipe,
    pipe: Any,
    folder: str | Path,
    *,
    conditioning: Conditioning | None = None,
    reference: str | Path | None = None,
    measure: Measure | None = None,
    learner: Learner | None = None,
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

    Raises:
        RunError: The folder holds another run.
        InvalidConditioning: The pipeline must be told what to draw.
        InvalidBudget: A budget cannot be reached.
        TooFewSamples: There are too few samples for the measure.
        InvalidPictures: The reference holds no pictures, or those of another size.
    """
    device = str(next(denoiser_of(pipe).parameters()).device)
    return _Reproduction(
        recipe,
        pipe,
        Path(folder),
        conditioning or Conditioning.of(pipe),
        measure or best_measure(recipe.samples.count, device),
        learner or TrainedForecasts(),
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
        found_floor = floor(self.measure, real) if isinstance(real, Features) else {}
        outcome = Outcome(self.recipe, self.measure.name, reference is not None, rows, found_floor, machine())
        write_whole(self.folder / "outcome.json", outcome.to_json())
        return outcome

    def claim(self) -> None:
        """Write what is run into the folder, or refuse one that holds something else."""
        told = {key: value for key, value in asdict(self.recipe).items() if key not in ("published", "notes", "title")}
        source = {"pipeline": type(self.pipe).__name__, "source": str(getattr(self.pipe, "name_or_path", ""))}
        run = {**told, **source, "measure": self.measure.name, "learner": repr(self.learner)}
        text, path = json.dumps(run, indent=1), self.folder / "run.json"
        if not path.exists():
            write_whole(path, text)
        elif path.read_text() != text:
            raise RunError(
                given=f"{self.folder}, which holds another run",
                expected="a new folder, or the run that run.json in it describes",
                advice="Choose another folder, or delete this one",
            )

    def schedules(self) -> dict[str, MaskSchedule]:
        """A schedule for each budget, learned unless it lies in the folder."""
        return {f"budget {budget:g}": self.schedule(budget) for budget in self.recipe.calibration.budgets}

    def schedule(self, budget: float) -> MaskSchedule:
        place = self.folder / "schedules" / f"{budget:g}"
        if not (place / FILE_NAME).exists():
            training = self.folder / "training"
            learned = learn(self.pipe, self.calibration, budget, learner=self.learner, folder=training)
            learned.save_pretrained(place)
        return MaskSchedule.from_pretrained(place)

    @cached_property
    def calibration(self) -> list[Trajectory]:
        """The runs to learn from."""
        told = self.recipe.calibration
        runs = list(_parts(told.samples, told.batch))
        return [
            record(self.pipe, seed=seed, **self.call(self.conditioning.call(size, seed)))
            for seed, (_, size) in enumerate(progress(runs, "recording"))
        ]

    def sampled(self, ways: Mapping[str, MaskSchedule | None]) -> "dict[str, list[_Batch]]":
        """All batches of all ways of sampling, in turns; those in the folder are not drawn again."""
        parts = list(enumerate(_parts(self.recipe.samples.count, self.recipe.samples.batch)))
        found: dict[str, list[_Batch]] = {name: [] for name in ways}
        for (index, (first, size)), name in progress([(part, name) for part in parts for name in ways], "sampling"):
            path = self.folder / "samples" / name.replace(" ", "-") / f"{index:05d}.safetensors"
            if not path.exists():
                sampling = Sampling(self.pipe, self.call(self.told(first, size)), FIRST_SEED + index)
                write_whole(path, self.draw(sampling, ways[name]).to_bytes())
            found[name].append(_Batch.from_bytes(path.read_bytes(), self.measure.name))
        return found

    def draw(self, sampling: Sampling, table: MaskSchedule | None) -> "_Batch":
        stopwatch = Stopwatch()
        with ExitStack() as stack:
            if table is not None:
                stack.enter_context(apply(self.pipe, table))
            stack.enter_context(attached({sampling.denoiser: stopwatch}))
            images = images_of(sampling().output)
        if images is None:
            raise RunError(given="a pipeline without pictures", expected="images", advice="Choose another pipeline")
        return _Batch(self.measure.features(images), stopwatch.seconds)

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
class _Batch:
    """Some samples: their features, and the seconds that they took in the denoiser."""

    features: Features
    seconds: float

    def to_bytes(self) -> bytes:
        return save({**self.features.tensors(), "seconds": torch.tensor(self.seconds, dtype=torch.float64)})

    @classmethod
    def from_bytes(cls, content: bytes, network: str) -> "_Batch":
        found = load(content)
        return cls(Features.of_tensors(found, network), float(found["seconds"]))


def _parts(count: int, batch: int) -> Iterator[tuple[int, int]]:
    """First index and size of each batch."""
    return ((index * batch, min(batch, count - index * batch)) for index in range(ceil(count / batch)))


def _speedup(reference: list[_Batch], masked: list[_Batch]) -> float:
    """Median over batches of the ratio of denoiser times; the first, which warms up, counts only if it is alone."""
    ratios = [full.seconds / part.seconds for full, part in zip(reference, masked, strict=True)]
    return median(ratios[1:] or ratios)
