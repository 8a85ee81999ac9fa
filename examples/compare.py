"""Measure a schedule beside its rivals at equal MACs, on the same seeds, and write one page with what came out."""

import stepmask
from stepmask import zoo
from stepmask.schedule.baselines import fixed_interval, whole_step
from stepmask.schedule.rectify import lower

STEPS, SHARE = 6, 0.6
CALL = {"class_labels": [5, 17], "num_inference_steps": STEPS}

pipe = zoo.load("zoo:dit-emoji")
pipe.set_progress_bar_config(disable=True)
profile = stepmask.sweep(pipe, stepmask.record(pipe, seed=0, **CALL), probes=1)
schedule = profile.schedule(SHARE)
spent = lower(schedule).macs_share

rivals = {
    "interval, reuse": fixed_interval(schedule, spent),
    "interval, Taylor 1": fixed_interval(schedule, spent, order=1),
    "whole step, Taylor 1": whole_step(schedule, spent, order=1),
    "fewer steps": round(spent * STEPS),
}
report = stepmask.evaluate(pipe, schedule, rivals=rivals, seed=1000, repeats=1, **CALL)
print(report)

for rival in rivals:
    print(f"{rival}: {report[rival].latent_error / report['schedule'].latent_error:.2f}× the schedule's error")
report.save("runs/compare.html", profile=profile)
report.save("runs/compare.json")
