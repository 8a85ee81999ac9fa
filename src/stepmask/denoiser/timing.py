"""`time_blocks`: how long each block of a denoiser takes, as this machine does it."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import cycle, islice
from statistics import median
from typing import Any

import torch
from torch import nn

from stepmask.denoiser.clock import now
from stepmask.denoiser.families import denoiser_of
from stepmask.denoiser.refusals import refuse_if_taken
from stepmask.denoiser.seam import Behaviour, attached
from stepmask.denoiser.trajectory import Trajectory
from stepmask.errors import NoSuchBlock, RunError, TraceError
from stepmask.progress import progress
from stepmask.schedule.graph import Block, BlockGraph

WARM_UPS = 3
"""Evaluations before the first that counts: compilation, caches, clocks."""


def time_blocks(pipe: Any, trajectory: Trajectory, graph: BlockGraph, *, repeats: int = 20) -> BlockGraph:
    """Measure how long each block takes, for budgets in time.

        graph = time_blocks(pipe, trajectory, stepmask.trace(pipe, trajectory))
        schedule = stepmask.learn(pipe, trajectory, stepmask.Budget(time=0.5), graph=graph)

    The denoiser is evaluated on recorded calls with a stopwatch in front of every block. An accelerator is waited for
    at both ends of each, so that work which would overlap is counted one after the other.

    Args:
        pipe: The pipeline, or plain denoiser, that the trajectory was recorded from.
        trajectory: Its calls are evaluated in turn: record it at the batch size that the schedule is for.
        graph: The blocks.
        repeats: Evaluations that count, after a few that do not.

    Returns:
        The graph with `ms` of each block: the median over evaluations, blocks inside it not counted, to 0.1 µs. The
        denoiser's own is its time without its blocks'.

    Raises:
        RunError: `repeats` is less than one, or the trajectory is of another pipeline.
        NoSuchBlock: A block of the graph is not in the denoiser.
        TraceError: A block was not called.
        AlreadyApplied: The denoiser is under a schedule.
    """
    denoiser = denoiser_of(pipe)
    if repeats < 1 or trajectory.sampling.denoiser is not denoiser:
        raise RunError(
            given=f"repeats={repeats} and a trajectory of a {trajectory.denoiser.class_name}",
            expected="at least one evaluation to time, and a trajectory recorded from this pipeline",
            advice="Call stepmask.record(pipe, ...) first",
        )
    refuse_if_taken(denoiser)
    running: list[float] = []
    watches = [_Watch(running) for _ in graph.blocks]
    modules = [_module(denoiser, block) for block in graph.blocks]
    with torch.no_grad(), attached(dict(zip(modules, watches, strict=True))):
        for call in progress(list(islice(cycle(trajectory.calls), WARM_UPS + repeats)), "timing blocks"):
            denoiser(*call.args, **call.kwargs)
    return BlockGraph(tuple(_timed(block, watch) for block, watch in zip(graph.blocks, watches, strict=True)))


@dataclass(eq=False)
class _Watch(Behaviour):
    """Stands in front of a module and writes down its own time, that of watched modules inside it taken off.

    Args:
        running: Seconds that watched modules inside each module which is running have taken, outermost first.
        seconds: Own time of each call.
    """

    running: list[float]
    seconds: list[float] = field(default_factory=list)

    def __call__(self, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Time one call."""
        self.running.append(0.0)
        started = now()
        output = call(*args, **kwargs)
        taken = now() - started
        self.seconds.append(max(taken - self.running.pop(), 0.0))
        if self.running:
            self.running[-1] += taken
        return output


def _module(denoiser: nn.Module, block: Block) -> nn.Module:
    try:
        return denoiser.get_submodule(block.name)
    except AttributeError as error:
        raise NoSuchBlock(
            given=f"block {block.label!r}, which is not in this {type(denoiser).__name__}",
            expected="a graph of this denoiser",
            advice="Trace it: stepmask.trace(pipe, trajectory)",
        ) from error


def _timed(block: Block, watch: _Watch) -> Block:
    if len(watch.seconds) <= WARM_UPS:
        raise TraceError(
            given=f"block {block.label!r}, which these evaluations did not call",
            expected="every block called once per evaluation",
            advice="Trace and time with calls that use it",
        )
    return replace(block, ms=round(1000 * median(watch.seconds[WARM_UPS:]), 4))
