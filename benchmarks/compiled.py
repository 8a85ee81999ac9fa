"""Masks in compiled denoisers: bare and masked, eager and compiled with Inductor, in turns.

The learned tables of the zoo at a half and .35 of the MACs; and architectures of full size, with random weights and few
steps, under single cells that take half of the time of their compiled blocks. Bare and masked are compiled as a whole
and by their repeated blocks; speed-ups are of the faster one over the faster one. Finished tables lie in runs/compiled,
so that a killed run goes on; those that were not asked for stay in the results as they were.
"""

import argparse
import json
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch

import stepmask
from architectures import ARCHITECTURES
from frontier import SCHEDULES
from full_size import STEPS, scattered
from results import FOLDER, kept, save
from setting import Setting
from stepmask import Budget, MaskSchedule, zoo
from stepmask.denoiser.clock import Clock
from stepmask.denoiser.device import device_of
from stepmask.denoiser.families import denoiser_of
from stepmask.denoiser.identity import digest
from stepmask.denoiser.regions import compile_repeated
from stepmask.denoiser.seam import attached
from stepmask.denoiser.timing import time_blocks
from stepmask.errors import RunError
from stepmask.evaluation.measure import Stopwatch, machine
from stepmask.schedule.baselines import all_reused
from stepmask.schedule.forecasts import WINDOW
from stepmask.schedule.rectify import lower

RUNS = Path("runs") / "compiled"

LEAST = 0.9
"""Of the speed-up that a learned table's MACs promise, over the compiled bare denoiser."""

LEAST_TIMED = 0.95
"""Of the speed-up that a full-size table promises by the times of its blocks."""

MOST_REUSED = 0.5
"""Of its eager time, what a step that reuses all blocks may take."""


class Contender:
    """A pipeline that samples the same pictures every time, bare or masked.

    Args:
        pipe: The pipeline.
        call: Its arguments.
        table: What is applied for each sampling; `None` = nothing.
    """

    def __init__(self, pipe: Any, call: Mapping[str, Any], table: MaskSchedule | None = None) -> None:
        self.pipe = pipe
        self.call = call
        self.table = table

    def seconds(self) -> float:
        """Of the denoiser in one sampling."""
        return sum(self.seconds_each())

    def seconds_each(self) -> list[float]:
        """Of the denoiser in each evaluation of one sampling."""
        denoiser = denoiser_of(self.pipe)
        watch = Stopwatch(Clock(device_of(denoiser)))
        masked = nullcontext() if self.table is None else stepmask.apply(self.pipe, self.table)
        with masked, attached({denoiser: watch}):
            self.pipe(**self.call, generator=torch.Generator().manual_seed(1))
        return watch.clock.seconds(watch.spans)


def compiled_whole(pipe: Any) -> Any:
    """The pipeline, its denoiser compiled as one graph."""
    denoiser_of(pipe).compile()
    return pipe


def compiled_by_regions(pipe: Any, table: MaskSchedule) -> Any:
    """The pipeline, the repeated modules around a table's blocks compiled, as `masked.compile()` does."""
    compile_repeated(denoiser_of(pipe), table.graph.names[:-1], fullgraph=True)
    return pipe


def in_turns(
    make: Callable[[], Any], call: Mapping[str, Any], table: MaskSchedule, promise: float, turns: int
) -> dict[str, Any]:
    """One table: medians of the denoiser's seconds, and speed-ups turn by turn.

    Args:
        make: Makes the pipeline.
        call: Its arguments.
        table: The table.
        promise: The speed-up that it promises.
        turns: How often each is timed.
    """
    eager = make()
    whole = compiled_whole(make())
    regions = compiled_by_regions(make(), table)
    contenders = {
        "bare": Contender(eager, call),
        "bare, compiled": Contender(whole, call),
        "bare, regions compiled": Contender(regions, call),
        "masked": Contender(eager, call, table),
        "masked, regions compiled": Contender(regions, call, table),
    }
    if fits_whole(whole, table):
        contenders["masked, compiled"] = Contender(whole, call, table)
    for contender in contenders.values():
        contender.seconds()  # compiles, and warms up
    rounds = [{name: contender.seconds() for name, contender in contenders.items()} for _ in range(turns)]

    speedups = [_fastest(turn, "bare, ") / _fastest(turn, "masked, ") for turn in rounds]
    return {
        "promise": promise,
        "seconds": {name: median(turn[name] for turn in rounds) for name in contenders},
        "eager_speedup": median(turn["bare"] / turn["masked"] for turn in rounds),
        "speedup_over_compiled": median(speedups),
        "slowest": min(speedups),
        "fastest": max(speedups),
        "over_promise": median(speedups) / promise,
        "turns": turns,
        "machine": machine(),
    }


def fits_whole(pipe: Any, table: MaskSchedule) -> bool:
    """Whether a table has no more different rows than a denoiser may have that is compiled as a whole."""
    try:
        stepmask.apply(pipe, table).remove()
    except RunError:
        return False
    return True


def _fastest(turn: Mapping[str, float], start: str) -> float:
    return min(seconds for name, seconds in turn.items() if name.startswith(start))


def learned(name: str, table: MaskSchedule, samples: int, turns: int) -> dict[str, Any]:
    """A learned table of the zoo."""
    setting = Setting(f"zoo:{name}", table.steps)
    call = setting.call(samples, 1, held_out=True)
    return in_turns(lambda: Setting(f"zoo:{name}", table.steps).pipe, call, table, 1 / lower(table).macs_share, turns)


def full_size(name: str, turns: int) -> dict[str, Any]:
    """Single cells of an architecture of full size, half of the time of its blocks as they are compiled."""
    size = ARCHITECTURES[name]
    call = {**size.call(), "num_inference_steps": STEPS}
    pipe = size.pipeline()
    run = stepmask.record(pipe, seed=0, **call)
    full = MaskSchedule.all_compute(stepmask.trace(pipe, run), run.denoiser, run.sampler)
    timed = time_blocks(compiled_by_regions(pipe, full), run, full.graph, repeats=5)
    table = scattered(MaskSchedule.all_compute(timed, run.denoiser, run.sampler), Budget(time=0.5))
    return in_turns(size.pipeline, call, table, 1 / lower(table).time_share, turns)


def reused(name: str, samples: int, steps: int) -> dict[str, Any]:
    """A step that reuses all blocks, each from three values: milliseconds eager and compiled, and their ratio.

    Args:
        name: Of the zoo's pipeline.
        samples: Drawn at once.
        steps: That are timed, after those that compute.
    """
    setting = Setting(f"zoo:{name}", WINDOW + steps)
    table = all_reused(setting.full, order=WINDOW - 1)
    call = setting.call(samples, 1, held_out=True)
    pipes = {
        "eager": setting.pipe,
        "compiled": compiled_whole(Setting(f"zoo:{name}", WINDOW + steps).pipe),
        "regions compiled": compiled_by_regions(Setting(f"zoo:{name}", WINDOW + steps).pipe, table),
    }
    times = {}
    for told, pipe in pipes.items():
        contender = Contender(pipe, call, table)
        contender.seconds()
        times[told] = 1000 * median(contender.seconds_each()[WINDOW:])
    return {"ms": times, "ratio": min(times["compiled"], times["regions compiled"]) / times["eager"]}


def before() -> dict[str, dict[str, Any]]:
    """What the results say already."""
    path = FOLDER / "compiled.json"
    told = json.loads(path.read_text()) if path.exists() else {}
    return {part: dict(told.get(part, {})) for part in ("learned", "all reused", "full size")}


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--pipelines", nargs="*", default=list(zoo.names()))
    arguments.add_argument("--tables", nargs="*", default=["20-0.5", "20-0.35"])
    arguments.add_argument("--samples", type=int, default=16, help="drawn at once")
    arguments.add_argument("--turns", type=int, default=5)
    arguments.add_argument("--architectures", nargs="*", default=["DiT-XL/2, 256", "PixArt-XL/2, 512"])
    asked = arguments.parse_args()

    found = before()
    for name in asked.pipelines:
        path = RUNS / f"{name}-reused-{asked.samples}.json"
        found["all reused"][name] = kept(path, partial(reused, name, asked.samples, 20))
        for share in asked.tables:
            table = MaskSchedule.from_pretrained(SCHEDULES / name / share)
            path = RUNS / f"{name}-{share}-{digest(table.to_json(), asked.samples, asked.turns)}.json"
            measured = partial(learned, name, table, asked.samples, asked.turns)
            found["learned"][f"{name}, {share}"] = kept(path, measured)
    for name in asked.architectures:
        path = RUNS / f"{name.replace('/', '-')}-{asked.turns}.json"
        found["full size"][name] = kept(path, partial(full_size, name, asked.turns))
    save(
        "compiled",
        {"what": f"{asked.samples} samples at once of the zoo, one at full size; {asked.turns} turns", **found},
        goal=f"over the compiled bare denoiser at least {LEAST} of the speed-up that the MACs promise, at full size "
        f"{LEAST_TIMED} of what the times of compiled blocks promise; a step that reuses all blocks in at most "
        f"{MOST_REUSED} of its eager time",
        met=all(row["over_promise"] >= LEAST for row in found["learned"].values())
        and all(row["over_promise"] >= LEAST_TIMED for row in found["full size"].values())
        and all(step["ratio"] <= MOST_REUSED for step in found["all reused"].values()),
    )


if __name__ == "__main__":
    main()
