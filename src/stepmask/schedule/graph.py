"""`Block` and `BlockGraph`: which blocks a denoiser has, in which order, who reads whom, and what each costs."""

from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain, groupby
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt

from stepmask.errors import InvalidSchedule, NoSuchBlock, NotTimed
from stepmask.schedule.limits import MAX_BLOCKS, MAX_DIMENSIONS, MAX_NUMBER, MAX_TENSORS, is_name, is_number, is_whole
from stepmask.text import shortened, told

Reuse = Literal["output", "delta"]
"""How a reused block answers: with its stored output, or with its input plus its stored (output − input)."""

DENOISER = ""
"""The denoiser's own fully qualified name. It is the last block of its own graph: to reuse it skips the whole step."""

BESIDE = "."
"""How the names of feeders begin that lie on the pipeline, beside the denoiser, which has no module of such a name."""


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
            norm in front of an attention. Where none of those blocks is computed, the feeder is not called. One whose
            name begins with a dot is a network beside the denoiser, an attribute of the pipeline (".controlnet"); where
            the denoiser's glue reads it, it feeds the denoiser itself, whose MACs are with its own.
        shared: Which of the tensors it returns belong to all rows of the batch, by place: where guidance ends within a
            run, the others lose rows.
    """

    name: str
    reads: tuple[str, ...] = ()
    reuse: Reuse = "output"
    macs: int = 0
    shapes: tuple[tuple[int, ...], ...] = ()
    bytes: int = 0
    ms: float = 0.0
    feeders: tuple[str, ...] = ()
    shared: tuple[int, ...] = ()

    @property
    def label(self) -> str:
        """The name as people read it."""
        return self.name or "(denoiser)"


@dataclass(frozen=True)
class BlockGraph:
    """The blocks of a denoiser in call order; the last is the denoiser itself, whose reads are what its output needs.

    Raises:
        InvalidSchedule: Two blocks share a name, a block reads one that is not called before it, a size or a time is
            negative or too large, a name is none that a module can have, there are too many blocks, or the denoiser is
            not the last block.
    """

    blocks: tuple[Block, ...]

    def __post_init__(self) -> None:
        if len(self.blocks) > MAX_BLOCKS:
            raise _inconsistent(f"a graph of {len(self.blocks)} blocks")
        seen: set[str] = set()
        for block in self.blocks:
            _check(block, seen)
            seen.add(block.name)
        if not self.blocks or self.blocks[-1].name != DENOISER:
            raise _inconsistent("a graph whose last block is not the denoiser")
        if (total := sum(block.macs for block in self.blocks)) > MAX_NUMBER:
            raise _inconsistent(f"a graph of {told(total)} MACs")
        if both := seen.intersection(chain.from_iterable(block.feeders for block in self.blocks)):
            raise _inconsistent(f"block {shortened(min(both))!r}, which is a feeder too")

    def __len__(self) -> int:
        return len(self.blocks)

    @property
    def names(self) -> tuple[str, ...]:
        """Fully qualified names, in call order."""
        return tuple(block.name for block in self.blocks)

    def without_feeders(self) -> "BlockGraph":
        """The graph that knows of no feeders: under its plans they are always called."""
        return BlockGraph(tuple(replace(block, feeders=()) for block in self.blocks))

    def untimed(self) -> "BlockGraph":
        """The graph as if its blocks had not been timed: what it is on any machine."""
        return BlockGraph(tuple(replace(block, ms=0.0) for block in self.blocks))

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
        columns: dict[str, list[int]] = {}
        for column, block in enumerate(self.blocks):
            for name in dict.fromkeys(block.feeders):
                columns.setdefault(name, []).append(column)
        return {name: tuple(fed) for name, fed in columns.items()}

    @property
    def companions(self) -> tuple[str, ...]:
        """The networks beside the denoiser whose answers it is given, by the names of the pipeline's attributes."""
        return tuple(name.removeprefix(BESIDE) for name in self.fed if name.startswith(BESIDE))

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
                **({"shared": list(block.shared)} if block.shared else {}),
            }
            for block, reads in zip(self.blocks, self.reads, strict=True)
        ]

    @classmethod
    def from_plain(cls, items: list[dict[str, Any]]) -> "BlockGraph":
        """From what `to_plain` gave.

        Raises:
            InvalidSchedule: As the graph does.
            ValueError: A span of columns is none, as are the others of what is no plain graph at all.
        """
        if len(items) > MAX_BLOCKS:
            raise _inconsistent(f"a graph of {len(items)} blocks")
        names = [item["name"] for item in items]
        return cls(
            tuple(
                Block(
                    name=item["name"],
                    reads=tuple(names[column] for column in columns_of(item["reads"], len(items))),
                    reuse=item["reuse"],
                    macs=item["macs"],
                    shapes=tuple(tuple(_listed(shape)) for shape in _listed(item["shapes"])),
                    bytes=item["bytes"],
                    ms=_milliseconds(item.get("ms", 0.0)),
                    feeders=tuple(_listed(item.get("feeders", []))),
                    shared=tuple(_listed(item.get("shared", []))),
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
                given=f"block {shortened(name)!r}",
                expected=f"one of {', '.join(block.label for block in self.blocks)}",
                advice="Take a name from graph.names",
            )
        return self.names.index(name)


def span_of(columns: list[int]) -> str:
    """[0, 1, 2, 5] as "0-2,5"."""
    runs = [[column for _, column in run] for _, run in groupby(enumerate(columns), key=lambda item: item[1] - item[0])]
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def columns_of(span: str, count: int) -> list[int]:
    """The columns of a span over so many, in order: [0, 1, 2, 5] for "0-2,5".

    Raises:
        ValueError: It is no span, reaches beyond, or names a column twice.
    """
    if not isinstance(span, str):
        raise ValueError(f"{told(span)} where a span was expected")
    columns: list[int] = []
    for part in filter(None, span.split(",")):
        first, _, last = part.partition("-")
        if not 0 <= int(first) <= int(last or first) < count:
            raise ValueError(f"span {told(span)} over {count} blocks")
        columns += range(int(first), int(last or first) + 1)
        if len(columns) > count:
            break
    if len(set(columns)) < len(columns):
        raise ValueError(f"span {told(span)} names a column twice")
    return sorted(columns)


def _check(block: Block, seen: set[str]) -> None:
    """Refuse a block that no denoiser has, given the names of those before it."""
    if not all(map(is_name, (block.name, *block.feeders))) or DENOISER in block.feeders:
        raise _inconsistent(f"block {told(block.name)}, whose name or feeders are no names")
    label = shortened(block.label)
    if block.name in seen or not seen.issuperset(block.reads) or block.reuse not in get_args(Reuse):
        reads = shortened(", ".join(block.reads))
        raise _inconsistent(f"block {label!r} with reads ({reads}) and reuse {told(block.reuse)}")
    if len(block.shapes) > MAX_TENSORS or any(len(shape) > MAX_DIMENSIONS for shape in block.shapes):
        raise _inconsistent(f"block {label!r} with {len(block.shapes)} shapes, or one with too many dimensions")
    for size in (block.macs, block.bytes, *chain.from_iterable(block.shapes)):
        if not is_whole(size):
            raise _inconsistent(f"block {label!r} with a size of {told(size)}")
    if not all(is_whole(place, len(block.shapes) - 1) for place in block.shared):
        raise _inconsistent(f"block {label!r} with shared tensors at {told(block.shared)}, of {len(block.shapes)}")
    if not is_number(block.ms) or block.ms < 0:
        raise _inconsistent(f"block {label!r} with {told(block.ms)} ms")


def _listed(value: object) -> list[Any]:
    """A list as it is.

    Raises:
        TypeError: It is none: text has parts, too.
    """
    if not isinstance(value, list):
        raise TypeError(f"{told(value)} where a list was expected")
    return value


def _milliseconds(value: object) -> float:
    """A time as a fraction, whichever way it was written.

    Raises:
        TypeError: It is no number.
    """
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise TypeError(f"{told(value)} where milliseconds were expected")
    return float(value)


def _inconsistent(what: str) -> InvalidSchedule:
    return InvalidSchedule(
        given=what,
        expected=f"at most {MAX_BLOCKS} blocks with unique names, reads of earlier blocks only, reuse 'output' or "
        f"'delta', whole sizes and finite times from 0 to {MAX_NUMBER:.0e}, feeders that are no blocks, and the "
        "denoiser last",
        advice="Use stepmask.trace to build a graph from a denoiser",
    )
