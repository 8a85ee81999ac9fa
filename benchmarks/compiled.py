"""Masks in compiled denoisers: bare and masked, eager and compiled with Inductor, in turns.

Every contender has a pipeline of its own, so that no compiled graph serves two of them. The bare denoiser is compiled
as a whole and by its repeated blocks; speed-ups over the compiled one are over the faster of the two. Finished tables
lie in runs/compiled, so that a killed run goes on where it stopped.
"""

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch

import stepmask
from frontier import SCHEDULES
from results import kept, save
from setting import Setting
from stepmask import MaskSchedule, zoo
from stepmask.denoiser.clock import Clock
from stepmask.denoiser.device import device_of
from stepmask.denoiser.families import denoiser_of
from stepmask.denoiser.identity import digest
from stepmask.denoiser.regions import modules_by_name, repeated_regions
from stepmask.denoiser.seam import attached
from stepmask.evaluation.measure import Stopwatch, machine
from stepmask.schedule.baselines import all_reused
from stepmask.schedule.forecasts import WINDOW
from stepmask.schedule.rectify import lower

RUNS = Path("runs") / "compiled"

LEAST = 0.9
"""Of the speed-up that a learned table's MACs promise, over the compiled bare denoiser."""

MOST_REUSED = 0.5
"""Of its eager time, what a step that reuses all blocks may take."""


class Contender:
    """A pipeline that samples the same pictures every time, bare or masked.

    Args:
        setting: The pipeline and its steps.
        samples: Drawn at once.
        table: What is applied; `None` = nothing.
        compiles: Compiles the denoiser of a pipeline; `None` = it stays as it is.
    """

    def __init__(
        self, setting: Setting, samples: int, table: MaskSchedule | None, compiles: Callable[[Any], None] | None
    ) -> None:
        self.pipe = setting.pipe
        self.call = setting.call(samples, 1, held_out=True)
        self.table = table
        if compiles is not None:
            compiles(self.pipe)

    def seconds(self) -> float:
        """Of the denoiser in one sampling."""
        return sum(self.seconds_each())

    def seconds_each(self) -> list[float]:
        """Of the denoiser in each evaluation of one sampling."""
        watch = Stopwatch(Clock(device_of(denoiser_of(self.pipe))))
        with self._masked(), attached({denoiser_of(self.pipe): watch}):
            self.pipe(**self.call, generator=torch.Generator().manual_seed(1))
        return watch.clock.seconds(watch.spans)

    @contextmanager
    def _masked(self) -> Iterator[None]:
        if self.table is None:
            yield
        else:
            with stepmask.apply(self.pipe, self.table):
                yield


def whole(pipe: Any) -> None:
    """Compile a denoiser as one graph."""
    denoiser_of(pipe).compile()


def by_regions(blocks: list[str]) -> Callable[[Any], None]:
    """Compile the repeated modules around masked blocks, as `masked.compile()` does."""

    def compiles(pipe: Any) -> None:
        denoiser = denoiser_of(pipe)
        modules = modules_by_name(denoiser)
        for name in repeated_regions(denoiser, blocks):
            modules[name].compile(fullgraph=True)

    return compiles


def measure(pipeline: str, table: MaskSchedule, samples: int, turns: int) -> dict[str, Any]:
    """One table: medians of the denoiser's seconds, all in turns, and the ratios turn by turn."""
    regions = by_regions(list(table.graph.names[:-1]))
    contenders = {
        "bare": Contender(Setting(pipeline, table.steps), samples, None, None),
        "bare, compiled": Contender(Setting(pipeline, table.steps), samples, None, whole),
        "bare, regions compiled": Contender(Setting(pipeline, table.steps), samples, None, regions),
        "masked": Contender(Setting(pipeline, table.steps), samples, table, None),
        "masked, regions compiled": Contender(Setting(pipeline, table.steps), samples, table, regions),
    }
    for contender in contenders.values():
        contender.seconds()  # compiles, and warms up
    rounds = [{name: contender.seconds() for name, contender in contenders.items()} for _ in range(turns)]

    promise = 1 / lower(table).macs_share
    speedups = [
        min(turn["bare, compiled"], turn["bare, regions compiled"]) / turn["masked, regions compiled"]
        for turn in rounds
    ]
    return {
        "macs_share": lower(table).macs_share,
        "seconds": {name: median(turn[name] for turn in rounds) for name in contenders},
        "eager_speedup": median(turn["bare"] / turn["masked"] for turn in rounds),
        "speedup_over_compiled": median(speedups),
        "slowest": min(speedups),
        "fastest": max(speedups),
        "over_promise": median(speedups) / promise,
        "turns": turns,
        "machine": machine(),
    }


def reused(pipeline: str, samples: int, steps: int) -> dict[str, Any]:
    """A step that reuses all blocks, each from three values: milliseconds eager and compiled, and their ratio.

    Args:
        pipeline: "zoo:NAME".
        samples: Drawn at once.
        steps: That are timed, after those that compute.
    """
    table = all_reused(Setting(pipeline, WINDOW + steps).full, order=WINDOW - 1)
    regions = by_regions(list(table.graph.names[:-1]))
    eager = Contender(Setting(pipeline, WINDOW + steps), samples, table, None)
    compiled = Contender(Setting(pipeline, WINDOW + steps), samples, table, regions)
    times = {}
    for name, contender in {"eager": eager, "compiled": compiled}.items():
        contender.seconds()
        times[name] = 1000 * median(contender.seconds_each()[WINDOW:])
    return {"eager_ms": times["eager"], "compiled_ms": times["compiled"], "ratio": times["compiled"] / times["eager"]}


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--pipelines", nargs="+", default=list(zoo.names()))
    arguments.add_argument("--tables", nargs="+", default=["20-0.5", "20-0.35"])
    arguments.add_argument("--samples", type=int, default=16, help="drawn at once")
    arguments.add_argument("--turns", type=int, default=5)
    asked = arguments.parse_args()

    found: dict[str, Any] = {}
    steps: dict[str, Any] = {}
    for name in asked.pipelines:
        steps[name] = kept(RUNS / f"{name}-reused.json", partial(reused, f"zoo:{name}", asked.samples, 20))
        for share in asked.tables:
            table = MaskSchedule.from_pretrained(SCHEDULES / name / share)
            path = RUNS / f"{name}-{share}-{digest(table.to_json(), asked.samples, asked.turns)}.json"
            measured = partial(measure, f"zoo:{name}", table, asked.samples, asked.turns)
            found[f"{name}, {share}"] = kept(path, measured)
    save(
        "compiled",
        {"what": f"{asked.samples} samples at once, {asked.turns} turns", "tables": found, "all reused": steps},
        goal=f"over the compiled bare denoiser at least {LEAST} of the speed-up that the MACs promise; a step that "
        f"reuses all blocks in at most {MOST_REUSED} of its eager time",
        met=all(row["over_promise"] >= LEAST for row in found.values())
        and all(step["ratio"] <= MOST_REUSED for step in steps.values()),
    )


if __name__ == "__main__":
    main()
