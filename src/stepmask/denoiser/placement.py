"""Where the hooks of a masked denoiser stand: in front of modules, or inside and around its compiled regions."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch import nn

from stepmask.denoiser.call import parameters_of
from stepmask.denoiser.compiled import (
    InsideBlock,
    MaskedRegion,
    Pattern,
    RegionBetween,
    Weights,
    masked_forward,
    patterns,
)
from stepmask.denoiser.refusals import refuse_hooks_inside, refuse_too_many_graphs
from stepmask.denoiser.regions import ROOM_FOR_GRAPHS, allow_graphs, compiled_regions, region_around, unwrapped
from stepmask.denoiser.replay import MaskedBlock, MaskedDenoiser, MaskedFeeder, guarded_forward
from stepmask.denoiser.run import Run
from stepmask.denoiser.seam import Hook, attach, attach_traced, detach, detach_traced, has_other_forward, hooks_of
from stepmask.errors import RunError, ScheduleMismatch
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
        self.unread_outputs: dict[nn.Module, dict[Any, Any]] = {}  # of regions

    def turn(self) -> None:
        """Turn all hooks to the run's plans, which have changed; nothing of the plans before stays held."""
        weights = Weights(self.run.plans)
        for block, inside in self.inside.items():
            block.turn()
            inside.turn(weights)
        for feeder in self.feeders.values():
            feeder.turn()
        self.own.turn()

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
        masked = self._regions(regions, held)

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
        if not has_other_forward(unwrapped(self.denoiser), self.own.door):
            attach_traced(unwrapped(self.denoiser), guarded_forward, self.own.door)
        for inside, module in traced.items():
            attach_traced(module, masked_forward(type(module).forward), inside.slot)
        self.hooked = hooks
        self.traced = traced
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
        detach_traced(unwrapped(self.hooked.get(self.own, self.denoiser)), self.own.door)

    def refuse_if_lost(self) -> None:
        """Refuse a denoiser that has lost a hook, for somebody has compiled it or a part since the run began.

        Raises:
            RunError: It has.
        """
        lost = [module for hook, module in self.hooked.items() if hook not in hooks_of(module)]
        if lost:
            raise RunError(
                given=f"a {type(unwrapped(lost[0])).__name__} that was compiled in the middle of a run",
                expected="a denoiser that stays as it is until the run's end",
                advice="Compile before the run, or after it; masked.compile() may come at any time",
            )

    def _regions(
        self, regions: Mapping[str, nn.Module], held: Mapping[str, Sequence[InsideBlock]]
    ) -> dict[str, MaskedRegion]:
        """What stands in front of compiled regions, but for blocks and what feeds them alone, which have their own."""
        others = {block.block.name for block in self.inside} | set(self.feeders)
        masked: dict[str, MaskedRegion] = {}
        for name, module in regions.items():
            if not name and held[name]:
                masked[name] = MaskedRegion(held[name])
            elif name and name not in others:
                known = self.unread_outputs.setdefault(module, {})
                masked[name] = RegionBetween(module, name, held[name], self.run, known)
        return masked

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
    """

    def __init__(self, denoiser: nn.Module, run: Run, graph: BlockGraph, number: int) -> None:
        self.denoiser = denoiser
        *blocks, own = graph.blocks
        self.blocks = [MaskedBlock(run, column, block) for column, block in enumerate(blocks)]
        self.own = MaskedDenoiser(run, self.blocks, own, parameters_of(denoiser), number)
        inside = {name: columns for name, columns in graph.fed.items() if not name.startswith(BESIDE)}
        feeders = {name: MaskedFeeder(run, columns) for name, columns in inside.items()}
        self.placement = Placement(denoiser, run, self.blocks, feeders, self.own)
        self.own.at_missing = self.placement.refuse_if_lost

    def follow(self, denoiser: nn.Module) -> None:
        """Turn to another form of the network, its compiled one."""
        self.denoiser = denoiser
        self.placement.denoiser = denoiser


def networks_of(denoisers: Sequence[nn.Module], run: Run, graph: BlockGraph) -> list[MaskedNetwork]:
    """The networks of a pipeline under one run."""
    networks = [MaskedNetwork(denoiser, run, graph, number) for number, denoiser in enumerate(denoisers)]

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
