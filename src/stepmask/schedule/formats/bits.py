"""What the formats share: lists of 0 and 1 a step, and the refusal of what they have no word for."""

from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt

from stepmask.errors import InvalidSchedule
from stepmask.schedule.forecasts import PLAIN
from stepmask.schedule.graph import BlockGraph
from stepmask.schedule.schedule import MaskSchedule
from stepmask.text import shortened


def to_bits(values: Sequence[int], steps: int, what: str) -> npt.NDArray[np.bool_]:
    """A list of 0 and 1 as bits, shape (steps,).

    Raises:
        InvalidSchedule: It has another length, or holds anything else.
    """
    if not isinstance(values, Sequence) or len(values) != steps or any(value not in (0, 1) for value in values):
        raise InvalidSchedule(
            given=f"{what} = {shortened(repr(values))}",
            expected=f"a list of {steps} numbers, one a step, noisiest first, 1 = compute and 0 = reuse",
            advice="Read it with a reference for as many steps as it was made for",
        )
    return np.array(values, dtype=bool)


def plain_rows(schedule: MaskSchedule, tool: str) -> npt.NDArray[np.bool_]:
    """The rows of a schedule without forecasts and blends.

    Raises:
        InvalidSchedule: It has some.
    """
    others = int((schedule.forecasts != PLAIN).any(axis=2).sum()) + len(schedule.channels)
    if others:
        raise InvalidSchedule(
            given=f"a schedule with {others} forecasts or blends, for {tool}",
            expected=f"one that reuses values as they were: {tool} takes nothing else from a table",
            advice="Leave them out, schedule.with_rows(schedule.rows), and measure what is left",
        )
    return schedule.rows


def check_reused_by_output(graph: BlockGraph, columns: Iterable[int], tool: str) -> None:
    """Refuse blocks that answer with their input plus a stored difference, where a tool stores outputs.

    Raises:
        InvalidSchedule: There is one.
    """
    for column in columns:
        if graph.blocks[column].reuse != "output":
            raise InvalidSchedule(
                given=f"{graph.blocks[column].label!r}, which is reused by {graph.blocks[column].reuse}",
                expected=f"blocks that are reused by output, as {tool} does",
                advice='Trace the denoiser with granularity="sublayer", or with blocks={pattern: "output"}',
            )
