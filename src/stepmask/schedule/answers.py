"""What every cell of a table answers, as weights of its block's values by age."""

import numpy as np
import numpy.typing as npt

from stepmask.errors import InvalidSchedule
from stepmask.schedule.forecasts import PLAIN
from stepmask.schedule.rectify import lower
from stepmask.schedule.schedule import MaskSchedule


def answers(schedule: MaskSchedule, ages: int) -> npt.NDArray[np.float64]:
    """Weights of the values from 0, 1, … `ages` steps ago, shape (steps, blocks, ages + 1).

    A computed cell is (1, 0, 0, …) or a blend, a reused one has its forecast's weights at the ages of the values it
    reads, a cell that nobody reads is all zeros.

    Raises:
        InvalidSchedule: A cell reads a value older than `ages`, or forecasts channel by channel.
    """
    if schedule.channels:
        raise InvalidSchedule(
            given=f"a table with {len(schedule.channels)} per-channel forecasts",
            expected="one weight per stored value, which is what a sweep can tell the effect of",
            advice="Measure this table by running it: stepmask.evaluate",
        )
    plan = lower(schedule)
    weights = np.zeros((*plan.computed.shape, ages + 1))
    for column in range(len(plan.graph)):
        computed: list[int] = []  # newest first
        for step, row in enumerate(plan.cells):
            cell = row[column]
            if cell.action == "compute":
                computed.insert(0, step)
            if cell.action != "dead":
                answer = cell.weights or PLAIN[:1]
                age = [step - source for source in computed[: len(answer)]]
                if age[-1] > ages:
                    raise _too_old(schedule, step, column, age[-1], ages)
                weights[step, column, age] = answer
    return weights


def _too_old(schedule: MaskSchedule, step: int, column: int, age: int, ages: int) -> InvalidSchedule:
    return InvalidSchedule(
        given=f"{schedule.graph.blocks[column].label!r} at step {step}, which reads a value {age} steps old",
        expected=f"values at most {ages} steps old, as far as the profile knows",
        advice=f"Sweep with ages={age}",
    )
