"""Where the hooks of a masked denoiser stand: in front of modules, or inside and around its compiled regions."""

from collections.abc import Iterable, Iterator, Mapping, Sequence

from torch import nn

from stepmask.denoiser.branches import BranchOrder
from stepmask.denoiser.call import parameters_of
from stepmask.denoiser.compiled import InsideBlock, MaskedRegion, Pattern, Weights, masked_forward, patterns, stand_in
from stepmask.denoiser.refusals import refuse_hooks_inside, refuse_too_many_graphs
from stepmask.denoiser.regions import ROOM_FOR_GRAPHS, allow_graphs, compiled_regions, region_around, unwrapped
from stepmask.denoiser.replay import MaskedBlock, MaskedDenoiser, MaskedFeeder
from stepmask.denoiser.run import Run
from stepmask.denoiser.seam import Hook, attach, attach_traced, detach, detach_traced
from stepmask.denoiser.unread import Unread
from stepmask.errors import ScheduleMismatch
from stepmask.schedule.graph import BESIDE, BlockGraph


class Placement:
    """The hooks of a masked denoiser, and where they are now.

    Args:
        denoiser: The denoiser.
        run: The run.
        blocks: The hooks of its blocks, by column.
        feeders: The hooks of what feeds blocks alone, by name.
        own: The hook of the denoiser itself.
    """

    def __init__(
        self,
        denoiser: nn.Module,
        run: Run,
        blocks: Sequence[MaskedBlock],
        feeders: Mapping[str, MaskedFeeder],
        own: MaskedDenoiser,
    ) -> None:
        self.denoiser = denoiser
        self.run = run
        self.feeders = feeders
        self.own = own
        weights = Weights(run.plans)
        self.inside = {block: InsideBlock(block, weights) for block in blocks}  # for those in compiled regions
        self.hooked: dict[Hook, nn.Module] = {}
        self.traced: dict[InsideBlock, nn.Module] = {}

    def put(self) -> None:
        """Put the hooks where the modules of their names are now; others may have been put there, or been compiled.

        Raises:
            ScheduleMismatch: A module is not there.
            RunError: The denoiser is compiled as a whole, and would need too many graphs; or a block
                inside a compiled region has forward hooks, or not its class's `forward`.
        """
        regions = compiled_regions(self.denoiser)
        around = {block: region_around(block.block.name, regions) for block in self.inside}
        held = {name: [self.inside[block] for block in around if around[block] == name] for name in regions}
        masked = {name: MaskedRegion(inside) for name, inside in held.items() if inside}

        traced = {
            self.inside[block]: _module(self.denoiser, block.block.name)
            for block in around
            if around[block] is not None
        }
        if "" in masked:
            refuse_too_many_graphs(self.denoiser, len(self._patterns(masked[""])))
        for inside, module in traced.items():
            refuse_hooks_inside(module, inside.slot)
        hooks = dict(self._hooks(regions, around, masked))

        self.take_off(keep=hooks)
        for hook, module in hooks.items():
            attach(module, hook)
        for inside, module in traced.items():
            attach_traced(module, masked_forward(type(module).forward), inside.slot)
        self.hooked = hooks
        self.traced = traced
        self.run.stand_in = stand_in if traced else Unread.of
        self.own.region = masked.get("")
        if regions:
            allow_graphs(self._most_graphs(masked.values()) + ROOM_FOR_GRAPHS)

    def take_off(self, keep: Mapping[Hook, nn.Module] | None = None) -> None:
        """Take all hooks off, but for those that are to stay where they are."""
        stays = keep or {}
        for hook, module in self.hooked.items():
            if stays.get(hook) is not module:
                detach(module, hook)
        for inside, module in self.traced.items():
            detach_traced(module, inside.slot)

    def _hooks(
        self,
        regions: Mapping[str, nn.Module],
        around: Mapping[MaskedBlock, str | None],
        masked: Mapping[str, MaskedRegion],
    ) -> Iterator[tuple[Hook, nn.Module]]:
        """What stands in front of which module, the innermost first."""
        for block, region in around.items():
            if region is None:
                yield block, _module(self.denoiser, block.block.name)
        for name, feeder in self.feeders.items():
            if region_around(name, regions) is None:  # inside of one, the compiler leaves out what nobody reads
                yield feeder, _module(self.denoiser, name)
        for name, hook in masked.items():
            if name:
                yield hook, regions[name]
        yield self.own, self.denoiser

    def _patterns(self, region: MaskedRegion) -> set[tuple[Pattern, ...]]:
        return patterns(self.run.plans, [inside.values.column for inside in region.blocks])

    def _most_graphs(self, masked: Iterable[MaskedRegion]) -> int:
        """More graphs than the compiler needs for a masked run, were no two regions alike."""
        return len(self.inside) + sum(len(self._patterns(region)) for region in masked)


class MaskedNetwork:
    """A network under a run: its hooks, and where they stand. Networks that take turns share the run.

    Args:
        denoiser: The network.
        run: The run.
        graph: Its blocks.
        number: Which of the pipeline's networks it is.
        order: Watches the order of the branches, which may be of several networks.
    """

    def __init__(self, denoiser: nn.Module, run: Run, graph: BlockGraph, number: int, order: BranchOrder) -> None:
        self.denoiser = denoiser
        *blocks, own = graph.blocks
        self.blocks = [MaskedBlock(run, column, block) for column, block in enumerate(blocks)]
        self.own = MaskedDenoiser(run, self.blocks, own, parameters_of(denoiser), network=number, order=order)
        feeders = {name: MaskedFeeder(run, columns) for name, columns in graph.fed.items()
                    if not name.startswith(BESIDE)}  # fmt: skip
        self.placement = Placement(denoiser, run, self.blocks, feeders, self.own)

    def follow(self, denoiser: nn.Module) -> None:
        """Turn to another form of the network, its compiled one."""
        self.denoiser = denoiser
        self.placement.denoiser = denoiser


def networks_of(denoisers: Sequence[nn.Module], run: Run, graph: BlockGraph) -> list[MaskedNetwork]:
    """The networks of a pipeline under one run."""
    order = BranchOrder(run.branches)
    networks = [MaskedNetwork(denoiser, run, graph, number, order) for number, denoiser in enumerate(denoisers)]

    def put() -> None:
        for network in networks:
            network.placement.put()

    for network in networks:
        network.own.at_start = put  # modules may have been put in others' places since
    return networks


def _module(denoiser: nn.Module, name: str) -> nn.Module:
    try:
        return denoiser.get_submodule(name)
    except AttributeError as error:
        raise ScheduleMismatch(
            given=f"a {type(unwrapped(denoiser)).__name__} without {name!r}",
            expected="the blocks of the schedule, and the modules that feed them",
            advice="Apply the schedule to the denoiser it was made for, or learn a new one",
        ) from error
