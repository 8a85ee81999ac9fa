"""cache-dit's `steps_computation_mask`: a number a step, 1 = compute it, 0 = answer from the cache.

At a 0 cache-dit still runs what lies around its blocks (embeddings, final layer), its first `Fn_compute_blocks`, at
least one, and its last `Bn_compute_blocks`; under `steps_computation_policy="static"` it answers for all others with
what they added to their input before. The mask tells neither number.
"""

from collections.abc import Sequence

import numpy as np

from stepmask.errors import InvalidSchedule
from stepmask.schedule.formats.bits import plain_rows, to_bits
from stepmask.schedule.schedule import MaskSchedule


def read(mask: Sequence[int], reference: MaskSchedule, *, first: int = 0, last: int = 0) -> MaskSchedule:
    """The table that computes all blocks where the mask has a 1, and only the first and last where it has a 0.

    The denoiser's glue is always computed. On whole blocks (`trace(..., granularity="block")`) it gives what cache-dit
    does, to rounding.

    Args:
        mask: A 0 or 1 a step, noisiest first.
        reference: Any table of the denoiser and sampler; only its graph and fingerprints are used.
        first: cache-dit's `Fn_compute_blocks`.
        last: cache-dit's `Bn_compute_blocks`.

    Raises:
        InvalidSchedule: The mask has another number of steps, or values other than 0 and 1; or there are fewer blocks.
        ReuseBeforeCompute: Its first value is 0.
    """
    blocks = len(reference.graph) - 1
    if min(first, last) < 0 or first + last > blocks:
        raise InvalidSchedule(
            given=f"first={first} and last={last}",
            expected=f"at least 0 each, and at most {blocks} together, the blocks that there are",
            advice="Give cache-dit's Fn_compute_blocks and Bn_compute_blocks",
        )
    rows = np.tile(to_bits(mask, reference.steps, "steps_computation_mask")[:, None], blocks + 1)
    rows[:, :first] = rows[:, blocks - last :] = True
    return reference.with_rows(rows, provenance={"table": "cache-dit's steps_computation_mask"})


def write(schedule: MaskSchedule) -> list[int]:
    """The mask of a schedule whose steps compute all blocks, or none.

        DBCacheConfig(steps_computation_mask=write(schedule), steps_computation_policy="static")

    A step that reuses the denoiser's own output (`whole_step`) is a 0 too, where cache-dit computes the glue.

    Raises:
        InvalidSchedule: A step computes some of the blocks, or the schedule has forecasts.
    """
    rows = plain_rows(schedule, "cache-dit")
    for step, row in enumerate(rows):
        if row[:-1].any() and not row.all():
            raise InvalidSchedule(
                given=f"step {step}, which computes {row[:-1].sum()} of {len(row) - 1} blocks",
                expected="all of them or none: cache-dit's mask has one number a step",
                advice="Write tables such as those of baselines.fixed_interval and whole_step",
            )
    return [int(row.all()) for row in rows]
