"""Where time and memory count: a budget in measured time, a limit of the store, and a store in half of the bits."""

import torch

import stepmask
from stepmask import MaskSchedule, zoo
from stepmask.denoiser.timing import time_blocks
from stepmask.schedule.baselines import fixed_interval
from stepmask.schedule.rectify import lower

STEPS = 8
CALL = {"class_labels": [3, 8], "num_inference_steps": STEPS}

pipe = zoo.load("zoo:dit-emoji")
pipe.set_progress_bar_config(disable=True)
trajectory = stepmask.record(pipe, seed=0, **CALL)
graph = time_blocks(pipe, trajectory, stepmask.trace(pipe, trajectory), repeats=2)
full = MaskSchedule.all_compute(graph, trajectory.denoiser, trajectory.sampler)

schedule = fixed_interval(full, stepmask.Budget(time=0.6), order=2)
print(f"an interval as a schedule: {lower(schedule).peak_bytes / 2**20:.2f} MiB stored")
limited = stepmask.Budget(time=0.6, store_bytes=2**20)
small = stepmask.sweep(pipe, trajectory, graph=graph, probes=1).schedule(limited)
print(f"by a sweep, within 1 MiB: {lower(small).peak_bytes / 2**20:.2f} MiB")

store = stepmask.Store(dtype=torch.bfloat16)
with stepmask.apply(pipe, schedule, store=store) as masked:
    pipe(**CALL)
planned = store.peak_bytes(lower(schedule)) / 2**20
print(f"the interval in bfloat16: {planned:.2f} MiB planned, {masked.peak_store_bytes / 2**20:.2f} MiB measured")
