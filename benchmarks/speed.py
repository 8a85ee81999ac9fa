"""Measured denoiser speed-up over the planned one, at half of the MACs: the zoo's DiT, and one of DiT-XL/2's size."""

import argparse
from typing import Any

import numpy as np
import torch

import stepmask
from results import paired_ratio, save
from stepmask import MaskSchedule, zoo
from stepmask.denoiser.families import fingerprint_of
from stepmask.learning.rounding import round_scores
from stepmask.schedule.baselines import all_reused
from stepmask.schedule.budget import Budget
from stepmask.schedule.fingerprint import SamplerFingerprint
from stepmask.schedule.rectify import lower


def dit_xl() -> torch.nn.Module:
    """DiT-XL/2 for 256×256 pictures (arXiv 2212.09748), random weights."""
    from diffusers import DiTTransformer2DModel

    return DiTTransformer2DModel(
        num_attention_heads=16, attention_head_dim=72, in_channels=4, out_channels=8, num_layers=28, sample_size=32,
        num_embeds_ada_norm=1000, norm_type="ada_norm_zero", norm_elementwise_affine=False,
    ).eval()  # fmt: skip


def half(reference: MaskSchedule) -> MaskSchedule:
    """Single cells, scattered over steps and blocks, half of the MACs; no step is skipped as a whole: the hard case."""
    scores = np.random.default_rng(0).random(reference.rows.shape)
    scores[:, -1] = np.inf
    return round_scores(scores, reference, Budget(macs=0.5), max_age=5)


def measure(
    denoiser: torch.nn.Module, batch: int, size: int, steps: int, rounds: int, granularity: Any = "sublayer"
) -> dict[str, Any]:
    call: dict[str, Any] = {
        "hidden_states": torch.randn(batch, 4, size, size),
        "timestep": torch.full((batch,), 500),
        "class_labels": torch.zeros(batch, dtype=torch.long),
    }
    graph = stepmask.trace(denoiser, call, granularity=granularity)
    sampler = SamplerFingerprint("", tuple(float(step) for step in range(steps)))
    reference = MaskSchedule.all_compute(graph, fingerprint_of(denoiser), sampler)
    schedule = half(reference)

    @torch.inference_mode()
    def run() -> None:
        for _ in range(steps):
            denoiser(**call)

    handles: list[Any] = []

    def against(table: MaskSchedule, count: int) -> dict[str, Any]:
        return paired_ratio(
            run,
            run,
            count,
            before_b=lambda: handles.append(stepmask.apply(denoiser, table)),
            after_b=lambda: handles.pop().remove(),
        )

    ratio = against(schedule, rounds)
    glue = (against(all_reused(reference), 3)["median"] * steps - 1) / (steps - 1)
    plan = lower(schedule)
    speedup, planned = 1 / ratio["median"], 1 / plan.macs_share
    return {
        "batch": batch,
        "steps": steps,
        "macs_share": plan.macs_share,
        "planned": planned,
        "measured": speedup,
        "measured_over_planned": speedup / planned,
        "quartiles": [1 / bound / planned for bound in reversed(ratio["quartiles"])],
        "rounds": rounds,
        "time_share_outside_the_blocks": glue,
        "store_mib": plan.peak_bytes / 2**20,
    }


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--rounds", type=int, default=9)
    rounds = arguments.parse_args().rounds
    torch.manual_seed(0)
    small = measure(zoo.load("zoo:dit-emoji").transformer, 16, 16, 20, rounds)
    xl = dit_xl()
    large = {grain: measure(xl, 2, 32, 4, max(3, rounds // 2), grain) for grain in ("sublayer", "block")}
    save(
        "speed",
        {"zoo:dit-emoji": small, **{f"DiT-XL/2 size, {grain}": numbers for grain, numbers in large.items()}},
        goal="measured over planned at least 0.85 (zoo) and 0.95 (DiT-XL/2 size, sublayer)",
        met=small["measured_over_planned"] >= 0.85 and large["sublayer"]["measured_over_planned"] >= 0.95,
    )


if __name__ == "__main__":
    main()
