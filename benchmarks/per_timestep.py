"""The paper's learner with uniform and with measured step weights, against the baselines, on held-out seeds."""

import argparse
from typing import Any

import stepmask
from results import save
from setting import Setting
from stepmask import MaskSchedule
from stepmask.evaluation.compare import evaluate
from stepmask.evaluation.report import Report
from stepmask.learning.objective import MeasuredGain, Uniform
from stepmask.learning.per_timestep import PerTimestep
from stepmask.learning.relax import Concrete, StraightThrough
from stepmask.schedule.baselines import fixed_interval, whole_step

LEARNERS = {
    "uniform weights": PerTimestep(scaling=Uniform()),
    "measured weights": PerTimestep(scaling=MeasuredGain()),
    "measured weights, straight-through": PerTimestep(relaxation=StraightThrough()),
    "measured weights, Concrete": PerTimestep(relaxation=Concrete()),
}


def tables(pipe: Any, trajectory: stepmask.Trajectory, budget: float) -> dict[str, MaskSchedule]:
    learned = {name: stepmask.learn(pipe, trajectory, budget, learner=learner) for name, learner in LEARNERS.items()}
    full = next(iter(learned.values()))
    fixed = {f"interval, order {order}": fixed_interval(full, budget, order=order) for order in (0, 1, 2)}
    whole = {f"whole step, order {order}": whole_step(full, budget, order=order) for order in (0, 1)}
    return {**learned, **fixed, **whole}


def errors(report: Report) -> dict[str, Any]:
    return {row.name: {"macs": row.macs_executed, "latent_error": row.latent_error} for row in report.rows[2:]}


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--budgets", type=float, nargs="+", default=[0.5])
    arguments.add_argument("--samples", type=int, default=32)
    asked = arguments.parse_args()
    setting = Setting("zoo:dit-emoji", 20)
    trajectory = setting.record(4, 0)
    found = {}
    for budget in asked.budgets:
        rivals: dict[str, Any] = {**tables(setting.pipe, trajectory, budget), "fewer steps": round(budget * 20)}
        first = next(table for table in rivals.values() if isinstance(table, MaskSchedule))
        report = evaluate(setting.pipe, first, rivals=rivals, repeats=1, **setting.call(asked.samples, 1))
        found[str(budget)] = errors(report)
    half = {name: row["latent_error"] for name, row in found["0.5"].items()}
    save(
        "per_timestep",
        {"what": f"zoo:dit-emoji, DDIM 20, guidance 4, {asked.samples} held-out samples", "budgets": found},
        goal="at 0.5: measured weights beat uniform weights, and beat the interval with plain reuse",
        met=half["measured weights"] < min(half["uniform weights"], half["interval, order 0"]),
    )


if __name__ == "__main__":
    main()
