"""Per-channel forecasts as data: weights of the stored values and a bias for every channel of what a block says."""

from collections.abc import Mapping
from math import prod

import numpy as np
import numpy.typing as npt

from stepmask.errors import InvalidSchedule
from stepmask.schedule.forecasts import WINDOW
from stepmask.schedule.graph import Block, BlockGraph

Vectors = npt.NDArray[np.float32]
"""(reads + 1, channels): a row of weights per stored value, newest first, then the row of biases."""

Channels = Mapping[tuple[int, int], Vectors]
"""The vectors of the cells that have them, by (step, column)."""


def channel_axis(dimensions: int) -> int:
    """The axis of a value that counts its channels: the second of images (4-D) and videos (5-D), else the last."""
    return 1 if dimensions in (4, 5) else dimensions - 1


def reads_of(vectors: Vectors) -> int:
    """How many stored values a per-channel forecast reads."""
    return len(vectors) - 1


def bytes_of(vectors: Vectors, block: Block) -> int:
    """What a run holds of these vectors: in float32, or in the dtype of the traced value where that is wider."""
    return vectors.size * max(4, block.bytes // prod(block.shapes[0]))


def checked(channels: Channels, graph: BlockGraph, rows: npt.NDArray[np.bool_]) -> dict[tuple[int, int], Vectors]:
    """Read-only float32 copies, by step and column.

    Args:
        channels: The vectors of reused cells.
        graph: The blocks.
        rows: (steps, blocks), true = compute.

    Raises:
        InvalidSchedule: A cell is not in the table or is computed, its block says several tensors, or its vectors are
            not finite or of another shape than (reads + 1, channels).
    """
    copies = {}
    for step, column in sorted(channels):
        _check_cell(step, column, graph, rows)
        copies[int(step), int(column)] = _checked_vectors(channels[step, column], step, graph.blocks[column])
    return copies


def _check_cell(step: int, column: int, graph: BlockGraph, rows: npt.NDArray[np.bool_]) -> None:
    if step not in range(len(rows)) or column not in range(len(graph)):
        raise _invalid(f"step {step}, column {column}", f"a cell of {len(rows)} steps × {len(graph)} blocks")
    block = graph.blocks[column]
    if rows[step, column]:
        raise _invalid(f"step {step}, {block.label!r}, which is computed", "vectors for reused cells only")
    if len(block.shapes) != 1 or not prod(block.shapes[0]) or not block.shapes[0]:
        raise _invalid(
            f"step {step}, {block.label!r}, whose value has the shapes {block.shapes}", "a block that says one tensor"
        )


def _checked_vectors(given: npt.ArrayLike, step: int, block: Block) -> Vectors:
    with np.errstate(over="ignore"):  # what float32 cannot hold is infinite, and refused as that
        vectors = np.array(given, dtype=np.float32, order="C")
    shape = block.shapes[0]
    count = shape[channel_axis(len(shape))]
    if vectors.ndim != 2 or vectors.shape[1] != count or not 1 <= reads_of(vectors) <= WINDOW:
        raise _invalid(
            f"step {step}, {block.label!r}, of shape {vectors.shape}",
            f"shape (reads + 1, {count}) for a value of shape {shape}, reads from 1 to {WINDOW}",
        )
    if not np.isfinite(vectors).all():
        raise _invalid(f"step {step}, {block.label!r}, that are not finite", "finite float32 weights and biases")
    vectors.setflags(write=False)
    return vectors


def _invalid(where: str, expected: str) -> InvalidSchedule:
    return InvalidSchedule(
        given=f"per-channel vectors for {where}",
        expected=expected,
        advice="Give a row of weights per stored value, newest first, then the biases: "
        "channels={(step, column): array}",
    )
