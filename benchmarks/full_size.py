"""Time of full-size denoisers under tables and under other caches, all of them told to compute about a half.

The architectures are the real ones, with random weights. What each computed is counted, and what it should gain by that
stands beside what it gains; of tables also what they should gain by the times of their blocks. Finished architectures
lie in runs/full_size, so that a killed run goes on; those that were not asked for stay in the results as they were.
Caches that decide by a threshold are left out: what they would skip of a network with random weights says nothing.
"""

import argparse
import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

import stepmask
from architectures import ARCHITECTURES, FullSize
from peers import PEERS, CannotRun
from results import FOLDER, gain, kept, save, table
from stepmask import Budget, MaskSchedule
from stepmask.denoiser.timing import time_blocks
from stepmask.evaluation.measure import machine
from stepmask.evaluation.report import Report
from stepmask.learning.rounding import round_scores
from stepmask.schedule.baselines import branches, deepcache, fixed_interval
from stepmask.schedule.rectify import lower

RUNS = Path("runs") / "full_size"
STEPS = 4
HALF = Budget(macs=0.5)

TOLD = """# Full size

Share of the MACs that is computed: measured speed-up of the denoiser (slowest to fastest turn), over the one that the
MACs promise, and of tables over the one that the times of their blocks promise. In bold what stepmask's runtime does;
the others are the packages, told to compute every other step.

"""

EVERY_OTHER: dict[str, dict[str, Any]] = {
    "TaylorSeer (diffusers)": {"cache_interval": 2, "max_order": 1, "disable_cache_before_step": 1},
    "PyramidAttentionBroadcast (diffusers)": {"every": 2, "within": (-1, 1001)},
    "step mask (cache-dit)": {"order": 0, "every": 2, "Fn_compute_blocks": 1},
    "DeepCache (package)": {"interval": 2, "branch": 0},
}
"""Other caches' settings by which every other step is computed whole."""


def measure(size: FullSize, repeats: int) -> dict[str, Any]:
    """All tables and caches on one architecture, by turns."""
    pipe, call = size.pipeline(), {**size.call(), "num_inference_steps": STEPS}
    ours = tables(pipe, call)
    first, *others = ours
    caches, absent = other_caches(size)
    rivals = {**{name: ours[name] for name in others}, **caches}
    report = stepmask.evaluate(pipe, ours[first], rivals=rivals, repeats=repeats, **call)
    return {
        "reference_ms_per_evaluation": median(report.rows[0].denoiser_ms) / STEPS,
        "rows": rows(report, ours),
        "absent": absent,
        "turns": repeats,
        "machine": machine(),
    }


def tables(pipe: Any, call: dict[str, Any]) -> dict[str, MaskSchedule]:
    """The all-compute table first; half of the MACs in single cells, at both granularities; and what others do."""
    run = stepmask.record(pipe, seed=0, **call)

    def full(granularity: Any) -> MaskSchedule:
        graph = time_blocks(pipe, run, stepmask.trace(pipe, run, granularity=granularity), repeats=3)
        return MaskSchedule.all_compute(graph, run.denoiser, run.sampler)

    fine, coarse = full("sublayer"), full("block")
    found = {
        "all computed": fine,
        "single cells": scattered(fine),
        "single cells, whole blocks": scattered(coarse),
        "interval 2, Taylor 1": fixed_interval(coarse, 0.5, order=1),
    }
    return {**found, "interval 2, DeepCache's": deepcache(coarse, 2)} if branches(coarse.graph) else found


def scattered(full: MaskSchedule, budget: Budget = HALF) -> MaskSchedule:
    """Single cells over all steps and blocks, within a budget; no step is skipped as a whole: the hard case."""
    scores = np.random.default_rng(0).random(full.rows.shape)
    scores[:, -1] = np.inf
    return round_scores(scores, full, budget, max_age=STEPS)


def other_caches(size: FullSize) -> tuple[dict[str, Any], dict[str, str]]:
    """Pipelines with other caches on them, and the reasons of those that cannot be put on."""
    found: dict[str, Any] = {}
    absent: dict[str, str] = {}
    for peer in (peer for peer in PEERS if peer.name in EVERY_OTHER):
        try:
            found[peer.name] = peer.put_on(size.pipeline(), STEPS, **EVERY_OTHER[peer.name])
        except CannotRun as error:
            absent[peer.name] = str(error)
    return found, absent


def rows(report: Report, ours: dict[str, MaskSchedule]) -> dict[str, dict[str, float]]:
    """Speed-ups, by the reference's time over a row's, beside what MACs promise; of tables also what block times do."""
    found = {}
    for row in report.rows[1:]:
        name = next(iter(ours)) if row.name == "schedule" else row.name
        found[name] = {"macs": row.macs_executed, **gain(report, row.name), "store_mib": row.store_bytes / 2**20}
        if name in ours:
            found[name]["over_timed_plan"] = found[name]["speedup"] * lower(ours[name]).time_share
    return found


def before() -> dict[str, Any]:
    """What the results say already."""
    path = FOLDER / "full_size.json"
    return dict(json.loads(path.read_text())["architectures"]) if path.exists() else {}


def finished(names: list[str], repeats: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each architecture's numbers, from its file if it was measured."""
    for name in names:
        path = RUNS / f"{name.replace('/', '-')}-{repeats}.json"
        yield name, kept(path, partial(measure, ARCHITECTURES[name], repeats))


def markdown(found: dict[str, dict[str, Any]]) -> str:
    """For people: a row for each table and cache, a column for each architecture."""
    names = dict.fromkeys(name for size in found.values() for name in size["rows"])
    lines = [["", *found]]
    lines += [
        [
            f"**{name}**" if name not in EVERY_OTHER else name,
            *(_told(size["rows"].get(name)) for size in found.values()),
        ]
        for name in names
    ]
    lines.append(
        [
            "the bare denoiser, ms per evaluation",
            *(f"{size['reference_ms_per_evaluation']:.0f}" for size in found.values()),
        ]
    )
    lines.append(
        [
            "threads, processor, turns",
            *(
                f"{size['machine']['threads']}, {size['machine']['processor']}, {size['turns']}"
                for size in found.values()
            ),
        ]
    )
    return table(lines) + "\n"


def _told(row: dict[str, float] | None) -> str:
    if row is None:
        return "–"
    timed = f", {row['over_timed_plan']:.2f}" if "over_timed_plan" in row else ""
    spread = f"{row['slowest']:.2f}–{row['fastest']:.2f}"
    return f"{row['macs']:.3f}: {row['speedup']:.2f}× ({spread}), {row['over_promise']:.2f}{timed}"


def met(found: dict[str, dict[str, Any]]) -> bool:
    """Whether all tables cost and gain what they should."""
    ours = [{name: row for name, row in size["rows"].items() if name not in EVERY_OTHER} for size in found.values()]
    cheap = all(1 / by_name["all computed"]["speedup"] <= 1.01 for by_name in ours)
    return cheap and all(row["over_promise"] >= 0.95 for by_name in ours for row in by_name.values())


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--architectures", nargs="+", choices=ARCHITECTURES, default=list(ARCHITECTURES))
    arguments.add_argument("--repeats", type=int, default=5)
    asked = arguments.parse_args()
    found = {**before(), **dict(finished(asked.architectures, asked.repeats))}
    (FOLDER / "full_size.md").write_text(TOLD + markdown(found))
    save(
        "full_size",
        {"what": f"{STEPS} steps, random weights", "architectures": found},
        goal="all computed at most 1.01 of the bare time; of the promised speed-up at least 0.95",
        met=met(found),
    )


if __name__ == "__main__":
    main()
