"""The setting of the DeepCache package (arXiv 2312.00858): `set_params(cache_interval=..., cache_branch_id=...)`."""

import numpy as np

from stepmask.errors import InvalidSchedule
from stepmask.schedule.baselines import branches, deepcache
from stepmask.schedule.formats.bits import plain_rows
from stepmask.schedule.schedule import MaskSchedule

LAYERS = 3
"""Layers of an up block, as the package counts branches; with other numbers its count has gaps."""


def read(cache_interval: int, cache_branch_id: int, reference: MaskSchedule) -> MaskSchedule:
    """The table of a setting with the package's default, uniform steps.

    Args:
        cache_interval: Steps between two whole evaluations.
        cache_branch_id: Layers from the output to where the way up is entered, less one.
        reference: Any table of the denoiser and sampler; only its graph and fingerprints are used.

    Raises:
        InvalidSchedule: As `deepcache`; or an up block from there on has not three layers.
    """
    _check_layers(reference, cache_branch_id)
    return deepcache(reference, cache_interval, branch=cache_branch_id)


def write(schedule: MaskSchedule) -> dict[str, int]:
    """The arguments of `set_params`: the smallest interval and branch that give the schedule's table.

    Raises:
        InvalidSchedule: No setting does: it has forecasts, or is not DeepCache's.
    """
    rows = plain_rows(schedule, "DeepCache")
    whole = np.flatnonzero(rows.all(axis=1)).tolist()
    interval = whole[1] if len(whole) > 1 else schedule.steps
    for branch in range(len(branches(schedule.graph))):
        if np.array_equal(deepcache(schedule, interval, branch=branch).rows, rows):
            _check_layers(schedule, branch)
            return {"cache_interval": interval, "cache_branch_id": branch}
    raise InvalidSchedule(
        given=f"a table of {schedule.denoiser.class_name} that no setting of DeepCache gives",
        expected="a U-Net computed whole at every n-th step, and in between from one layer on the way up",
        advice="Write tables such as those of baselines.deepcache",
    )


def _check_layers(schedule: MaskSchedule, branch: int) -> None:
    """Refuse up blocks, from the output to a branch, in which the package counts other layers than there are."""
    names = [schedule.graph.names[column].split(".")[1] for column in branches(schedule.graph)]
    for block in dict.fromkeys(names[: branch + 1]):
        if (layers := names.count(block)) != LAYERS:
            raise InvalidSchedule(
                given=f"up block {block} of {schedule.denoiser.class_name} with {layers} layers",
                expected=f"{LAYERS} layers a block: DeepCache's branches are counted so",
                advice="Use baselines.deepcache, which counts the layers that there are",
            )
