"""Distances between sets of pictures, at equal measured time, with the floor of halves.

`against_peers.py` says what is compared: of every method, at each share of the reference's time, the setting with the
smallest latent error that keeps to it. All draw the same labels or prompts with the same seeds. Of prompted pipelines
it tells how often a picture is nearest to those that the data has for its prompt. Features lie in runs/quality, so
that a killed run goes on where it stopped.
"""

import argparse
import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from hashlib import sha256
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load
from safetensors.torch import save as to_bytes
from torch.nn import functional

from equal_cost import STYLES, title
from equal_cost import read as read_errors
from race import LEARNED, OURS, Race
from results import FOLDER, Row, read_rows, save, table, write_rows
from setting import name_of
from stepmask import MaskSchedule, zoo
from stepmask.denoiser.runtime import apply
from stepmask.denoiser.sampling import Sampling
from stepmask.drawing import blank
from stepmask.drawing import save as save_figure
from stepmask.evaluation.distribution import Features, Measure, best_measure, features_of, floor, joined, read_pictures
from stepmask.evaluation.measure import machine
from stepmask.evaluation.metrics import Images, images_of
from stepmask.files import write_whole
from stepmask.progress import progress

RUNS = Path("runs") / "quality"
BATCH = 16
FIRST_SEED = 10_000
"""Of the pictures; those that tables were learned from and measured on have smaller ones."""

SLACK = 1.03
"""A share of the time is kept up to that: about what medians of one run differ by."""

NEAREST = 10
"""Of the data's pictures, among which one of the prompt's own must be."""

ZOO = Path(__file__).parents[1] / "zoo"

OVERVIEW = """# Sets of pictures

Fréchet distance to the reference's pictures of stepmask / of the best other method, at shares of the reference's
measured time of the denoiser:"""

REFERENCE = ("reference", "")
"""In the place of a method and its setting."""


class Gallery:
    """Pictures of one pipeline and number of steps, as a network sees them."""

    def __init__(self, race: Race, samples: int, measure: Measure) -> None:
        self.race, self.samples, self.measure = race, samples, measure
        self.batches = range(0, samples, BATCH)

    def features(self, method: str, setting: str) -> Features:
        """Of all pictures that a setting of a method draws; of batches that were finished from their files."""
        contender = None if (method, setting) == REFERENCE else self.race.contender(method, setting)
        name = f"{method} {setting}".strip()
        if isinstance(contender, MaskSchedule):
            name += f" {sha256(contender.to_json().encode()).hexdigest()[:12]}"  # it may be learned again
        return joined([self.batch(name, contender, first) for first in progress(self.batches, name)])

    def batch(self, name: str, contender: Any, first: int) -> Features:
        """Of one batch, from its file if it was finished."""
        folder = RUNS / f"{name_of(self.race.pipeline)}-{self.race.steps}" / name
        path = folder / f"{first}-{self.count(first)}.safetensors"
        return kept(path, self.measure, lambda: self.measure.features(self.draw(contender, first)))

    def draw(self, contender: Any, first: int) -> Images:
        """Pictures of one batch: of a table, of so many steps, or of a pipeline with a cache on it."""
        pipe, call = self.race.pipe, {**self.call(first), "output_type": "np"}
        if isinstance(contender, int):
            call["num_inference_steps"] = contender
        elif contender is not None and not isinstance(contender, MaskSchedule):
            pipe = contender
        with apply(pipe, contender) if isinstance(contender, MaskSchedule) else nullcontext():
            images = images_of(Sampling(pipe, call, FIRST_SEED + first)().output)
        assert images is not None
        return images

    def prompts(self) -> list[str]:
        """What each picture was told; none of pipelines that take no prompt."""
        return [prompt for first in self.batches for prompt in self.call(first).get("prompt", ())]

    def call(self, first: int) -> dict[str, Any]:
        """Arguments of one batch."""
        return self.race.call(self.count(first), FIRST_SEED + first, held_out=True)

    def count(self, first: int) -> int:
        """Pictures in the batch that begins there."""
        return min(BATCH, self.samples - first)


def kept(path: Path, measure: Measure, see: Callable[[], Features]) -> Features:
    """Features from a file, or else seen now and kept there."""
    path = path.with_stem(f"{path.stem}-{measure.name.replace(' ', '-')}")
    if not path.exists():
        write_whole(path, to_bytes(see().tensors()))
    return Features.of_tensors(load(path.read_bytes()), measure.name)


def shrunk(images: Images, side: int) -> Images:
    """Square pictures (N, H, H, 3), scaled down by averaging, as the zoo's models see them."""
    size = (len(images), side, images.shape[1] // side, side, images.shape[2] // side, 3)
    return np.asarray(images.reshape(size).mean((2, 4)), dtype=np.float32)


@dataclass(frozen=True)
class Data:
    """Training pictures: all that a file has, with what a model was told of each, and as many as are sampled."""

    every: Features
    captions: list[str]
    some: Features

    @classmethod
    def of(cls, path: Path, measure: Measure, samples: int, side: int) -> "Data":
        """Of a file that `zoo/build_data.py` wrote, at the size that the model was trained at.

        The floor is that of as many pictures as are sampled.
        """
        sys.path.append(str(ZOO))
        from emoji import Emoji

        pictures = (shrunk(batch, side) for batch in progress(read_pictures(path), "data"))
        place = RUNS / "data" / f"{path.stem}-{side}.safetensors"
        every = kept(place, measure, lambda: features_of(measure, pictures))
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


def within(measured: Sequence[Row], share: float) -> list[Row]:
    """Of every method the setting with the smallest latent error that keeps to a share of the reference's time."""
    fitting = [row for row in measured if row["time"] <= SLACK * share]
    methods = sorted({row["method"] for row in fitting})
    return [min((row for row in fitting if row["method"] == name), key=itemgetter("error")) for name in methods]


def rows(gallery: Gallery, measured: Sequence[Row], shares: Sequence[float], data: Data | None) -> Iterator[Row]:
    """Each contender against the reference's pictures and against the training data, share by share."""
    reference = gallery.features(*REFERENCE)
    yield {**_told(1.0, *REFERENCE, 1.0), **beside_data(gallery, reference, data)}
    for share in shares:
        for row in within(measured, share):
            drawn = gallery.features(row["method"], row["setting"])
            found = {f"reference: {name}": value for name, value in gallery.measure.compare(drawn, reference).items()}
            told = _told(share, row["method"], row["setting"], row["time"])
            yield {**told, **found, **beside_data(gallery, drawn, data)}


def beside_data(gallery: Gallery, drawn: Features, data: Data | None) -> Row:
    """What the training data has to say of pictures."""
    if data is None:
        return {}
    prompts = gallery.prompts()
    agreement = {"agreement": data.agreement(drawn, prompts)} if prompts else {}
    return {f"data: {name}": value for name, value in gallery.measure.compare(drawn, data.some).items()} | agreement


def _told(share: float, method: str, setting: str, time: float) -> Row:
    return {"share": share, "method": method, "setting": setting, "time": time}


def distance_of(row: Row) -> float:
    """Fréchet distance to the reference's pictures: the first that is measured."""
    return float(next(value for name, value in row.items() if name.startswith("reference: ")))


def nearest(found: Sequence[Row], share: float, but: Sequence[str] = ()) -> Row:
    """Who is nearest to the reference's pictures at a share of the time, but for some methods."""
    left_out = (*but, REFERENCE[0])
    return min((row for row in found if row["share"] == share and row["method"] not in left_out), key=distance_of)


def overview() -> str:
    """All results for people: in a cell the distance of our pictures / of those of the best other method."""
    known = [(f"zoo:{name}", steps) for steps in (20, 50) for name in zoo.names()]
    cases = [case for case in known if results(*case).exists()]
    found = {case: read(*case) for case in cases}
    shares = sorted({row["share"] for rows in found.values() for row in rows} - {1.0}, reverse=True)
    head = ["", *(f"{share:g}" for share in shares)]
    lines = [[title(case), *(_beside(rows, share) for share in shares)] for case, rows in found.items()]
    pages = ", ".join(f"[{pipeline}, {steps} steps]({results(pipeline, steps).stem}.md)" for pipeline, steps in cases)
    return f"{OVERVIEW}\n\n{table([head, *lines])}\n\nAll methods, machines and floors: {pages}.\n"


def _beside(found: Sequence[Row], share: float) -> str:
    others = nearest(found, share, but=LEARNED)
    ours = next(row for row in found if row["share"] == share and row["method"] == OURS)
    return f"{_short(distance_of(ours))} / {_short(distance_of(others))} {others['method'].split(' (')[0]}"


def results(pipeline: str, steps: int, ending: str = "csv") -> Path:
    """Where all rows lie, and beside them what they come to."""
    return FOLDER / f"quality-{name_of(pipeline)}-{steps}.{ending}"


def read(pipeline: str, steps: int) -> list[Row]:
    """All rows, as they were measured."""
    return read_rows(results(pipeline, steps))


def markdown(found: Sequence[Row], floors: Row, told: str) -> str:
    """For people: a row for each contender, and the floors."""
    names = list(dict.fromkeys(name for row in (*found, floors) for name in row if name != "setting"))
    lines = [names]
    lines += [[_short(row.get(name, "–")) for name in names] for row in found]
    lines.append(["", "halves of one set", "", *(_short(floors.get(name, "–")) for name in names[3:])])
    return f"{told}\n\n{table(lines)}\n"


def plot(found: Sequence[Row], floors: Row, path: Path, title: str) -> None:
    figure = blank(7.0, 4.5)
    axes = figure.subplots()
    methods = sorted({row["method"] for row in found} - {REFERENCE[0]})
    for index, method in enumerate(methods):
        points = sorted((row["time"], distance_of(row)) for row in found if row["method"] == method)
        style = {"linewidth": 2.5, "color": "black"} if method == OURS else STYLES[index % len(STYLES)]
        axes.plot(*zip(*points, strict=True), marker="o", markersize=4, label=method, **style)
    axes.axhline(distance_of(floors), color="grey", linestyle=":", label="halves of the reference")
    axes.set(yscale="log", xlabel="share of the reference's time", ylabel="Fréchet distance", title=title)
    axes.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1.02, 1.0), frameon=False)
    save_figure(figure, path)


def publish(race: Race, found: Sequence[Row], floors: Row, shares: Sequence[float], what: str) -> None:
    """Everything as CSV, as a picture, for people, and with its goal."""
    case = race.pipeline, race.steps
    write_rows(results(*case), found)
    plot(found, floors, results(*case, "png"), f"{race.pipeline}, {race.steps} steps")
    here = ", ".join(f"{key} {value}" for key, value in machine().items())
    told = f"# {race.pipeline}, {race.steps} steps: sets of pictures\n\n{what}; {here}."
    results(*case, "md").write_text(markdown(found, floors, told))
    ahead = {f"{share:g}": nearest(found, share)["method"] for share in shares}
    save(
        results(*case).stem,
        {"what": what, "nearest": ahead, "floors": floors},
        goal="of all methods at equal time, what is learned is nearest to the reference's pictures",
        met=all(method == OURS for method in ahead.values()),
    )
    (FOLDER / "quality.md").write_text(overview())


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--pipeline", default="zoo:dit-emoji")
    arguments.add_argument("--steps", type=int, default=20)
    arguments.add_argument("--samples", type=int, default=512)
    arguments.add_argument("--shares", type=float, nargs="+", default=[0.5, 0.35])
    arguments.add_argument("--data", type=Path, help="what zoo/build_data.py wrote")
    asked = arguments.parse_args()
    logging.disable(logging.WARNING)  # cache-dit says eight lines for each setting
    race, measure = Race(asked.pipeline, asked.steps), best_measure(asked.samples)
    gallery = Gallery(race, asked.samples, measure)
    side = gallery.features(*REFERENCE).size[0]
    data = Data.of(asked.data, measure, asked.samples, side) if asked.data else None
    found = list(rows(gallery, read_errors(asked.pipeline, asked.steps), asked.shares, data))
    floors = {f"reference: {name}": value for name, value in floor(measure, gallery.features(*REFERENCE)).items()}
    if data is not None:
        floors |= {f"data: {name}": value for name, value in floor(measure, data.some).items()}
    publish(race, found, floors, asked.shares, f"{asked.samples} pictures of each method, {measure}")


if __name__ == "__main__":
    main()
