"""How well a sweep's predicted error ranks random tables of equal MACs: Spearman's correlation with the true error."""

import argparse

import numpy as np
from scipy.stats import spearmanr

import stepmask
from results import save
from setting import Setting, by_sample, timed
from stepmask import MaskSchedule, Profile
from stepmask.learning.rounding import round_scores
from stepmask.schedule.budget import Budget
from stepmask.schedule.rectify import lower

AGES = 6


def random_table(full: MaskSchedule, generator: np.random.Generator) -> MaskSchedule:
    """Half of the MACs at random: every step and every block has a random density of its own."""
    steps, blocks = full.rows.shape
    scores = generator.random((steps, blocks))
    scores += generator.uniform(0, 2) * generator.random((steps, 1)) + generator.uniform(0, 2) * generator.random(
        blocks
    )
    scores[:, -1] = np.inf
    return round_scores(scores, full, Budget(macs=0.5), max_age=AGES)


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--tables", type=int, default=50)
    arguments.add_argument("--batches", type=int, default=8, help="of 8 samples each")
    arguments.add_argument("--probes", type=int, default=2)
    asked = arguments.parse_args()
    setting = Setting("zoo:dit-emoji", 20)
    trajectories = [setting.record(8, seed) for seed in range(asked.batches)]
    sweeps = (stepmask.sweep(setting.pipe, run, probes=asked.probes, ages=AGES) for run in trajectories)
    profile, sweep_s = timed(lambda: Profile.merge(*sweeps))
    generator = np.random.default_rng(0)
    tables = [random_table(profile.around, generator) for _ in range(asked.tables)]
    predicted = np.array([profile.predicted_errors(table) for table in tables])
    true = np.array([[error for run in trajectories for error in by_sample(run, table)] for table in tables])
    correlation = float(spearmanr(predicted.mean(1), true.mean(1)).statistic)
    save(
        "prediction",
        {
            "what": f"zoo:dit-emoji, DDIM 20, guidance 4, {8 * asked.batches} samples, {asked.probes} probes, "
            f"{asked.tables} tables",
            "macs": [min(lower(t).macs_share for t in tables), max(lower(t).macs_share for t in tables)],
            "spearman": correlation,
            "spearman_of_geometric_means": float(spearmanr(np.log(predicted).mean(1), np.log(true).mean(1)).statistic),
            "predicted_over_true": float(np.median(predicted.mean(1) / true.mean(1))),
            "true_errors": [float(true.mean(1).min()), float(true.mean(1).max())],
            "reference_samplings_of_16": sweep_s / setting.reference_s,
        },
        goal="Spearman's correlation at least 0.8",
        met=correlation >= 0.8,
    )


if __name__ == "__main__":
    main()
