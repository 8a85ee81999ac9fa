"""The proof of a graph: the recorded sampling, run again under plans that must change nothing.

A trace sees one evaluation, and only what flows as tensors. What it missed shows when the recorded run is repeated:
under the plan that computes everything, blocks that nobody reads left out, it must give the recorded numbers; and a
random table must give the same numbers whether what nobody reads is left out or computed, whether the store holds what
blocks answered or private copies of it.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import nn

from stepmask.denoiser.call import Call
from stepmask.denoiser.runtime import Masked
from stepmask.denoiser.sampling import NOT_REPEATED
from stepmask.denoiser.seam import Hook, attached, attached_by_name
from stepmask.denoiser.store import Store
from stepmask.denoiser.trajectory import Trajectory
from stepmask.denoiser.unread import Unread
from stepmask.denoiser.values import each, same_numbers, stream, tensors
from stepmask.errors import RunError, StepmaskError, TraceError
from stepmask.schedule.course import computed_before
from stepmask.schedule.graph import Block, BlockGraph
from stepmask.schedule.rectify import Plan, lower, lower_whole
from stepmask.schedule.schedule import MaskSchedule

log = logging.getLogger(__name__)

SEED = 20260319
"""The random table of every proof is drawn with this seed."""

MOST_REPEATED = 8
"""How many recorded calls are evaluated once more, in the opposite order."""

SHARE = 0.3
"""The share of the random table's cells that are computed."""


class AnotherPath(TraceError):
    """An evaluation that does not go the way of those that were traced.

    Args:
        given: What was given.
        expected: What was expected.
        advice: What to do.
        evaluation: Which one of the recorded ones.
    """

    def __init__(self, *, given: str, expected: str, advice: str, evaluation: int = -1) -> None:
        super().__init__(given=given, expected=expected, advice=advice)
        self.evaluation = evaluation


def check_against_record(trajectory: Trajectory, graph: BlockGraph) -> None:
    """Prove that a graph tells all that flows along a recorded run.

    Args:
        trajectory: The run; it is repeated once as it is, and once or twice under a random table.
        graph: The blocks of its denoiser.

    Raises:
        AnotherPath: An evaluation reads or calls blocks that the graph does not tell of.
        TraceError: The denoiser or its sampling loop does not repeat itself; or values reach others past the graph: the
            first step where numbers differ is named, and a block that was left out before it.
    """
    log.info("proving the graph of a %s: about two samplings", trajectory.denoiser.class_name)
    full = MaskSchedule.all_compute(graph, trajectory.denoiser, trajectory.sampler)
    _check_repeated(trajectory, full)
    _check_order(trajectory)
    if trajectory.steps < 2:
        return

    table = _random_table(full)
    called = replace(table, graph=graph.without_feeders())
    expected = _outputs(trajectory, called, _PrivateStore(), lower_whole)
    given = _outputs(trajectory, table, Store(), lower)
    for evaluation, (one, other) in enumerate(zip(given, expected, strict=True)):
        if not _equal(one, other):
            raise _difference_error(table, trajectory.sampler.evaluations[evaluation][0])


class _Unchanged(Hook):
    """Stands in front of a block, and looks whether its stream and its output stay as they are, however it is written.

    Args:
        block: The block.
        outputs: What blocks have answered in this evaluation, each with its name and a copy.
    """

    def __init__(self, block: Block, outputs: list[tuple[str, Any, Any]]) -> None:
        self.block = block
        self.outputs = outputs

    def __call__(self, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self.block.reuse == "output":
            output = call(*args, **kwargs)
            if not any(isinstance(tensor, Unread) for tensor in tensors(output)):
                self.outputs.append((self.block.label, output, each(torch.clone, output)))
            return output

        given = stream(args, kwargs)
        before = given if isinstance(given, Unread) else given.clone()
        output = call(*args, **kwargs)
        if not isinstance(given, Unread) and not same_numbers(given, before):
            raise TraceError(
                given=f"block {self.block.label!r}, which changes its input in place",
                expected="an input that stays as it is, for what is stored is the output without it",
                advice="Reuse the block by its output: blocks={name: 'output'}",
            )
        return output


def _check_repeated(trajectory: Trajectory, full: MaskSchedule) -> None:
    """Repeat the recorded run with everything computed that is read, and compare."""
    outputs: list[tuple[str, Any, Any]] = []
    comparison = _Comparison(trajectory, outputs)
    block_hooks = {block.name: _Unchanged(block, outputs) for block in full.graph.blocks[:-1]}
    _sample(trajectory, full, Store(), lower, comparison, block_hooks)
    if comparison.differs_in is None:
        return

    evaluation = comparison.evaluation
    step, _ = trajectory.sampler.evaluations[evaluation]
    denoiser = trajectory.network_of(evaluation)
    if comparison.differs_in == "input":
        raise _loop_error(step)
    if not _repeats_itself(denoiser, trajectory.calls[evaluation], trajectory.outputs[evaluation]):
        raise _unsteady_error(denoiser, step)
    raise _difference_error(full, step)


def _check_order(trajectory: Trajectory) -> None:
    """Evaluate recorded calls in the opposite order: what counts evaluations, or keeps something of the last, differs.

    Raises:
        TraceError: The denoiser answers otherwise than in the recorded order.
    """
    count = len(trajectory.calls)
    every = -(-count // MOST_REPEATED)
    for evaluation in reversed(range(0, count, every)):
        call = trajectory.calls[evaluation]
        denoiser = trajectory.network_of(evaluation)
        with torch.no_grad(), torch.random.fork_rng():
            output = call.evaluate(denoiser)
        if not _equal(output, trajectory.outputs[evaluation]):
            step, _ = trajectory.sampler.evaluations[evaluation]
            raise _order_error(denoiser, step)


class _Comparison(Hook):
    """Stands in front of the denoiser, and compares what it is given and says with the record.

    Args:
        trajectory: The record.
        outputs: What blocks have answered in this evaluation, each with its name and a copy.
    """

    def __init__(self, trajectory: Trajectory, outputs: list[tuple[str, Any, Any]]) -> None:
        self.trajectory = trajectory
        self.outputs = outputs
        self.evaluation = -1
        self.differs_in: str | None = None

    def __call__(self, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self.evaluation += 1
        if self.evaluation >= len(self.trajectory.calls):
            raise _loop_error(self.trajectory.steps)
        recorded = self.trajectory.calls[self.evaluation]
        if not _equal((args, kwargs), (recorded.args, recorded.kwargs)):
            self.differs_in = "input"
            raise _Differs

        output = call(*args, **kwargs)
        if not _equal(output, self.trajectory.outputs[self.evaluation]):
            self.differs_in = "output"
            raise _Differs
        self._check_outputs()
        return output

    def _check_outputs(self) -> None:
        """Refuse outputs of blocks that were changed in place by the end of the evaluation."""
        for block, output, copy in self.outputs:
            if not _equal(output, copy):
                raise TraceError(
                    given=f"block {block!r}, whose output is changed in place at evaluation {self.evaluation}",
                    expected="outputs that stay as they are, for they may be stored",
                    advice="Mask the module around it instead",
                )
        self.outputs.clear()


class _Answers(Hook):
    """Stands in front of the denoiser, and keeps what it says."""

    def __init__(self) -> None:
        self.outputs: list[Any] = []

    @property
    def evaluation(self) -> int:
        """The one that is going on."""
        return len(self.outputs)

    def __call__(self, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        output = call(*args, **kwargs)
        self.outputs.append(each(lambda tensor: tensor.detach().clone(), output))
        return output


class _Differs(BaseException):
    """The run is not the recorded one: the rest of it need not be seen."""


Lower = Callable[[MaskSchedule], Plan]


def _outputs(trajectory: Trajectory, table: MaskSchedule, store: Store, plan: Lower) -> Sequence[Any]:
    """What the denoiser says along the recorded run under a table."""
    listener = _Answers()
    _sample(trajectory, table, store, plan, listener)
    return listener.outputs


def _sample(
    trajectory: Trajectory,
    table: MaskSchedule,
    store: Store,
    plan: Lower,
    hook: _Comparison | _Answers,
    block_hooks: Mapping[str, Hook] | None = None,
) -> None:
    """Repeat the recorded sampling under a table, up to the last latent.

    Raises:
        AnotherPath: A masked run refuses what the denoiser does.
        TraceError: It fails in another way.
    """
    sampling = trajectory.sampling
    try:
        masked = Masked(sampling.pipe, [table], store, plan=plan)
        with masked, ExitStack() as stack, torch.no_grad():
            for denoiser in sampling.denoisers:
                stack.enter_context(attached_by_name(denoiser, block_hooks or {}))
            stack.enter_context(attached(dict.fromkeys(sampling.denoisers, hook)))
            sampling.latent()
    except _Differs:
        return
    except RunError as error:
        parts = error.parts
        raise AnotherPath(
            given=f"evaluation {hook.evaluation} of the recorded run, repeated under a plan: {parts['given']}",
            expected=parts["expected"],
            advice=parts["advice"],
            evaluation=hook.evaluation,
        ) from error
    except StepmaskError:
        raise
    except Exception as error:
        raise TraceError(
            given=f"evaluation {hook.evaluation} of the recorded run, which fails under a plan that reuses blocks: "
            f"{type(error).__name__}: {error}",
            expected="a run that goes on as it did",
            advice="Mask other blocks, by blocks=[...]",
        ) from error


class _PrivateStore(Store):
    """A store that nobody shares memory with, neither what goes in nor what comes out."""

    def put(self, value: Any) -> Any:
        """A copy."""
        return each(torch.clone, value)

    def take(self, held: Any) -> Any:
        """A copy."""
        return each(torch.clone, held)


def _random_table(full: MaskSchedule) -> MaskSchedule:
    """Cells computed at random, and reused plainly or as a forecast from two values; one step is reused whole."""
    generator = np.random.default_rng(SEED)
    rows = generator.random(full.rows.shape) < SHARE
    rows[0] = True
    rows[:, -1] = True

    # One step reuses every block, so that all that feeds blocks alone is left out.
    if len(rows) > 4:
        rows[1, :-1] = False

    # In the middle a step whose blocks are all computed for nothing: with what nobody reads left out, nothing runs.
    middle = len(rows) // 2
    if middle + 1 < len(rows):
        rows[middle : middle + 2] = True
        rows[middle, -1] = False

    # Forecasts read two values, of the same half.
    begins = full.sampler.begins
    rows[list(begins)] = True
    values = computed_before(rows, sorted({*begins, middle + 1} & {*range(len(rows))}))
    is_forecast = ~rows & (values > 1) & (generator.random(rows.shape) < 0.5)
    weights = np.tile((1.0, 0.0, 0.0), (*rows.shape, 1))
    weights[is_forecast] = (1.5, -0.5, 0.0)
    return full.with_rows(rows, weights)


def _equal(one: Any, other: Any) -> bool:
    """Whether two values have the same tensors, bit by bit; other things in them are not compared."""
    pairs = list(zip(tensors(one), tensors(other), strict=False))
    same_count = len(pairs) == sum(1 for _ in tensors(one)) == sum(1 for _ in tensors(other))
    return same_count and all(same_numbers(a, b) for a, b in pairs)


def _repeats_itself(denoiser: nn.Module, call: Call, recorded: Any) -> bool:
    """Whether the bare denoiser answers a recorded call twice as it did then."""
    with torch.no_grad(), torch.random.fork_rng():
        answers = [call.evaluate(denoiser) for _ in range(2)]
    return all(_equal(answer, recorded) for answer in answers)


def _dropped(table: MaskSchedule, step: int) -> str | None:
    """A block that was left out at a step or before it, the latest of them; `None` if there is none."""
    cells = lower(table).cells
    for earlier in reversed(range(step + 1)):
        for block, cell in zip(table.graph.blocks, cells[earlier], strict=True):
            if cell.action == "dead":
                return block.label
    return None


def _difference_error(table: MaskSchedule, step: int) -> TraceError:
    dropped = _dropped(table, step)
    what = (
        f"block {dropped!r} left out, which nothing was seen to read"
        if dropped
        else "blocks, or what feeds them, reused"
    )
    return TraceError(
        given=f"a denoiser that answers otherwise at step {step} with {what}",
        expected="blocks whose outputs reach others as tensors, in arguments and return values alone",
        advice="Mask others, by blocks=[...]: a value goes past these, in a number, the state of a module, or memory "
        "that is written to",
    )


def _order_error(denoiser: nn.Module, step: int) -> TraceError:
    return TraceError(
        given=f"a {type(denoiser).__name__} that answers the call of step {step} otherwise when the calls come in "
        "another order",
        expected="the same answer to the same input, whatever was evaluated before: a step that is reused whole runs "
        "nothing, and a block that is reused does not count",
        advice="Look for a counter of steps, or a value kept from the last one; take the step from the timestep",
    )


def _loop_error(step: int) -> TraceError:
    return TraceError(
        given=f"a sampling loop that does not repeat itself: at step {step} the denoiser is given something else than "
        "in the recorded run",
        expected="the same inputs, as long as the denoiser answers the same",
        advice=NOT_REPEATED,
    )


def _unsteady_error(denoiser: nn.Module, step: int) -> TraceError:
    trained = [name or "the denoiser itself" for name, module in denoiser.named_modules() if module.training]
    why = (
        f"{trained[0]} is in training mode"
        if trained
        else "it draws noise, counts its evaluations or keeps something of the last one, or was recorded masked"
    )
    return TraceError(
        given=f"a {type(denoiser).__name__} that does not repeat itself: at step {step} it answers the recorded call "
        f"otherwise, bare as it is; {why}",
        expected="the same answer to the same input",
        advice="Look for a counter of steps (take the step from the timestep) and call .eval(). Only if it differs by "
        "rounding alone: use deterministic kernels (torch.use_deterministic_algorithms), or pass prove=False to "
        "stepmask.trace",
    )
