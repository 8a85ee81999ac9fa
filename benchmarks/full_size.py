"""Time of full-size denoisers under tables and under other caches, all of them told to compute about a half.

The architectures are the real ones, with random weights. What each computed is counted, and what it should gain by that
stands beside what it gains. Finished architectures lie in runs/full_size, so that a killed run goes on.
"""

import argparse
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

import stepmask
from peers import PEERS, CannotRun
from results import save
from stepmask import Budget, MaskSchedule
from stepmask.evaluation.report import Report
from stepmask.files import write_whole
from stepmask.learning.rounding import round_scores
from stepmask.schedule.baselines import branches, deepcache, fixed_interval

RUNS = Path("runs") / "full_size"
STEPS = 4

EVERY_OTHER = {
    "TaylorSeer (diffusers)": {"cache_interval": 2, "max_order": 1, "disable_cache_before_step": 1},
    "PyramidAttentionBroadcast (diffusers)": {"every": 2, "within": (-1, 1001)},
    "step mask (cache-dit)": {"order": 0, "every": 2, "Fn_compute_blocks": 1},
    "DeepCache (package)": {"interval": 2, "branch": 0},
}
"""Other caches' settings by which every other step is computed whole."""

SMALL_DECODER = {"block_out_channels": (8,), "norm_num_groups": 4}
"""Of an autoencoder that is not called."""


@dataclass(frozen=True)
class FullSize:
    """A pipeline of a real architecture.

    Args:
        make: Makes it, with random weights.
        call: Its arguments.
    """

    make: Callable[[], Any]
    call: Callable[[], dict[str, Any]]

    def pipeline(self) -> Any:
        """A new one, always with the same weights."""
        torch.manual_seed(0)
        pipe = self.make()
        pipe.set_progress_bar_config(disable=True)
        for part in pipe.components.values():
            if isinstance(part, torch.nn.Module):
                part.eval()
        return pipe


def dit_xl() -> Any:
    """DiT-XL/2 for 256×256 pictures (arXiv 2212.09748)."""
    from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel

    transformer = DiTTransformer2DModel(
        num_attention_heads=16, attention_head_dim=72, in_channels=4, out_channels=8, num_layers=28, sample_size=32,
        num_embeds_ada_norm=1000, norm_type="ada_norm_zero", norm_elementwise_affine=False,
    )  # fmt: skip
    return DiTPipeline(transformer=transformer, vae=AutoencoderKL(**SMALL_DECODER), scheduler=DDIMScheduler())


def pixart_xl() -> Any:
    """PixArt-α for 512×512 pictures (arXiv 2310.00426)."""
    from diffusers import AutoencoderKL, DPMSolverMultistepScheduler, PixArtAlphaPipeline, PixArtTransformer2DModel

    transformer = PixArtTransformer2DModel(
        num_attention_heads=16, attention_head_dim=72, in_channels=4, out_channels=8, num_layers=28, sample_size=64,
        cross_attention_dim=1152, caption_channels=4096,
    )  # fmt: skip
    return PixArtAlphaPipeline(
        tokenizer=None, text_encoder=None, vae=AutoencoderKL(**SMALL_DECODER), transformer=transformer,
        scheduler=DPMSolverMultistepScheduler(),
    )  # fmt: skip


def stable_diffusion() -> Any:
    """Stable Diffusion 1.5 for 512×512 pictures (arXiv 2112.10752)."""
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel

    return StableDiffusionPipeline(
        vae=AutoencoderKL(**SMALL_DECODER), text_encoder=None, tokenizer=None, safety_checker=None,
        unet=UNet2DConditionModel(sample_size=64, cross_attention_dim=768), feature_extractor=None,
        scheduler=DDIMScheduler(steps_offset=1, clip_sample=False), requires_safety_checker=False,
    )  # fmt: skip


def ddpm(side: int, channels: tuple[int, ...], attention: int) -> Any:
    """A U-Net of DDPM (arXiv 2006.11239), with attention at one of its resolutions."""
    from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel

    down = ["DownBlock2D"] * len(channels)
    down[attention] = "AttnDownBlock2D"
    up = [name.replace("Down", "Up") for name in reversed(down)]
    unet = UNet2DModel(
        sample_size=side, block_out_channels=channels, down_block_types=down, up_block_types=up, layers_per_block=2,
        attention_head_dim=None, downsample_padding=0, flip_sin_to_cos=False, freq_shift=1, norm_eps=1e-6,
    )  # fmt: skip
    return DDIMPipeline(unet=unet, scheduler=DDIMScheduler())


ARCHITECTURES = {
    "DiT-XL/2, 256": FullSize(dit_xl, lambda: {"class_labels": [207], "guidance_scale": 1.0, "output_type": "latent"}),
    "PixArt-XL/2, 512": FullSize(
        pixart_xl,
        lambda: {
            "prompt_embeds": torch.randn(1, 120, 4096),
            "prompt_attention_mask": torch.ones(1, 120),
            "negative_prompt": None,
            "guidance_scale": 1.0,
            "use_resolution_binning": False,
            "output_type": "latent",
        },
    ),
    "Stable Diffusion 1.5, 512": FullSize(
        stable_diffusion,
        lambda: {"prompt_embeds": torch.randn(1, 77, 768), "guidance_scale": 1.0, "output_type": "latent"},
    ),
    "DDPM, CIFAR-10, 32": FullSize(lambda: ddpm(32, (128, 256, 256, 256), 1), lambda: {"batch_size": 8}),
    "DDPM, LSUN, 256": FullSize(lambda: ddpm(256, (128, 128, 256, 256, 512, 512), 4), lambda: {"batch_size": 1}),
}


def measure(size: FullSize, repeats: int) -> dict[str, Any]:
    """All tables and caches on one architecture, by turns."""
    pipe, call = size.pipeline(), {**size.call(), "num_inference_steps": STEPS}
    computed, *others = tables(pipe, call).items()
    caches, absent = other_caches(size)
    report = stepmask.evaluate(pipe, computed[1], rivals={**dict(others), **caches}, repeats=repeats, **call)
    times = report.rows[0].denoiser_ms
    return {
        "reference_ms_per_evaluation": sorted(times)[len(times) // 2] / STEPS,
        "rows": rows(report, computed[0]),
        "absent": absent,
    }


def tables(pipe: Any, call: dict[str, Any]) -> dict[str, MaskSchedule]:
    """The all-compute table first; half of the MACs in single cells, at both granularities; and what others do."""
    run = stepmask.record(pipe, seed=0, **call)

    def full(granularity: Any) -> MaskSchedule:
        graph = stepmask.trace(pipe, run, granularity=granularity)
        return MaskSchedule.all_compute(graph, run.denoiser, run.sampler)

    fine, coarse = full("sublayer"), full("block")
    found = {
        "all computed": fine,
        "single cells": scattered(fine),
        "single cells, whole blocks": scattered(coarse),
        "interval 2, Taylor 1": fixed_interval(coarse, 0.5, order=1),
    }
    return {**found, "interval 2, DeepCache's": deepcache(coarse, 2)} if branches(coarse.graph) else found


def scattered(full: MaskSchedule) -> MaskSchedule:
    """Single cells over all steps and blocks, half of the MACs; no step is skipped as a whole: the hard case."""
    scores = np.random.default_rng(0).random(full.rows.shape)
    scores[:, -1] = np.inf
    return round_scores(scores, full, Budget(macs=0.5), max_age=STEPS)


def other_caches(size: FullSize) -> tuple[dict[str, Any], dict[str, str]]:
    """Pipelines with other caches on them, and the reasons of those that cannot be put on."""
    found, absent = {}, {}
    for peer in (peer for peer in PEERS if peer.name in EVERY_OTHER):
        try:
            found[peer.name] = peer.put_on(size.pipeline(), STEPS, **EVERY_OTHER[peer.name])
        except CannotRun as error:
            absent[peer.name] = str(error)
    return found, absent


def rows(report: Report, first: str) -> dict[str, dict[str, float]]:
    """Speed-ups, by the reference's time over a row's, beside what the MACs promise."""
    found = {}
    for row in report.rows[1:]:
        speedup, slowest, fastest = report.speedup(row.name)
        found[first if row.name == "schedule" else row.name] = {
            "macs": row.macs_executed,
            "speedup": speedup,
            "slowest": slowest,
            "fastest": fastest,
            "over_promise": speedup * row.macs_executed,
            "store_mib": row.store_bytes / 2**20,
        }
    return found


def finished(names: list[str], repeats: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each architecture's numbers, from its file if it was measured."""
    for name in names:
        kept = RUNS / f"{name.replace('/', '-')}.json"
        if not kept.exists():
            write_whole(kept, json.dumps(measure(ARCHITECTURES[name], repeats)))
        yield name, json.loads(kept.read_text())


def met(found: dict[str, dict[str, Any]]) -> bool:
    """Whether all tables cost and gain what they should."""
    ours = [{name: row for name, row in size["rows"].items() if name not in EVERY_OTHER} for size in found.values()]
    cheap = all(1 / by_name["all computed"]["speedup"] <= 1.01 for by_name in ours)
    return cheap and all(row["over_promise"] >= 0.95 for by_name in ours for row in by_name.values())


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--architectures", nargs="+", choices=ARCHITECTURES, default=list(ARCHITECTURES))
    arguments.add_argument("--repeats", type=int, default=5)
    asked = arguments.parse_args()
    found = dict(finished(asked.architectures, asked.repeats))
    save(
        "full_size",
        {"what": f"{STEPS} steps, random weights, {asked.repeats} turns", "architectures": found},
        goal="all computed at most 1.01 of the bare time; of the promised speed-up at least 0.95",
        met=met(found),
    )


if __name__ == "__main__":
    main()
