"""What an all-compute schedule costs: denoiser time masked over bare, in turns; and bitwise equality."""

from typing import Any

import torch

import stepmask
from results import paired_ratio, save
from stepmask import zoo

BATCH, ROUNDS = 16, 40


def main() -> None:
    torch.manual_seed(0)
    pipe = zoo.load("zoo:dit-emoji")
    pipe.set_progress_bar_config(disable=True)
    trajectory = stepmask.record(pipe, class_labels=[0] * (BATCH // 2), num_inference_steps=2)
    call = trajectory.calls[0]
    graph = stepmask.trace(pipe, trajectory)
    full = stepmask.MaskSchedule.all_compute(graph, trajectory.denoiser, trajectory.sampler)

    handles: list[Any] = []

    def attach() -> None:
        handles.append(stepmask.apply(pipe, full))
        handles[-1].restart()

    @torch.inference_mode()
    def once() -> torch.Tensor:
        return pipe.transformer(*call.args, **call.kwargs).sample

    bare = once()
    attach()
    equal = torch.equal(once(), bare)
    handles.pop().remove()
    ratio = paired_ratio(once, once, ROUNDS, before_b=attach, after_b=lambda: handles.pop().remove())
    save(
        "overhead",
        {
            "what": f"zoo:dit-emoji, {BATCH} rows, all-compute schedule: denoiser time over the bare denoiser's",
            "bitwise_equal": equal,
            **ratio,
        },
        goal="ratio at most 1.02, bitwise equal",
        met=equal and ratio["median"] <= 1.02,
    )


if __name__ == "__main__":
    main()
