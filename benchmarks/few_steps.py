"""What is left to gain at 4, 6 and 8 steps: masked runs against fewer steps at equal MACs, next to a run of many steps.

Every table spends at most the MACs of a whole number of steps, and is compared with just as many steps of the
pipeline's own sampler, from the same noise. Finished cells lie in runs/few-steps, so that a killed run goes on where it
stopped.
"""

import argparse
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from functools import cached_property, partial
from pathlib import Path
from statistics import fmean, geometric_mean
from typing import Any

from torch import Tensor

import stepmask
from results import kept, save, table
from setting import FIRST_SEED, Setting, name_of
from stepmask import MaskSchedule, zoo
from stepmask.denoiser.runtime import apply
from stepmask.errors import InvalidBudget
from stepmask.evaluation.metrics import latent_errors
from stepmask.learning.trained import TrainedForecasts
from stepmask.schedule.baselines import fixed_interval, whole_step
from stepmask.schedule.rectify import lower

CELLS = ((4, 2), (6, 3), (8, 4), (8, 6))
"""Steps of the sampler, and how many of them the MACs are worth."""

MANY = 50
"""Steps of the run that all are to come near."""

LEARNED = "learned"
LEARNER = TrainedForecasts(passes=5)
"""A third of the default's training."""

RUNS, SAMPLES = 4, 2
"""Calibration runs, and samples of each."""

HELD_OUT = 16

FOLDER = Path("runs") / "few-steps"


class Few(Setting):
    """A pipeline at a number of steps; what it samples with `HELD_OUT` noises that nothing is learned from."""

    @cached_property
    def plain(self) -> Any:
        """The recorded run of the held-out samples."""
        return self.record(HELD_OUT, 1, held_out=True)

    def masked(self, schedule: MaskSchedule) -> Tensor:
        """The last latents of the held-out samples under a table."""
        sampling = self.plain.sampling  # recorded before anything is masked
        with apply(self.pipe, schedule):
            latent: Tensor = sampling().latent
        return latent


def simple_tables(setting: Few, worth: int) -> dict[str, MaskSchedule]:
    """Regular tables that spend as much, the glue of fixed intervals on top."""
    share = worth / setting.steps
    found = {}
    for kind, make in (("whole steps", whole_step), ("interval", fixed_interval)):
        for order in (0, 1, 2):
            with suppress(InvalidBudget):
                found[f"{kind}, order {order}"] = make(setting.full, share, order=order)
    return found


def learned_table(setting: Few, worth: int) -> tuple[MaskSchedule, float]:
    """What the default learner makes of 8 samples with a third of its training; its time over that of 16 samples."""
    started = time.process_time()
    trajectories = [setting.record(SAMPLES, FIRST_SEED + run) for run in range(RUNS)]
    graph, share = setting.full.graph, worth / setting.steps
    learned = stepmask.learn(setting.pipe, trajectories, share, learner=LEARNER, graph=graph)
    learning = time.process_time() - started
    setting.record(16, 99)
    return learned, learning / (time.process_time() - started - learning)


def said(errors: list[float]) -> dict[str, float]:
    return {"error": fmean(errors), "geometric_error": geometric_mean(errors)}


def measure(setting: Few, worth: int, few: Mapping[int, Few], many: Tensor, *, learns: bool) -> dict[str, Any]:
    """Errors of all tables of a cell, to the run of as many steps and to that of many."""
    tables = simple_tables(setting, worth)
    cost = {}
    if learns:
        tables[LEARNED], took = learned_table(setting, worth)
        cost = {"table": tables[LEARNED].provenance["table"], "reference_samplings_of_16": took}
    rows = {}
    for name, schedule in tables.items():
        latent = setting.masked(schedule)
        rows[name] = {
            "macs": lower(schedule).macs_share * setting.steps / worth,
            "to_reference": said(latent_errors(latent, setting.plain.sampled.latent)),
            "to_many": said(latent_errors(latent, many)),
        }
    plain = {steps: few[steps].plain.sampled.latent for steps in (worth, setting.steps)}
    return {
        "steps": setting.steps,
        "worth": worth,
        **cost,
        "rows": rows,
        "fewer_steps": said(latent_errors(plain[worth], many)),
        "all_steps": said(latent_errors(plain[setting.steps], many)),
        "fewer_to_reference": said(latent_errors(plain[worth], plain[setting.steps])),
    }


def cells(pipeline: str, *, learns: bool) -> Iterator[dict[str, Any]]:
    """What is known of a pipeline's cells, measured where it is not."""
    kind = "" if learns else "-simple"
    paths = {cell: FOLDER / f"{name_of(pipeline)}-{cell[0]}-{cell[1]}{kind}.json" for cell in CELLS}
    if not all(path.exists() for path in paths.values()):
        many = Few(pipeline, MANY).plain.sampled.latent
        few = {steps: Few(pipeline, steps) for steps in sorted({steps for cell in CELLS for steps in cell})}
        for (steps, worth), path in paths.items():
            kept(path, partial(measure, few[steps], worth, few, many, learns=learns))
    for path in paths.values():
        yield kept(path, dict)


def over_fewer(cell: Mapping[str, Any]) -> float:
    """A masked run's distance to the run of many steps, the best simple table's, over that of as many plain steps."""
    return best_simple(cell, "to_many")[1] / float(cell["fewer_steps"]["error"])


def best_simple(cell: Mapping[str, Any], to: str) -> tuple[str, float]:
    """The regular table that comes nearest, and its error."""
    others = {name: float(row[to]["error"]) for name, row in cell["rows"].items() if name != LEARNED}
    name = min(others, key=lambda each: others[each])
    return name, others[name]


def learned_error(cell: Mapping[str, Any], to: str) -> str:
    """For people; nothing where nothing was learned."""
    row = cell["rows"].get(LEARNED)
    return "–" if row is None else f"{row[to]['error']:.2g}"


def markdown(found: Mapping[str, list[dict[str, Any]]]) -> str:
    """For people: a row per cell, errors (mean) to the run of many steps, and to that of as many steps."""
    own = "to as many steps: fewer steps / simple / learned"
    lines = [["", "worth, steps", "fewer steps", "simple", "learned", "all steps", "simple over fewer steps", own]]
    for pipeline, rows in found.items():
        for cell in rows:
            fewer, simple = cell["fewer_to_reference"]["error"], best_simple(cell, "to_reference")[1]
            lines.append(
                [
                    f"`{pipeline}`",
                    f"{cell['worth']} of {cell['steps']}",
                    f"{cell['fewer_steps']['error']:.2g}",
                    f"{best_simple(cell, 'to_many')[1]:.2g}",
                    learned_error(cell, "to_many"),
                    f"{cell['all_steps']['error']:.2g}",
                    f"{over_fewer(cell):.2f}",
                    f"{fewer:.2g} / {simple:.2g} / {learned_error(cell, 'to_reference')}",
                ]
            )
    return table(lines)


def main() -> None:
    pipelines = [f"zoo:{name}" for name in zoo.names()]
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--pipelines", nargs="+", default=pipelines)
    arguments.add_argument("--learned", nargs="*", default=pipelines, help="those for which tables are learned, too")
    asked = arguments.parse_args()
    FOLDER.mkdir(parents=True, exist_ok=True)
    found = {pipeline: list(cells(pipeline, learns=pipeline in asked.learned)) for pipeline in asked.pipelines}
    over = {
        pipeline: {f"{cell['worth']} of {cell['steps']}": round(over_fewer(cell), 3) for cell in rows}
        for pipeline, rows in found.items()
    }
    save(
        "few_steps",
        {
            "what": f"{HELD_OUT} held-out samples; {LEARNER!r} on {RUNS} runs of {SAMPLES}; to {MANY} steps",
            "cells": found,
            "simple_over_fewer_steps": over,
        },
        goal=f"nearer to {MANY} steps than as many plain steps as the MACs are worth",
        met=all(ratio < 1 for rows in over.values() for ratio in rows.values()),
    )
    print(markdown(found))


if __name__ == "__main__":
    main()
