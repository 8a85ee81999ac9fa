"""`Block` and `BlockGraph`: which blocks a denoiser has, in which order, who reads whom, and what each costs."""

from dataclasses import dataclass
from functools import cached_property
from itertools import chain, groupby
from math import isfinite
from operator import index as whole
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt

from stepmask.errors import InvalidSchedule, NoSuchBlock, NotTimed

Reuse = Literal["output", "delta"]
"""How a reused block answers: with its stored output, or with its input plus its stored (output − input)."""

DENOISER = ""
"""The denoiser's own fully qualified name. It is the last block of its own graph: to reuse it skips the whole step."""


@dataclass(frozen=True)
class Block:
    """A unit of masking: one module, named as in `named_modules()`.

    Args:
        name: Fully qualified module name; "" is the denoiser itself.
        reads: Names of the blocks whose outputs reach this block's inputs without passing another block.
        reuse: How it answers when it is not computed.
        macs: Multiply-accumulates per evaluation at the traced shape, blocks inside it not counted.
        shapes: Of the tensors it returns, as traced.
        bytes: Size of one stored value, as traced.
        ms: Milliseconds per evaluation at the traced shape, on the machine that measured; the denoiser's own are those
            of an evaluation that reuses all blocks; 0 = not measured.
        feeders: Names of modules outside all blocks whose outputs reach nothing but blocks, this one among them: the
            norm in front of an attention. Where none of those blocks is computed, the feeder is not called.
    """

    name: str
    reads: tuple[str, ...] = ()
    reuse: Reuse = "output"
    macs: int = 0
    shapes: tuple[tuple[int, ...], ...] = ()
    bytes: int = 0
    ms: float = 0.0
    feeders: tuple[str, ...] = ()

    @property
    def label(self) -> str:
        """The name as people read it."""
        return self.name or "(denoiser)"


@dataclass(frozen=True)
class BlockGraph:
    """The blocks of a denoiser in call order; the last is the denoiser itself, whose reads are what its output needs.

    Raises:
        InvalidSchedule: Two blocks share a name, a block reads one that is not called before it, a time is negative
            or not finite, or the denoiser is not the last block.
    """

    blocks: tuple[Block, ...]

    def __post_init__(self) -> None:
        seen: set[str] = set()
        for block in self.blocks:
            if block.name in seen or not seen.issuperset(block.reads) or block.reuse not in get_args(Reuse):
                raise _inconsistent(f"block {block.label!r} with reads {block.reads} and reuse {block.reuse!r}")
            if min(block.macs, block.bytes, *chain.from_iterable(block.shapes)) < 0:
                raise _inconsistent(f"block {block.label!r} with a negative size")
            if block.ms < 0 or not isfinite(block.ms):
                raise _inconsistent(f"block {block.label!r} with {block.ms} ms")
            if not all(isinstance(feeder, str) for feeder in block.feeders):
                raise _inconsistent(f"block {block.label!r} with feeders {block.feeders}")
            seen.add(block.name)
        if not self.blocks or self.blocks[-1].name != DENOISER:
            raise _inconsistent("a graph whose last block is not the denoiser")

    def __len__(self) -> int:
        return len(self.blocks)

    @property
    def names(self) -> tuple[str, ...]:
        """Fully qualified names, in call order."""
        return tuple(block.name for block in self.blocks)

    @cached_property
    def macs(self) -> npt.NDArray[np.int64]:
        """MACs per block, shape (blocks,); their sum is one evaluation of the denoiser."""
        return np.array([block.macs for block in self.blocks], dtype=np.int64)

    @cached_property
    def costs(self) -> npt.NDArray[np.float64]:
        """Share of the denoiser's MACs per block, shape (blocks,); sums to 1."""
        return self.macs / max(int(self.macs.sum()), 1)

    @property
    def is_timed(self) -> bool:
        """Whether the blocks' times were measured."""
        return any(block.ms for block in self.blocks)

    @cached_property
    def times(self) -> npt.NDArray[np.float64]:
        """Share of the denoiser's measured time per block, shape (blocks,); sums to 1.

        Raises:
            NotTimed: The times were not measured.
        """
        if not self.is_timed:
            raise NotTimed(
                given="a graph whose blocks were not timed",
                expected="milliseconds per block",
                advice="Call stepmask.denoiser.timing.time_blocks(pipe, trajectory, graph), and use its graph from the "
                "start: trace, time, then sweep or learn",
            )
        ms = np.array([block.ms for block in self.blocks])
        return np.asarray(ms / ms.sum())

    @cached_property
    def fed(self) -> dict[str, tuple[int, ...]]:
        """The columns that each feeder feeds, by its name."""
        names = dict.fromkeys(chain.from_iterable(block.feeders for block in self.blocks))
        return {name: tuple(c for c, block in enumerate(self.blocks) if name in block.feeders) for name in names}

    @cached_property
    def reads(self) -> npt.NDArray[np.bool_]:
        """Shape (blocks, blocks); `reads[b, a]` says that block b reads block a."""
        column = {name: index for index, name in enumerate(self.names)}
        matrix = np.zeros((len(self), len(self)), dtype=bool)
        for index, block in enumerate(self.blocks):
            matrix[index, [column[name] for name in block.reads]] = True
        return matrix

    def to_plain(self) -> list[dict[str, Any]]:
        """As plain JSON values, a dictionary a block; reads are spans of columns."""
        return [
            {
                "name": block.name,
                "reuse": block.reuse,
                "macs": block.macs,
                "shapes": [list(shape) for shape in block.shapes],
                "bytes": block.bytes,
                "ms": block.ms,
                "reads": span_of(np.flatnonzero(reads).tolist()),
                **({"feeders": list(block.feeders)} if block.feeders else {}),
            }
            for block, reads in zip(self.blocks, self.reads, strict=True)
        ]

    @classmethod
    def from_plain(cls, items: list[dict[str, Any]]) -> "BlockGraph":
        """From what `to_plain` gave."""
        names = [item["name"] for item in items]
        return cls(
            tuple(
                Block(
                    name=item["name"],
                    reads=tuple(names[column] for column in columns_of(item["reads"], len(items))),
                    reuse=item["reuse"],
                    macs=whole(item["macs"]),
                    shapes=tuple(tuple(map(whole, shape)) for shape in item["shapes"]),
                    bytes=whole(item["bytes"]),
                    ms=float(item.get("ms", 0.0)),
                    feeders=tuple(item.get("feeders", ())),
                )
                for item in items
            )
        )

    def column(self, name: str) -> int:
        """Index of a block by its name.

        Raises:
            NoSuchBlock: No block is called that.
        """
        if name not in self.names:
            raise NoSuchBlock(
                given=f"block {name!r}",
                expected=f"one of {', '.join(block.label for block in self.blocks)}",
                advice="Take a name from graph.names",
            )
        return self.names.index(name)


def span_of(columns: list[int]) -> str:
    """[0, 1, 2, 5] as "0-2,5"."""
    runs = [[column for _, column in run] for _, run in groupby(enumerate(columns), key=lambda item: item[1] - item[0])]
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def columns_of(span: str, count: int) -> list[int]:
    """The columns of a span over so many: [0, 1, 2, 5] for "0-2,5".

    Raises:
        ValueError: It is no span, or reaches beyond.
    """
    columns: list[int] = []
    for part in filter(None, span.split(",")):
        first, _, last = part.partition("-")
        if not 0 <= int(first) <= int(last or first) < count:
            raise ValueError(f"span {span!r} over {count} blocks")
        columns += range(int(first), int(last or first) + 1)
    return columns


def _inconsistent(what: str) -> InvalidSchedule:
    return InvalidSchedule(
        given=what,
        expected="unique names, reads of earlier blocks only, reuse 'output' or 'delta', finite times and sizes of 0 "
        "or more, names of feeders, and the denoiser last",
        advice="Use stepmask.trace to build a graph from a denoiser",
    )
