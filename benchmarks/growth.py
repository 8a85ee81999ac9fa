"""How time and memory of sampling and learning grow with steps, blocks, calibration samples and resolution.

A random DiT (width 192) of one size after the other; every point is measured in a process of its own.
"""

import argparse
import json
import resource
from collections.abc import Callable
from typing import Any

import torch

import stepmask
from results import FOLDER, alone, save
from setting import timed
from stepmask import MaskSchedule, Trajectory
from stepmask.drawing import blank
from stepmask.drawing import save as save_figure
from stepmask.learning.trained import TrainedForecasts
from stepmask.schedule.baselines import fixed_interval

BASE = {"steps": 10, "layers": 6, "samples": 8, "side": 16}
AXES = {"steps": (5, 10, 20, 40), "layers": (3, 6, 12, 24), "samples": (4, 8, 16, 32), "side": (8, 16, 32)}
SAYS = {
    "steps": "sampling steps",
    "layers": "transformer blocks (two sublayers each)",
    "samples": "samples",
    "side": "side of the latent, in pixels",
}


def pipeline(layers: int, side: int) -> Any:
    """A DiT with random weights and an autoencoder that is not called."""
    from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel

    torch.manual_seed(0)
    transformer = DiTTransformer2DModel(
        num_attention_heads=6, attention_head_dim=32, num_layers=layers, sample_size=side, in_channels=4, out_channels=4
    )
    vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4)
    scheduler = DDIMScheduler(beta_schedule="linear", clip_sample=False)
    pipe = DiTPipeline(transformer=transformer.eval(), vae=vae.eval(), scheduler=scheduler)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def half(pipe: Any, run: Trajectory) -> MaskSchedule:
    """A fixed interval that computes every other step."""
    full = MaskSchedule.all_compute(stepmask.trace(pipe, run), run.denoiser, run.sampler)
    return fixed_interval(full, 0.5, order=2)


def masked(pipe: Any, run: Trajectory) -> None:
    with stepmask.apply(pipe, half(pipe, run)):
        run.sampling()


WAYS: dict[str, Callable[[Any, Trajectory], Any]] = {
    "sampling": lambda pipe, run: run.sampling(),
    "sampling, masked": masked,
    "sweep, 1 probe": lambda pipe, run: stepmask.sweep(pipe, run, probes=1, ages=4),
    "learning, 2 iterations": lambda pipe, run: stepmask.learn(pipe, run, 0.52, learner=TrainedForecasts(passes=1)),
}


def point(way: str, steps: int, layers: int, samples: int, side: int) -> dict[str, float]:
    """Seconds, and the process's peak memory in MiB, of one way at one size."""
    torch.set_num_threads(1)
    pipe = pipeline(layers, side)
    labels = [index % 8 for index in range(samples)]
    run = stepmask.record(pipe, class_labels=labels, num_inference_steps=steps, output_type="latent")
    _, seconds = timed(lambda: WAYS[way](pipe, run))
    return {"seconds": seconds, "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}


def measured(way: str, size: dict[str, int]) -> dict[str, float]:
    """`point` in a process of its own."""
    told = alone(__file__, "--point", json.dumps({"way": way, **size}))
    return dict(json.loads(told.splitlines()[-1]))


def plot(found: dict[str, dict[str, dict[int, dict[str, float]]]]) -> None:
    """A file per axis: seconds and memory of every way."""
    for axis, by_way in found.items():
        figure = blank(9.0, 3.6)
        for panel, key, label in zip(
            figure.subplots(1, 2), ("seconds", "peak_mib"), ("seconds", "peak memory, MiB"), strict=True
        ):
            for way, by_value in by_way.items():
                panel.plot(list(by_value), [numbers[key] for numbers in by_value.values()], marker="o", label=way)
            panel.set(xlabel=SAYS[axis], ylabel=label, ylim=(0, None))
        figure.axes[0].legend(fontsize=8, frameon=False)
        save_figure(figure, FOLDER / f"growth-{axis}.png")


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--point", help="of one process: a JSON object of a way and a size")
    asked = arguments.parse_args()
    if asked.point:
        print(json.dumps(point(**json.loads(asked.point))))
        return
    found = {
        axis: {way: {value: measured(way, {**BASE, axis: value}) for value in values} for way in WAYS}
        for axis, values in AXES.items()
    }
    plot(found)
    memory = found["steps"]["learning, 2 iterations"]
    ratio = memory[40]["peak_mib"] / memory[5]["peak_mib"]
    save(
        "growth",
        {"what": f"a random DiT of width 192; {BASE} but for one", "by_axis": found, "learning_40_over_5_steps": ratio},
        goal="peak memory of learning at 40 steps at most 1.05 of that at 5",
        met=ratio <= 1.05,
    )


if __name__ == "__main__":
    main()
