"""How far a mask read into our table is from cache-dit itself, on a tiny DiT; alone, for cache-dit patches classes."""

from typing import Any

import cache_dit
import numpy as np
import torch

import stepmask
from denoisers import denoiser
from pipelines import dit
from stepmask import MaskSchedule
from stepmask.schedule.formats.cache_dit import read

MASK = [1, 1, 0, 1, 0, 0]
FIRST = 1


def pictures(pipe: Any) -> Any:
    generator = torch.Generator().manual_seed(0)
    return pipe(**inputs, num_inference_steps=len(MASK), output_type="np", generator=generator).images


pipe, inputs = dit()
pipe.register_modules(transformer=denoiser("DiTTransformer2DModel", num_layers=3))
trajectory = stepmask.record(pipe, **inputs, num_inference_steps=len(MASK))
graph = stepmask.trace(pipe, trajectory, granularity="block")
reference = MaskSchedule.all_compute(graph, trajectory.denoiser, trajectory.sampler)
bare = pictures(pipe)
with stepmask.apply(pipe, read(MASK, reference, first=FIRST)):
    ours = pictures(pipe)
config = cache_dit.DBCacheConfig(
    Fn_compute_blocks=FIRST, max_warmup_steps=0, steps_computation_mask=MASK, steps_computation_policy="static"
)
cache_dit.enable_cache(pipe, cache_config=config)
theirs = pictures(pipe)
print(np.abs(ours - theirs).max() / np.abs(bare - theirs).max())
