"""`trace`: a denoiser's blocks, their order, who reads whom, and their cost, from evaluations on fake tensors."""

import logging
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import _pytree as pytree

from stepmask.denoiser.batch import Shapes, rows_of
from stepmask.denoiser.call import Call
from stepmask.denoiser.companions_seen import Companion, companions_seen
from stepmask.denoiser.dataflow import Flow, Recorder, TracedBlock
from stepmask.denoiser.fakes import on_fakes
from stepmask.denoiser.families import Granularity, Patterns, denoiser_of, find_blocks, is_known
from stepmask.denoiser.modes import autocast_as, uncompiled, unfused_attention, without_inference_mode
from stepmask.denoiser.proof import AnotherPath, check_against_record
from stepmask.denoiser.quantised import quantised_counted
from stepmask.denoiser.refusals import refuse_if_taken
from stepmask.denoiser.seam import Hook, attached_by_name, frozen
from stepmask.denoiser.shards import gathered_unseen
from stepmask.denoiser.trajectory import Trajectory
from stepmask.denoiser.values import tensors
from stepmask.errors import TraceError
from stepmask.schedule.fingerprint import SamplerFingerprint
from stepmask.schedule.graph import BESIDE, Block, BlockGraph, Reuse

log = logging.getLogger(__name__)

MOST_GLUE = 1 / 3
"""The share of the MACs outside of blocks, from which on it is told what to name instead."""

LEAST_OF_AVERAGE = 1e-3
"""Of blocks that were found by themselves, what has at most this share of their average MACs is left out."""

MOST_PATHS = 12
"""The number of recorded calls that are traced at most."""


@without_inference_mode()  # in it whole operations are seen, not what they are made of
@uncompiled()
def trace(
    pipe: Any,
    example: Trajectory | Call | tuple[Any, ...] | Mapping[str, Any],
    *,
    granularity: Granularity = "sublayer",
    blocks: str | Iterable[str] | Patterns | None = None,
    prove: bool = True,
) -> BlockGraph:
    """Find a denoiser's blocks and how they hang together, and prove it on the recorded run.

        graph = stepmask.trace(pipe, trajectory)
        graph = stepmask.trace(network, (x, t), blocks="layers.*")

    The denoiser is evaluated once for real, unless it is on "meta": what it caches at its first call must be real. The
    rest is done on fake tensors, and computes nothing. Where these do not do, it is for real: if weights are offloaded
    or cast layer by layer, if numbers decide about shapes or paths (Mochi, Lumina 2), or if it cannot be copied. Of a
    trajectory, one call of every form is traced, and those that turn out to take another path.

    What a trace may miss, the proof finds: the recorded sampling is run once with all blocks computed, but for those
    that nobody reads, and under a random table, with what nobody reads left out and without. The numbers must be the
    same, evaluation by evaluation. Some recorded calls are evaluated in the opposite order, which finds counters.
    All that costs about two samplings and eight evaluations.

    A ControlNet that the pipeline calls beside its denoiser is found by repeating the run without the denoiser: who
    reads it, and its MACs, which count among the denoiser's own.

    Args:
        pipe: A pipeline, or the denoiser itself.
        example: What the denoiser is called with: a trajectory, or positional or keyword arguments.
        granularity: "sublayer" masks attention and feed-forward modules, "block" whole transformer blocks; of a
            U-Net, "block" masks whole attentions where "sublayer" masks what is inside them. For known families.
        blocks: A name pattern, several, or patterns with the way of reuse. `None` = the family's own; of a class that
            has none, the elements of its module lists (at "sublayer" their attention and feed-forward modules), as far
            as these evaluations call them.
        prove: Whether a trajectory's graph is proven; `False` for who knows that it holds.

    Returns:
        The graph, the denoiser itself as its last block. MACs are half of `torch.utils.flop_counter`'s FLOPs, with
        attention's two matrix products and both halves of a guided batch; element-wise work is not counted, and
        quantised layers count as whole ones.

    Raises:
        NoSuchBlock: A pattern matches no module.
        AlreadyApplied: The denoiser is under a schedule.
        TraceError: A named block is not called; a block is called twice, without tensors, at some steps only or in
            another order; a value reaches others past a block's arguments and answer; a block draws random numbers,
            keeps state, or is changed in place by the code after it; the denoiser uses flex attention; or the run does
            not give the same numbers.
    """
    denoiser = denoiser_of(pipe)
    refuse_if_taken(denoiser)
    found = find_blocks(denoiser, granularity, blocks)
    _refuse_fused(denoiser, found)
    run = example if isinstance(example, Trajectory) else None
    calls = (_call(example),) if run is None else run.calls
    sampler = SamplerFingerprint("", tuple(map(float, range(len(calls))))) if run is None else run.sampler
    beside = {} if run is None else companions_seen(run)
    tracer = _Tracer(denoiser, found, sampler, beside, are_named=blocks is not None)
    are_guessed = blocks is None and not is_known(denoiser)
    with autocast_as(None if run is None else run.sampling.autocast):
        if are_guessed:
            tracer.leave_out_trifles(calls[0])
        for index in _forms(calls):
            if index not in tracer.traced:
                tracer.trace(calls[index], index)
        if run is not None and prove:
            _prove(run, tracer)
    if are_guessed:
        tracer.tell_glue()
    return tracer.graph


def _prove(trajectory: Trajectory, tracer: "_Tracer") -> None:
    """Prove the graph, and trace calls that take another path than those before.

    Raises:
        TraceError: It does not hold.
    """
    while True:
        try:
            return check_against_record(trajectory, tracer.graph)
        except AnotherPath as error:
            if error.evaluation in tracer.traced or len(tracer.traced) >= MOST_PATHS:
                raise
            tracer.trace(trajectory.calls[error.evaluation], error.evaluation)


class _Tracer:
    """Traces one call after the other, and puts what they show together.

    Args:
        denoiser: The denoiser.
        found: Its blocks, with the way that each is to be reused.
        sampler: Which step and branch each call is of.
        beside: The networks beside the denoiser whose answers it is given, by name.
        are_named: Whether somebody asked for just these blocks.
    """

    def __init__(
        self,
        denoiser: nn.Module,
        found: dict[str, Reuse | None],
        sampler: SamplerFingerprint,
        beside: Mapping[str, Companion],
        *,
        are_named: bool,
    ) -> None:
        self.denoiser = denoiser
        self.found = found
        self.sampler = sampler
        self.beside = beside
        self.are_named = are_named
        self.traced: dict[int, BlockGraph] = {}
        self.rows: dict[int, int] = {}  # of the latent that each traced evaluation was given
        self.flops: Mapping[str, int] = {}  # of modules, by torch's counter

    @property
    def graph(self) -> BlockGraph:
        """What all traced calls show together, with the MACs of networks beside the denoiser among its own."""
        alike: dict[tuple[int, int], dict[int, BlockGraph]] = {}
        for index, graph in self.traced.items():
            step, branch = self.sampler.evaluations[index]
            begun = max(begin for begin in self.sampler.begins if begin <= step)
            alike.setdefault((branch, begun), {})[index] = graph
        shared: dict[str, set[int]] = {}
        for traced in alike.values():
            self._check_shapes(traced, shared)
        graph = _together({index: self.traced[index] for index in sorted(self.traced, key=self._is_unlike_most)})
        *blocks, own = (replace(block, shared=tuple(sorted(shared.get(block.name, ())))) for block in graph.blocks)
        return BlockGraph((*blocks, replace(own, macs=own.macs + self._macs_beside)))

    @property
    def _macs_beside(self) -> int:
        """Of the networks beside the denoiser, per evaluation."""
        return sum(companion.macs for companion in self.beside.values())

    def _is_unlike_most(self, index: int) -> bool:
        """Whether an evaluation lacks a part of the batch, or is of a short beginning: a graph has others' sizes."""
        step, _ = self.sampler.evaluations[index]
        begins = [*self.sampler.begins, self.sampler.steps]
        lengths = [end - begin for begin, end in pairwise(begins)]
        own = next(length for begin, length in reversed([*zip(begins, lengths, strict=False)]) if begin <= step)
        return self.sampler.loads[step] < 1 or own < max(lengths) / 2

    def _check_shapes(self, traced: Mapping[int, BlockGraph], shared: dict[str, set[int]]) -> None:
        """Refuse blocks whose outputs change their shape from step to step, but for the parts of a guided batch.

        Args:
            traced: Evaluations of one branch since the run last began.
            shared: Gets which of each block's tensors belong to all rows, by its name.

        Raises:
            TraceError: There is one.
        """
        first_index, first = next(iter(traced.items()))
        for index, other in traced.items():
            rows = self.rows[first_index], self.rows[index]
            for one, two in zip(first.blocks, other.blocks, strict=False):
                if one.name != two.name:
                    continue
                if not _shapes_fit(one.shapes, two.shapes, *rows):
                    raise TraceError(
                        given=f"block {one.label!r}, which answers with shape {two.shapes} at evaluation {index}, and "
                        f"with {one.shapes} at evaluation {first_index}",
                        expected="one shape at all steps, for what is stored must fit later ones",
                        advice="Keep guidance and caches on or off for the whole run, or pad what changes its length",
                    )
                if rows[0] != rows[1]:
                    same = zip(one.shapes, two.shapes, strict=True)
                    shared.setdefault(one.name, set()).update(place for place, (a, b) in enumerate(same) if a == b)

    def trace(self, call: Call, index: int) -> None:
        """Trace one call.

        Args:
            call: The call.
            index: Which of the recorded ones it is.
        """
        try:
            watch = partial(self._watch, index)
            recorder, output = on_fakes(self.denoiser, call, watch) or watch(self.denoiser, call)
        except NotImplementedError as error:
            raise _not_followed_error(self.denoiser, error) from error
        missing = [name for name in self.found if name not in recorder.blocks]
        if missing and self.are_named:
            raise TraceError(
                given=f"block {missing[0]!r}, which evaluation {index} did not call",
                expected="every block called once per evaluation",
                advice="Leave it out of the pattern, or trace with inputs that use it",
            )
        self.traced[index] = recorder.graph(output)
        self.rows[index] = rows_of(call.args, call.kwargs)
        self.flops = self.flops or {
            name.partition(".")[2]: sum(counts.values()) for name, counts in recorder.flops.get_flop_counts().items()
        }

    def leave_out_trifles(self, call: Call) -> None:
        """Leave out blocks that cost next to nothing beside the others: norms, projections of the timestep.

        Args:
            call: The first recorded call, which is traced again if any is left out.
        """
        self.trace(call, 0)
        macs = {block.name: block.macs for block in self.graph.blocks[:-1]}
        least = LEAST_OF_AVERAGE * sum(macs.values()) / max(len(macs), 1)
        worth = {name: reuse for name, reuse in self.found.items() if macs.get(name, 0) > least}
        if worth and len(worth) < len(macs):
            self.found = worth
            del self.traced[0]

    def _watch(self, index: int, denoiser: nn.Module, call: Call) -> tuple[Recorder, Any]:
        """One evaluation: what it showed, and its output."""
        recorder = Recorder(self.found, list(tensors((call.args, call.kwargs))))
        leaves = pytree.tree_leaves((call.args, call.kwargs))
        for name, companion in self.beside.items():
            recorder.feeders.give(name, [leaves[place] for place in companion.places.get(index, ())])
        hooks: dict[str, Hook] = {name: TracedBlock(recorder, name) for name in self.found}
        hooks |= recorder.feeders.hooks(denoiser, self.found)
        with ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            stack.enter_context(frozen(denoiser))
            stack.enter_context(attached_by_name(denoiser, hooks))
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))
            stack.enter_context(unfused_attention())
            stack.enter_context(_no_warning_of_global_hooks())
            stack.enter_context(gathered_unseen(denoiser))
            stack.enter_context(quantised_counted(denoiser, recorder.flops))
            stack.enter_context(recorder.flops)
            stack.enter_context(Flow(recorder))
            output = call.evaluate(denoiser)
        return recorder, output

    def tell_glue(self) -> None:
        """Tell who found blocks by themselves that much of the denoiser lies outside of them, and what to name."""
        graph = self.graph
        share = (graph.blocks[-1].macs - self._macs_beside) / max(int(graph.macs.sum()) - self._macs_beside, 1)
        if share <= MOST_GLUE:
            return
        outside = {
            name: flops
            for name, flops in self.flops.items()
            if name and not any(name.startswith(f"{block}.") or block.startswith(f"{name}.") for block in self.found)
            and name not in self.found
        }  # fmt: skip
        largest = [name for name in outside if not any(name.startswith(f"{other}.") for other in outside)]
        largest.sort(key=lambda name: -outside[name])
        log.warning(
            "%.0f %% of the MACs of this %s lie outside the %d blocks that were found by themselves. Name more, by "
            "blocks=[...]: the largest modules outside are %s.",
            100 * share,
            type(self.denoiser).__name__,
            len(self.found),
            ", ".join(map(repr, largest[:5])) or "none of its own",
        )


def _forms(calls: Sequence[Call]) -> list[int]:
    """One call of every form, and of calls that differ in numbers the first, the middle and the last."""
    forms: dict[Any, list[int]] = {}
    for index, call in enumerate(calls):
        leaves, structure = pytree.tree_flatten((call.args, call.kwargs))
        forms.setdefault((str(structure), *map(_form, leaves)), []).append(index)
    chosen: set[int] = set()
    for indices in forms.values():
        chosen.add(indices[0])
        if any(_numbers(calls[index]) != _numbers(calls[indices[0]]) for index in indices):
            chosen |= {indices[len(indices) // 2], indices[-1]}
    return sorted(chosen)[:MOST_PATHS]


def _form(leaf: Any) -> Any:
    if isinstance(leaf, Tensor):
        return tuple(leaf.shape), leaf.dtype
    if isinstance(leaf, bool | str | None):
        return leaf
    return type(leaf)


def _numbers(call: Call) -> list[Any]:
    return [leaf for leaf in pytree.tree_leaves((call.args, call.kwargs)) if isinstance(leaf, int | float)]


def _shapes_fit(one: Shapes, other: Shapes, rows: int, other_rows: int) -> bool:
    """Whether shapes are the same, but for first dimensions that go by the rows of the batch, as `Batch` takes them.

    Args:
        one: Of a block's output.
        other: Of the same block's in another evaluation.
        rows: How many the one evaluation is given.
        other_rows: How many the other is given.
    """
    if len(one) != len(other):
        return False
    for first, second in zip(one, other, strict=True):
        goes_by_rows = bool(first and second) and first[0] * other_rows == second[0] * rows and first[1:] == second[1:]
        if first != second and not goes_by_rows:
            return False
    return True


def _together(traced: Mapping[int, BlockGraph]) -> BlockGraph:
    """One graph from those of several calls: what any of them reads is read.

    Raises:
        TraceError: They call other blocks, or in another order.
    """
    first, *others = traced.values()
    for index, other in traced.items():
        if other.names != first.names:
            raise _other_order_error(first, other, index)
    feeders = set(first.fed).intersection(*(other.fed for other in others))
    feeders |= {name for graph in traced.values() for name in graph.fed if name.startswith(BESIDE)}
    columns = zip(*(graph.blocks for graph in traced.values()), strict=True)
    return BlockGraph(tuple(_one_block(blocks, first.names, feeders) for blocks in columns))


def _one_block(blocks: Sequence[Block], order: Sequence[str], feeders: set[str]) -> Block:
    """A block as several calls showed it."""
    reads = {name for block in blocks for name in block.reads}
    fed_by = dict.fromkeys(name for block in blocks for name in block.feeders if name in feeders)
    is_delta = all(block.reuse == "delta" for block in blocks)
    return replace(
        blocks[0],
        reads=tuple(name for name in order if name in reads),
        reuse="delta" if is_delta else "output",
        feeders=tuple(fed_by),
    )


def _other_order_error(first: BlockGraph, other: BlockGraph, index: int) -> TraceError:
    pairs = zip((*first.names, "nothing"), (*other.names, "nothing"), strict=False)
    expected, given = next((one, two) for one, two in pairs if one != two)
    return TraceError(
        given=f"evaluation {index}, which calls block {given!r} where the first one calls {expected!r}",
        expected="the same blocks in the same order at every step",
        advice="Mask only blocks that every step calls, by blocks=[...], or the module around them",
    )


def _refuse_fused(denoiser: nn.Module, found: Iterable[str]) -> None:
    """Refuse blocks inside torch's encoder layers, which skip them where they are fused into one operation."""
    if not torch.backends.mha.get_fastpath_enabled():
        return
    fused = [name for name, module in denoiser.named_modules() if isinstance(module, nn.TransformerEncoderLayer)]
    for block in found:
        if layer := next((name for name in fused if block.startswith(f"{name}.")), None):
            raise TraceError(
                given=f"block {block!r}, inside {layer!r}, which torch runs as one fused operation",
                expected="blocks that are called",
                advice="Call torch.backends.mha.set_fastpath_enabled(False) before you record, or mask the whole layer",
            )


@contextmanager
def _no_warning_of_global_hooks() -> Iterator[None]:
    """Without the warning that the counter's hooks are called twice for compiled wrappers, which does not matter."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"Using `torch\.compile\(module\)` when there are global hooks")
        yield


def _not_followed_error(denoiser: nn.Module, error: NotImplementedError) -> TraceError:
    what = str(error).split(" and mode")[0]
    return TraceError(
        given=f"a {type(denoiser).__name__} with an operation that cannot be followed ({what})",
        expected="operations on dense tensors that torch's dispatch modes see; flex attention is none outside "
        "torch.compile",
        advice="Choose another attention for the denoiser, or dense tensors inside it",
    )


def _call(example: Any) -> Call:
    if isinstance(example, Call):
        return example
    if isinstance(example, Mapping):
        return Call((), dict(example))
    return Call(tuple(example), {})
