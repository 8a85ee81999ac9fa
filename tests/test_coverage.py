"""Every denoiser class at a tiny size: traced, masked, learned, and listed in docs/coverage.md."""

from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
from torch import nn

import stepmask
from denoisers import TINY, build, sampler
from stepmask import MaskSchedule, Trajectory
from stepmask.denoiser.families import FAMILIES, Granularity
from stepmask.learning.trained import TrainedForecasts
from stepmask.schedule.graph import BlockGraph
from stepmask.schedule.rectify import lower

STEPS = 4
TABLE = Path(__file__).parent.parent / "docs" / "coverage.md"

every_class = pytest.mark.parametrize("name", TINY)
every_granularity = pytest.mark.parametrize("granularity", get_args(Granularity))


def recorded(name: str) -> tuple[nn.Module, Trajectory]:
    denoiser, inputs = build(name)
    return denoiser, stepmask.record(denoiser, run=sampler(denoiser, inputs, STEPS))


def random_table(graph: BlockGraph, trajectory: Trajectory) -> MaskSchedule:
    full = MaskSchedule.all_compute(graph, trajectory.denoiser, trajectory.sampler)
    rows = np.random.default_rng(0).random(full.rows.shape) < 0.5
    rows[0], rows[:, -1] = True, True
    return full.with_rows(rows)


@every_class
@every_granularity
def test_masks_keep_their_promises(name: str, granularity: Granularity) -> None:
    denoiser, trajectory = recorded(name)
    graph = stepmask.trace(denoiser, trajectory, granularity=granularity)
    full = MaskSchedule.all_compute(graph, trajectory.denoiser, trajectory.sampler)
    with stepmask.apply(denoiser, full):
        assert torch.equal(trajectory.sampling().latent, trajectory.sampled.latent)
    table = random_table(graph, trajectory)
    with stepmask.apply(denoiser, table) as masked:
        assert torch.isfinite(trajectory.sampling().latent).all()
        assert masked.computed_macs == lower(table).macs < lower(full).macs
        assert masked.peak_store_bytes == lower(table).peak_bytes
        assert masked.store_bytes == 0
    assert torch.equal(trajectory.sampling().latent, trajectory.sampled.latent)


@every_class
def test_a_schedule_is_learned(name: str) -> None:
    denoiser, trajectory = recorded(name)
    schedule = stepmask.learn(denoiser, trajectory, budget=0.7, learner=TrainedForecasts(passes=1.2))
    assert lower(schedule).macs_share <= 0.7
    with stepmask.apply(denoiser, schedule):
        assert torch.isfinite(trajectory.sampling().latent).all()


def test_the_table_in_the_docs_is_what_the_tests_cover() -> None:
    """Writes the table anew where it is not."""
    written = f"{HEAD}\n{chr(10).join(map(line, TINY))}\n"
    if TABLE.read_text() != written:
        TABLE.write_text(written)
        pytest.fail(f"{TABLE} was out of date and has been written anew: look at it and commit it")


HEAD = """\
# What is covered

Each denoiser class of diffusers below is built at a tiny size by the tests, with random weights, and traced, run with
nothing masked (bitwise as it is without), run under a random table (what is computed and stored is what the plan says)
and learned for; afterwards it is as it was. `tests/test_coverage.py` writes this table.

Blocks are counted at the tiny size, the denoiser itself included. *Delta* blocks answer their input plus what they
added earlier, the others what they said earlier.

| denoiser | found by | blocks | of them delta | sublayers |
|---|---|---|---|---|"""


def line(name: str) -> str:
    denoiser, inputs = build(name)
    example = {**inputs, "timestep": torch.full((2,), 900.0)}
    blocks, sublayers = (stepmask.trace(denoiser, example, granularity=each).blocks for each in get_args(Granularity))
    delta = sum(block.reuse == "delta" for block in blocks)
    found = "name" if name in FAMILIES else "its module lists"
    return f"| {name} | {found} | {len(blocks)} | {delta} | {len(sublayers)} |"
