"""Tables learned in bfloat16 beside those learned in float32, on the pipelines of the zoo.

Both are learned alike, each from runs of its own precision, and both are measured on held-out samples of the pipeline
in float32 and in bfloat16. Finished tables and numbers lie in runs/half, so that a killed run goes on where it stopped;
pipelines that were not asked for stay in the results as they were.
"""

import argparse
import json
from functools import partial
from pathlib import Path
from typing import Any

import torch

import stepmask
from results import FOLDER, kept, kept_table, save
from setting import SAMPLES, Setting, errors, name_of, timed
from stepmask import MaskSchedule, Trajectory, zoo
from stepmask.evaluation.measure import machine
from stepmask.learning.trained import TrainedForecasts
from stepmask.schedule.rectify import lower

RUNS = Path("runs") / "half"

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

AUTOCAST = ("zoo:ddpm-emoji",)
"""Pipelines that make NumPy arrays of what they sample, for which NumPy has no bfloat16: there autocast does it."""

MOST = 1.2
"""Times the error of the table learned in float32."""


class Precise(Setting):
    """A pipeline in a dtype, or in float32 under autocast."""

    def __init__(self, pipeline: str, steps: int, dtype: str) -> None:
        super().__init__(pipeline, steps)
        self.autocast = pipeline in AUTOCAST and dtype != "float32"
        if not self.autocast:
            self.pipe.to(DTYPES[dtype])

    def record(self, count: int, seed: int, *, held_out: bool = False) -> Trajectory:
        """A reference run of `count` samples; it is repeated as it was recorded, under autocast or without."""
        with torch.autocast("cpu", torch.bfloat16, enabled=self.autocast):
            return super().record(count, seed, held_out=held_out)


def learned(pipeline: str, steps: int, share: float, dtype: str, asked: argparse.Namespace) -> MaskSchedule:
    """The table at a share of computed steps, from calibration runs in a dtype; with the seconds that it took."""
    setting = Precise(pipeline, steps, dtype)
    runs, learner = setting.calibration(asked.samples), TrainedForecasts(passes=asked.passes)
    table, seconds = timed(partial(stepmask.learn, setting.pipe, runs, setting.budget(share), learner=learner))
    return table.with_rows(table.rows, table.forecasts, provenance={**table.provenance, "seconds": seconds})


def measure(pipeline: str, steps: int, share: float, asked: argparse.Namespace) -> dict[str, Any]:
    """Held-out errors of both tables on both pipelines, and of the one learned in bfloat16 over the other's."""
    name = f"{name_of(pipeline)}-{steps}-{share:g}-{asked.samples}-{asked.passes:g}"
    tables = {
        dtype: kept_table(RUNS / f"{name}-{dtype}", partial(learned, pipeline, steps, share, dtype, asked))
        for dtype in DTYPES
    }
    found: dict[str, Any] = {
        "tables": {
            dtype: {
                "macs": lower(table).macs_share,
                "table": table.provenance["table"],
                "seconds": table.provenance["seconds"],
            }
            for dtype, table in tables.items()
        }
    }
    for dtype in DTYPES:
        held_out = Precise(pipeline, steps, dtype).record(asked.held_out, 1, held_out=True)
        own = {by: errors(held_out, table) for by, table in tables.items()}
        ratio = {key: own["bfloat16"][key] / own["float32"][key] for key in own["float32"]}
        found[f"on the pipeline in {dtype}"] = {"learned in": own, "ratio": ratio}
    return {**found, "held_out": asked.held_out, "machine": machine()}


def before() -> dict[str, Any]:
    """What the results say already."""
    path = FOLDER / "half.json"
    return dict(json.loads(path.read_text())["cells"]) if path.exists() else {}


def cells(asked: argparse.Namespace) -> dict[str, Any]:
    """Every pipeline at every share, from its file if it was measured."""
    found = {}
    for pipeline in asked.pipelines:
        for share in asked.shares:
            told = f"{asked.steps}-{share:g}-{asked.samples}-{asked.passes:g}-{asked.held_out}"
            path = RUNS / f"{name_of(pipeline)}-{told}.json"
            found[f"{pipeline}, {asked.steps} steps, {share:g}"] = kept(
                path, partial(measure, pipeline, asked.steps, share, asked)
            )
    return found


def ratios(cell: dict[str, Any]) -> list[float]:
    """The mean error of what was learned in bfloat16 over that of what was learned in float32, on each pipeline."""
    return [cell[f"on the pipeline in {dtype}"]["ratio"]["error"] for dtype in DTYPES]


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--pipelines", nargs="+", default=[f"zoo:{name}" for name in zoo.names()])
    arguments.add_argument("--shares", type=float, nargs="+", default=[0.5, 0.35])
    arguments.add_argument("--steps", type=int, default=20)
    arguments.add_argument("--samples", type=int, default=2 * SAMPLES, help="to learn from")
    arguments.add_argument("--passes", type=float, default=4, help="of the learner")
    arguments.add_argument("--held-out", type=int, default=16)
    asked = arguments.parse_args()
    found = {**before(), **cells(asked)}
    save(
        "half",
        {"what": f"tables learned in bfloat16 and in float32, {asked.passes:g} passes", "cells": found},
        goal=f"at most {MOST} times the error of float32's tables, on both pipelines",
        met=all(ratio <= MOST for cell in found.values() for ratio in ratios(cell)),
    )


if __name__ == "__main__":
    main()
