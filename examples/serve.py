"""A pipeline that serves many requests under one schedule, made once and kept in a folder; and off again."""

from pathlib import Path
from typing import Any

import torch

import stepmask
from stepmask import zoo
from stepmask.errors import ScheduleMismatch

STEPS, FOLDER = 8, Path("runs/serve")

pipe = zoo.load("zoo:dit-emoji")
pipe.set_progress_bar_config(disable=True)

if not FOLDER.exists():  # offline, once; stepmask.learn takes longer and is better
    trajectory = stepmask.record(pipe, class_labels=[3, 8], num_inference_steps=STEPS)
    stepmask.sweep(pipe, trajectory, probes=1).schedule(0.6).save_pretrained(FOLDER)
schedule = stepmask.MaskSchedule.from_pretrained(FOLDER)  # or a hub id


def answer(labels: list[int], seed: int, steps: int = STEPS) -> list[Any]:
    generator = torch.Generator().manual_seed(seed)
    return pipe(class_labels=labels, num_inference_steps=steps, generator=generator).images


masked = stepmask.apply(pipe, schedule)
for seed, labels in enumerate([[3], [11, 24, 8], [13, 1]]):  # batch sizes may change from run to run
    print(f"{len(answer(labels, seed))} images under the schedule, store {masked.peak_store_bytes / 2**20:.1f} MiB")
try:
    answer([3], seed=3, steps=STEPS + 2)
except ScheduleMismatch as refusal:  # before anything is computed; the next run is not affected
    print(f"refused: {refusal}")
masked.remove()
print(f"{len(answer([3], seed=3, steps=STEPS + 2))} image without it")
