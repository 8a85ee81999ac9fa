"""What U-Nets gain: the learned table at the MACs of DeepCache's, its measured speed-up, and what liveness drops."""

import argparse
from statistics import fmean
from typing import Any

import numpy as np

import stepmask
from results import gain, save
from setting import Setting, timed
from stepmask import MaskSchedule
from stepmask.evaluation.compare import evaluate
from stepmask.evaluation.report import Report
from stepmask.schedule.baselines import deepcache
from stepmask.schedule.budget import Budget
from stepmask.schedule.rectify import lower

INTERVAL = 3
RANDOM_TABLES = 20


def at_deepcaches_macs(setting: Setting, samples: int, repeats: int) -> dict[str, Any]:
    """Error and speed-up of a learned table and of DeepCache's, at equal MACs."""
    rival = deepcache(setting.full, INTERVAL)
    budget = Budget(macs=lower(rival).macs_share)
    runs = setting.calibration(64)
    table, seconds = timed(lambda: stepmask.learn(setting.pipe, runs, budget))
    rivals = {"DeepCache": rival}
    call = setting.call(samples, 1, held_out=True)
    report = evaluate(setting.pipe, table, rivals=rivals, repeats=repeats, **call)
    learned, plain = (_told(report, row.name) for row in report.rows[1:])
    return {
        "table": table.provenance["table"],
        "reference_samplings_of_16": seconds / setting.reference_s,
        "learned": learned,
        "deepcache": plain,
        "error_ratio": learned["error"] / plain["error"],
    }


def _told(report: Report, name: str) -> dict[str, float]:
    row = report[name]
    return {"macs": row.macs_executed, "error": fmean(row.latent_errors), **gain(report, name)}


def liveness(full: MaskSchedule) -> dict[str, float]:
    """MACs of random tables, half of the bits set, before and after what nobody reads is dropped."""
    generator, costs = np.random.default_rng(0), full.graph.costs
    tables = []
    for _ in range(RANDOM_TABLES):
        rows = generator.random(full.rows.shape) < 0.5
        rows[0], rows[:, -1] = True, True
        tables.append(full.with_rows(rows))
    before = fmean(float((table.rows * costs).sum(axis=1).mean()) for table in tables)
    after = fmean(lower(table).macs_share for table in tables)
    return {"set": before, "computed": after, "saved": 1 - after / before}


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--pipelines", nargs="+", default=["zoo:ldm-emoji", "zoo:ddpm-emoji"])
    arguments.add_argument("--steps", type=int, nargs="+", default=[20, 50])
    arguments.add_argument("--samples", type=int, default=32)
    arguments.add_argument("--repeats", type=int, default=3)
    asked = arguments.parse_args()
    found: dict[str, Any] = {}
    for pipeline in asked.pipelines:
        for steps in asked.steps:
            setting = Setting(pipeline, steps)
            contest = at_deepcaches_macs(setting, asked.samples, asked.repeats)
            found[f"{pipeline}, {steps} steps"] = {**contest, "liveness": liveness(setting.full)}
    save(
        "unets",
        {"what": f"DeepCache of interval {INTERVAL}, {asked.samples} held-out samples", "settings": found},
        goal="at most a third of DeepCache's error, and at least 0.8 of the planned speed-up",
        met=all(s["error_ratio"] <= 1 / 3 and s["learned"]["over_promise"] >= 0.8 for s in found.values()),
    )


if __name__ == "__main__":
    main()
