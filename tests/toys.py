"""Denoisers whose algebra can be done on paper, and real diffusers classes at tiny size."""

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from denoisers import denoiser
from stepmask.schedule.channels import channel_axis
from stepmask.schedule.fingerprint import DenoiserFingerprint, SamplerFingerprint
from stepmask.schedule.forecasts import PLAIN
from stepmask.schedule.graph import DENOISER, Block, BlockGraph, Reuse
from stepmask.schedule.schedule import MaskSchedule


class Scale(nn.Module):
    """x ↦ factor · x, and counts its calls."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor, self.calls = factor, 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x * self.factor


class Chain(nn.Module):
    """x ↦ x + 2x = 3x, then ↦ 3·5x: layer 0 doubles beside the stream, layer 1 multiplies by 5 in it; t is added."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Scale(2.0), Scale(5.0)])

    def forward(self, x: Tensor, t: float) -> Tensor:
        x = x + self.layers[0](x)
        return self.layers[1](x) + t


class Skips(nn.Module):
    """A U-Net on scalars: down0, down1, mid, up1 (reads mid and down1), up0 (reads up1 and down0)."""

    names = ("down0", "down1", "mid", "up1", "up0")

    def __init__(self) -> None:
        super().__init__()
        for name, factor in zip(self.names, (2.0, 3.0, 5.0, 7.0, 11.0), strict=True):
            setattr(self, name, Scale(factor))

    def forward(self, x: Tensor) -> Tensor:
        top = self.down0(x)
        deep = self.down1(top)
        x = self.up1(self.mid(deep) + deep)
        return self.up0(x + top)


def sampler(steps: int, class_name: str = "") -> SamplerFingerprint:
    return SamplerFingerprint(
        class_name, tuple(float(t) for t in range(steps - 1, -1, -1)), tuple(float(k) for k in range(steps))
    )


def untimed(steps: int, branches: int = 1) -> SamplerFingerprint:
    """Of a loop whose denoiser is given no timestep, or always the same: they are not compared."""
    return SamplerFingerprint("", (0.0,) * steps, branches=branches)


def unet_graph() -> BlockGraph:
    """The graph of `Skips`, a MAC and four bytes a block."""
    reads = {"down0": (), "down1": ("down0",), "mid": ("down1",), "up1": ("down1", "mid"), "up0": ("down0", "up1")}
    blocks = tuple(Block(name, reads[name], "output", 1, ((1,),), 4) for name in Skips.names)
    return BlockGraph((*blocks, Block(DENOISER, ("up0",), "output", 0, ((1,),), 4)))


UNET_NAMES = (
    "down_blocks.0.resnets.0",
    "down_blocks.0.downsamplers.0",
    "mid_block.resnets.0",
    "up_blocks.0.resnets.0",
    "up_blocks.0.upsamplers.0",
    "up_blocks.1.resnets.0",
)


def stepped_unet(steps: int) -> MaskSchedule:
    """The all-compute table of a U-Net with two layers down, two up and a skip between each pair, a MAC a block."""
    reads = [(), (0,), (1,), (1, 2), (3,), (0, 4)]
    blocks = [
        Block(name, tuple(UNET_NAMES[column] for column in read), "output", 1, ((1,),), 4)
        for name, read in zip(UNET_NAMES, reads, strict=True)
    ]
    graph = BlockGraph((*blocks, Block(DENOISER, UNET_NAMES[-1:], "output", 0, ((1,),), 4)))
    return MaskSchedule.all_compute(graph, DenoiserFingerprint("Toy"), sampler(steps))


def chain_graph(count: int, reuse: Reuse) -> BlockGraph:
    blocks = tuple(Block(f"b{i}", (f"b{i - 1}",) if i else (), reuse, 1, ((1,),), 4) for i in range(count))
    return BlockGraph((*blocks, Block(DENOISER, (f"b{count - 1}",), "output", 0, ((1,),), 4)))


def timed(graph: BlockGraph, *ms: float) -> BlockGraph:
    """The same graph with times, as if they had been measured."""
    return BlockGraph(tuple(replace(block, ms=float(took)) for block, took in zip(graph.blocks, ms, strict=True)))


def table(graph: BlockGraph, *rows: str, weights: dict[tuple[int, str], tuple[float, ...]] | None = None,
          denoiser: DenoiserFingerprint | None = None) -> MaskSchedule:  # fmt: skip
    """A schedule from rows of bits over the graph's blocks; the denoiser's own bit may be left out (computed)."""
    bits = np.array([[bit == "1" for bit in row.ljust(len(graph), "1")] for row in rows])
    full = np.tile((1.0, 0.0, 0.0), (*bits.shape, 1))
    for (step, name), cell in (weights or {}).items():
        full[step, graph.column(name)] = (*cell, *[0.0] * (3 - len(cell)))
    return MaskSchedule(graph, bits, denoiser or DenoiserFingerprint("Toy"), untimed(len(rows)), full)


def per_channel(schedule: MaskSchedule) -> MaskSchedule:
    """The same forecasts, but with the scalar weights repeated on every channel, and no bias."""
    channels, blends = {}, np.where(schedule.rows[..., None], schedule.forecasts, PLAIN)
    for step, column in np.argwhere(~schedule.rows).tolist():
        shape, reads = schedule.graph.blocks[column].shapes[0], schedule.windows[step, column]
        vectors = np.zeros((reads + 1, shape[channel_axis(len(shape))]))
        vectors[:-1] = schedule.forecasts[step, column, :reads, None]
        channels[step, column] = vectors
    return schedule.with_rows(schedule.rows, blends, channels=channels)


def unrectified(schedule: MaskSchedule) -> MaskSchedule:
    """The same table over a graph whose denoiser reads every block: nothing in it is dead, all of it is run."""
    *blocks, denoiser = schedule.graph.blocks
    graph = BlockGraph((*blocks, replace(denoiser, reads=tuple(block.name for block in blocks))))
    return MaskSchedule(graph, schedule.rows, schedule.denoiser, schedule.sampler, schedule.forecasts)


def bits(schedule: MaskSchedule) -> list[str]:
    """Rows as strings, without the denoiser's own bit."""
    return ["".join("01"[int(bit)] for bit in row[:-1]) for row in schedule.rows]


def tiny_dit(layers: int = 3) -> nn.Module:
    return denoiser("DiTTransformer2DModel", num_layers=layers)


def tiny_pipe() -> Any:
    """A DiTPipeline with random weights: 3 blocks, 8×8 latents."""
    from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline

    torch.manual_seed(0)
    vae = AutoencoderKL(
        block_out_channels=(8, 8), norm_num_groups=4, latent_channels=4, sample_size=16,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    )  # fmt: skip
    scheduler = DDIMScheduler(beta_schedule="linear", clip_sample=False)
    pipe = DiTPipeline(transformer=tiny_dit(), vae=vae.eval(), scheduler=scheduler)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def tiny_unet(layers: int = 1) -> nn.Module:
    return denoiser("UNet2DConditionModel", layers_per_block=layers)


def tiny_stable_diffusion() -> Any:
    """A StableDiffusionPipeline with random weights and three layers a block, as Stable Diffusion has; no words."""
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline

    torch.manual_seed(0)
    scheduler = DDIMScheduler(beta_schedule="scaled_linear", clip_sample=False, steps_offset=1)
    vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4)
    parts = (vae, None, None, tiny_unet(layers=2), scheduler, None, None)
    pipe = StableDiffusionPipeline(*parts, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def tiny_pixel_unet() -> nn.Module:
    return denoiser("UNet2DModel")


def tiny_pixart() -> nn.Module:
    return denoiser("PixArtTransformer2DModel", num_layers=3)


class Drift(nn.Module):
    """x ↦ x + 2x + t·x: one block says the same at every step, the other follows the timestep."""

    def __init__(self) -> None:
        super().__init__()
        self.still, self.moving = Scale(2.0), Times()

    def forward(self, x: Tensor, t: float) -> Tensor:
        return x + self.still(x) + self.moving(x, t)


class Times(nn.Module):
    """x ↦ t·x."""

    def forward(self, x: Tensor, t: float) -> Tensor:
        return x * t
