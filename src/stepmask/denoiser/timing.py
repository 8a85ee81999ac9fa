"""`time_blocks`: how long each block of a denoiser takes, as this machine does it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import cycle, islice, pairwise
from statistics import median
from typing import Any

import torch
from torch import nn

from stepmask.denoiser.calls import as_they_lie
from stepmask.denoiser.clock import Clock
from stepmask.denoiser.device import device_of
from stepmask.denoiser.families import denoiser_of
from stepmask.denoiser.modes import uncompiled
from stepmask.denoiser.refusals import refuse_if_taken
from stepmask.denoiser.runtime import apply
from stepmask.denoiser.seam import Hook, attached
from stepmask.denoiser.trajectory import Trajectory
from stepmask.denoiser.values import tensors
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

    The denoiser is evaluated on recorded calls, whole and under a table that reuses every block, forecast from as many
    stored values as there may be: these two times are what a step takes that computes all, and one that computes
    nothing. Between them lies what the blocks take, and a third round, with a stopwatch in front of every block, tells
    how it is shared out over them; in that one nothing is compiled. An accelerator is not waited for meanwhile: the
    marks lie in its own work.

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
    rounds = _Rounds(denoiser, trajectory, repeats, Clock(device_of(denoiser)))
    own = rounds.own(graph)
    return _shared_out(graph, own, whole=rounds.whole(), reused=rounds.reused(graph))


@dataclass(frozen=True)
class _Rounds:
    """Evaluations of recorded calls, timed.

    Args:
        denoiser: The denoiser.
        trajectory: Whose calls they are.
        repeats: How many count.
        clock: Of the denoiser's device.
    """

    denoiser: nn.Module
    trajectory: Trajectory
    repeats: int
    clock: Clock

    def whole(self) -> float:
        """Milliseconds of a whole evaluation, with nothing in front of any module."""
        return self._evaluated("timing evaluations")

    def own(self, graph: BlockGraph) -> list[float]:
        """Milliseconds of each block in a whole evaluation under watches, those of blocks inside it taken off."""
        running: list[_Span] = []
        watches = [_Watch(self.clock, running) for _ in graph.blocks]
        modules = [_module(self.denoiser, block) for block in graph.blocks]
        with uncompiled(), attached(dict(zip(modules, watches, strict=True))):  # no watch is in a compiled region
            self._evaluated("timing blocks")
        return [_median(block, watch) for block, watch in zip(graph.blocks, watches, strict=True)]

    def reused(self, graph: BlockGraph) -> float:
        """Milliseconds of an evaluation that reuses all blocks."""
        sampler = SamplerFingerprint("", (0.0,) * (WARM_UPS + self.repeats))
        table = all_reused(MaskSchedule.all_compute(graph, self.trajectory.denoiser, sampler), order=WARM_UPS - 1)
        with apply(self.denoiser, table):
            return self._evaluated("timing reuse")

    @torch.no_grad()
    def _evaluated(self, what: str) -> float:
        """Milliseconds of an evaluation as it is now."""
        spans = []
        places = list(islice(cycle(_alike(self.trajectory)), WARM_UPS + self.repeats))
        for place in progress(places, what):
            call = self.trajectory.calls[place]
            started = self.clock.mark()
            call.evaluate(self.denoiser)
            spans.append((started, self.clock.mark()))
        return 1000 * median(self.clock.seconds(spans[WARM_UPS:]))


def _alike(trajectory: Trajectory) -> list[int]:
    """The evaluations that most others are like: of steps with all branches, since the run last began anew."""
    sampler = trajectory.sampler
    begins = [*sampler.begins, sampler.steps]
    start, end = max(pairwise(begins), key=lambda span: span[1] - span[0])
    kinds: dict[Any, list[int]] = {}
    for place, ((step, _), call) in enumerate(zip(sampler.evaluations, as_they_lie(trajectory.calls), strict=True)):
        if start <= step < end and sampler.loads[step] == 1:
            shapes = tuple(tensor.shape for tensor in tensors((call.args, call.kwargs)))
            kinds.setdefault(shapes, []).append(place)
    return max(kinds.values(), key=len, default=[0])


def _shared_out(graph: BlockGraph, own: Sequence[float], *, whole: float, reused: float) -> BlockGraph:
    """The graph with a whole evaluation's time: one that reuses all blocks, and the rest in proportion to their own."""
    rest = max(whole - reused, 0.0)
    blocks = sum(own[:-1])
    if not blocks:
        rest = 0.0
    times = [*(ms * rest / blocks if blocks else 0.0 for ms in own[:-1]), whole - rest]
    return BlockGraph(tuple(replace(block, ms=round(ms, 4)) for block, ms in zip(graph.blocks, times, strict=True)))


@dataclass(eq=False)
class _Span:
    """One call of a watched module.

    Args:
        started: When it began.
        ended: When it was over.
        inside: Calls of watched modules inside it.
    """

    started: Any
    ended: Any = None
    inside: "list[_Span]" = field(default_factory=list)


@dataclass(eq=False)
class _Watch(Hook):
    """Stands in front of a module and writes down its calls.

    Args:
        clock: Of the device.
        running: Calls of watched modules that are running, outermost first.
        spans: The module's own.
    """

    clock: Clock
    running: list[_Span]
    spans: list[_Span] = field(default_factory=list)

    def __call__(self, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Time one call."""
        span = _Span(self.clock.mark())
        self.spans.append(span)
        if self.running:
            self.running[-1].inside.append(span)
        self.running.append(span)
        output = call(*args, **kwargs)
        span.ended = self.clock.mark()
        self.running.pop()
        return output

    def own(self, spans: Sequence[_Span]) -> list[float]:
        """Seconds of each call, those of watched modules inside it taken off."""
        inner = [part for span in spans for part in span.inside]
        taken = iter(self.clock.seconds([(span.started, span.ended) for span in (*spans, *inner)]))
        whole = [next(taken) for _ in spans]
        return [max(own - sum(next(taken) for _ in span.inside), 0.0) for own, span in zip(whole, spans, strict=True)]


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
    if len(watch.spans) <= WARM_UPS:
        raise TraceError(
            given=f"block {block.label!r}, which these evaluations did not call",
            expected="every block called once per evaluation",
            advice="Trace and time with calls that use it",
        )
    return 1000 * median(watch.own(watch.spans[WARM_UPS:]))
