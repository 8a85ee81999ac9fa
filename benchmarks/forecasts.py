"""Forecasts trained on the masked run against Taylor's, on regular tables at several budgets, on held-out seeds."""

import argparse
from statistics import fmean, geometric_mean
from typing import Any

import stepmask
from results import save
from stepmask import MaskSchedule, zoo
from stepmask.denoiser.families import example_call
from stepmask.evaluation.compare import evaluate
from stepmask.learning.trained import TrainedForecasts
from stepmask.schedule.baselines import fixed_interval, whole_step


def contenders(trained: MaskSchedule, budget: float) -> dict[str, Any]:
    kinds = {"interval": fixed_interval, "whole step": whole_step}
    tables = {
        f"{name}, order {order}": make(trained, budget, order=order)
        for name, make in kinds.items()
        for order in (0, 1, 2)
    }
    return {**tables, "fewer steps": round(budget * trained.steps)}


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--budgets", type=float, nargs="+", default=[0.51, 0.36, 0.26])
    arguments.add_argument("--calibration", type=int, default=8)
    arguments.add_argument("--samples", type=int, default=16)
    asked = arguments.parse_args()
    pipe = zoo.load("zoo:dit-emoji")
    pipe.set_progress_bar_config(disable=True)
    trajectory = stepmask.record(pipe, **example_call(pipe, asked.calibration, seed=0), num_inference_steps=20)
    held_out = {**example_call(pipe, asked.samples, seed=1), "num_inference_steps": 20}
    found: dict[str, Any] = {}
    for budget in asked.budgets:
        trained = stepmask.learn(pipe, trajectory, budget, learner=TrainedForecasts())
        report = evaluate(pipe, trained, rivals=contenders(trained, budget), repeats=1, **held_out)
        found[str(budget)] = {
            "table": trained.provenance["table"],
            **{
                row.name: {
                    "macs": row.macs_executed,
                    "mean_error": fmean(row.latent_errors),
                    "geometric_mean_error": geometric_mean(row.latent_errors),
                }
                for row in report.rows[1:]
            },
        }
    save(
        "forecasts",
        {
            "what": f"zoo:dit-emoji, DDIM 20, guidance 4; {asked.calibration} calibration and {asked.samples} held-out "
            "samples",
            "budgets": found,
        },
        goal="never worse than a regular table, by mean error",
        met=all(rows["schedule"]["mean_error"] <= row["mean_error"] for rows in found.values()
                for row in rows.values() if isinstance(row, dict)),
    )  # fmt: skip


if __name__ == "__main__":
    main()
