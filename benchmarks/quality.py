"""Distances between sets of pictures: what is learned, fixed intervals and fewer steps, with the floor of real halves.

What is learned comes from `frontier.py`, which leaves its tables in results/schedules. All contenders draw the same
labels or prompts with the same seeds. Of prompted pipelines it also tells how often a picture is nearest to those that
the data has for its prompt. Features lie in runs/quality, so that a killed run goes on where it stopped.
"""

import argparse
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load
from safetensors.torch import save as to_bytes
from torch.nn import functional

from frontier import SCHEDULES
from results import save
from setting import Setting, name_of
from stepmask import MaskSchedule
from stepmask.denoiser.runtime import apply
from stepmask.denoiser.sampling import Sampling
from stepmask.evaluation.distribution import Features, Measure, best_measure, features_of, floor, joined, read_pictures
from stepmask.evaluation.metrics import Images, images_of
from stepmask.files import write_whole
from stepmask.progress import progress
from stepmask.schedule.baselines import fixed_interval
from stepmask.schedule.rectify import lower

RUNS = Path("runs") / "quality"
BATCH = 16
FIRST_SEED = 10_000
"""Of the pictures; those that tables were learned from and measured on have smaller ones."""

NEAREST = 10
"""Of the data's pictures, among which one of the prompt's own must be."""

ZOO = Path(__file__).parents[1] / "zoo"

Contender = MaskSchedule | int | None
"""A table, the reference in fewer steps, or the reference."""


class Gallery(Setting):
    """Pictures of one pipeline and number of steps, as a network sees them."""

    def __init__(self, pipeline: str, steps: int, samples: int, measure: Measure) -> None:
        super().__init__(pipeline, steps)
        self.pipeline, self.samples, self.measure = pipeline, samples, measure

    def contenders(self, shares: list[float]) -> dict[str, Contender]:
        """Ways to sample, by name."""
        found: dict[str, Contender] = {"reference": None}
        for share in shares:
            found[f"fewer steps, {share:g}"] = max(1, int(share * self.steps + 1e-9))
            for order in (1, 2):
                found[f"interval, Taylor {order}, {share:g}"] = fixed_interval(self.full, share, order=order)
            learned = SCHEDULES / name_of(self.pipeline) / f"{self.steps}-{share:g}"
            if learned.exists():
                found[f"learned, {share:g}"] = MaskSchedule.from_pretrained(learned)
        return found

    def features(self, name: str, contender: Contender) -> Features:
        """Of all pictures of a contender."""
        batches = range(0, self.samples, BATCH)
        return joined([self.batch(name, contender, first) for first in progress(batches, name)])

    def batch(self, name: str, contender: Contender, first: int) -> Features:
        """Of one batch, from its file if it was finished."""
        count = min(BATCH, self.samples - first)
        told = contender.to_json() if isinstance(contender, MaskSchedule) else str(contender)
        folder = RUNS / f"{name_of(self.pipeline)}-{self.steps}" / f"{name}-{sha256(told.encode()).hexdigest()[:12]}"
        path, seed = folder / f"{first}-{count}.safetensors", FIRST_SEED + first
        return kept(path, self.measure, lambda: self.measure.features(self.draw(contender, count, seed)))

    def draw(self, contender: Contender, count: int, seed: int) -> Images:
        """Pictures."""
        steps = {"num_inference_steps": contender} if isinstance(contender, int) else {}
        call = {**self.call(count, seed, held_out=True), **steps, "output_type": "np"}
        sampling = Sampling(self.pipe, call, seed)
        with apply(self.pipe, contender) if isinstance(contender, MaskSchedule) else nullcontext():
            images = images_of(sampling().output)
        assert images is not None
        return images

    def prompts(self) -> list[str]:
        """What each picture was told; none of pipelines that take no prompt."""
        batches = range(0, self.samples, BATCH)
        calls = (self.call(min(BATCH, self.samples - first), FIRST_SEED + first, held_out=True) for first in batches)
        return [prompt for call in calls for prompt in call.get("prompt", ())]

    def macs(self, contender: Contender) -> float:
        """Over those of the reference."""
        if isinstance(contender, MaskSchedule):
            return lower(contender).macs_share
        return 1.0 if contender is None else contender / self.steps


def kept(path: Path, measure: Measure, see: Callable[[], Features]) -> Features:
    """Features from a file, or else seen now and kept there."""
    path = path.with_stem(f"{path.stem}-{measure.name.replace(' ', '-')}")
    if not path.exists():
        write_whole(path, to_bytes(see().tensors()))
    return Features.of_tensors(load(path.read_bytes()), measure.name)


@dataclass(frozen=True)
class Data:
    """Training pictures: all that a file has, with what a model was told of each, and as many as are sampled."""

    every: Features
    captions: list[str]
    some: Features

    @classmethod
    def of(cls, path: Path, measure: Measure, samples: int) -> "Data":
        """Of a file that `zoo/build_data.py` wrote; the floor is that of as many pictures as are sampled."""
        sys.path.append(str(ZOO))
        from emoji import Emoji

        pictures = progress(read_pictures(path), "data")
        every = kept(RUNS / "data" / f"{path.stem}.safetensors", measure, lambda: features_of(measure, pictures))
        order = torch.randperm(len(every), generator=torch.Generator().manual_seed(0))
        return cls(every, Emoji.load(path).captions, every.take(order[:samples]))

    def agreement(self, drawn: Features, prompts: Sequence[str]) -> float:
        """Share of pictures that have one of their prompt's among the `NEAREST` of the data, by cosine."""
        likeness = functional.normalize(drawn.values) @ functional.normalize(self.every.values).T
        nearest = likeness.topk(NEAREST).indices.tolist()
        found = [
            prompt in (self.captions[index] for index in row) for prompt, row in zip(prompts, nearest, strict=True)
        ]
        return sum(found) / len(found)


def rows(gallery: Gallery, contenders: Mapping[str, Contender], data: Data | None) -> Iterator[dict[str, Any]]:
    """Each contender against the reference's pictures and against the training data."""
    prompts = gallery.prompts()
    sets = {name: gallery.features(name, contender) for name, contender in contenders.items()}
    for name, found in sets.items():
        row: dict[str, Any] = {"name": name, "macs": gallery.macs(contenders[name])}
        if name != "reference":
            row["to_reference"] = gallery.measure.compare(found, sets["reference"])
        if data is not None:
            row["to_data"] = gallery.measure.compare(found, data.some)
        if data is not None and prompts:
            row["agreement"] = data.agreement(found, prompts)
        yield row
    yield {"name": "halves of the reference", "to_reference": floor(gallery.measure, sets["reference"])}
    if data is not None:
        yield {"name": "halves of the data", "to_data": floor(gallery.measure, data.some)}


def best_is_learned(found: list[dict[str, Any]], shares: list[float]) -> bool:
    """Whether what is learned is nearest to the reference at every share that has it."""
    distances = {row["name"]: row["to_reference"] for row in found if "to_reference" in row}
    at = [{name: value for name, value in distances.items() if name.endswith(f", {share:g}")} for share in shares]
    nearest = [min(here, key=lambda name: next(iter(here[name].values()))) for here in at]  # the distance is first
    return all(name.startswith("learned") for name in nearest)


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--pipeline", default="zoo:dit-emoji")
    arguments.add_argument("--steps", type=int, default=20)
    arguments.add_argument("--samples", type=int, default=2048)
    arguments.add_argument("--shares", type=float, nargs="+", default=[0.5, 0.35, 0.25])
    arguments.add_argument("--data", type=Path, help="what zoo/build_data.py wrote")
    asked = arguments.parse_args()
    gallery = Gallery(asked.pipeline, asked.steps, asked.samples, measure := best_measure(asked.samples))
    data = Data.of(asked.data, measure, asked.samples) if asked.data else None
    found = list(rows(gallery, gallery.contenders(asked.shares), data))
    what = f"{asked.pipeline}, {asked.steps} steps, {asked.samples} samples of each, {measure}"
    save(
        f"quality-{name_of(asked.pipeline)}-{asked.steps}",
        {"what": what, "rows": found},
        goal="of all contenders at a share, what is learned is nearest to the reference's pictures",
        met=best_is_learned(found, asked.shares),
    )


if __name__ == "__main__":
    main()
