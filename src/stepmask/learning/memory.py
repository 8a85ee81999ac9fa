"""`predict`: the memory that a sweep takes, counted before it runs."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from torch import nn

from stepmask.denoiser.batch import Batch, rows_of
from stepmask.denoiser.call import Call
from stepmask.denoiser.fakes import on_fakes
from stepmask.denoiser.memory import Alive
from stepmask.denoiser.modes import uncompiled
from stepmask.denoiser.sampling import Sampling
from stepmask.denoiser.seam import frozen
from stepmask.denoiser.trajectory import Trajectory
from stepmask.denoiser.values import first, tensors
from stepmask.learning.floats import floats
from stepmask.learning.tape import Evaluation, Moment, Tape, as_function
from stepmask.schedule.graph import BlockGraph
from stepmask.schedule.rectify import lower
from stepmask.schedule.schedule import MaskSchedule

SMALL = 10**9
"""The MACs of an evaluation that takes less time than one on fake tensors, which cost as much at any size."""


def predict(
    trajectory: Trajectory,
    graph: BlockGraph,
    *,
    around: MaskSchedule | None = None,
    ages: int = 6,
    checkpoint_blocks: bool = False,
) -> int:
    """The most memory that a sweep with these arguments takes, in bytes, on top of what is in use when it begins.

    Counted on fake tensors, from one evaluation of the sweep: all that is alive at once while gradients come back, and
    what is kept of it for `ages` steps; around a table that reuses also what its store holds, and the gradients that
    are owed to it. Where fake tensors do not do (weights that are moved by hooks), and where the denoiser is small,
    that one evaluation is real. What operations use inside themselves is not seen, nor what the allocator does not give
    back, nor what `decode` takes.
    """
    watch = partial(_one_evaluation, trajectory, graph, checkpoint_blocks)
    denoiser, call = trajectory.sampling.denoiser, trajectory.calls[0]
    is_small = sum(block.macs for block in graph.blocks) <= SMALL
    counted = None if is_small else on_fakes(denoiser, call, watch)
    peak, kept = counted or _for_real(denoiser, call, watch)
    branches = trajectory.sampler.branches
    stored = 0 if around is None else 2 * branches * lower(around).peak_bytes
    return peak + kept * (min(ages, trajectory.steps - 1) * branches) + stored


def _for_real(denoiser: nn.Module, call: Call, watch: Callable[[nn.Module, Call], tuple[int, int]]) -> tuple[int, int]:
    """What `watch` sees of the denoiser itself, which draws no numbers from the caller's generator."""
    with torch.random.fork_rng(), uncompiled():
        return watch(denoiser, call)


def _one_evaluation(
    trajectory: Trajectory, graph: BlockGraph, checkpoint_blocks: bool, denoiser: nn.Module, call: Call
) -> tuple[int, int]:
    """The peak of an evaluation with gradients, and what is kept of it until it is `ages` steps old, in bytes."""
    there = [*denoiser.parameters(), *denoiser.buffers(), *tensors((call.args, call.kwargs))]
    reader, answered = _Reader(), np.ones((1, len(graph), 1))
    told = replace(trajectory, sampling=Sampling(denoiser))
    tape = Tape(told, graph, answered, reader, checkpoint_blocks=checkpoint_blocks)
    with frozen(denoiser), Alive(there) as alive:
        run, inputs = as_function(denoiser, call.args, call.kwargs)
        latent = {id(tensor) for tensor in first(call.args, call.kwargs)}
        leaves = [t.detach().requires_grad_(id(t) in latent) for t in inputs]
        grads = [tensor.clone() for tensor in floats(trajectory.outputs[0])]
        batch = Batch(rows_of(call.args, call.kwargs), trajectory.sampler.present(0))
        tape.backward(Evaluation(tape, 0, 0, run, denoiser, batch), leaves, grads)
    return alive.peak, reader.kept


class _Reader:
    """Holds what the sweep's reader does, and knows what it keeps."""

    kept = 0

    def __call__(self, moment: Moment) -> None:
        """Take in one evaluation."""
        _, held = moment.values(), moment.held()
        storages = [tensor.untyped_storage() for block in (*moment.gradients, *held) for tensor in block]
        self.kept = sum({storage._cdata: storage.nbytes() for storage in storages}.values())
