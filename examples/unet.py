"""A U-Net: DeepCache's pattern as a table, tables of one's own, and what nobody reads is not computed."""

import numpy as np

import stepmask
from stepmask import MaskSchedule, zoo
from stepmask.schedule.baselines import deepcache
from stepmask.schedule.rectify import lower

STEPS = 6
CALL = {"batch_size": 2, "num_inference_steps": STEPS}

pipe = zoo.load("zoo:ddpm-emoji")
pipe.set_progress_bar_config(disable=True)
trajectory = stepmask.record(pipe, seed=0, **CALL)
graph = stepmask.trace(pipe, trajectory)
full = MaskSchedule.all_compute(graph, trajectory.denoiser, trajectory.sampler)

tables = {f"DeepCache, branch {branch}": deepcache(full, 2, branch=branch) for branch in range(3)}
rows = np.ones_like(full.rows)
rows[1::2, :-1] = [name.startswith("down_blocks") for name in graph.names[:-1]]  # and the way up reused: dead
tables["the way down"] = full.with_rows(rows)

for name, table in tables.items():
    told = float((table.rows * graph.costs).sum()) / STEPS
    print(f"{name}: the schedule asks for {told:.0%} of the MACs, {lower(table).macs_share:.0%} are read by somebody")
first, *others = tables
rivals = {name: tables[name] for name in others}
print(stepmask.evaluate(pipe, tables[first], rivals=rivals, repeats=1, **CALL))
