"""cache-dit's `steps_computation_mask`: a number a step, 1 = compute it, 0 = answer from the cache.

At a 0 cache-dit still runs what lies around its blocks (embeddings, final layer), and its first `Fn_compute_blocks` and
last `Bn_compute_blocks` blocks, of which the mask does not tell: give them to `DBCacheConfig`, with
`steps_computation_policy="static"`.
"""

from collections.abc import Sequence

import numpy as np

from stepmask.errors import InvalidSchedule
from stepmask.schedule.formats.bits import plain_rows, to_bits
from stepmask.schedule.schedule import MaskSchedule


def read(mask: Sequence[int], reference: MaskSchedule) -> MaskSchedule:
    """The table that computes all blocks where the mask has a 1 and none where it has a 0, the denoiser's glue always.

    On whole blocks (`trace(..., granularity="block")`) that is cache-dit's own answer without first and last blocks.

    Args:
        mask: A 0 or 1 a step, noisiest first.
        reference: Any table of the denoiser and sampler; only its graph and fingerprints are used.

    Raises:
        InvalidSchedule: The mask has another number of steps, or values other than 0 and 1.
        ReuseBeforeCompute: Its first value is 0.
    """
    rows = np.tile(to_bits(mask, reference.steps, "steps_computation_mask")[:, None], len(reference.graph))
    rows[:, -1] = True
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
