"""Error against MACs: every learner and baseline of the zoo's pipelines, on held-out seeds, in one run.

Finished cells lie in runs/frontier, so that a killed run goes on where it stopped.
"""

import argparse
import json
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import cache, partial
from math import ceil
from pathlib import Path
from statistics import fmean, geometric_mean, median
from typing import Any

import stepmask
from results import FOLDER, kept, save, table
from setting import Setting, errors, name_of, timed
from stepmask import MaskSchedule, zoo
from stepmask.drawing import blank
from stepmask.drawing import save as save_figure
from stepmask.errors import InvalidBudget
from stepmask.evaluation.compare import evaluate
from stepmask.evaluation.measure import machine
from stepmask.evaluation.report import Report
from stepmask.learning.per_timestep import PerTimestep
from stepmask.learning.trained import TrainedForecasts
from stepmask.schedule.baselines import branches, deepcache_within, fixed_interval, whole_step

RIVALS = (
    "fewer steps",
    "per-timestep",
    *(f"{kind}, order {order}" for kind in ("interval", "DeepCache") for order in (0, 1, 2)),
)
LEARNED = "trained forecasts"
AGES = 9
RUNS = Path("runs") / "frontier"
SCHEDULES = FOLDER / "schedules"
"""What was learned: PIPELINE/STEPS-SHARE/stepmask.json, without a guidance of its own."""


class Contest(Setting):
    """A setting with its calibration runs and what one sweep found: all that the contenders learn from."""

    def __init__(self, pipeline: str, steps: int, guidance: float | None) -> None:
        super().__init__(pipeline, steps, guidance)
        self.pipeline = pipeline
        self.trajectories = self.calibration(64)
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
        if self.guidance is None:
            learned[LEARNED].save_pretrained(SCHEDULES / name_of(self.pipeline) / f"{self.steps}-{share:g}")
        rivals = {**learned, **self.baselines(share), **self.deepcaches(share, samples)}
        del rivals[LEARNED]
        report = evaluate(self.pipe, learned[LEARNED], rivals=rivals, repeats=1, **self.call(samples, 1, held_out=True))
        return {
            "steps": self.steps,
            "guidance": self.guidance,
            "share": share,
            "processor": machine()["processor"],
            "reference_samplings_of_16": cost,
            "table": learned[LEARNED].provenance["table"],
            "learner": learned[LEARNED].provenance["learner"],
            "rows": rows(report),
        }

    def learners(self, share: float) -> dict[str, Callable[[], MaskSchedule]]:
        """The learners to compare, ready to go."""
        budget = self.budget(share)
        return {
            LEARNED: lambda: stepmask.learn(self.pipe, self.trajectories, budget, learner=TrainedForecasts()),
            "per-timestep": lambda: stepmask.learn(self.pipe, self.few, budget, learner=paper(share)),
        }

    def baselines(self, share: float) -> dict[str, MaskSchedule | int]:
        """Regular tables, and the reference with fewer steps."""
        tables: dict[str, MaskSchedule | int] = {
            f"{name}, order {order}": make(self.full, share, order=order)
            for name, make in (("interval", fixed_interval), ("whole step", whole_step))
            for order in (0, 1, 2)
        }
        return {**tables, "fewer steps": int(share * self.steps + 1e-9)}

    def deepcaches(self, share: float, samples: int) -> dict[str, MaskSchedule]:
        """DeepCache's table of a U-Net by Taylor order, at the branch that does best on other held-out samples."""
        if not branches(self.full.graph):
            return {}
        held_out = self.record(samples, 1, held_out=True)
        tables = {order: list(self._by_branch(share, order)) for order in (0, 1, 2)}
        return {
            f"DeepCache, order {order}": min(by_branch, key=lambda table: errors(held_out, table)["error"])
            for order, by_branch in tables.items()
            if by_branch
        }

    def _by_branch(self, share: float, order: int) -> Iterator[MaskSchedule]:
        for branch in range(len(branches(self.full.graph))):
            with suppress(InvalidBudget):
                yield deepcache_within(self.full, self.budget(share), branch=branch, order=order)


def paper(share: float) -> PerTimestep:
    """The paper's learner, as it is measured here."""
    return PerTimestep(iterations=10, max_age=max(5, ceil(1 / share)))


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


def measured(contest: Callable[[], Contest], share: float, samples: int) -> dict[str, Any]:
    """A cell, of a contest that is only made if a cell is missing."""
    return contest().measure(share, samples)


def cells(pipeline: str, asked: argparse.Namespace) -> Iterator[dict[str, Any]]:
    for steps in asked.steps:
        for guidance in asked.guidance:
            contest = cache(partial(Contest, pipeline, steps, guidance))  # of the first cell that is missing
            for share in asked.shares:
                path = RUNS / f"{name_of(pipeline)}-{steps}-{guidance}-{share:g}-{asked.samples}.json"
                yield kept(path, partial(measured, contest, share, asked.samples))


def best_rival(cell: dict[str, Any]) -> str:
    """Of those that the goal names."""
    return min((name for name in RIVALS if name in cell["rows"]), key=lambda name: cell["rows"][name]["error"])


def ratio(cell: dict[str, Any]) -> float:
    """Error of the learned table over that of its best rival."""
    return float(cell["rows"][LEARNED]["error"] / cell["rows"][best_rival(cell)]["error"])


def title(cell: dict[str, Any]) -> str:
    guidance = "the pipeline's own guidance" if cell["guidance"] is None else f"guidance {cell['guidance']:g}"
    return f"{cell['steps']} steps, {guidance}"


def plot(found: list[dict[str, Any]], path: Path) -> None:
    settings = list(dict.fromkeys(map(title, found)))
    figure = blank(10.0, 4.0 * len(settings))
    axes = figure.subplots(len(settings), 2, squeeze=False)
    for setting, pair in zip(settings, axes, strict=True):
        here = [cell for cell in found if title(cell) == setting]
        for axis, key, label in zip(pair, ("macs", "speedup"), ("share of MACs", "denoiser speed-up"), strict=True):
            for name in here[0]["rows"]:
                rows = [cell["rows"][name] for cell in here if name in cell["rows"]]
                points = sorted((row[key], row["error"]) for row in rows)
                style = {"linewidth": 2.5, "color": "black"} if name == LEARNED else {"linewidth": 1}
                axis.plot(*zip(*points, strict=True), marker="o", label=name, **style)
            axis.set(yscale="log", xlabel=label, ylabel="latent error", title=setting)
    axes[0, 0].legend(fontsize=7)
    save_figure(figure, path)


def markdown(found: list[dict[str, Any]]) -> str:
    """A table of errors for people: a row per contender, a column per cell, and what is learned over its best rival."""
    names = dict.fromkeys(name for cell in found for name in cell["rows"])
    lines = [["", *(f"{title(cell)}, {cell['share']:g}" for cell in found)]]
    for name in names:
        errors = (cell["rows"].get(name, {}).get("error") for cell in found)
        lines.append([name, *("–" if error is None else f"{error:.2g}" for error in errors)])
    lines.append(["learned, over the best rival", *(f"{ratio(cell):.2f}" for cell in found)])
    return table(lines)


def overview() -> str:
    """A table of all results for people: a row per pipeline, and in a cell learned / best rival, ratio, speed-up.

    Of several guidances the first that was measured.
    """
    found = {name: json.loads(path.read_text())["cells"] for name in zoo.names() if (path := _results(name)).exists()}
    chosen = {
        name: [cell for cell in cells if cell["guidance"] == cells[0]["guidance"]] for name, cells in found.items()
    }
    settings = sorted({(cell["steps"], -cell["share"]) for cells in chosen.values() for cell in cells})
    lines = [["", *(f"{steps} steps, {-share:g}" for steps, share in settings)]]
    for name, cells in chosen.items():
        told = {(cell["steps"], -cell["share"]): _told(cell) for cell in cells}
        lines.append([f"`zoo:{name}`", *(told.get(setting, "–") for setting in settings)])
    return table(lines)


def _told(cell: dict[str, Any]) -> str:
    learned, rival = cell["rows"][LEARNED], cell["rows"][best_rival(cell)]
    return f"{learned['error']:.2g} / {rival['error']:.2g} = **{ratio(cell):.2f}**, {learned['speedup']:.2f}×"


def _results(name: str) -> Path:
    return FOLDER / f"frontier-{name}.json"


def publish(pipeline: str, found: list[dict[str, Any]], samples: int) -> None:
    """Plot and file the cells of a pipeline."""
    plot(found, FOLDER / f"frontier-{name_of(pipeline)}.png")
    ratios = {f"{title(cell)}, {cell['share']:g}": round(ratio(cell), 3) for cell in found}
    save(
        f"frontier-{name_of(pipeline)}",
        {"what": f"{pipeline}, {samples} held-out samples", "cells": found, "over_best_rival": ratios},
        goal="error at most half of the best rival's",
        met=all(value <= 0.5 for value in ratios.values()),
    )
    print(markdown(found))


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--pipelines", nargs="+", default=[f"zoo:{name}" for name in zoo.names()])
    arguments.add_argument("--steps", type=int, nargs="+", default=[20, 50])
    arguments.add_argument("--guidance", type=float, nargs="+", default=[None], help="the pipeline's own if not given")
    arguments.add_argument("--shares", type=float, nargs="+", default=[0.5, 0.35, 0.25])
    arguments.add_argument("--samples", type=int, default=32)
    asked = arguments.parse_args()
    for pipeline in asked.pipelines:
        publish(pipeline, list(cells(pipeline, asked)), asked.samples)
    print(overview())


if __name__ == "__main__":
    main()
