"""Error against MACs: every learner and baseline of a pipeline at several budgets, on held-out seeds, in one run.

Finished cells lie in runs/frontier, so that a killed run goes on where it stopped.
"""

import argparse
import json
from collections.abc import Callable, Iterator
from math import ceil
from pathlib import Path
from statistics import fmean, geometric_mean, median
from typing import Any

import stepmask
from results import FOLDER, save
from setting import Setting, timed
from stepmask import MaskSchedule
from stepmask.evaluation.compare import evaluate
from stepmask.evaluation.report import Report
from stepmask.files import write_whole
from stepmask.learning.per_timestep import PerTimestep
from stepmask.learning.trained import TrainedForecasts
from stepmask.schedule.baselines import fixed_interval, whole_step

RIVALS = ("fewer steps", "interval, order 0", "interval, order 1", "interval, order 2", "per-timestep")
LEARNED = "trained forecasts"
AGES = 9
RUNS = Path("runs") / "frontier"


class Contest(Setting):
    """A setting with its calibration runs and what one sweep found: all that the contenders learn from."""

    def __init__(self, pipeline: str, steps: int, guidance: float) -> None:
        super().__init__(pipeline, steps, guidance)
        self.trajectories = [self.record(8, seed) for seed in range(100, 108)]
        self.few = self.record(4, 0)
        self.profile, self.sweep_s = timed(lambda: stepmask.sweep(self.pipe, self.trajectories[0], ages=AGES))

    def measure(self, share: float, samples: int) -> dict[str, Any]:
        """Errors, MACs and times of all contenders at one share of computed steps."""
        learned, cost = {}, {}
        for name, learn in self.learners(share).items():
            learned[name], seconds = timed(learn)
            cost[name] = seconds / self.reference_s
        learned["one sweep"] = self.profile.schedule(self.budget(share))
        cost["one sweep"] = self.sweep_s / self.reference_s
        rivals = {name: table for name, table in {**learned, **self.baselines(share)}.items() if name != LEARNED}
        report = evaluate(self.pipe, learned[LEARNED], rivals=rivals, repeats=1, **self.call(samples, 1))
        return {
            "steps": self.full.steps,
            "guidance": self.guided["guidance_scale"],
            "share": share,
            "reference_samplings_of_16": cost,
            "table": learned[LEARNED].provenance["table"],
            "learner": learned[LEARNED].provenance["learner"],
            "rows": rows(report),
        }

    def learners(self, share: float) -> dict[str, Callable[[], MaskSchedule]]:
        """The learners to compare, ready to go."""
        budget = self.budget(share)
        paper = PerTimestep(iterations=10, max_age=max(5, ceil(1 / share)))
        return {
            LEARNED: lambda: stepmask.learn(self.pipe, self.trajectories, budget, learner=TrainedForecasts()),
            "per-timestep": lambda: stepmask.learn(self.pipe, self.few, budget, learner=paper),
        }

    def baselines(self, share: float) -> dict[str, MaskSchedule | int]:
        """Regular tables, and the reference with fewer steps."""
        tables: dict[str, MaskSchedule | int] = {
            f"{name}, order {order}": make(self.full, share, order=order)
            for name, make in (("interval", fixed_interval), ("whole step", whole_step))
            for order in (0, 1, 2)
        }
        return {**tables, "fewer steps": int(share * self.full.steps + 1e-9)}


def rows(report: Report) -> dict[str, Any]:
    found = {}
    for row in report.rows[1:]:
        found[LEARNED if row.name == "schedule" else row.name] = {
            "macs": row.macs_executed,
            "error": fmean(row.latent_errors),
            "geometric_error": geometric_mean(row.latent_errors),
            "median_error": median(row.latent_errors),
            "speedup": report.speedup(row.name)[0],
            "store_mib": row.store_bytes / 2**20,
        }
    return found


def cells(asked: argparse.Namespace) -> Iterator[dict[str, Any]]:
    for steps in asked.steps:
        for guidance in asked.guidance:
            contest = None
            for share in asked.shares:
                kept = RUNS / f"{steps}-{guidance:g}-{share:g}-{asked.samples}.json"
                if not kept.exists():
                    contest = contest or Contest(asked.pipeline, steps, guidance)
                    write_whole(kept, json.dumps(contest.measure(share, asked.samples)))
                yield json.loads(kept.read_text())


def ratio(cell: dict[str, Any]) -> float:
    """Error of the learned table over that of its best rival."""
    return float(cell["rows"][LEARNED]["error"] / min(cell["rows"][name]["error"] for name in RIVALS))


def plot(found: list[dict[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    settings = sorted({(cell["steps"], cell["guidance"]) for cell in found})
    figure, axes = pyplot.subplots(len(settings), 2, figsize=(10, 4 * len(settings)), squeeze=False, layout="tight")
    for (steps, guidance), pair in zip(settings, axes, strict=True):
        here = [cell for cell in found if (cell["steps"], cell["guidance"]) == (steps, guidance)]
        for axis, key, label in zip(pair, ("macs", "speedup"), ("share of MACs", "denoiser speed-up"), strict=True):
            for name in here[0]["rows"]:
                points = sorted((cell["rows"][name][key], cell["rows"][name]["error"]) for cell in here)
                style = {"linewidth": 2.5, "color": "black"} if name == LEARNED else {"linewidth": 1}
                axis.plot(*zip(*points, strict=True), marker="o", label=name, **style)
            axis.set(yscale="log", xlabel=label, ylabel="latent error", title=f"{steps} steps, guidance {guidance:g}")
    axes[0, 0].legend(fontsize=7)
    figure.savefig(path, dpi=120)


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--pipeline", default="zoo:dit-emoji")
    arguments.add_argument("--steps", type=int, nargs="+", default=[20, 50])
    arguments.add_argument("--guidance", type=float, nargs="+", default=[4.0])
    arguments.add_argument("--shares", type=float, nargs="+", default=[0.5, 0.35, 0.25])
    arguments.add_argument("--samples", type=int, default=32)
    asked = arguments.parse_args()
    found = list(cells(asked))
    plot(found, FOLDER / "frontier.png")
    ratios = {f"{c['steps']} steps, guidance {c['guidance']:g}, {c['share']:g}": round(ratio(c), 3) for c in found}
    save(
        "frontier",
        {
            "what": f"{asked.pipeline}, DDIM, {asked.samples} held-out samples",
            "cells": found,
            "over_best_rival": ratios,
        },
        goal="error at most half of the best rival's at shares 0.5, 0.35 and 0.25",
        met=all(value <= 0.5 for value in ratios.values()),
    )


if __name__ == "__main__":
    main()
