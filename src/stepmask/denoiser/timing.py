"""`time_blocks`: how long each block of a denoiser takes, as this machine does it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import cycle, islice
from statistics import median
from typing import Any

import torch
from torch import nn

from stepmask.denoiser.clock import now
from stepmask.denoiser.families import denoiser_of
from stepmask.denoiser.refusals import refuse_if_taken
from stepmask.denoiser.runtime import apply
from stepmask.denoiser.seam import Hook, attached
from stepmask.denoiser.trajectory import Trajectory
from stepmask.errors import NoSuchBlock, RunError, TraceError
from stepmask.progress import progress
from stepmask.schedule.baselines import all_reused
from stepmask.schedule.fingerprint import SamplerFingerprint
from stepmask.schedule.forecasts import WINDOW
from stepmask.schedule.graph import Block, BlockGraph
from stepmask.schedule.schedule import MaskSchedule

WARM_UPS = WINDOW
"""Evaluations before the first that counts, for compilation, caches, clocks; as many as a forecast may read."""


def time_blocks(pipe: Any, trajectory: Trajectory, graph: BlockGraph, *, repeats: int = 20) -> BlockGraph:
    """Measure what computing each block takes, and what a step takes that reuses all of them, for budgets in time.

        graph = time_blocks(pipe, trajectory, stepmask.trace(pipe, trajectory))
        schedule = stepmask.learn(pipe, trajectory, stepmask.Budget(time=0.5), graph=graph)

    The denoiser is evaluated on recorded calls, with a stopwatch in front of every block, and then under a table that
    reuses every block, forecast from as many stored values as there may be. An accelerator is waited for at both ends
    of each block, so that work which would overlap is counted one after the other.

    Args:
        pipe: The pipeline, or plain denoiser, that the trajectory was recorded from.
        trajectory: Its calls are evaluated in turn: record it at the batch size that the schedule is for.
        graph: The blocks.
        repeats: Evaluations of either kind that count, after a few that do not.

    Returns:
        The graph with `ms` of each block, medians over evaluations to 0.1 µs. The denoiser's own is what an evaluation
        takes that reuses all blocks; what a whole one takes on top of that is shared out over the blocks as their own
        times are.

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
    own = _own_times(denoiser, trajectory, graph, repeats)
    return _shared_out(graph, own, reused=_reused_time(denoiser, trajectory, graph, repeats))


def _own_times(denoiser: nn.Module, trajectory: Trajectory, graph: BlockGraph, repeats: int) -> list[float]:
    """Milliseconds of each block in a whole evaluation, those of blocks inside it taken off."""
    running: list[float] = []
    watches = [_Watch(running) for _ in graph.blocks]
    modules = [_module(denoiser, block) for block in graph.blocks]
    with attached(dict(zip(modules, watches, strict=True))):
        _evaluate(denoiser, trajectory, WARM_UPS + repeats, "timing blocks")
    return [_median(block, watch) for block, watch in zip(graph.blocks, watches, strict=True)]


def _reused_time(denoiser: nn.Module, trajectory: Trajectory, graph: BlockGraph, repeats: int) -> float:
    """Milliseconds of an evaluation that reuses all blocks."""
    steps = WARM_UPS + repeats
    sampler = SamplerFingerprint("", (0.0,) * steps)
    table = all_reused(MaskSchedule.all_compute(graph, trajectory.denoiser, sampler), order=WARM_UPS - 1)
    watch = _Watch([])
    with apply(denoiser, table), attached({denoiser: watch}):
        _evaluate(denoiser, trajectory, steps, "timing reuse")
    return 1000 * median(watch.seconds[WARM_UPS:])


def _evaluate(denoiser: nn.Module, trajectory: Trajectory, count: int, what: str) -> None:
    with torch.no_grad():
        for call in progress(list(islice(cycle(trajectory.calls), count)), what):
            denoiser(*call.args, **call.kwargs)


def _shared_out(graph: BlockGraph, own: Sequence[float], *, reused: float) -> BlockGraph:
    """The graph with a whole evaluation's time: one that reuses all blocks, and the rest in proportion to their own."""
    rest, blocks = max(sum(own) - reused, 0.0), sum(own[:-1])
    times = [*(ms * rest / blocks if blocks else 0.0 for ms in own[:-1]), sum(own) - rest]
    return BlockGraph(tuple(replace(block, ms=round(ms, 4)) for block, ms in zip(graph.blocks, times, strict=True)))


@dataclass(eq=False)
class _Watch(Hook):
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


def _median(block: Block, watch: _Watch) -> float:
    """Milliseconds of a call."""
    if len(watch.seconds) <= WARM_UPS:
        raise TraceError(
            given=f"block {block.label!r}, which these evaluations did not call",
            expected="every block called once per evaluation",
            advice="Trace and time with calls that use it",
        )
    return 1000 * median(watch.seconds[WARM_UPS:])
