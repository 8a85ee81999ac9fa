"""What a masked run promises, of any denoiser and any pipeline."""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import numpy as np
import torch

import stepmask
from stepmask import MaskSchedule, Trajectory
from stepmask.denoiser.families import Granularity, companions_of, denoiser_of
from stepmask.denoiser.runtime import Masked
from stepmask.denoiser.seam import attached, frozen
from stepmask.evaluation.measure import MacCounter
from stepmask.schedule.graph import BlockGraph
from stepmask.schedule.rectify import Plan, lower


def all_compute(pipe: Any, trajectory: Trajectory, granularity: Granularity = "sublayer") -> MaskSchedule:
    graph = stepmask.trace(pipe, trajectory, granularity=granularity, prove=False)  # what is promised proves it
    return MaskSchedule.all_compute(graph, trajectory.denoiser, trajectory.sampler)


def random_table(pipe: Any, trajectory: Trajectory, granularity: Granularity = "sublayer") -> MaskSchedule:
    """A table of the pipeline's blocks with `half_of` its bits."""
    return half_of(all_compute(pipe, trajectory, granularity))


def half_of(full: MaskSchedule) -> MaskSchedule:
    """Half of the bits at random; the first row and the denoiser itself are computed."""
    rows = np.random.default_rng(0).random(full.rows.shape) < 0.5
    rows[0], rows[:, -1] = True, True
    return full.with_rows(rows)


def without_feeders(table: MaskSchedule) -> MaskSchedule:
    """The table over a graph that knows of no feeders: they are always called."""
    return replace(table, graph=table.graph.without_feeders())


def held(masked: Masked) -> int:
    """Bytes of memory that the store keeps alive, of a part of a tensor the whole."""
    stored = [tensor.untyped_storage() for tensor in masked.run.held_tensors()]
    return sum({storage._cdata: storage.nbytes() for storage in stored}.values())


def counted_macs(pipe: Any, run: Callable[[], Any]) -> int:
    """MACs of the operations that torch sees while the denoiser, or a ControlNet, is called: of what really ran."""
    counters = {network: MacCounter(network) for network in (denoiser_of(pipe), *companions_of(pipe).values())}
    with ExitStack() as stack:
        for network in counters:
            stack.enter_context(frozen(network))
        stack.enter_context(attached(counters))
        run()
    return sum(counter.macs for counter in counters.values())


def changes_its_layers(pipe: Any) -> bool:
    """Whether a pipeline gives its layers a cheaper attention for as long as it is called: perturbed, of some rows."""
    return hasattr(pipe, "pag_applied_layers")


def peak_of_branches(plan: Plan, branches: int) -> int:
    """Largest size of all branches' stores together, where each takes its turn at every step."""
    size = peak = 0
    held = [[0] * len(plan.graph) for _ in range(branches)]
    for row in plan.cells:
        for own in held:
            for column, cell in enumerate(row):
                size += (cell.keeps - own[column]) * plan.graph.blocks[column].bytes
                own[column] = cell.keeps
                peak = max(peak, size)
    return peak


def check_promises(pipe: Any, trajectory: Trajectory, graph: BlockGraph | None = None) -> None:
    """All-compute is bitwise the bare run; a table's plan is kept, in MACs and bytes; nothing stays behind.

    Whether feeders are called changes nothing; where all of them are, torch counts the MACs that the plan states.
    """
    graph = graph or stepmask.trace(pipe, trajectory, prove=False)  # what is promised proves it
    full = MaskSchedule.all_compute(graph, trajectory.denoiser, trajectory.sampler)
    with stepmask.apply(pipe, full):
        assert torch.equal(trajectory.sampling().latent, trajectory.sampled.latent)
    table, branches = half_of(full), trajectory.sampler.branches
    with stepmask.apply(pipe, table) as masked:
        memory: list[tuple[int, int]] = []
        hook = denoiser_of(pipe).register_forward_hook(lambda *_: memory.append((masked.store_bytes, held(masked))))
        latent = trajectory.sampling().latent
        assert torch.isfinite(latent).all()
        hook.remove()
        assert all(counted == real for counted, real in memory)
        assert masked.computed_macs == lower(table).macs * branches < lower(full).macs * branches
        assert masked.peak_store_bytes == peak_of_branches(lower(table), branches)
        assert masked.store_bytes == 0
    with stepmask.apply(pipe, without_feeders(table)):
        assert torch.equal(trajectory.sampling().latent, latent)
    with stepmask.apply(pipe, without_feeders(table)) as masked:
        counted = counted_macs(pipe, trajectory.sampling)
        assert masked.computed_macs == lower(table).macs * branches
        assert counted < masked.computed_macs if changes_its_layers(pipe) else counted == masked.computed_macs
    assert torch.equal(trajectory.sampling().latent, trajectory.sampled.latent)
