"""What a smaller store costs: error and time of learned tables whose values are held in bfloat16 and float8."""

import argparse
from functools import partial
from typing import Any

import torch

import stepmask
from frontier import SCHEDULES
from results import paired_ratio, save
from setting import Setting, name_of
from stepmask import MaskSchedule, Store, Trajectory
from stepmask.denoiser.families import denoiser_of
from stepmask.evaluation.metrics import latent_errors
from stepmask.schedule.rectify import lower

STORES = {"bfloat16": Store(dtype=torch.bfloat16), "float8_e4m3fn": Store(dtype=torch.float8_e4m3fn)}


def under(held_out: Trajectory, table: MaskSchedule, store: Store) -> list[float]:
    """Latent errors of held-out samples."""
    with stepmask.apply(held_out.sampling.pipe, table, store=store):
        return latent_errors(held_out.sampling().latent, held_out.sampled.latent)


def measured(pipeline: str, samples: int, rounds: int) -> dict[str, Any]:
    """Mean error, planned bytes, and paired time of sampling over that with a full store, by store."""
    setting = Setting(pipeline, 20)
    table = MaskSchedule.from_pretrained(SCHEDULES / name_of(pipeline) / "20-0.5")
    held_out, plan = setting.record(samples, 1, held_out=True), lower(table)
    assert denoiser_of(setting.pipe).dtype == torch.float32
    full = under(held_out, table, Store())
    found: dict[str, Any] = {"float32": {"error": sum(full) / samples, "store_share": 1.0}}
    for name, store in STORES.items():
        errors = under(held_out, table, store)
        found[name] = {
            "error": sum(errors) / samples,
            "store_share": store.peak_bytes(plan) / plan.peak_bytes,
            "time_over_full": paired_ratio(
                partial(under, held_out, table, Store()), partial(under, held_out, table, store), rounds
            ),
        }
    return found


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--pipelines", nargs="+", default=["zoo:dit-emoji", "zoo:pixart-emoji"])
    arguments.add_argument("--samples", type=int, default=16)
    arguments.add_argument("--rounds", type=int, default=4)
    asked = arguments.parse_args()
    found = {pipeline: measured(pipeline, asked.samples, asked.rounds) for pipeline in asked.pipelines}
    kept = {name: rows["bfloat16"]["error"] / rows["float32"]["error"] for name, rows in found.items()}
    save(
        "store",
        {"what": f"learned tables, 20 steps, half of the MACs, {asked.samples} held-out samples", "pipelines": found},
        goal="bfloat16 adds at most a tenth to the error",
        met=all(ratio <= 1.1 for ratio in kept.values()),
    )


if __name__ == "__main__":
    main()
